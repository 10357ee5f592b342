// Convolutions whose input is spikes, packed as bits: only active inputs are touched, and a product is a sum.
//
// Bit i of byte j is element 8 j + i of the channels-last memory [n, h, w, ci]; ci is a multiple of 8. Gradients and
// results are channels-last, float or bfloat16; all sums are float. Portable C++17 with the vectors of GCC and Clang.
//
// Every sum has a fixed order: how work is split depends on the shape, never on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

// PyTorch's OpenMP, found in the process: linking one, or any pragma, could start a second pool of threads. The OpenMP
// libraries of GCC, LLVM and Intel all have these two functions.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);

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

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
struct Scratch : std::unique_ptr<T[], Free> {  // not cleared; null if there is no memory
  explicit Scratch(int64_t n)
      : std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64))) {}
};

// Call function(task, thread) for each task below n; a thread takes `grain` tasks at a time.
template <class F>
void for_each(int threads, int64_t n, int64_t grain, const F& function) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t thread) {
    for (int64_t from; (from = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      for (int64_t task = from; task < std::min(from + grain, n); task++) function(task, thread);
  };
  if (threads == 1 || n <= grain) return work(0);
  GOMP_parallel([](void* p) { (*static_cast<decltype(work)*>(p))(omp_get_thread_num()); }, &work, unsigned(threads), 0);
}

INLINE V load(const float* p) { return *reinterpret_cast<const V*>(p); }
INLINE V load(const uint16_t* p) {
  return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const H*>(p), U) << 16);
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

// Bits of the q-th block of channels at a pixel.
INLINE uint64_t word_at(const uint8_t* bits, const Conv& z, int64_t pixel, int64_t q) {
  const uint8_t* p = bits + (pixel * z.ci + q * WORD) / 8;
  uint64_t word = 0;
  if (z.ci - q * WORD >= WORD)
    std::memcpy(&word, p, 8);
  else
    for (int64_t i = 0; i < (z.ci - q * WORD) / 8; i++) word |= uint64_t(p[i]) << 8 * i;
  return word;
}

int64_t count(const uint8_t* bits, int64_t bytes) {
  int64_t n = 0;
  for (; bytes >= 8; bits += 8, bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, bits, 8);
    n += __builtin_popcountll(word);
  }
  for (; bytes > 0; bits++, bytes--) n += __builtin_popcount(*bits);
  return n;
}

// ---------------------------------------------------------------------------------------------------------- forward

// For each input row and block of channels: the active x · block + c in ascending order, and where those of a pixel
// begin. The columns under a kernel row follow each other, so an output's sum is one run through the list.
struct Events {
  const uint32_t* at;
  const uint32_t* begin;  // [row][q][w + 1]
};
void list_row(const uint8_t* bits, const Conv& z, int64_t row, uint32_t next, uint32_t* at, uint32_t* begin) {
  for (int64_t q = 0; q < z.words(); q++) {
    uint32_t* start = begin + (row * z.words() + q) * (z.w + 1);
    for (int64_t x = 0; x < z.w; x++) {
      start[x] = next;
      for (uint64_t m = word_at(bits, z, row * z.w + x, q); m; m &= m - 1)
        at[next++] = uint32_t(x * z.block() + __builtin_ctzll(m));
    }
    start[z.w] = next;
  }
}

// Add one kernel row to `n` output pixels beside each other. `weights` [kw][block][N]; `x` is the first input column.
template <int NV>
__attribute__((noinline)) void add_row(const Conv& z, const float* in, int64_t in_step, float* out, int64_t out_step,
                                       const uint32_t* at, const uint32_t* begin, const float* weights, int64_t x,
                                       int64_t n) {
  constexpr int64_t N = NV * LANES;
  const int64_t column = z.block() * N;
  for (; n > 0; n--, in += in_step, out += out_step, x += z.sw) {
    V sum[NV];
    for (int j = 0; j < NV; j++) sum[j] = load(in + j * LANES);
    const int64_t from = std::clamp<int64_t>(x, 0, z.w), to = std::clamp<int64_t>(x + z.kw, 0, z.w);
    const uint32_t *e = at + begin[from], *end = at + begin[to];
    const float* shifted = weights - x * column;
    for (; e < end; e++) {
      const float* row = shifted + *e * N;
      OPAQUE(row);
      for (int j = 0; j < NV; j++) sum[j] += load(row + j * LANES);
    }
    for (int j = 0; j < NV; j++) store(out + j * LANES, sum[j]);
  }
}

