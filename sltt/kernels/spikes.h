// Convolutions whose input is spikes, packed as bits: only active inputs are touched, and a product is a sum.
//
// Bit i of byte j is element 8 j + i of the channels-last memory [n, h, w, ci]. Gradients and
// results are channels-last, float or bfloat16; all sums are float. Portable C++17 with the vectors of GCC and Clang.
//
// Every sum has a fixed order: how work is split depends on the shape, never on the number of threads.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// PyTorch's OpenMP, found in the process: linking one, or any pragma, could start a second pool of threads. The OpenMP
// libraries of GCC, LLVM and Intel all have these two functions.
#ifdef __linux__
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
constexpr bool HAS_OPENMP = true;
#else  // a library sees no symbols of another: native.py gives these, of LLVM's or Intel's
struct OpenMP {
  void (*fork)(void* place, int32_t, void (*task)(int32_t*, int32_t*, void (*)(void*), void*), ...);
  int32_t (*number)(void* place);
  void (*limit)(void* place, int32_t number, int32_t threads);
  int (*thread)();
};
extern "C" inline OpenMP sltt_openmp = {};
#define HAS_OPENMP (sltt_openmp.fork != nullptr)
static int omp_get_thread_num() { return sltt_openmp.thread(); }
static void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  static struct { int32_t none, flags, no[2]; const char* source; } place{0, 2, {0, 0}, ";sltt;;0;0;;"};  // ident_t
  sltt_openmp.limit(&place, sltt_openmp.number(&place), int32_t(threads));
  sltt_openmp.fork(&place, 2, [](int32_t*, int32_t*, void (*f)(void*), void* p) { f(p); }, function, data);
}
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
// The compiler must take this pointer as it is: else it splits off invariant parts, and runs out of registers.
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))

constexpr int64_t TILE = 128;   // output pixels of a forward task: their sums stay in the cache
constexpr int64_t CHUNK = 256;  // pixels of the gradient that are summed at a time, in the cache
constexpr int64_t TASKS = 16;   // of a weight gradient, at least: what more threads can share
constexpr int64_t WORD = 64;    // channels in a block of the input

struct Conv {  // shared with sparse.py
  int64_t n, h, w, ci, co, kh, kw, sh, sw, ph, pw, oh, ow;
  int64_t words() const { return (ci + WORD - 1) / WORD; }          // blocks of input channels
  int64_t block() const { return std::min(ci, WORD); }              // channels of a block, the last one may have fewer
  int64_t padded() const { return (co + 15) / 16 * 16; }            // output channels in whole vectors
  bool flat() const { return kh * kw * sh * sw == 1 && !ph && !pw && oh == h && ow == w; }  // pixels are independent
};

struct Outputs {  // a block of output channels
  int64_t from, width;
};
// The i-th of as few blocks as there are: of `widest`, then of 32 and of 16.
int64_t count_blocks(const Conv& z, int64_t widest) {
  const int64_t rest = z.padded() % widest;
  return z.padded() / widest + (rest & 32 ? 1 : 0) + (rest & 16 ? 1 : 0);
}
Outputs block_of(const Conv& z, int64_t widest, int64_t i) {
  const int64_t whole = z.padded() / widest * widest;
  if (i * widest < whole) return {i * widest, widest};
  const int64_t rest = z.padded() - whole;
  if (i * widest == whole && rest & 32) return {whole, 32};
  return {z.padded() - 16, 16};
}

template <class T>
class Scratch {  // not cleared; null if there is no memory
 public:
#ifdef _WIN32
  explicit Scratch(int64_t n) : p(static_cast<T*>(_aligned_malloc((n * sizeof(T) / 64 + 1) * 64, 64))) {}
  ~Scratch() { _aligned_free(p); }
#else
  explicit Scratch(int64_t n) : p(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64))) {}
  ~Scratch() { std::free(p); }
#endif
  Scratch(const Scratch&) = delete;
  T* get() const { return p; }
  T& operator[](int64_t i) const { return p[i]; }
  explicit operator bool() const { return p; }

 private:
  T* p;
};

