// Max pooling of a sum over time, in one pass over memory.
#include "spikes.h"

namespace {

struct Pooling {  // shared with pooling.py; windows do not overlap, and `oh`, `ow` count the whole ones
  int64_t n, h, w, channels, kh, kw, oh, ow;
};

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
// x [n, h, w, channels] and y [n, oh, ow, channels] are float or bfloat16. `total`, shaped as x, is the sum before it, and
// `largest`, as y, its pooling: float or of x's type. Written are the sum and its pooling after x, `sum` and `most`, and
// what that gained, y.
void sltt_running_max(const Pooling* z, int bfloat16, int bfloat16_total, const void* x, const void* total,
                      const void* largest, float* sum, float* most, void* y, int threads) {
  const auto of = [&](auto type, auto type_total) {
    using T = decltype(type);
    using S = decltype(type_total);
    run(*z, static_cast<const T*>(x), static_cast<const S*>(total), static_cast<const S*>(largest), sum, most,
        static_cast<T*>(y), threads);
  };
  if (!bfloat16)
    of(float(), float());
  else if (bfloat16_total)
    of(uint16_t(), uint16_t());
  else
    of(uint16_t(), float());
}
}