// Outputs `block` of the pixels from..to. `sums` [to - from][N] holds what was added so far.
template <int NV, class T>
void forward_tile(const Conv& z, const Events& events, const float* packed, const float* bias, T* y, Outputs block,
                  int64_t from, int64_t to, float* sums) {
  constexpr int64_t N = NV * LANES;
  const int64_t valid = std::min(N, z.co - block.from), q_last = z.words() - 1;
  const bool direct = std::is_same_v<T, float> && valid == N;  // the last pass writes the result
  float first[N] = {};
  if (bias) std::copy_n(bias + block.from, valid, first);
  packed += block.from * z.words() * z.block() * z.kh * z.kw;
  for (int64_t q = 0; q <= q_last; q++)
    for (int64_t i = 0; i < z.kh; i++, packed += z.kw * z.block() * N) {
      const bool begins = q == 0 && i == 0, ends = direct && q == q_last && i == z.kh - 1;
      for (int64_t p = from; p < to;) {
        const int64_t ox = p % z.ow, line = p / z.ow, n = std::min(z.ow - ox, to - p);
        const int64_t iy = line % z.oh * z.sh + i - z.ph, x = ox * z.sw - z.pw;
        const bool inside = iy >= 0 && iy < z.h;
        float* sum = sums + (p - from) * N;
        float* out = ends ? reinterpret_cast<float*>(y) + p * z.co + block.from : sum;
        const float* in = begins ? first : sum;
        const uint32_t* row = events.begin + ((line / z.oh * z.h + iy) * z.words() + q) * (z.w + 1);
        if (inside)
          add_row<NV>(z, in, begins ? 0 : N, out, ends ? z.co : N, events.at, row, packed, x, n);
        else if (begins || ends)
          for (int64_t k = 0; k < n; k++)
            std::memcpy(out + k * (ends ? z.co : N), in + k * (begins ? 0 : N), sizeof first);
        p += n;
      }
    }
  if (direct) return;
  for (int64_t p = from; p < to; p++, sums += N) {
    T* out = y + p * z.co + block.from;
    T whole[N];
    for (int j = 0; j < NV; j++) store(whole + j * LANES, load(sums + j * LANES));
    std::memcpy(out, whole, valid * sizeof(T));
  }
}

template <class T>
int forward(const uint8_t* bits, const Conv& z, const float* packed, const float* bias, T* y, int threads) {
  const int64_t rows = z.n * z.h, row_bytes = z.w * z.ci / 8;
  Scratch<uint32_t> first(rows + 1), begin(rows * z.words() * (z.w + 1));
  Scratch<float> sums(threads * TILE * WORD);
  if (!first || !begin || !sums) return 1;
  first[0] = 0;
  for (int64_t row = 0; row < rows; row++) first[row + 1] = first[row] + count(bits + row * row_bytes, row_bytes);
  Scratch<uint32_t> at(first[rows]);
  if (!at) return 1;
  const int64_t pixels = z.n * z.oh * z.ow, tiles = (pixels + TILE - 1) / TILE, blocks = count_blocks(z, 64);
  const Events events{at.get(), begin.get()};
  for_each(threads, rows, 8, [&](int64_t row, int64_t) { list_row(bits, z, row, first[row], at.get(), begin.get()); });
  for_each(threads, blocks * tiles, 1, [&](int64_t task, int64_t thread) {
    const Outputs block = block_of(z, 64, task / tiles);
    const int64_t from = task % tiles * TILE, to = std::min(from + TILE, pixels);
    float* mine = sums.get() + thread * TILE * WORD;
    if (block.width == 64) forward_tile<64 / LANES>(z, events, packed, bias, y, block, from, to, mine);
    if (block.width == 32) forward_tile<32 / LANES>(z, events, packed, bias, y, block, from, to, mine);
    if (block.width == 16) forward_tile<16 / LANES>(z, events, packed, bias, y, block, from, to, mine);
  });
  return 0;
}