// Call function(task, thread) for each task below n; a thread takes `grain` tasks at a time.
template <class F>
void for_each(int threads, int64_t n, int64_t grain, const F& function) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t thread) {
    for (int64_t from; (from = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      for (int64_t task = from; task < std::min(from + grain, n); task++) function(task, thread);
  };
  if (threads == 1 || n <= grain || !HAS_OPENMP) return work(0);
  GOMP_parallel([](void* p) { (*static_cast<decltype(work)*>(p))(omp_get_thread_num()); }, &work, unsigned(threads), 0);
}

INLINE V load(const float* p) { return *reinterpret_cast<const V*>(p); }
INLINE V load(const uint16_t* p) {
  return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const H*>(p), U) << 16);
}
INLINE V load_apart(const float* p, int64_t step) {  // numbers that are `step` apart
#ifdef __AVX512F__
  return V(_mm512_i32gather_ps(__m512i(U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * uint32_t(step)), p, 4));
#else
  return V{p[0], p[step], p[2 * step], p[3 * step], p[4 * step], p[5 * step], p[6 * step], p[7 * step]};
#endif
}
INLINE void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
INLINE void store(uint16_t* p, V v) {  // rounded to the nearest, ties to even; NaN stays NaN
  U u = reinterpret_cast<U>(v);
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  *reinterpret_cast<H*>(p) = __builtin_convertvector(v == v ? rounded : (u >> 16 | 0x40u), H);
}
INLINE float widen(float v) { return v; }
INLINE float widen(uint16_t v) {
  const uint32_t u = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
INLINE uint16_t narrow(float v) {  // to bfloat16: to the nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return uint16_t(v == v ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : u >> 16 | 0x40u);
}
INLINE void put(float* to, float v) { *to = v; }
INLINE void put(uint16_t* to, float v) { *to = narrow(v); }

constexpr int WIDEST = (LANES == 16 ? 16 : 8);  // vectors of outputs whose sums are in registers
constexpr int64_t COLUMNS = WIDEST * LANES;

// Call function(NV, column) for each part of `columns` that has NV whole vectors, which is a constant.
template <class F>
INLINE void for_columns(int64_t columns, const F& function) {
  int64_t at = 0;
  while (at < columns) {
    const int64_t left = (columns - at + LANES - 1) / LANES;
    const auto part = [&](auto width) { function(width, at), at += width() * LANES; };
    if (left >= WIDEST) part(std::integral_constant<int, WIDEST>());
    else if (left >= 4) part(std::integral_constant<int, 4>());
    else if (left >= 2) part(std::integral_constant<int, 2>());
    else part(std::integral_constant<int, 1>());
  }
}

// Call function(number), where the number has the type of elements: of float, or bfloat16 as uint16_t.
template <class F>
INLINE auto with_type(int bfloat16, const F& function) {
  return bfloat16 ? function(uint16_t()) : function(float());
}
template <class T>
INLINE const T* as(const void* p, T) { return static_cast<const T*>(p); }
template <class T>
INLINE T* as(void* p, T) { return static_cast<T*>(p); }

template <class T>
constexpr T MAGNITUDE = T(~(T(1) << (8 * sizeof(T) - 1)));  // without the sign: -0 is no spike

// Bits of elements that are zero or not. The loop is plain, so that the compiler makes vectors of it; with AVX-512, a
// comparison gives the bits.
template <class T>
static inline void pack_part(const T* __restrict x, uint8_t* __restrict bits, int64_t bytes) {
  int64_t j = 0;
#ifdef __AVX512BW__
  for (; sizeof(T) == 4 && j + 2 <= bytes; j += 2) {
    const uint16_t some = _mm512_test_epi32_mask(_mm512_loadu_si512(x + 8 * j), _mm512_set1_epi32(MAGNITUDE<T>));
    std::memcpy(bits + j, &some, 2);
  }
  for (; sizeof(T) == 2 && j + 4 <= bytes; j += 4) {
    const uint32_t some = _mm512_test_epi16_mask(_mm512_loadu_si512(x + 8 * j), _mm512_set1_epi16(MAGNITUDE<T>));
    std::memcpy(bits + j, &some, 4);
  }
#endif
  for (; j < bytes; j++) {
    unsigned byte = 0;
    for (int i = 0; i < 8; i++) byte |= unsigned((x[8 * j + i] & MAGNITUDE<T>) != 0) << i;
    bits[j] = uint8_t(byte);
  }
}

static inline int64_t count(const uint8_t* bits, int64_t bytes) {
  int64_t n = 0;
  for (; bytes >= 8; bits += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, bits, 8);
    n += __builtin_popcountll(word);
  }
  for (; bytes > 0; bits++, bytes--) n += __builtin_popcount(*bits);
  return n;
}

// Bits of the q-th block of channels at a pixel.
INLINE uint64_t word_at(const uint8_t* bits, const Conv& z, int64_t pixel, int64_t q) {
  const int64_t first = pixel * z.ci + q * WORD, n = std::min(WORD, z.ci - q * WORD), shift = first & 7;
  const uint8_t* p = bits + (first >> 3);
  uint64_t word = 0;
  if (n + shift >= WORD) {
    std::memcpy(&word, p, 8);
    if (!shift) return word;
    word >>= shift;
    if (n + shift > WORD) word |= uint64_t(p[8]) << (WORD - shift);
  } else {
    for (int64_t i = 0; 8 * i < n + shift; i++) word |= uint64_t(p[i]) << 8 * i;
    word >>= shift;
  }
  return n == WORD ? word : word & ((uint64_t(1) << n) - 1);
}

// The set bits from one position to another.
INLINE int64_t count_between(const uint8_t* bits, int64_t from, int64_t to) {
  const auto before = [&](int64_t at) { return at & 7 ? __builtin_popcount(bits[at >> 3] & ((1 << (at & 7)) - 1)) : 0; };
  return count(bits + (from >> 3), (to >> 3) - (from >> 3)) - before(from) + before(to);
}

}  // namespace
