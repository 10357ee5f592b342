// The weight gradient of a 3×3 convolution of stride 1, from an input of any values: a quarter of the products, in float.
//
// A task has a group of input channels and one of output channels, and sums the products of its tiles in each of the 36
// places; the sums stay in the cache.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum in one instruction
#pragma clang fp contract(fast)
#include "winograd.h"

namespace {

constexpr int64_t GROUP = 64;  // channels of a task, or 32

struct Group {
  int64_t from, width;
  Group(int64_t channels, int64_t i) : from(i * GROUP), width(std::min(GROUP, channels - from)) {}
};

// sums [ROWS][PANEL] += Σ_k a [k][ROWS]ᵀ · b [k][PANEL]; a row of a has `a_step` elements, and one of b `b_step`.
__attribute__((noinline)) void add_products(int64_t count, const float* a, int64_t a_step, const float* b,
                                            int64_t b_step, float* sums) {
  V sum[ROWS][2];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 2; j++) sum[i][j] = load(sums + i * PANEL + j * LANES);
  for (int64_t k = 0; k < count; k++, a += a_step, b += b_step) {
    const V b0 = load(b), b1 = load(b + LANES);
    for (int i = 0; i < ROWS; i++) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 2; j++) store(sums + i * PANEL + j * LANES, sum[i][j]);
}

// Sums, PLACES of [panel][out.width][PANEL], to the gradients [out.width][9][channels] of the 3×3 weights.
void write_gradient(const float* sums, Group in, Group out, float* grad, int64_t channels) {
  for (int64_t c = 0; c < in.width; c += LANES)
    for (int64_t o = 0; o < out.width; o++) {
      V taps[3][3];
      const float* from = sums + c / PANEL * PANEL * out.width + o * PANEL + c % PANEL;
      transform_products<3>(from, out.width * in.width + SKEW, taps);
      for (int t = 0; t < 9; t++) store(grad + (9 * o + t) * channels + c, taps[t / 3][t % 3]);
    }
}

template <class T>
int dense_weight_gradient(const Conv& z, const T* x, const T* g, float* grad, int threads) {
  const int64_t rows = (z.oh + 3) / 4, columns = (z.ow + 3) / 4, tiles = z.n * rows * columns;
  const int64_t ins = (z.ci + GROUP - 1) / GROUP, outs = (z.co + GROUP - 1) / GROUP;
  const int64_t blocks = (tiles + TILES - 1) / TILES, places = TILES * GROUP + SKEW;
  const int64_t parts = std::clamp<int64_t>(TASKS / (ins * outs), 1, blocks), size = 9 * z.co * z.ci;
  Scratch<float> sums(threads * PLACES * (GROUP * GROUP + SKEW)), found((parts - 1) * size);
  Scratch<float> inputs(threads * PLACES * places), gradients(threads * PLACES * places);
  Scratch<T> zeros(GROUP);
  if (!sums || !found || !inputs || !gradients || !zeros) return 1;
  std::fill_n(zeros.get(), GROUP, T(0));
  for_each(threads, ins * outs * parts, 1, [&](int64_t task, int64_t thread) {
    const Group in(z.ci, task / parts % ins), out(z.co, task / parts / ins);
    const int64_t part = task % parts, end = std::min(tiles, blocks * (part + 1) / parts * TILES);
    float *mine = sums.get() + thread * PLACES * (GROUP * GROUP + SKEW), *a = gradients.get() + thread * PLACES * places;
    float* b = inputs.get() + thread * PLACES * places;
    const int64_t step = out.width * in.width + SKEW;
    std::fill_n(mine, PLACES * step, 0.0f);
    for (int64_t first = blocks * part / parts * TILES; first < end; first += TILES) {
      const int64_t count = std::min(TILES, end - first);
      for (int64_t i = 0; i < count; i++) {
        const int64_t tile = first + i, image = tile / (rows * columns);
        const int64_t y = tile / columns % rows * 4, column = tile % columns * 4;
        const T *around[SIDE][SIDE], *inside[4][4];
        pixels_of<SIDE>(x + in.from, z.h, z.w, z.ci, image, y - z.ph, column - z.pw, zeros.get(), around);
        pixels_of<4>(g + out.from, z.oh, z.ow, z.co, image, y, column, zeros.get(), inside);
        transform_tile<SIDE>(around, in.width, b + i * in.width, places);
        transform_tile<4>(inside, out.width, a + i * out.width, places);
      }
      for (int64_t place = 0; place < PLACES; place++)
        for (int64_t panel = 0; panel < in.width; panel += PANEL)
          for (int64_t o = 0; o < out.width; o += ROWS)
            add_products(count, a + place * places + o, out.width, b + place * places + panel, in.width,
                         mine + place * step + panel * out.width + o * PANEL);
    }
    float* to = part ? found.get() + (part - 1) * size : grad;
    write_gradient(mine, in, out, to + 9 * out.from * z.ci + in.from, z.ci);
  });
  for_each(threads, z.co, 1, [&](int64_t o, int64_t) {
    for (int64_t part = 1; part < parts; part++)
      for (int64_t k = 9 * o * z.ci; k < 9 * (o + 1) * z.ci; k++) grad[k] += found[(part - 1) * size + k];
  });
  return 0;
}

}  // namespace

extern "C" {
// To grad [co][3][3][ci]. 0, or 1 if there is no memory. ci and co are multiples of 32; the kernel is 3×3, the stride 1.
int sltt_dense_weight_gradient(const Conv* conv, const void* x, const void* g, int bfloat16, float* grad, int threads) {
  return with_type(bfloat16, [&](auto t) { return dense_weight_gradient(*conv, as(x, t), as(g, t), grad, threads); });
}
}
