// A neuron's step: charge, fire and reset in one pass over memory that writes the spikes as bits too; and its gradient.
//
// The equations, and the order in which they round, are those of step.py. A block of elements goes through a few plain
// loops while it is in the cache; the compiler makes vectors of each.
#include "spikes.h"

namespace {

constexpr int64_t BLOCK = 512;     // elements that go through all loops before the next ones
constexpr int64_t PART = 1 << 14;  // elements of a task

enum Surrogate : int32_t { TRIANGLE, RECTANGLE, ARCTAN, FAST_SIGMOID };

struct Neuron {  // shared with native_step.py
  float decay, gain, threshold, rest;
  int32_t soft, detached, above;
  Surrogate surrogate;
  float a, b;     // of the surrogate
  float inverse;  // 1 / a for a power of two, else 0
};

INLINE uint16_t narrow(float v) {  // to bfloat16: to the nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return uint16_t(v == v ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : u >> 16 | 0x40u);
}
INLINE void put(float* to, float v) { *to = v; }
INLINE void put(uint16_t* to, float v) { *to = narrow(v); }

template <class T>
void forward_block(const Neuron& z, const T* __restrict x, const float* __restrict v, T* __restrict s_out,
                   float* __restrict v_out, float* __restrict u_out, uint8_t* __restrict bits, int64_t n) {
  float u[BLOCK], s[BLOCK];
  for (int64_t i = 0; i < n; i++) u[i] = z.gain * widen(x[i]);
  if (z.rest == 0)
    for (int64_t i = 0; i < n; i++) u[i] = z.decay * v[i] + u[i];
  else
    for (int64_t i = 0; i < n; i++) u[i] = z.rest + z.decay * (v[i] - z.rest) + u[i];
  if (z.above)
    for (int64_t i = 0; i < n; i++) s[i] = u[i] - z.threshold > 0 ? 1.0f : 0.0f;
  else
    for (int64_t i = 0; i < n; i++) s[i] = u[i] - z.threshold >= 0 ? 1.0f : 0.0f;
  if (z.soft)
    for (int64_t i = 0; i < n; i++) v_out[i] = u[i] - z.threshold * s[i];
  else
    for (int64_t i = 0; i < n; i++) v_out[i] = u[i] - (u[i] - z.rest) * s[i];
  for (int64_t i = 0; i < n; i++) put(s_out + i, s[i]);
  if (u_out) std::copy_n(u, n, u_out);
  if (bits) pack_part(reinterpret_cast<const uint32_t*>(s), bits, n / 8);
}

// ∂s/∂u at x = u − V_th, in place.
void derivative(const Neuron& z, float* __restrict x, int64_t n) {
  const float inverse = z.inverse;
  switch (z.surrogate) {
    case TRIANGLE:
      if (inverse)  // exact, and faster than a division
        for (int64_t i = 0; i < n; i++) {
          const float y = 1 - std::fabs(x[i]) * inverse;
          x[i] = (y < 0 ? 0.0f : y) * inverse;  // NaN stays
        }
      else
        for (int64_t i = 0; i < n; i++) {
          const float y = 1 - std::fabs(x[i]) / z.a;
          x[i] = (y < 0 ? 0.0f : y) / z.a;
        }
      return;
    case RECTANGLE:
      for (int64_t i = 0; i < n; i++) x[i] = (std::fabs(x[i]) < z.a ? 1.0f : 0.0f) / z.b;
      return;
    case ARCTAN:
      for (int64_t i = 0; i < n; i++) x[i] = 1 / (1 + z.a * x[i] * (z.a * x[i])) * z.b;
      return;
    case FAST_SIGMOID:
      for (int64_t i = 0; i < n; i++) {
        const float y = 1 + z.a * std::fabs(x[i]);
        x[i] = 1 / (y * y) * z.b;
      }
  }
}

// Spikes as 0 and 1, from their bits.
void unpack_part(const uint8_t* __restrict bits, float* __restrict s, int64_t n) {
  for (int64_t j = 0; j < n / 8; j++)
    for (int i = 0; i < 8; i++) s[8 * j + i] = float(bits[j] >> i & 1);
}

// `s` are the spikes where there are no bits.
template <class T, class G>
void backward_block(const Neuron& z, const T* __restrict grad_s, const float* __restrict grad_v,
                    const float* __restrict kept, const T* __restrict s_in, const uint8_t* __restrict bits,
                    G* __restrict out, float* __restrict out_v, int64_t n) {
  float s[BLOCK], fires[BLOCK], g[BLOCK];
  if (bits)
    unpack_part(bits, s, n);
  else
    for (int64_t i = 0; i < n; i++) s[i] = widen(s_in[i]);
  if (z.soft)
    for (int64_t i = 0; i < n; i++) fires[i] = kept[i] - z.threshold * (1 - s[i]);
  else
    for (int64_t i = 0; i < n; i++) fires[i] = kept[i] - z.threshold;
  derivative(z, fires, n);
  if (grad_s)
    for (int64_t i = 0; i < n; i++) g[i] = widen(grad_s[i]) * fires[i];
  else
    std::fill_n(g, n, 0.0f);
  if (grad_v && z.detached)
    for (int64_t i = 0; i < n; i++) g[i] += grad_v[i] * (z.soft ? 1.0f : 1 - s[i]);
  else if (grad_v && z.soft)
    for (int64_t i = 0; i < n; i++) g[i] += grad_v[i] * (1 - fires[i] * z.threshold);
  else if (grad_v)
    for (int64_t i = 0; i < n; i++) g[i] += grad_v[i] * (1 - s[i] - fires[i] * (kept[i] - z.rest));
  for (int64_t i = 0; i < n; i++) put(out + i, g[i]);
  if (out_v)
    for (int64_t i = 0; i < n; i++) out_v[i] = g[i] * z.decay;
}

template <class T>
T* shifted(T* p, int64_t i) { return p ? p + i : nullptr; }

// Call function(first element, elements) for each block.
template <class F>
void for_each_block(int threads, int64_t n, const F& function) {
  for_each(threads, (n + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    for (int64_t i = part * PART, end = std::min(i + PART, n); i < end; i += BLOCK)
      function(i, std::min(BLOCK, end - i));
  });
}

template <class T>
void forward(const Neuron& z, const T* x, const float* v, T* s, float* v_out, float* u_out, uint8_t* bits, int64_t n,
             int threads) {
  for_each_block(threads, n, [&](int64_t i, int64_t m) {
    forward_block(z, x + i, v + i, s + i, v_out + i, shifted(u_out, i), shifted(bits, i / 8), m);
  });
}

template <class T, class G>
void backward(const Neuron& z, const void* grad_s, const float* grad_v, const float* kept, const void* s,
              const uint8_t* bits, void* out, float* out_v, int64_t n, int threads) {
  for_each_block(threads, n, [&](int64_t i, int64_t m) {
    backward_block(z, shifted(static_cast<const T*>(grad_s), i), shifted(grad_v, i), kept + i,
                   shifted(static_cast<const T*>(s), i), shifted(bits, i / 8), static_cast<G*>(out) + i,
                   shifted(out_v, i), m);
  });
}

}  // namespace