// -------------------------------------------------------------------------------------------------- weight gradient

// A stride is taken apart into phases: inputs with (y + ph) mod sh = f meet the kernel rows f, f + sh, ... only. With
// y + ph = f + sh · r, kernel row f + sh · j meets output row r - j: a convolution of stride 1. The same for columns.
struct Axis {
  int64_t low, high;   // of r, over all phases
  int64_t taps;        // kernel rows of a phase, at most
  int64_t before;      // output rows -before .. -1 and `after` behind the last are zeros
  int64_t shared;      // zeros that end one row (or image) and begin the next
  Axis(int64_t size, int64_t k, int64_t stride, int64_t pad, int64_t out) : low(pad / stride), taps((k - 1) / stride + 1) {
    high = std::max(low, std::min((size - 1 + pad) / stride + 1, out + taps - 1));
    before = std::max<int64_t>(0, taps - 1 - low);
    shared = std::min(before, std::max<int64_t>(0, high - out));
  }
  int64_t range() const { return high - low; }
  int64_t first() const { return low - (taps - 1); }              // the output row that is stored first
};

// A chunk is some rows of r of an image, or some images. Gradients of a chunk are copied with zeros around them, so that
// an input at position p meets the gradient at p + a constant for each kernel element.
struct Chunks {
  Axis y, x;
  int64_t rows, images, per_image, total, height, pitch;
  explicit Chunks(const Conv& z) : y(z.h, z.kh, z.sh, z.ph, z.oh), x(z.w, z.kw, z.sw, z.pw, z.ow) {
    const int64_t pixels = std::max<int64_t>(1, y.range() * x.range());
    pitch = std::max<int64_t>(1, x.range() + x.taps - 1 - x.shared);
    images = std::clamp<int64_t>(CHUNK / pixels, 1, z.n);
    rows = std::max<int64_t>(1, y.range());
    if (images == 1) {
      const int64_t parts = std::min((pixels + CHUNK - 1) / CHUNK, rows);
      rows = (rows + parts - 1) / parts;
    }
    per_image = (std::max<int64_t>(1, y.range()) + rows - 1) / rows;
    total = (z.n + images - 1) / images * per_image;
    height = rows + y.taps - 1 - (images > 1 ? y.shared : 0);
  }
  int64_t lines() const { return (images - 1) * height + rows + y.taps - 1; }
  int64_t stored() const { return lines() * pitch + x.taps; }                        // pixels of the copied gradient
  int64_t words() const { return (((images - 1) * height + rows) * pitch + 63) / 64; }  // of positions
  int64_t image(int64_t chunk) const { return chunk / per_image * images; }
  int64_t row(int64_t chunk) const { return y.low + chunk % per_image * rows; }
};

INLINE void transpose(uint64_t* m) {  // bit c of m[p] becomes bit p of m[c]; Hacker's Delight, 7-3
  uint64_t mask = 0xffffffffull;
  for (int j = 32; j; j >>= 1, mask ^= mask << j)
    for (int base = 0; base < 64; base += 2 * j)
      for (int k = base; k < base + j; k++) {
        const uint64_t t = ((m[k] >> j) ^ m[k + j]) & mask;
        m[k] ^= t << j;
        m[k + j] ^= t;
      }
}

