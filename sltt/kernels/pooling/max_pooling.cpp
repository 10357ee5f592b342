// Max pooling, its gradient, and max pooling of a sum over time: each in one pass over memory.
#include "../spikes.h"

namespace {

constexpr int64_t BLOCK = 512;  // channels whose maxima are in the cache

struct Pooling {  // shared with pooling.py; windows do not overlap, and `oh`, `ow` count the whole ones
  int64_t n, h, w, channels, kh, kw, oh, ow;
};

// Maxima of a window, and the position of each in it, of m channels. NaN is larger than a number, as in PyTorch.
template <class T>
void window(const Pooling& z, const T* __restrict x, T* __restrict y, uint8_t* __restrict positions, int64_t m) {
  float most[BLOCK];
  int32_t at[BLOCK], k = 0;
  for (int64_t c = 0; c < m; c++) most[c] = widen(x[c]);
  std::fill_n(at, m, 0);
  for (int64_t i = 0; i < z.kh; i++)
    for (int64_t j = 0; j < z.kw; j++, k++) {
      const T* __restrict from = x + (i * z.w + j) * z.channels;
      for (int64_t c = 0; c < m; c++) {
        const float value = widen(from[c]);
        const bool larger = value > most[c] || value != value;
        most[c] = larger ? value : most[c];
        at[c] = larger ? k : at[c];
      }
    }
  for (int64_t c = 0; c < m; c++) put(y + c, most[c]);
  if (positions)
    for (int64_t c = 0; c < m; c++) positions[c] = uint8_t(at[c]);
}

template <class T>
void pool(const Pooling& z, const T* x, T* y, uint8_t* positions, int threads) {
  for_each(threads, z.n * z.oh, 1, [&](int64_t task, int64_t) {
    const int64_t image = task / z.oh, above = task % z.oh * z.kh;
    for (int64_t j = 0; j < z.ow; j++)
      for (int64_t c = 0; c < z.channels; c += BLOCK) {
        const int64_t from = ((image * z.h + above) * z.w + j * z.kw) * z.channels + c;
        const int64_t to = (task * z.ow + j) * z.channels + c;
        window(z, x + from, y + to, positions ? positions + to : nullptr, std::min(BLOCK, z.channels - c));
      }
  });
}

template <class T>
void pool_gradient(const Pooling& z, const T* grad, const uint8_t* positions, T* out, int threads) {
  const int64_t rows = z.oh * z.kh, columns = z.ow * z.kw;
  for_each(threads, z.n * z.h, 1, [&](int64_t task, int64_t) {
    const int64_t image = task / z.h, i = task % z.h;
    for (int64_t j = 0; j < z.w; j++) {
      T* __restrict to = out + (task * z.w + j) * z.channels;
      if (i >= rows || j >= columns) {  // it is in no window
        std::fill_n(to, z.channels, T(0));
        continue;
      }
      const int64_t at = ((image * z.oh + i / z.kh) * z.ow + j / z.kw) * z.channels;
      const uint8_t position = uint8_t(i % z.kh * z.kw + j % z.kw);
      const T* __restrict from = grad + at;
      const uint8_t* __restrict chosen = positions + at;
      for (int64_t c = 0; c < z.channels; c++) to[c] = chosen[c] == position ? from[c] : T(0);
    }
  });
}

template <class T, class S>
void run(const Pooling& z, const T* x, const S* total, const S* largest, float* sum, float* most, T* y, int threads) {
  const int64_t channels = z.channels, rows = z.oh * z.kh, columns = z.ow * z.kw, row_out = z.ow * channels;
  for_each(threads, z.n * z.oh, 1, [&](int64_t task, int64_t) {
    const int64_t image = task / z.oh, above = task % z.oh, out = task * row_out;
    std::fill_n(most + out, row_out, -INFINITY);
    const int64_t stop = above + 1 == z.oh ? z.h : (above + 1) * z.kh;
    for (int64_t i = above * z.kh; i < stop; i++)
      for (int64_t j = 0; j < z.w; j++) {
        const int64_t at = ((image * z.h + i) * z.w + j) * channels;
        const T* __restrict of_x = x + at;
        const S* __restrict before = total + at;
        float *__restrict now = sum + at, *__restrict to = most + out + j / z.kw * channels;
        for (int64_t c = 0; c < channels; c++) now[c] = widen(before[c]) + widen(of_x[c]);
        if (i < rows && j < columns)  // else it is in no window
          for (int64_t c = 0; c < channels; c++) to[c] = now[c] > to[c] || now[c] != now[c] ? now[c] : to[c];
      }
    for (int64_t k = out; k < out + row_out; k++) put(y + k, most[k] - widen(largest[k]));
  });
}

}  // namespace

extern "C" {
// x [n, h, w, channels] and y [n, oh, ow, channels] are float or bfloat16. `positions`, as y, may be null: those of the
// maxima in their windows, row by row.
void sltt_max_pool(const Pooling* z, int bfloat16, const void* x, void* y, uint8_t* positions, int threads) {
  with_type(bfloat16, [&](auto t) { pool(*z, as(x, t), as(y, t), positions, threads); });
}

// From ∂L/∂y to ∂L/∂x, `out`.
void sltt_max_pool_gradient(const Pooling* z, int bfloat16, const void* grad, const uint8_t* positions, void* out,
                            int threads) {
  with_type(bfloat16, [&](auto t) { pool_gradient(*z, as(grad, t), positions, as(out, t), threads); });
}

// x [n, h, w, channels] and y [n, oh, ow, channels] are float or bfloat16. `total`, shaped as x, is the sum before it, and
// `largest`, as y, its pooling: float or of x's type. Written are the sum and its pooling after x, `sum` and `most`, and
// what that gained, y.
void sltt_running_max(const Pooling* z, int bfloat16, int bfloat16_total, const void* x, const void* total,
                      const void* largest, float* sum, float* most, void* y, int threads) {
  with_type(bfloat16, [&](auto t) {
    with_type(bfloat16_total, [&](auto s) {
      run(*z, as(x, t), as(total, s), as(largest, s), sum, most, as(y, t), threads);
    });
  });
}
}
