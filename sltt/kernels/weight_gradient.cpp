// The weight gradient of a 3×3 convolution of stride 1, in float, from an input of any values: 16 products for 2×2
// outputs instead of 36.
//
// Winograd's F(3×3, 2×2) (Lavin and Gray, CVPR 2016, arXiv 1509.09308). A task has a group of input channels and one of
// output channels, and sums the products of its tiles in each of the 16 places; the sums stay in the cache.
#pragma GCC optimize("fp-contract=fast")  // a product and a sum in one instruction
#include "spikes.h"

namespace {

constexpr int64_t TILES = 32;                  // of 2×2 outputs, that are multiplied at a time
constexpr int64_t GROUP = 64;                  // channels of a task, or 32
constexpr int64_t PANEL = 2 * LANES;           // output channels that are multiplied at a time
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;  // input channels that are: their sums fit the registers

struct Group {
  int64_t from, width;
  Group(int64_t channels, int64_t i) : from(i * GROUP), width(std::min(GROUP, channels - from)) {}
};

// Where the N×N pixels from (y, column) on are; those outside of the image are zeros.
template <int N>
void pixels_of(const float* x, int64_t h, int64_t w, int64_t channels, int64_t image, int64_t y, int64_t column,
               const float* zeros, const float* (*at)[N]) {
  for (int64_t i = 0; i < N; i++)
    for (int64_t j = 0; j < N; j++) {
      const bool inside = y + i >= 0 && y + i < h && column + j >= 0 && column + j < w;
      at[i][j] = inside ? x + ((image * h + y + i) * w + column + j) * channels : zeros;
    }
}

// Gradients of a tile: to [4][4] places, `step` from one to the next, of [width].
void transform_gradient(const float* const (*at)[2], Group group, float* to, int64_t step) {
  for (int64_t c = 0; c < group.width; c += LANES) {
    V rows[4][2];
    for (int j = 0; j < 2; j++) {
      const V a = load(at[0][j] + c), b = load(at[1][j] + c);
      rows[0][j] = a, rows[1][j] = (a + b) * 0.5f, rows[2][j] = (a - b) * 0.5f, rows[3][j] = b;
    }
    for (int i = 0; i < 4; i++) {
      float* row = to + 4 * i * step + c;
      store(row, rows[i][0]);
      store(row + step, (rows[i][0] + rows[i][1]) * 0.5f);
      store(row + 2 * step, (rows[i][0] - rows[i][1]) * 0.5f);
      store(row + 3 * step, rows[i][1]);
    }
  }
}

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

// Sums [place][panel][in.width][PANEL] to the gradients of the 3×3 weights, for eight input channels from `c0` on.
void transform_back(const float* sums, Group in, Group out, int64_t c0, float* grad, const int64_t* stride) {
  const int64_t step = out.width * in.width;
  for (int64_t panel = 0; panel < out.width; panel += PANEL) {
    float found[8][9][PANEL];
    for (int64_t c = 0; c < 8; c++)
      for (int64_t j = 0; j < PANEL; j += LANES) {
        V rows[3][4];
        for (int x = 0; x < 4; x++) {
          const float* place = sums + x * step + panel * in.width + (c0 + c) * PANEL + j;
          const auto sum = [&](int y) { return load(place + 4 * y * step); };
          const V a = sum(0), b = sum(1), d = sum(2), e = sum(3);
          rows[0][x] = a + b + d, rows[1][x] = b - d, rows[2][x] = b + d - e;
        }
        for (int y = 0; y < 3; y++) {
          store(found[c][3 * y] + j, rows[y][0] + rows[y][1] + rows[y][2]);
          store(found[c][3 * y + 1] + j, rows[y][1] - rows[y][2]);
          store(found[c][3 * y + 2] + j, rows[y][1] + rows[y][2] - rows[y][3]);
        }
      }
    for (int64_t j = 0; j < PANEL; j++)
      for (int64_t t = 0; t < 9; t++) {
        float* to = grad + (out.from + panel + j) * stride[0] + (in.from + c0) * stride[1] + t / 3 * stride[2];
        for (int64_t c = 0; c < 8; c++) to[c * stride[1] + t % 3 * stride[3]] = found[c][t][j];
      }
  }
}

}  // namespace

