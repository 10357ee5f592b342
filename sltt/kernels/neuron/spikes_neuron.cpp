// A neuron's step: charge, fire and reset in one pass over memory that writes the spikes as bits too; and its gradient.
// A BatchNorm in front of the neuron is a part of these passes. All time steps under a steady current, and the
// derivative of the rate, are one pass too.
#include "spikes_neuron.h"

namespace {

constexpr int64_t PART = 1 << 14;  // elements of a task
constexpr int VECTORS = 4;         // that go through all time steps in registers

INLINE float magnitude(float x) { return std::fabs(x); }
INLINE V magnitude(V x) { return V(U(x) & 0x7fffffffu); }
INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
INLINE U bits_of(V x) { return U(x); }
INLINE float number_of(uint32_t x) { return __builtin_bit_cast(float, x); }
INLINE V number_of(U x) { return V(x); }

// exp(x) for x ≤ 0, to two units in the last place; 0 below 2⁻¹²⁵. x = n ln 2 + r, and a series in r.
template <class F>
INLINE F exponential(F x) {
  const F shift = F{} + 12582912.0f, n = x * 1.44269504f + shift;  // whole, in the last bits of n
  const F whole = n - shift, r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
  F y = F{} + 1.0f / 5040;
  y = y * r + 1.0f / 720, y = y * r + 1.0f / 120, y = y * r + 1.0f / 24, y = y * r + 1.0f / 6;
  y = ((y * r + 0.5f) * r + 1.0f) * r + 1.0f;
  return x < -86.6f ? F{} : y * number_of((bits_of(n) + 127) << 23);  // NaN stays
}

// ∂s/∂u at x = u − V_th, a number or a vector.
template <Surrogate S, class F>
INLINE F slope(const Neuron& z, F x) {
  const F zero = {}, size = magnitude(x);
  if constexpr (S == TRIANGLE) {
    const F y = z.inverse ? 1.0f - size * z.inverse : 1.0f - size / z.a;  // exact, and faster than a division
    const F up = y < 0.0f ? zero : y;                                     // NaN stays
    return z.inverse ? up * z.inverse : up / z.a;
  } else if constexpr (S == RECTANGLE) {
    return size < z.a ? zero + 1.0f / z.b : zero;
  } else if constexpr (S == ARCTAN) {
    return 1.0f / (1.0f + z.a * x * (z.a * x)) * z.b;
  } else if constexpr (S == FAST_SIGMOID) {
    const F y = 1.0f + z.a * size;
    return 1.0f / (y * y) * z.b;
  } else if constexpr (S == SIGMOID) {
    const F y = exponential(-z.a * size);
    return z.a * y / ((1.0f + y) * (1.0f + y));
  } else if constexpr (S == EXPONENTIAL) {
    return z.b * exponential(-z.a * size);
  } else {
    const F y = x / z.a;
    return z.b * exponential(-0.5f * y * y);
  }
}

// Call function(the surrogate, as a type).
template <class F>
INLINE void with_surrogate(Surrogate surrogate, const F& function) {
  switch (surrogate) {
    case TRIANGLE: return function(std::integral_constant<Surrogate, TRIANGLE>());
    case RECTANGLE: return function(std::integral_constant<Surrogate, RECTANGLE>());
    case ARCTAN: return function(std::integral_constant<Surrogate, ARCTAN>());
    case FAST_SIGMOID: return function(std::integral_constant<Surrogate, FAST_SIGMOID>());
    case SIGMOID: return function(std::integral_constant<Surrogate, SIGMOID>());
    case EXPONENTIAL: return function(std::integral_constant<Surrogate, EXPONENTIAL>());
    case GAUSSIAN: return function(std::integral_constant<Surrogate, GAUSSIAN>());
  }
}

// Means over time steps under the currents x of some vectors of neurons: of the spikes, in place of x, and of their
// derivatives with respect to x; where it is LEARNED, with respect to the decay too.
template <Surrogate S, bool SOFT, bool ABOVE, bool LEARNED>
void steady_vectors(const Neuron& z, float start, int steps, V* __restrict x, V* __restrict by_x,
                    V* __restrict by_decay) {
  const V zero = {}, one = zero + 1.0f;
  V current[VECTORS], v[VECTORS], of_x[VECTORS], of_decay[VECTORS], spikes[VECTORS];
  for (int k = 0; k < VECTORS; k++) {
    current[k] = z.gain * x[k];
    v[k] = zero + start;
    of_x[k] = of_decay[k] = spikes[k] = by_x[k] = by_decay[k] = zero;
  }
  for (int t = 0; t < steps; t++)
    for (int k = 0; k < VECTORS; k++) {
      const V left = SOFT || z.rest == 0 ? z.decay * v[k] : z.rest + z.decay * (v[k] - z.rest), u = left + current[k];
      const V above = u - z.threshold, s = (ABOVE ? above > 0.0f : above >= 0.0f) ? one : zero;
      if (LEARNED) of_decay[k] = z.decay * of_decay[k] + (v[k] - z.rest - (z.gain != 1 ? x[k] : zero));  // ∂u/∂λ
      v[k] = SOFT ? u - z.amount * s : u - (u - z.rest) * s;
      const V fires = slope<S>(z, above);
      V stays = SOFT ? one : one - s;
      if (!z.detached) stays -= SOFT ? fires * z.amount : fires * (u - z.rest);
      of_x[k] = z.decay * of_x[k] + z.gain;  // ∂u/∂x, from ∂v/∂x of the step before
      spikes[k] += s;
      by_x[k] += of_x[k] * fires;
      of_x[k] *= stays;
      if (LEARNED) by_decay[k] += of_decay[k] * fires, of_decay[k] *= stays;
    }
  for (int k = 0; k < VECTORS; k++) x[k] = spikes[k] / float(steps);
  for (int k = 0; k < VECTORS; k++) by_x[k] /= float(steps), by_decay[k] /= float(steps);
}

template <Surrogate S, bool LEARNED>
auto steady_form(const Neuron& z) {
  return z.soft ? (z.above ? steady_vectors<S, true, true, LEARNED> : steady_vectors<S, true, false, LEARNED>)
                : (z.above ? steady_vectors<S, false, true, LEARNED> : steady_vectors<S, false, false, LEARNED>);
}

template <class T>
void steady_block(const Neuron& z, const T* __restrict x, float start, int steps, T* __restrict rate,
                  T* __restrict by_input, float* __restrict by_decay, int64_t n) {
  constexpr int64_t AT_ONCE = VECTORS * LANES;
  static_assert(BLOCK % AT_ONCE == 0);
  float rates[BLOCK] = {}, of_input[BLOCK], of_decay[BLOCK];
  for (int64_t i = 0; i < n; i++) rates[i] = widen(x[i]);
  with_surrogate(z.surrogate, [&](auto surrogate) {
    constexpr Surrogate S = surrogate();
    const auto run = by_decay ? steady_form<S, true>(z) : steady_form<S, false>(z);
    const auto at = [](float* p) { return reinterpret_cast<V*>(p); };
    for (int64_t i = 0; i < n; i += AT_ONCE) run(z, start, steps, at(rates + i), at(of_input + i), at(of_decay + i));
  });
  for (int64_t i = 0; i < n; i++) put(rate + i, rates[i]);
  for (int64_t i = 0; i < n; i++) put(by_input + i, of_input[i]);
  if (by_decay) std::copy_n(of_decay, n, by_decay);
}

// `s` are the spikes where there are no bits. The gradient is left in g too.
template <class T, class G>
void backward_block(const Neuron& z, const T* __restrict grad_s, const float* __restrict grad_v,
                    const float* __restrict kept, const T* __restrict s_in, const uint8_t* __restrict bits,
                    G* __restrict out, float* __restrict out_v, float* __restrict g, int64_t n) {
  float s[BLOCK], fires[BLOCK];
  if (bits)
    for (int64_t j = 0; j < n / 8; j++)
      for (int i = 0; i < 8; i++) s[8 * j + i] = float(bits[j] >> i & 1);
  else
    for (int64_t i = 0; i < n; i++) s[i] = widen(s_in[i]);
  for (int64_t i = 0; i < n; i++) fires[i] = kept[i] - (z.soft ? z.threshold - z.amount * s[i] : z.threshold);
  with_surrogate(z.surrogate, [&](auto surrogate) {
    for (int64_t i = 0; i < n; i++) fires[i] = slope<surrogate()>(z, fires[i]);
  });
  if (grad_s)
    for (int64_t i = 0; i < n; i++) g[i] = widen(grad_s[i]) * fires[i];
  else
    std::fill_n(g, n, 0.0f);
  if (grad_v)
    for (int64_t i = 0; i < n; i++) {
      const float stays = z.soft ? 1.0f : 1 - s[i], falls = z.soft ? z.amount : kept[i] - z.rest;
      g[i] += grad_v[i] * (z.detached ? stays : stays - fires[i] * falls);
    }
  for (int64_t i = 0; i < n; i++) put(out + i, g[i]);
  if (out_v)
    for (int64_t i = 0; i < n; i++) out_v[i] = g[i] * z.decay;
}

// Call function(part, first element, elements) for each block.
template <class F>
void for_each_block(int threads, int64_t n, const F& function) {
  for_each(threads, (n + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    for (int64_t i = part * PART, end = std::min(i + PART, n); i < end; i += BLOCK)
      function(part, i, std::min(BLOCK, end - i));
  });
}

// Two sums for each channel, over all elements: in float in each part, then in double, in the order of the parts.
class Sums {
 public:
  Sums(int64_t n, int64_t channels)
      : parts_((n + PART - 1) / PART), channels_(channels), sums_(2 * channels * parts_), totals_(2 * channels) {
    if (whole()) std::fill_n(sums_.get(), 2 * channels * parts_, 0.0f);
  }
  bool whole() const { return sums_ && totals_; }
  float* first(int64_t part) { return sums_.get() + 2 * channels_ * part; }
  float* second(int64_t part) { return first(part) + channels_; }
  const double* totals() {
    std::fill_n(totals_.get(), 2 * channels_, 0.0);
    for (int64_t part = 0; part < parts_; part++)
      for (int64_t i = 0; i < 2 * channels_; i++) totals_[i] += first(part)[i];
    return totals_.get();
  }

