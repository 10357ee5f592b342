// The input gradient of a 3×3 convolution of stride 1, in float: 16 products for 2×2 inputs instead of 36.
//
// Winograd's F(2×2, 3×3) (Lavin and Gray, CVPR 2016, arXiv 1509.09308). Gradients and weights are transformed, multiplied
// as matrices for each of the 16 places, and transformed back, some tiles at a time, which stay in the cache.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum in one instruction
#include "spikes.h"

namespace {

constexpr int64_t TILES = 32;                      // of 2×2 inputs, in a task
constexpr int64_t PANEL = 2 * LANES;               // input channels that are multiplied at a time
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;      // tiles that are: their sums fit the registers
static_assert(TILES % ROWS == 0);

struct Tiles {
  int64_t rows, columns, total;
  explicit Tiles(const Conv& z) : rows((z.h + 1) / 2), columns((z.w + 1) / 2), total(z.n * rows * columns) {}
};

// Weights of a panel: weight[co][ci][3][3] to [4][4][co][PANEL].
void transform_weight(const Conv& z, const float* weight, const int64_t* stride, int64_t panel, float* to) {
  for (int64_t o = 0; o < z.co; o++) {
    const float* s = weight + o * stride[0] + panel * PANEL * stride[1];
    float k[3][3][PANEL], rows[4][3][PANEL];
    for (int i = 0; i < 3; i++)
      for (int j = 0; j < 3; j++)
        for (int64_t c = 0; c < PANEL; c++) k[i][j][c] = s[c * stride[1] + (2 - i) * stride[2] + (2 - j) * stride[3]];
    for (int j = 0; j < 3; j++)
      for (int64_t c = 0; c < PANEL; c++) {
        const float even = (k[0][j][c] + k[2][j][c]) / 2, odd = k[1][j][c] / 2;
        rows[0][j][c] = k[0][j][c], rows[1][j][c] = even + odd, rows[2][j][c] = even - odd, rows[3][j][c] = k[2][j][c];
      }
    for (int i = 0; i < 4; i++) {
      float* row = to + (4 * i * z.co + o) * PANEL;
      for (int64_t c = 0; c < PANEL; c++) {
        const float even = (rows[i][0][c] + rows[i][2][c]) / 2, odd = rows[i][1][c] / 2;
        row[c] = rows[i][0][c], row[z.co * PANEL + c] = even + odd;
        row[2 * z.co * PANEL + c] = even - odd, row[3 * z.co * PANEL + c] = rows[i][2][c];
      }
    }
  }
}

// Gradients around a tile: to [4][4] places, `step` from one to the next, of [co]. `zeros` [co] stand beyond the border.
void transform_gradient(const Conv& z, const Tiles& t, int64_t tile, const float* g, const float* zeros, float* to,
                        int64_t step) {
  const int64_t image = tile / (t.rows * t.columns), y = tile / t.columns % t.rows, x = tile % t.columns;
  const float* at[4][4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) {
      const int64_t oy = 2 * y + z.ph - 2 + i, ox = 2 * x + z.pw - 2 + j;
      const bool inside = oy >= 0 && oy < z.oh && ox >= 0 && ox < z.ow;
      at[i][j] = inside ? g + ((image * z.oh + oy) * z.ow + ox) * z.co : zeros;
    }
  transform_tile(at, z.co, to, step);
}

// sums [ROWS][PANEL] = a [ROWS][co] · b [co][PANEL]
__attribute__((noinline)) void multiply(int64_t co, const float* a, const float* b, float* sums) {
  V sum[ROWS][2] = {};
  for (int64_t k = 0; k < co; k++, b += PANEL) {
    const V b0 = load(b), b1 = load(b + LANES);
    for (int i = 0; i < ROWS; i++) {
      const float x = a[i * co + k];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < 2; j++) store(sums + i * PANEL + j * LANES, sum[i][j]);
}

// The products of a tile, [4][4] places of [TILES][PANEL], to the gradients of its 2×2 inputs.
void transform_back(const Conv& z, const Tiles& t, int64_t tile, const float* products, int64_t panel, float* grad) {
  const int64_t image = tile / (t.rows * t.columns), y = tile / t.columns % t.rows * 2, x = tile % t.columns * 2;
  for (int64_t c = 0; c < PANEL; c += LANES) {
    V rows[2][4];
    for (int j = 0; j < 4; j++) {
      const auto product = [&](int i) { return load(products + (4 * i + j) * TILES * PANEL + c); };
      const V b = product(1), d = product(2);
      rows[0][j] = product(0) + b + d, rows[1][j] = b - d - product(3);
    }
    for (int64_t i = 0; i < std::min<int64_t>(2, z.h - y); i++) {
      float* to = grad + ((image * z.h + y + i) * z.w + x) * z.ci + panel * PANEL + c;
      store(to, rows[i][0] + rows[i][1] + rows[i][2]);
      if (x + 1 < z.w) store(to + z.ci, rows[i][1] - rows[i][2] - rows[i][3]);
    }
  }
}

}  // namespace

extern "C" {
// 0, or 1 if there is no memory. ci is a multiple of 32, and co of 16; the kernel is 3×3, the stride 1.
int sltt_input_gradient(const Conv* conv, const float* weight, const int64_t* stride, const float* g, float* grad,
                        int threads) {
  const Conv& z = *conv;
  const Tiles t(z);
  const int64_t panels = z.ci / PANEL, each = 16 * z.co * PANEL, blocks = (t.total + TILES - 1) / TILES;
  const int64_t parts = std::clamp<int64_t>(TASKS / blocks, 1, panels);  // of the panels: few tiles have many channels
  const int64_t places = TILES * z.co, products = TILES * PANEL;
  Scratch<float> weights(panels * each), gradients(threads * 16 * places), sums(threads * 16 * products), zeros(z.co);
  if (!weights || !gradients || !sums || !zeros) return 1;
  std::fill_n(zeros.get(), z.co, 0.0f);
  for_each(threads, panels, 1, [&](int64_t panel, int64_t) {
    transform_weight(z, weight, stride, panel, weights.get() + panel * each);
  });
  for_each(threads, blocks * parts, 1, [&](int64_t task, int64_t thread) {
    const int64_t block = task / parts, part = task % parts, first = block * TILES;
    const int64_t count = std::min(TILES, t.total - first);
    float *v = gradients.get() + thread * 16 * places, *m = sums.get() + thread * 16 * products;
    for (int64_t i = 0; i < count; i++) transform_gradient(z, t, first + i, g, zeros.get(), v + i * z.co, places);
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; panel++) {
      for (int64_t place = 0; place < 16; place++)
        for (int64_t i = 0; i < count; i += ROWS)
          multiply(z.co, v + place * places + i * z.co, weights.get() + panel * each + place * z.co * PANEL,
                   m + place * products + i * PANEL);
      for (int64_t i = 0; i < count; i++) transform_back(z, t, first + i, m + i * PANEL, panel, grad);
    }
  });
  return 0;
}
}
