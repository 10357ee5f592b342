// The sum of weights of active inputs: each output is a run through a list of them.
#include "../spikes.h"

namespace {

// For each input row and block of channels: the active x · block + c in ascending order, and where those of a pixel
// begin. The columns under a kernel row follow each other, so an output's sum is one run through the list.
struct Events {
  const uint32_t* at;
  const uint32_t* begin;  // [row][q][w + 1]
};
void list_row(const uint8_t* bits, const Conv& z, int64_t row, uint32_t next, uint32_t* at, uint32_t* begin) {
  for (int64_t q = 0; q < z.words(); q++) {
    uint32_t* start = begin + (row * z.words() + q) * (z.w + 1);
    for (int64_t x = 0; x < z.w; x++) {
      start[x] = next;
      for (uint64_t m = word_at(bits, z, row * z.w + x, q); m; m &= m - 1)
        at[next++] = uint32_t(x * z.block() + __builtin_ctzll(m));
    }
    start[z.w] = next;
  }
}

// Add one kernel row to `n` output pixels beside each other. `weights` [kw][block][N]; `x` is the first input column.
template <int NV>
__attribute__((noinline)) void add_row(const Conv& z, const float* in, int64_t in_step, float* out, int64_t out_step,
                                       const uint32_t* at, const uint32_t* begin, const float* weights, int64_t x,
                                       int64_t n) {
  constexpr int64_t N = NV * LANES;
  const int64_t column = z.block() * N;
  for (; n > 0; n--, in += in_step, out += out_step, x += z.sw) {
    V sum[NV];
    for (int j = 0; j < NV; j++) sum[j] = load(in + j * LANES);
    const int64_t from = std::clamp<int64_t>(x, 0, z.w), to = std::clamp<int64_t>(x + z.kw, 0, z.w);
    const uint32_t *e = at + begin[from], *end = at + begin[to];
    const float* shifted = weights - x * column;
    for (; e < end; e++) {
      const float* row = shifted + *e * N;
      OPAQUE(row);
      for (int j = 0; j < NV; j++) sum[j] += load(row + j * LANES);
    }
    for (int j = 0; j < NV; j++) store(out + j * LANES, sum[j]);
  }
}

// Outputs `block` of the pixels from..to. `sums` [to - from][N] holds what was added so far.
template <int NV, class T>
void forward_tile(const Conv& z, const Events& events, const float* packed, const float* bias, T* y, Outputs block,
                  int64_t from, int64_t to, float* sums) {
  constexpr int64_t N = NV * LANES;
  const int64_t valid = std::min(N, z.co - block.from), q_last = z.words() - 1;
  const bool direct = std::is_same_v<T, float> && valid == N;  // the last pass writes the result
  float first[N] = {};
  if (bias) std::copy_n(bias + block.from, valid, first);
  packed += block.from * z.words() * z.block() * z.kh * z.kw;
  for (int64_t q = 0; q <= q_last; q++)
    for (int64_t i = 0; i < z.kh; i++, packed += z.kw * z.block() * N) {
      const bool begins = q == 0 && i == 0, ends = direct && q == q_last && i == z.kh - 1;
      for (int64_t p = from; p < to;) {
        const int64_t ox = p % z.ow, line = p / z.ow, n = std::min(z.ow - ox, to - p);
        const int64_t iy = line % z.oh * z.sh + i - z.ph, x = ox * z.sw - z.pw;
        const bool inside = iy >= 0 && iy < z.h;
        float* sum = sums + (p - from) * N;
        float* out = ends ? reinterpret_cast<float*>(y) + p * z.co + block.from : sum;
        const float* in = begins ? first : sum;
        const uint32_t* row = events.begin + ((line / z.oh * z.h + iy) * z.words() + q) * (z.w + 1);
        if (inside)
          add_row<NV>(z, in, begins ? 0 : N, out, ends ? z.co : N, events.at, row, packed, x, n);
        else if (begins || ends)
          for (int64_t k = 0; k < n; k++)
            std::memcpy(out + k * (ends ? z.co : N), in + k * (begins ? 0 : N), sizeof first);
        p += n;
      }
    }
  if (direct) return;
  for (int64_t p = from; p < to; p++, sums += N) {
    T* out = y + p * z.co + block.from;
    T whole[N];
    for (int j = 0; j < NV; j++) store(whole + j * LANES, load(sums + j * LANES));
    std::memcpy(out, whole, valid * sizeof(T));
  }
}

// Add the rows of w that a list names to `in`, NV vectors of columns.
template <int NV>
__attribute__((noinline)) void add_rows(const float* w, int64_t pitch, const uint32_t* at, int64_t n, const float* in,
                                        float* out) {
  V total[NV];
  for (int j = 0; j < NV; j++) total[j] = load(in + j * LANES);
  for (int64_t e = 0; e < n; e++) {
    const float* row = w + at[e] * pitch;
    OPAQUE(row);
    for (int j = 0; j < NV; j++) total[j] += load(row + j * LANES);
  }
  for (int j = 0; j < NV; j++) store(out + j * LANES, total[j]);
}

// Independent pixels: all active inputs of one in a list, the sums of its outputs in registers. `packed` has the weights
// of COLUMNS outputs beside each other, [block of outputs][ci][width].
template <class T>
int forward_flat(const uint8_t* bits, const Conv& z, const float* packed, const float* bias, T* y, int threads) {
  const int64_t pixels = z.n * z.h * z.w, tiles = (pixels + TILE - 1) / TILE, blocks = (z.co + COLUMNS - 1) / COLUMNS;
  Scratch<uint32_t> begin(pixels + 1);
  if (!begin) return 1;
  begin[0] = 0;
  for (int64_t p = 0; p < pixels; p++) begin[p + 1] = begin[p] + uint32_t(count_between(bits, p * z.ci, (p + 1) * z.ci));
  Scratch<uint32_t> lists(begin[pixels]);
  if (!lists) return 1;
  for_each(threads, pixels, TILE, [&](int64_t p, int64_t) {
    uint32_t* next = lists.get() + begin[p];
    for (int64_t q = 0; q < z.words(); q++)
      for (uint64_t m = word_at(bits, z, p, q); m; m &= m - 1) *next++ = uint32_t(q * WORD + __builtin_ctzll(m));
  });
  for_each(threads, blocks * tiles, 1, [&](int64_t task, int64_t) {
    const int64_t column = task / tiles * COLUMNS, valid = std::min(COLUMNS, z.co - column);
    const int64_t from = task % tiles * TILE, pitch = std::min(COLUMNS, z.padded() - column);
    const bool direct = std::is_same_v<T, float> && valid % LANES == 0;
    float first[COLUMNS] = {}, sums[COLUMNS];
    if (bias) std::copy_n(bias + column, valid, first);
    for (int64_t p = from; p < std::min(from + TILE, pixels); p++) {
      T* out = y + p * z.co + column;
      float* to = direct ? reinterpret_cast<float*>(out) : sums;
      for_columns(valid, [&](auto vectors, int64_t c) {
        const float* w = packed + column * z.ci + c;
        add_rows<vectors()>(w, pitch, lists.get() + begin[p], begin[p + 1] - begin[p], first + c, to + c);
      });
      for (int64_t j = 0; !direct && j < valid; j++) put(out + j, sums[j]);
    }
  });
  return 0;
}

template <class T>
int forward(const uint8_t* bits, const Conv& z, const float* packed, const float* bias, T* y, int threads) {
  if (z.flat()) return forward_flat(bits, z, packed, bias, y, threads);
  const int64_t rows = z.n * z.h, each = z.w * z.ci;  // elements of a row
  Scratch<uint32_t> first(rows + 1), begin(rows * z.words() * (z.w + 1));
  Scratch<float> sums(threads * TILE * WORD);
  if (!first || !begin || !sums) return 1;
  first[0] = 0;
  for (int64_t row = 0; row < rows; row++)
    first[row + 1] = first[row] + uint32_t(count_between(bits, row * each, (row + 1) * each));
  Scratch<uint32_t> at(first[rows]);
  if (!at) return 1;
  const int64_t pixels = z.n * z.oh * z.ow, tiles = (pixels + TILE - 1) / TILE, blocks = count_blocks(z, 64);
  const Events events{at.get(), begin.get()};
  for_each(threads, rows, 8, [&](int64_t row, int64_t) { list_row(bits, z, row, first[row], at.get(), begin.get()); });
  for_each(threads, blocks * tiles, 1, [&](int64_t task, int64_t thread) {
    const Outputs block = block_of(z, 64, task / tiles);
    const int64_t from = task % tiles * TILE, to = std::min(from + TILE, pixels);
    float* mine = sums.get() + thread * TILE * WORD;
    if (block.width == 64) forward_tile<64 / LANES>(z, events, packed, bias, y, block, from, to, mine);
    if (block.width == 32) forward_tile<32 / LANES>(z, events, packed, bias, y, block, from, to, mine);
    if (block.width == 16) forward_tile<16 / LANES>(z, events, packed, bias, y, block, from, to, mine);
  });
  return 0;
}

}  // namespace

