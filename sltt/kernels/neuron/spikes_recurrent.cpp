// A layer of neurons that reads its own spikes of the step before, through a linear layer, over several time steps.
#include "spikes_neuron.h"

namespace {

constexpr int64_t SAMPLES = 64;  // that go through all time steps before the next ones

}  // namespace

extern "C" {
// x, s and u_out [steps][rows][width]; v_out too, or, for v_step = 0, the last one. `w` is the layer's weight as `sltt_pack`
// gives it. `bias`, `s_before` and `u_out` may be null. Not 0 if there is no memory.
int sltt_recurrent(const Neuron* z, const float* x, const float* w, const float* bias, const float* s_before,
                   const float* v_before, float* s, float* v_out, int64_t v_step, float* u_out,
                   int64_t rows, int64_t width, int64_t steps, int threads) {
  const int64_t block = std::clamp<int64_t>((rows + threads - 1) / threads, 1, SAMPLES), room = block * width;
  Scratch<uint32_t> lists(threads * 2 * room);
  Scratch<int64_t> counts(threads * 2 * block);
  Scratch<float> potentials(threads * 2 * room);
  if (!lists || !counts || !potentials) return 1;
  for_each(threads, (rows + block - 1) / block, 1, [&](int64_t task, int64_t thread) {
    const int64_t first = task * block, samples = std::min(block, rows - first);
    uint32_t* list = lists.get() + thread * 2 * room;  // of the active neurons of each sample, in two steps
    int64_t* count = counts.get() + thread * 2 * block;
    float* kept = potentials.get() + thread * 2 * room;
    const auto append = [&](int64_t b, int64_t now, const float* spikes, int64_t column, int64_t n) {
      uint32_t* to = list + now * room + b * width;
      int64_t& c = count[now * block + b];
      for (int64_t i = 0; i < n; i++) to[c] = uint32_t(column + i), c += spikes[i] != 0;
    };
    std::fill_n(count, 2 * block, 0);
    for (int64_t b = 0; s_before && b < samples; b++) append(b, 1, s_before + (first + b) * width, 0, width);
    for (int64_t t = 0; t < steps; t++) {
      const int64_t now = t % 2, last = 1 - now;
      std::fill_n(count + now * block, block, 0);
      for (int64_t column = 0; column < width; column += COLUMNS)  // these columns of w stay in the cache
        for (int64_t b = 0; b < samples; b++) {
          const int64_t n = std::min(COLUMNS, width - column), row = (first + b) * width + column;
          const int64_t at = t * rows * width + row, mine = b * width + column;
          const int64_t pitch = std::min(COLUMNS, (width + 15) / 16 * 16 - column);
          float current[COLUMNS] = {};
          if (bias) std::copy_n(bias + column, n, current);
          for_columns(n, [&](auto vectors, int64_t c) {
            add_rows<vectors()>(w + column * width + c, pitch, list + last * room + b * width, count[last * block + b],
                                current + c, current + c);
          });
          for (int64_t i = 0; i < n; i++) current[i] += x[at + i];
          const bool stays = v_step || t == steps - 1;
          float* after = stays ? v_out + t * v_step + row : kept + now * room + mine;
          const float* before = !t ? v_before + row : v_step ? v_out + (t - 1) * v_step + row : kept + last * room + mine;
          forward_block(*z, Norm(), current, before, s + at, after, shifted(u_out, at), nullptr, 0, n);
          append(b, now, s + at, column, n);
        }
    }
  });
  return 0;
}
}