// Bits of a phase of a chunk by channel: [ci][words], a bit for each position. `by_position` [words · 64] is scratch.
void transpose_chunk(const uint8_t* bits, const Conv& z, const Chunks& m, int64_t chunk, int64_t fy, int64_t fx,
                     uint64_t* by_channel, uint64_t* by_position) {
  const int64_t words = m.words(), image = m.image(chunk), row = m.row(chunk);
  for (int64_t q = 0; q < z.words(); q++) {
    std::fill_n(by_position, words * 64, 0);
    for (int64_t i = 0; i < std::min(m.images, z.n - image); i++)
      for (int64_t r = row; r < std::min(row + m.rows, m.y.high); r++) {
        const int64_t iy = fy + z.sh * r - z.ph;
        if (iy < 0 || iy >= z.h) continue;
        uint64_t* to = by_position + (i * m.height + r - row) * m.pitch;
        for (int64_t c = m.x.low; c < m.x.high; c++) {
          const int64_t ix = fx + z.sw * c - z.pw;
          if (ix >= 0 && ix < z.w) to[c - m.x.low] = word_at(bits, z, ((image + i) * z.h + iy) * z.w + ix, q);
        }
      }
    const int64_t channels = std::min(WORD, z.ci - q * WORD);
    for (int64_t w = 0; w < words; w++) {
      transpose(by_position + w * 64);
      for (int64_t c = 0; c < channels; c++) by_channel[(q * WORD + c) * words + w] = by_position[w * 64 + c];
    }
  }
}

// Copy the gradients of a chunk and of a block of N output channels, with zeros around them: [lines][pitch][N].
template <int NV, class T>
void copy_gradient(const Conv& z, const Chunks& m, int64_t chunk, Outputs block, const T* g, float* to) {
  constexpr int64_t N = NV * LANES;
  const int64_t valid = std::min(N, z.co - block.from), left = std::clamp<int64_t>(-m.x.first(), 0, m.pitch);
  const int64_t start = std::max<int64_t>(0, m.x.first());
  const int64_t n = std::clamp<int64_t>(z.ow - start, 0, m.pitch - left);
  for (int64_t line = 0; line < m.lines(); line++, to += m.pitch * N) {
    const int64_t i = std::min(line / m.height, m.images - 1), image = m.image(chunk) + i;
    const int64_t oy = m.row(chunk) - (m.y.taps - 1) + line - i * m.height;
    if (image >= z.n || oy < 0 || oy >= z.oh) {
      std::fill_n(to, m.pitch * N, 0.0f);
      continue;
    }
    std::fill_n(to, left * N, 0.0f);
    float* d = to + left * N;
    const T* s = g + ((image * z.oh + oy) * z.ow + start) * z.co + block.from;
    if (valid == N)
      for (int64_t x = 0; x < n; x++, d += N, s += z.co)
        for (int j = 0; j < NV; j++) store(d + j * LANES, load(s + j * LANES));
    else
      for (int64_t x = 0; x < n; x++, d += N, s += z.co)
        for (int64_t j = 0; j < N; j++) d[j] = j < valid ? widen(s[j]) : 0.0f;
    std::fill_n(d, (m.pitch - left - n) * N, 0.0f);
  }
  std::fill_n(to, m.x.taps * N, 0.0f);
}

// For each channel, sums over its active positions of TY × TX kernel elements, in registers. `g` is the gradient that
// the first element meets at position 0; the next kernel row meets the gradient row before. `grad` is the sum of the
// first element of the first channel.
struct Steps {
  int64_t channel, row, column;  // in `grad`
};
template <int NV, int TY, int TX>
__attribute__((noinline)) void accumulate(int64_t channels, const uint64_t* by_channel, int64_t words, const float* g,
                                          int64_t pitch, float* grad, Steps step, bool begins) {
  constexpr int64_t N = NV * LANES;
  for (int64_t c = 0; c < channels; c++, by_channel += words, grad += step.channel) {
    V sum[TY][TX][NV];
    for (int y = 0; y < TY; y++)
      for (int x = 0; x < TX; x++)
        for (int j = 0; j < NV; j++)
          sum[y][x][j] = begins ? V{} : load(grad + y * step.row + x * step.column + j * LANES);
    for (int64_t w = 0; w < words; w++)
      for (uint64_t m = by_channel[w]; m; m &= m - 1) {
        const float* p = g + (w * 64 + __builtin_ctzll(m)) * N;
        OPAQUE(p);
        for (int y = 0; y < TY; y++)
          for (int x = 0; x < TX; x++)
            for (int j = 0; j < NV; j++) sum[y][x][j] += load(p - y * pitch - x * N + j * LANES);
      }
    for (int y = 0; y < TY; y++)
      for (int x = 0; x < TX; x++)
        for (int j = 0; j < NV; j++) store(grad + y * step.row + x * step.column + j * LANES, sum[y][x][j]);
  }
}

