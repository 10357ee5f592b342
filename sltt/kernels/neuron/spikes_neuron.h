// A neuron's step on a block of elements, a few plain loops while it is in the cache; the compiler makes vectors of each.
//
// The equations, and the order in which they round, are those of equations.py.
#pragma once
#include "../spikes.h"

namespace {

constexpr int64_t BLOCK = 512;     // elements that go through all loops before the next ones

enum Surrogate : int32_t { TRIANGLE, RECTANGLE, ARCTAN, FAST_SIGMOID, SIGMOID, EXPONENTIAL, GAUSSIAN };

struct Neuron {  // shared with native_step.py
  float decay, gain, threshold, rest;
  float amount, most;  // a soft reset subtracts the amount for each spike, of which there are at most so many
  int32_t soft, detached, above;
  Surrogate surrogate;
  float a, b;     // of the surrogate
  float inverse;  // 1 / a for a power of two, else 0
};

// BatchNorm of a time step in memory with the channels last: y = scale · x + shift, where scale = weight · invstd.
struct Norm {
  const float *scale, *shift, *mean, *invstd;
  int64_t channels;
};

// The BatchNorm of each time step, in factors [4, steps, channels].
struct Norms {
  const float* factors;
  int64_t channels, steps;
  Norm operator[](int64_t t) const {
    const int64_t n = steps * channels;
    const float* at = factors + t * channels;
    return {at, at + n, at + 2 * n, at + 3 * n, channels};
  }
};

// Call function(element, channel, elements) for each run of channels in n elements from `first` on.
template <class F>
INLINE void by_channel(int64_t first, int64_t n, int64_t channels, const F& function) {
  for (int64_t i = 0, c = first % channels; i < n; c = 0) {
    const int64_t m = std::min(channels - c, n - i);
    function(i, c, m);
    i += m;
  }
}

// The input current of elements from `first` on.
template <class T>
void current(const Neuron& z, const Norm& norm, const T* __restrict x, int64_t first, float* __restrict u, int64_t n) {
  if (!norm.scale) {
    for (int64_t i = 0; i < n; i++) u[i] = z.gain * widen(x[i]);
    return;
  }
  by_channel(first, n, norm.channels, [&](int64_t i, int64_t c, int64_t m) {
    const float *__restrict scale = norm.scale + c, *__restrict shift = norm.shift + c;
    const T* __restrict from = x + i;
    float* __restrict to = u + i;
    for (int64_t k = 0; k < m; k++) to[k] = z.gain * (widen(from[k]) * scale[k] + shift[k]);
  });
}

template <class T>
void forward_block(const Neuron& z, const Norm& norm, const T* __restrict x, const float* __restrict v,
                   T* __restrict s_out, float* __restrict v_out, float* __restrict u_out, uint8_t* __restrict bits,
                   int64_t first, int64_t n) {
  float u[BLOCK], s[BLOCK];
  current(z, norm, x, first, u, n);
  for (int64_t i = 0; i < n; i++) u[i] += z.rest == 0 ? z.decay * v[i] : z.rest + z.decay * (v[i] - z.rest);
  if (z.most == 1)
    for (int64_t i = 0; i < n; i++) s[i] = (z.above ? u[i] - z.threshold > 0 : u[i] - z.threshold >= 0) ? 1.0f : 0.0f;
  else
    for (int64_t i = 0; i < n; i++) s[i] = std::max(0.0f, std::min(std::trunc(u[i] / z.threshold), z.most));
  for (int64_t i = 0; i < n; i++) v_out[i] = u[i] - (z.soft ? z.amount : u[i] - z.rest) * s[i];
  for (int64_t i = 0; i < n; i++) put(s_out + i, s[i]);
  if (u_out) std::copy_n(u, n, u_out);
  if (bits)
    for (int64_t j = 0; j < n / 8; j++) {
      unsigned byte = 0;
      for (int i = 0; i < 8; i++) byte |= unsigned(s[8 * j + i] != 0) << i;
      bits[j] = uint8_t(byte);
    }
}

template <class T>
T* shifted(T* p, int64_t i) { return p ? p + i : nullptr; }

}  // namespace
