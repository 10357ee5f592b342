// The input gradient of a 3×3 convolution of stride 1: a quarter of the products, in float.
//
// Gradients and weights are transformed, multiplied as matrices for each of the 36 places, and transformed back, some
// tiles of 4×4 inputs at a time, which stay in the cache.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum in one instruction
#pragma clang fp contract(fast)
#include "winograd.h"

namespace {

constexpr int64_t PART = 32;
constexpr int64_t LARGE = 4 << 20;  // numbers of transformed weights that are kept for all tasks

struct Tiles {
  int64_t rows, columns, total;
  explicit Tiles(const Conv& z) : rows((z.h + 3) / 4), columns((z.w + 3) / 4), total(z.n * rows * columns) {}
};

// Weights of a panel of input channels: weight[co][ci][3][3] to PLACES of [co][PANEL].
void transform_weight(const Conv& z, const float* weight, const int64_t* stride, int64_t panel, float* to) {
  const bool ordered = stride[1] == 1;
  float copies[LANES][3][3][PANEL];  // of some output channels: a line of the cache holds as many
  for (int64_t o = 0; o < z.co; o++) {
    const float* from = weight + o * stride[0] + panel * PANEL * stride[1];
    const float* at[3][3];
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 3; j++) {
        const float* tap = from + (2 - i) * stride[2] + (2 - j) * stride[3];
        at[i][j] = ordered ? tap : copies[o % LANES][i][j];
        if (ordered || o % LANES) continue;
        for (int64_t c = 0; c < PANEL; c++)
          for (int64_t k = 0; k < LANES; k++) copies[k][i][j][c] = tap[k * stride[0] + c * stride[1]];
      }
    transform_tile<3>(at, PANEL, to + o * PANEL, z.co * PANEL + SKEW);
  }
}

// sums [ROWS][PANEL] = a [ROWS][co] · b [co][PANEL], in parts: a long sum would lose digits
__attribute__((noinline)) void multiply(int64_t co, const float* a, const float* b, float* sums) {
  for (int64_t from = 0; from < co; from += PART) {
    V sum[ROWS][2] = {};
    for (int64_t k = from; k < std::min(from + PART, co); k++) {
      const V b0 = load(b + k * PANEL), b1 = load(b + k * PANEL + LANES);
      for (int i = 0; i < ROWS; i++) {
        const float x = a[i * co + k];
        sum[i][0] += x * b0;
        sum[i][1] += x * b1;
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < 2; j++) {
        float* to = sums + i * PANEL + j * LANES;
        store(to, from ? load(to) + sum[i][j] : sum[i][j]);
      }
  }
}

// The products of a tile to the gradients of its 4×4 inputs.
template <class T>
void write_tile(const Conv& z, const Tiles& t, int64_t tile, const float* products, int64_t panel, T* grad) {
  const int64_t image = tile / (t.rows * t.columns), y = tile / t.columns % t.rows * 4, x = tile % t.columns * 4;
  for (int64_t c = 0; c < PANEL; c += LANES) {
    V found[4][4];
    transform_products<4>(products + c, TILES * PANEL + SKEW, found);
    for (int64_t i = 0; i < std::min<int64_t>(4, z.h - y); i++)
      for (int64_t j = 0; j < std::min<int64_t>(4, z.w - x); j++)
        store(grad + ((image * z.h + y + i) * z.w + x + j) * z.ci + panel * PANEL + c, found[i][j]);
  }
}

template <class T>
int input_gradient(const Conv& z, const float* weight, const int64_t* stride, const T* g, T* grad, int threads) {
  const Tiles t(z);
  const int64_t panels = z.ci / PANEL, each = PLACES * (z.co * PANEL + SKEW), blocks = (t.total + TILES - 1) / TILES;
  const int64_t parts = std::clamp<int64_t>(TASKS / blocks, 1, panels);  // of the panels: few tiles have many channels
  const int64_t places = TILES * z.co + SKEW, products = TILES * PANEL + SKEW;
  const bool once = blocks == 1 || panels * each > LARGE;  // a panel for each task: no other reads it, or for the memory
  Scratch<float> weights((once ? threads : panels) * each), gradients(threads * PLACES * places);
  Scratch<float> sums(threads * PLACES * products);
  Scratch<T> zeros(z.co);
  if (!weights || !gradients || !sums || !zeros) return 1;
  std::fill_n(zeros.get(), z.co, T(0));
  if (!once)
    for_each(threads, panels, 1, [&](int64_t panel, int64_t) {
      transform_weight(z, weight, stride, panel, weights.get() + panel * each);
    });
  for_each(threads, blocks * parts, 1, [&](int64_t task, int64_t thread) {
    const int64_t block = task / parts, part = task % parts, first = block * TILES;
    const int64_t count = std::min(TILES, t.total - first);
    float *v = gradients.get() + thread * PLACES * places, *m = sums.get() + thread * PLACES * products;
    for (int64_t i = 0; i < count; i++) {
      const int64_t tile = first + i, y = tile / t.columns % t.rows * 4, x = tile % t.columns * 4;
      const T* at[SIDE][SIDE];
      pixels_of<SIDE>(g, z.oh, z.ow, z.co, tile / (t.rows * t.columns), y + z.ph - 2, x + z.pw - 2, zeros.get(), at);
      transform_tile<SIDE>(at, z.co, v + i * z.co, places);
    }
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++) {
      float* w = weights.get() + (once ? thread : panel) * each;
      if (once) transform_weight(z, weight, stride, panel, w);
      for (int64_t place = 0; place < PLACES; place++)
        for (int64_t i = 0; i < count; i += ROWS)
          multiply(z.co, v + place * places + i * z.co, w + place * (z.co * PANEL + SKEW), m + place * products + i * PANEL);
      for (int64_t i = 0; i < count; i++) write_tile(z, t, first + i, m + i * PANEL, panel, grad);
    }
  });
  return 0;
}

}  // namespace

extern "C" {
// 0, or 1 if there is no memory. ci is a multiple of 32, and co of 16; the kernel is 3×3, the stride 1.
int sltt_input_gradient(const Conv* conv, const float* weight, const int64_t* stride, const void* g, int bfloat16,
                        void* grad, int threads) {
  return with_type(bfloat16,
                   [&](auto t) { return input_gradient(*conv, weight, stride, as(g, t), as(grad, t), threads); });
}
}