// All kernel elements of a phase: at once where their sums fit the registers, else by rows and parts of rows.
template <int NV>
void accumulate_phase(const Conv& z, const Chunks& m, int64_t fy, int64_t fx, const uint64_t* by_channel, const float* g,
                      float* grad, bool begins) {
  constexpr int64_t N = NV * LANES;
  const int64_t ty = (z.kh - fy + z.sh - 1) / z.sh, tx = (z.kw - fx + z.sw - 1) / z.sw, words = m.words();
  const Steps step{z.kh * z.kw * N, z.sh * z.kw * N, z.sw * N};
  const auto run = [&](auto function, int64_t y, int64_t x) {
    function(z.ci, by_channel, words, g + ((m.y.taps - 1 - y) * m.pitch + m.x.taps - 1 - x) * N, m.pitch * N,
             grad + ((fy + z.sh * y) * z.kw + fx + z.sw * x) * N, step, begins);
  };
  if (LANES == 16 && ty == 3 && tx == 3) return run(accumulate<NV, 3, 3>, 0, 0);
  if (LANES == 16 && ty == 2 && tx == 2) return run(accumulate<NV, 2, 2>, 0, 0);
  if (LANES == 16 && ty == 2 && tx == 1) return run(accumulate<NV, 2, 1>, 0, 0);
  for (int64_t y = 0; y < ty; y++)
    for (int64_t x = 0; x < tx; x += 3)
      if (tx - x >= 3)
        run(accumulate<NV, 1, 3>, y, x);
      else if (tx - x == 2)
        run(accumulate<NV, 1, 2>, y, x);
      else
        run(accumulate<NV, 1, 1>, y, x);
}

template <int NV, class T>
void gradient_task(const Conv& z, const Chunks& m, Outputs block, int64_t from, int64_t to, const uint64_t* by_channel,
                   const T* g, float* copied, float* grad) {
  const int64_t each = z.ci * m.words();
  for (int64_t chunk = from; chunk < to; chunk++) {
    copy_gradient<NV>(z, m, chunk, block, g, copied);
    for (int64_t fy = 0; fy < std::min(z.sh, z.kh); fy++)
      for (int64_t fx = 0; fx < std::min(z.sw, z.kw); fx++) {
        const int64_t phase = (chunk * std::min(z.sh, z.kh) + fy) * std::min(z.sw, z.kw) + fx;
        accumulate_phase<NV>(z, m, fy, fx, by_channel + phase * each, copied, grad, chunk == from);
      }
  }
}

// Add the parts [parts][ci][kh kw][width] of a block in their order, for eight input channels from `c0` on, and write
// them by output channel.
void write_gradient(const Conv& z, Outputs block, int64_t c0, float* part, int64_t parts, int64_t part_size, float one,
                    float* out, const int64_t* stride) {
  const int64_t k = z.kh * z.kw, width = block.width, valid = std::min(width, z.co - block.from);
  part += c0 * k * width;
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < 8 * k * width; i++) part[i] += part[p * part_size + i];
  for (int64_t t = 0; t < k; t++)
    for (int64_t j = 0; j < valid; j++) {
      float* to = out + (block.from + j) * stride[0] + c0 * stride[1] + t / z.kw * stride[2] + t % z.kw * stride[3];
      for (int64_t c = 0; c < 8; c++) to[c * stride[1]] = one * part[(c * k + t) * width + j];
    }
}