 private:
  int64_t parts_, channels_;
  Scratch<float> sums_;
  Scratch<double> totals_;
};

// Time steps of n elements each; v_out has all of them, or, for v_step = 0, the last one.
template <class T>
void forward(const Neuron& z, const Norms& norms, const T* x, const float* v, T* s, float* v_out, int64_t v_step,
             float* u_out, uint8_t* bits, int64_t n, int64_t steps, int threads) {
  for_each_block(threads, n, [&](int64_t, int64_t i, int64_t m) {
    float room[2][BLOCK];
    const float* before = v + i;
    for (int64_t t = 0, at = i; t < steps; t++, at += n) {
      float* after = v_step || t == steps - 1 ? v_out + t * v_step + i : room[t % 2];
      forward_block(z, norms.factors ? norms[t] : Norm(), x + at, before, s + at, after, shifted(u_out, at), shifted(bits, at / 8), i, m);
      before = after;
    }
  });
}

// Call function(part, t, first element, elements, ∂L/∂v[t], where to write ∂L/∂v[t−1]) for each block, and each time step
// from the last to the first. With `cut`, no gradient flows from one of the time steps to the step before.
template <class F>
void for_each_step_back(const float* grad_v, float* out_v, int64_t n, int64_t steps, bool cut, int threads,
                        const F& function) {
  for_each_block(threads, n, [&](int64_t part, int64_t i, int64_t m) {
    float room[2][BLOCK];
    const float* after = shifted(grad_v, i);
    for (int64_t t = steps - 1; t >= 0; t--) {
      float* before = t == 0 ? shifted(out_v, i) : cut ? nullptr : room[t % 2];
      function(part, t, i, m, after, before);
      after = before;
    }
  });
}

template <class T, class G>
void backward(const Neuron& z, const T* grad_s, const float* grad_v, const float* kept, const T* s, const uint8_t* bits,
              G* out, float* out_v, int64_t n, int64_t steps, bool cut, int threads) {
  for_each_step_back(grad_v, out_v, n, steps, cut, threads,
                     [&](int64_t, int64_t t, int64_t i, int64_t m, const float* after, float* before) {
    float g[BLOCK];
    const int64_t at = t * n + i;
    backward_block(z, shifted(grad_s, at), after, kept + at, shifted(s, at), shifted(bits, at / 8), out + at, before, g,
                   m);
  });
}

// Mean and variance of each channel. The sums are those of the differences from the mean of some first rows: small
// numbers, whatever the mean is.
template <class T>
int statistics(const T* x, int64_t n, int64_t channels, float* mean, float* var, int threads) {
  Sums sums(n, channels);
  if (!sums.whole()) return 1;
  const int64_t rows = n / channels, some = std::min<int64_t>(rows, 64);
  std::fill_n(mean, channels, 0.0f);
  for (int64_t row = 0; row < some; row++)
    for (int64_t c = 0; c < channels; c++) mean[c] += widen(x[row * channels + c]) / float(some);
  for_each_block(threads, n, [&](int64_t part, int64_t first, int64_t size) {
    by_channel(first, size, channels, [&](int64_t i, int64_t c, int64_t m) {
      float *__restrict one = sums.first(part) + c, *__restrict two = sums.second(part) + c;
      const T* __restrict from = x + first + i;
      const float* __restrict near = mean + c;
      for (int64_t k = 0; k < m; k++) {
        const float d = widen(from[k]) - near[k];
        one[k] += d, two[k] += d * d;
      }
    });
  });
  const double* totals = sums.totals();
  for (int64_t c = 0; c < channels; c++) {
    const double d = totals[c] / double(rows), square = totals[channels + c] / double(rows) - d * d;
    mean[c] = float(mean[c] + d);
    var[c] = float(square < 0 ? 0 : square);  // NaN stays
  }
  return 0;
}

// First ∂L/∂y of the normalised y, in `out`, and its sums; then ∂L/∂x in its place, for each time step:
// ∂L/∂x = scale · (g − mean(g) − (x − mean) · invstd² · mean(g · (x − mean))), without the means for fixed statistics.
template <class T>
int normed_backward(const Neuron& z, const Norms& norms, bool training, const T* grad_s, const float* grad_v,
                    const float* kept, const T* s, const uint8_t* bits, const T* x, T* out, float* out_v, float* affine,
                    int64_t n, bool cut, int threads) {
  const int64_t channels = norms.channels, steps = norms.steps, all = steps * channels;
  Sums sums(n, all);
  Scratch<float> factors(2 * all);
  if (!sums.whole() || !factors) return 1;
  for_each_step_back(grad_v, out_v, n, steps, cut, threads,
                     [&](int64_t part, int64_t t, int64_t first, int64_t size, const float* after, float* before) {
    float g[BLOCK];
    const int64_t at = t * n + first;
    backward_block(z, shifted(grad_s, at), after, kept + at, shifted(s, at), shifted(bits, at / 8), out + at, before, g,
                   size);
    if (z.gain != 1)
      for (int64_t i = 0; i < size; i++) put(out + at + i, g[i] *= z.gain);
    by_channel(first, size, channels, [&](int64_t i, int64_t c, int64_t m) {
      float *__restrict one = sums.first(part) + t * channels + c, *__restrict two = sums.second(part) + t * channels + c;
      const T* __restrict from = x + at + i;
      const float *__restrict mean = norms[t].mean + c, *__restrict of_y = g + i;
      for (int64_t k = 0; k < m; k++) one[k] += of_y[k], two[k] += of_y[k] * (widen(from[k]) - mean[k]);
    });
  });
  const double *totals = sums.totals(), rows = double(n / channels);
  float *slope = factors.get(), *offset = slope + all;
  std::fill_n(affine, 2 * channels, 0.0f);
  for (int64_t i = 0; i < all; i++) {
    const double invstd = norms[0].invstd[i], scale = training ? -norms[0].scale[i] / rows : 0.0;
    affine[i % channels] += float(totals[all + i] * invstd);
    affine[channels + i % channels] += float(totals[i]);
    slope[i] = float(scale * invstd * invstd * totals[all + i]);
    offset[i] = float(scale * totals[i]);
  }
  for_each_block(threads, n * steps, [&](int64_t, int64_t first, int64_t size) {
    for (int64_t i = 0; i < size;) {  // a block may reach into the next time step
      const int64_t t = (first + i) / n, m = std::min(size - i, (t + 1) * n - first - i);
      const Norm norm = norms[t];
      by_channel(first + i, m, channels, [&](int64_t j, int64_t c, int64_t count) {
        T* __restrict to = out + first + i + j;
        const T* __restrict from = x + first + i + j;
        const float *__restrict mean = norm.mean + c, *__restrict scale = norm.scale + c;
        const float *__restrict a = slope + t * channels + c, *__restrict b = offset + t * channels + c;
        for (int64_t k = 0; k < count; k++)
          put(to + k, widen(to[k]) * scale[k] + (widen(from[k]) - mean[k]) * a[k] + b[k]);
      });
      i += m;
    }
  });
  return 0;
}

}  // namespace

