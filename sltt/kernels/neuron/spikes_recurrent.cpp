// A layer of neurons that reads its own spikes of the step before, through a linear layer, over several time steps.
#include "spikes_neuron.h"

namespace {

constexpr int64_t SAMPLES = 64;  // that go through all time steps before the next ones: the bits of a word

// Add rows of w, NV vectors of columns, to the sums [SAMPLES][COLUMNS] of the samples whose bits are set in a row's word.
template <int NV>
__attribute__((noinline)) void add_rows(const float* w, int64_t pitch, const uint64_t* active, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i++, w += pitch) {
    uint64_t samples = active[i];
    if (!samples) continue;
    V row[NV];
    for (int j = 0; j < NV; j++) row[j] = load(w + j * LANES);
    for (; samples; samples &= samples - 1) {
      float* sum = sums + __builtin_ctzll(samples) * COLUMNS;
      OPAQUE(sum);
      for (int j = 0; j < NV; j++) store(sum + j * LANES, load(sum + j * LANES) + row[j]);
    }
  }
}

}  // namespace

extern "C" {
// x, s and u_out [steps][rows][width]; v_out too, or, for v_step = 0, the last one. `w` is the layer's weight as `sltt_pack`
// gives it. `bias`, `s_before` and `u_out` may be null. Not 0 if there is no memory.
int sltt_recurrent(const Neuron* z, const float* x, const float* w, const float* bias, const float* s_before,
                   const float* v_before, float* s, float* v_out, int64_t v_step, float* u_out,
                   int64_t rows, int64_t width, int64_t steps, int threads) {
  const int64_t block = std::clamp<int64_t>((rows + threads - 1) / threads, 1, SAMPLES), room = block * width;
  const int64_t parts = (width + COLUMNS - 1) / COLUMNS;
  Scratch<uint64_t> words(threads * 2 * width);
  Scratch<float> potentials(threads * 2 * room), totals(threads * block * COLUMNS);
  if (!words || !potentials || !totals) return 1;
  for_each(threads, (rows + block - 1) / block, 1, [&](int64_t task, int64_t thread) {
    const int64_t first = task * block, samples = std::min(block, rows - first);
    uint64_t* active = words.get() + thread * 2 * width;  // the samples in which each neuron fired, in two steps
    float *kept = potentials.get() + thread * 2 * room, *sums = totals.get() + thread * block * COLUMNS;
    const auto mark = [](uint64_t* words, int64_t b, const float* spikes, int64_t n) {
      for (int64_t i = 0; i < n; i++) words[i] |= uint64_t(spikes[i] != 0) << b;
    };
    std::fill_n(active + width, width, 0);
    for (int64_t b = 0; s_before && b < samples; b++) mark(active + width, b, s_before + (first + b) * width, width);
    for (int64_t t = 0; t < steps; t++) {
      const int64_t now = t % 2, last = 1 - now;
      std::fill_n(active + now * width, width, 0);
      for (int64_t k = 0; k < parts; k++) {  // to the right, then back: columns of w that were last are in the cache
        const int64_t column = (now ? k : parts - 1 - k) * COLUMNS;
        const int64_t n = std::min(COLUMNS, width - column), pitch = std::min(COLUMNS, (width + 15) / 16 * 16 - column);
        std::fill_n(sums, samples * COLUMNS, 0.0f);
        for (int64_t b = 0; bias && b < samples; b++) std::copy_n(bias + column, n, sums + b * COLUMNS);
        for_columns(n, [&](auto vectors, int64_t c) {
          add_rows<vectors()>(w + column * width + c, pitch, active + last * width, width, sums + c);
        });
        const bool stays = v_step || t == steps - 1;
        for (int64_t b = 0; b < samples; b++) {
          const int64_t row = (first + b) * width + column, at = t * rows * width + row, mine = b * width + column;
          float *current = sums + b * COLUMNS, *after = stays ? v_out + t * v_step + row : kept + now * room + mine;
          const float* before = !t ? v_before + row : v_step ? v_out + (t - 1) * v_step + row : kept + last * room + mine;
          for (int64_t i = 0; i < n; i++) current[i] += x[at + i];
          forward_block(*z, Norm(), current, before, s + at, after, shifted(u_out, at), nullptr, 0, n);
          mark(active + now * width + column, b, s + at, n);
        }
      }
    }
  });
  return 0;
}
}