template <class T>
int weight_gradient(const uint8_t* bits, const Conv& z, const T* g, float one, float* out, const int64_t* stride,
                    int threads) {
  const Chunks m(z);
  const int64_t phase_rows = std::min(z.sh, z.kh), phase_columns = std::min(z.sw, z.kw);
  const int64_t blocks = count_blocks(z, 32), parts = std::min(m.total, (TASKS + blocks - 1) / blocks);
  const int64_t each = z.ci * m.words(), part_size = z.ci * z.kh * z.kw * 32, scratch = m.stored() * 32 + 16;
  const int64_t phases = phase_rows * phase_columns;
  Scratch<uint64_t> by_channel(m.total * phases * each), by_position(threads * m.words() * 64);
  Scratch<float> copied(threads * scratch), grads((parts == 1 ? threads : blocks * parts) * part_size);
  if (!by_channel || !by_position || !copied || !grads) return 1;
  for_each(threads, m.total * phases, 1, [&](int64_t i, int64_t thread) {
    const int64_t phase = i % phases;
    transpose_chunk(bits, z, m, i / phases, phase / phase_columns, phase % phase_columns, by_channel.get() + i * each,
                    by_position.get() + thread * m.words() * 64);
  });
  for_each(threads, blocks * parts, 1, [&](int64_t task, int64_t thread) {
    const Outputs block = block_of(z, 32, task / parts);
    const int64_t part = task % parts, from = m.total * part / parts, to = m.total * (part + 1) / parts;
    float* grad = grads.get() + (parts == 1 ? thread : task) * part_size;
    float* mine = copied.get() + thread * scratch;
    if (block.width == 32)
      gradient_task<32 / LANES>(z, m, block, from, to, by_channel.get(), g, mine, grad);
    else
      gradient_task<16 / LANES>(z, m, block, from, to, by_channel.get(), g, mine, grad);
    if (parts == 1)  // while it is in the cache
      for (int64_t c = 0; c < z.ci; c += 8) write_gradient(z, block, c, grad, 1, part_size, one, out, stride);
  });
  if (parts > 1)
    for_each(threads, blocks * (z.ci / 8), 1, [&](int64_t i, int64_t) {
      const int64_t b = i % blocks;
      float* part = grads.get() + b * parts * part_size;
      write_gradient(z, block_of(z, 32, b), i / blocks * 8, part, parts, part_size, one, out, stride);
    });
  return 0;
}

}  // namespace

extern "C" {
int64_t sltt_count(const uint8_t* bits, int64_t bytes) { return count(bits, bytes); }

// weight[co][ci][kh][kw] of any strides, times `one`, to [block of outputs][q][kh][kw][block of inputs][width].
void sltt_pack(const float* weight, const int64_t* stride, const Conv* conv, float one, float* packed, int threads) {
  const Conv& z = *conv;
  const int64_t blocks = count_blocks(z, 64);
  for_each(threads, blocks * z.words(), 1, [&](int64_t i, int64_t) {
    const int64_t q = i % z.words(), k = z.kh * z.kw, channels = std::min(WORD, z.ci - q * WORD);
    const Outputs block = block_of(z, 64, i / z.words());
    float* to = packed + (block.from * z.words() + q * block.width) * z.block() * k;
    for (int64_t t = 0; t < k; t++, to += z.block() * block.width)
      for (int64_t c0 = 0; c0 < channels; c0 += 8)
        for (int64_t j = 0; j < block.width; j++) {
          const bool valid = block.from + j < z.co;
          const float* s = weight + t / z.kw * stride[2] + t % z.kw * stride[3] + (q * WORD + c0) * stride[1];
          s += valid ? (block.from + j) * stride[0] : 0;
          for (int64_t c = 0; c < 8; c++) to[(c0 + c) * block.width + j] = valid ? one * s[c * stride[1]] : 0.0f;
        }
  });
}

// 0, or 1 if there is no memory.
int sltt_forward(const uint8_t* bits, const Conv* z, const float* packed, const float* bias, void* y, int bfloat16,
                 int threads) {
  return bfloat16 ? forward(bits, *z, packed, bias, static_cast<uint16_t*>(y), threads)
                  : forward(bits, *z, packed, bias, static_cast<float*>(y), threads);
}

// 0, or 1 if there is no memory.
int sltt_weight_gradient(const uint8_t* bits, const Conv* z, const void* g, int bfloat16, float one, float* out,
                         const int64_t* stride, int threads) {
  return bfloat16 ? weight_gradient(bits, *z, static_cast<const uint16_t*>(g), one, out, stride, threads)
                  : weight_gradient(bits, *z, static_cast<const float*>(g), one, out, stride, threads);
}
}