extern "C" {

// weight[co][ci][kh][kw] of any strides, times `one`, to [block of outputs][q][kh][kw][block of inputs][width], or, where
// pixels are independent, as `forward_flat` reads it.
void sltt_pack(const float* weight, const int64_t* stride, const Conv* conv, float one, float* packed, int threads) {
  const Conv& z = *conv;
  const int64_t blocks = count_blocks(z, 64);
  for_each(threads, blocks * z.words(), 1, [&](int64_t i, int64_t) {
    const int64_t q = i % z.words(), k = z.kh * z.kw, channels = std::min(WORD, z.ci - q * WORD);
    const Outputs block = block_of(z, 64, i / z.words());
    const int64_t column = block.from % COLUMNS, wide = block.from - column;
    const int64_t pitch = z.flat() ? std::min(COLUMNS, z.padded() - wide) : block.width;
    float* to = packed + (block.from * z.words() + q * block.width) * z.block() * k;
    if (z.flat()) to = packed + wide * z.ci + q * WORD * pitch + column;
    for (int64_t t = 0; t < k; t++, to += z.block() * block.width)
      for (int64_t first = 0; first < block.width; first += LANES) {
        const float* s = weight + t / z.kw * stride[2] + t % z.kw * stride[3] + q * WORD * stride[1];
        s += (block.from + first) * stride[0];
        const int64_t valid = z.co - block.from - first;
        float* row = to + first;
        for (int64_t c = 0; c < channels; c++, s += stride[1], row += pitch)
          if (valid >= LANES && stride[0] < 1 << 27)  // the positions of a vector are of 32 bits
            store(row, one * load_apart(s, stride[0]));
          else
            for (int64_t j = 0; j < LANES; j++) row[j] = j < valid ? one * s[j * stride[0]] : 0.0f;
      }
  });
}

// 0, or 1 if there is no memory.
int sltt_forward(const uint8_t* bits, const Conv* z, const float* packed, const float* bias, void* y, int bfloat16,
                 int threads) {
  return with_type(bfloat16, [&](auto t) { return forward(bits, *z, packed, bias, as(y, t), threads); });
}
}