extern "C" {
// x and s are float or bfloat16. `u_out` and `bits` may be null; with bits, n is a multiple of 8.
void sltt_neuron(const Neuron* z, int bfloat16, const void* x, const float* v, void* s, float* v_out, float* u_out,
                 uint8_t* bits, int64_t n, int threads) {
  if (bfloat16)
    forward(*z, static_cast<const uint16_t*>(x), v, static_cast<uint16_t*>(s), v_out, u_out, bits, n, threads);
  else
    forward(*z, static_cast<const float*>(x), v, static_cast<float*>(s), v_out, u_out, bits, n, threads);
}

// `kept` is v for a soft reset and u for a hard one. `grad_s`, `grad_v` and `out_v` may be null, and `s` or `bits`.
void sltt_neuron_gradient(const Neuron* z, int bfloat16, int bfloat16_out, const void* grad_s, const float* grad_v,
                          const float* kept, const void* s, const uint8_t* bits, void* out, float* out_v, int64_t n,
                          int threads) {
  if (!bfloat16) return backward<float, float>(*z, grad_s, grad_v, kept, s, bits, out, out_v, n, threads);
  if (bfloat16_out) return backward<uint16_t, uint16_t>(*z, grad_s, grad_v, kept, s, bits, out, out_v, n, threads);
  backward<uint16_t, float>(*z, grad_s, grad_v, kept, s, bits, out, out_v, n, threads);
}
}