extern "C" {
// x and s are float or bfloat16. `u_out`, `bits` and `factors` may be null; with bits, n is a multiple of 8. `factors` are
// those of `Norms`, [4, steps, channels]. See `forward`.
void sltt_neuron(const Neuron* z, const float* factors, int64_t channels, int bfloat16, const void* x, const float* v,
                 void* s, float* v_out, int64_t v_step, float* u_out, uint8_t* bits, int64_t n, int64_t steps,
                 int threads) {
  with_type(bfloat16, [&](auto t) {
    forward(*z, Norms{factors, channels, steps}, as(x, t), v, as(s, t), v_out, v_step, u_out, bits, n, steps, threads);
  });
}

// x, rate and by_input are float or bfloat16; by_decay may be null.
void sltt_steady(const Neuron* z, int bfloat16, const void* x, float start, int steps, void* rate, void* by_input,
                 float* by_decay, int64_t n, int threads) {
  with_type(bfloat16, [&](auto t) {
    for_each_block(threads, n, [&](int64_t, int64_t i, int64_t m) {
      steady_block(*z, as(x, t) + i, start, steps, as(rate, t) + i, as(by_input, t) + i,
                   shifted(by_decay, i), m);
    });
  });
}

// `kept` is v for a soft reset and u for a hard one. `grad_s`, `grad_v` and `out_v` may be null, and `s` or `bits`. With
// `factors` the gradient goes through the norm in front too: x is its input, `out` is of x's type, and `affine` gets
// ∂L/∂weight and ∂L/∂bias [2, channels]. Not 0 if there is no memory.
int sltt_neuron_gradient(const Neuron* z, const float* factors, int64_t channels, int training, int bfloat16,
                         int bfloat16_out, const void* grad_s, const float* grad_v, const float* kept, const void* s,
                         const uint8_t* bits, const void* x, void* out, float* out_v, float* affine, int64_t n,
                         int64_t steps, int cut, int threads) {
  return with_type(bfloat16, [&](auto t) {
    if (factors)
      return normed_backward(*z, Norms{factors, channels, steps}, training, as(grad_s, t), grad_v, kept, as(s, t), bits,
                             as(x, t), as(out, t), out_v, affine, n, cut, threads);
    with_type(bfloat16_out, [&](auto g) {
      backward(*z, as(grad_s, t), grad_v, kept, as(s, t), bits, as(out, g), out_v, n, steps, cut, threads);
    });
    return 0;
  });
}

// `Norms` of x [steps, rows, channels] with n elements in a time step: scale, shift, mean and invstd
// [4, steps, channels] in `factors`. In training mode the statistics are those of each time step, and the running ones
// are updated by each, unless they are null; else they are the running ones. `weight` and `bias` may be null. Not 0 if
// there is no memory.
int sltt_norm(int bfloat16, const void* x, int64_t n, int64_t steps, int64_t channels, float* running_mean,
              float* running_var, const float* weight, const float* bias, int training, const double* momenta, double eps,
              float* factors, int threads) {
  for (int64_t t = 0; t < steps; t++, factors += channels) {
    const int64_t all = steps * channels;
    float *scale = factors, *shift = scale + all, *mean = shift + all, *invstd = mean + all;
    if (training) {
      if (with_type(bfloat16, [&](auto z) { return statistics(as(x, z) + t * n, n, channels, mean, invstd, threads); }))
        return 1;
      const double rows = double(n / channels), unbiased = rows / (rows - 1);
      for (int64_t c = 0; running_mean && c < channels; c++) {
        running_mean[c] = float(running_mean[c] + momenta[t] * (double(mean[c]) - running_mean[c]));
        running_var[c] = float(running_var[c] + momenta[t] * (invstd[c] * unbiased - running_var[c]));
      }
    } else {
      std::copy_n(running_mean, channels, mean);
      std::copy_n(running_var, channels, invstd);
    }
    for (int64_t c = 0; c < channels; c++) {
      const double deviation = 1 / std::sqrt(invstd[c] + eps);
      invstd[c] = float(deviation);
      scale[c] = float(weight ? weight[c] * deviation : deviation);
      shift[c] = float((bias ? bias[c] : 0.0) - double(mean[c]) * scale[c]);
    }
  }
  return 0;
}
}
