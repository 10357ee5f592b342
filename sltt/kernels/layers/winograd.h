// Winograd's F(4×4, 3×3) and F(3×3, 4×4): a 3×3 convolution in 36 products for 4×4 pixels instead of 144 (Lavin and Gray,
// CVPR 2016, arXiv 1509.09308).
//
// A row of six values stands for a polynomial. Its values at the points 0, ±p, ±q and ∞ are multiplied, and the product
// is read off from them. At p = 3/4 and q = 3/2, rounding errors are a third of those at the usual points, 1 and 2: near
// those of a plain sum in float (Barabasz et al., ACM TOMS 2020, arXiv 1803.10986).
#pragma once
#include "../spikes.h"

namespace {

constexpr int SIDE = 6, PLACES = SIDE * SIDE;  // of a transformed tile
constexpr int64_t TILES = 32;                  // that are multiplied at a time
constexpr int64_t PANEL = 2 * LANES;           // channels that are: their sums with ROWS others fit the registers
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;
static_assert(TILES % ROWS == 0);
constexpr int64_t SKEW = 16;  // between places, which else fall into the same lines of the cache
constexpr float P = 0.75f, Q = 1.5f, PP = P * P, QQ = Q * Q;
constexpr float AT_0 = 1 / (PP * QQ), AT_P = 1 / (2 * PP * (PP - QQ)), AT_Q = 1 / (2 * QQ * (QQ - PP));

// Of six values x, what the products at the six points are made of: Bᵀ x.
INLINE void transform_values(const V* x, V* to) {
  const V even_p = x[4] - QQ * x[2], odd_p = P * (x[3] - QQ * x[1]);
  const V even_q = x[4] - PP * x[2], odd_q = Q * (x[3] - PP * x[1]);
  to[0] = x[4] - (PP + QQ) * x[2] + PP * QQ * x[0];
  to[1] = even_p + odd_p, to[2] = even_p - odd_p;
  to[3] = even_q + odd_q, to[4] = even_q - odd_q;
  to[5] = x[5] - (PP + QQ) * x[3] + PP * QQ * x[1];
}

// Of `taps` values that six are convolved with, 3 or 4: G x.
template <int taps>
INLINE void transform_taps(const V* x, V* to) {
  V odd_p = P * x[1], odd_q = Q * x[1];
  if constexpr (taps == 4) odd_p += P * PP * x[3], odd_q += Q * QQ * x[3];
  const V even_p = x[0] + PP * x[2], even_q = x[0] + QQ * x[2];
  to[0] = AT_0 * x[0];
  to[1] = AT_P * (even_p + odd_p), to[2] = AT_P * (even_p - odd_p);
  to[3] = AT_Q * (even_q + odd_q), to[4] = AT_Q * (even_q - odd_q);
  to[5] = x[taps - 1];
}

// The `count` results, 4 with 3 taps and 3 with 4, of the products: Aᵀ x.
template <int count>
INLINE void transform_back(const V* x, V* to) {
  const V even_p = x[1] + x[2], odd_p = x[1] - x[2], even_q = x[3] + x[4], odd_q = x[3] - x[4];
  to[0] = x[0] + even_p + even_q;
  to[1] = P * odd_p + Q * odd_q;
  to[2] = PP * even_p + QQ * even_q;
  if constexpr (count == 4) to[3] = P * PP * odd_p + Q * QQ * odd_q;
  to[count - 1] += x[5];
}

// Where the N×N pixels from (y, column) on are; those outside of the image are zeros.
template <int N, class T>
INLINE void pixels_of(const T* x, int64_t h, int64_t w, int64_t channels, int64_t image, int64_t y, int64_t column,
                      const T* zeros, const T* (*at)[N]) {
  for (int64_t i = 0; i < N; i++)
    for (int64_t j = 0; j < N; j++) {
      const bool inside = y + i >= 0 && y + i < h && column + j >= 0 && column + j < w;
      at[i][j] = inside ? x + ((image * h + y + i) * w + column + j) * channels : zeros;
    }
}

// The pixels of a tile, 6×6 values or 4×4 taps, to PLACES, `step` from one to the next, of [channels].
template <int N, class T>
INLINE void transform_tile(const T* const (*at)[N], int64_t channels, float* to, int64_t step) {
  const auto transform = [](const V* x, V* y) {
    if constexpr (N == SIDE) transform_values(x, y);
    else transform_taps<N>(x, y);
  };
  for (int64_t c = 0; c < channels; c += LANES) {
    V columns[N][SIDE];
    for (int j = 0; j < N; j++) {
      V x[N];
      for (int i = 0; i < N; i++) x[i] = load(at[i][j] + c);
      transform(x, columns[j]);
    }
    for (int i = 0; i < SIDE; i++) {
      V x[N], y[SIDE];
      for (int j = 0; j < N; j++) x[j] = columns[j][i];
      transform(x, y);
      for (int j = 0; j < SIDE; j++) store(to + (SIDE * i + j) * step + c, y[j]);
    }
  }
}

// The N×N results of the products `from`, of which the places are `step` apart.
template <int N>
INLINE void transform_products(const float* from, int64_t step, V (*to)[N]) {
  V rows[N][SIDE];
  for (int j = 0; j < SIDE; j++) {
    V x[SIDE], y[N];
    for (int i = 0; i < SIDE; i++) x[i] = load(from + (SIDE * i + j) * step);
    transform_back<N>(x, y);
    for (int i = 0; i < N; i++) rows[i][j] = y[i];
  }
  for (int i = 0; i < N; i++) transform_back<N>(rows[i], to[i]);
}

}  // namespace