extern "C" {
// 0, or 1 if there is no memory. ci and co are multiples of 32; the kernel is 3×3, the stride 1.
int sltt_dense_weight_gradient(const Conv* conv, const float* x, const float* g, float* grad, const int64_t* stride,
                               int threads) {
  const Conv& z = *conv;
  const int64_t rows = (z.oh + 1) / 2, columns = (z.ow + 1) / 2, tiles = z.n * rows * columns;
  const int64_t ins = (z.ci + GROUP - 1) / GROUP, outs = (z.co + GROUP - 1) / GROUP;
  const int64_t blocks = (tiles + TILES - 1) / TILES;
  const int64_t parts = std::clamp<int64_t>(TASKS / (ins * outs), 1, blocks), size = 16 * GROUP * GROUP;
  const int64_t places = TILES * GROUP;
  Scratch<float> sums(ins * outs * parts * size), inputs(threads * 16 * places), gradients(threads * 16 * places);
  Scratch<float> zeros(GROUP);
  if (!sums || !inputs || !gradients || !zeros) return 1;
  std::fill_n(zeros.get(), GROUP, 0.0f);
  for_each(threads, ins * outs * parts, 1, [&](int64_t task, int64_t thread) {
    const Group in(z.ci, task / parts % ins), out(z.co, task / parts / ins);
    const int64_t part = task % parts, end = std::min(tiles, blocks * (part + 1) / parts * TILES);
    float *mine = sums.get() + task * size, *a = inputs.get() + thread * 16 * places;
    float* b = gradients.get() + thread * 16 * places;
    std::fill_n(mine, size, 0.0f);
    for (int64_t first = blocks * part / parts * TILES; first < end; first += TILES) {
      const int64_t count = std::min(TILES, end - first);
      for (int64_t i = 0; i < count; i++) {
        const int64_t tile = first + i, image = tile / (rows * columns);
        const int64_t y = tile / columns % rows * 2, column = tile % columns * 2;
        const float *around[4][4], *inside[2][2];
        pixels_of<4>(x + in.from, z.h, z.w, z.ci, image, y - z.ph, column - z.pw, zeros.get(), around);
        pixels_of<2>(g + out.from, z.oh, z.ow, z.co, image, y, column, zeros.get(), inside);
        transform_tile(around, in.width, a + i * in.width, places);
        transform_gradient(inside, out, b + i * out.width, places);
      }
      for (int64_t place = 0; place < 16; place++)
        for (int64_t panel = 0; panel < out.width; panel += PANEL)
          for (int64_t c = 0; c < in.width; c += ROWS)
            add_products(count, a + place * places + c, in.width, b + place * places + panel, out.width,
                         mine + place * out.width * in.width + panel * in.width + c * PANEL);
    }
  });
  for_each(threads, ins * outs * (GROUP / 8), 1, [&](int64_t i, int64_t) {
    const int64_t pair = i / (GROUP / 8), c = i % (GROUP / 8) * 8;
    const Group in(z.ci, pair % ins), out(z.co, pair / ins);
    if (c >= in.width) return;
    float* total = sums.get() + pair * parts * size;
    for (int64_t part = 1; part < parts; part++)
      for (int64_t place = 0; place < 16; place++)
        for (int64_t panel = 0; panel < out.width; panel += PANEL) {
          const int64_t from = place * out.width * in.width + panel * in.width + c * PANEL;
          for (int64_t k = from; k < from + 8 * PANEL; k++) total[k] += total[part * size + k];
        }
    transform_back(total, in, out, c, grad, stride);
  });
  return 0;
}
}
