// The gradient of the weights: for each input channel, the sum of the gradients around its active pixels.
#include "../spikes.h"

namespace {

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

// The sums of independent pixels, whose gradients lie beside each other as the sums need them. Those of a chunk are added
// up before they enter `grad`: one sum over all pixels would round more.
template <int NV, class T>
__attribute__((noinline)) void accumulate_flat(int64_t channels, const uint64_t* by_channel, int64_t words, const T* g,
                                               int64_t pitch, float* grad, int64_t grad_pitch, bool begins) {
  for (int64_t c = 0; c < channels; c++, by_channel += words, grad += grad_pitch) {
    V sum[NV] = {};
    for (int64_t w = 0; w < words; w++)
      for (uint64_t m = by_channel[w]; m; m &= m - 1) {
        const T* p = g + (w * 64 + __builtin_ctzll(m)) * pitch;
        OPAQUE(p);
        for (int j = 0; j < NV; j++) sum[j] += load(p + j * LANES);
      }
    for (int j = 0; j < NV; j++) store(grad + j * LANES, begins ? sum[j] : load(grad + j * LANES) + sum[j]);
  }
}

// Add the parts [parts][ci][kh kw][width] of a block in their order, for up to eight input channels from `c0` on, and
// write them by output channel.
void write_gradient(const Conv& z, Outputs block, int64_t c0, float* part, int64_t parts, int64_t part_size, float one,
                    float* out, const int64_t* stride) {
  const int64_t k = z.kh * z.kw, width = block.width, valid = std::min(width, z.co - block.from);
  const int64_t channels = std::min<int64_t>(8, z.ci - c0);
  part += c0 * k * width;
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < channels * k * width; i++) part[i] += part[p * part_size + i];
  for (int64_t t = 0; t < k; t++)
    for (int64_t j = 0; j < valid; j++) {
      float* to = out + (block.from + j) * stride[0] + c0 * stride[1] + t / z.kw * stride[2] + t % z.kw * stride[3];
      for (int64_t c = 0; c < channels; c++) to[c * stride[1]] = one * part[(c * k + t) * width + j];
    }
}

template <class T>
int weight_gradient(const uint8_t* bits, const Conv& z, const T* g, float one, float* out, const int64_t* stride,
                    float* bias, int threads) {
  const Chunks m(z);
  const bool flat = z.flat() && z.co % LANES == 0 && z.h == 1;
  const int64_t phase_rows = std::min(z.sh, z.kh), phase_columns = std::min(z.sw, z.kw);
  const int64_t blocks = count_blocks(z, 32), parts = std::min(m.total, (TASKS + blocks - 1) / blocks);
  const int64_t each = z.ci * m.words(), part_size = z.ci * z.kh * z.kw * 32, scratch = m.stored() * 32 + 16;
  const int64_t phases = phase_rows * phase_columns;
  Scratch<uint64_t> by_channel(m.total * phases * each), by_position(threads * m.words() * 64);
  const int64_t sums = flat ? threads * z.ci * COLUMNS : (parts == 1 ? threads : blocks * parts) * part_size;
  Scratch<float> copied(threads * scratch), grads(sums);
  if (!by_channel || !by_position || !copied || !grads) return 1;
  for_each(threads, m.total * phases, 1, [&](int64_t i, int64_t thread) {
    const int64_t phase = i % phases;
    transpose_chunk(bits, z, m, i / phases, phase / phase_columns, phase % phase_columns, by_channel.get() + i * each,
                    by_position.get() + thread * m.words() * 64);
  });
  if (flat) {  // a task has some channels, all pixels, and as many outputs as registers hold
    const int64_t wide = (z.co + COLUMNS - 1) / COLUMNS, groups = std::max<int64_t>(1, threads / wide);
    for_each(threads, wide * groups, 1, [&](int64_t task, int64_t thread) {
      const int64_t group = task % groups, eighths = (z.ci + 7) / 8;
      const int64_t first = eighths * group / groups * 8, last = std::min(eighths * (group + 1) / groups * 8, z.ci);
      const int64_t column = task / groups * COLUMNS, width = std::min(COLUMNS, z.co - column);
      float* grad = grads.get() + thread * z.ci * COLUMNS;
      for (int64_t chunk = 0; chunk < m.total; chunk++) {
        const int64_t from = m.image(chunk) * z.w, pixels = std::min(m.images * z.w, z.n * z.w - from);
        uint64_t all[CHUNK / 64] = {};
        for (int64_t i = 0; i < pixels; i++) all[i / 64] |= uint64_t(1) << i % 64;
        for_columns(width, [&](auto vectors, int64_t c) {
          const T* p = g + from * z.co + column + c;
          accumulate_flat<vectors()>(last - first, by_channel.get() + chunk * each + first * m.words(), m.words(), p, z.co,
                                     grad + first * width + c, width, !chunk);
          if (bias && !group) accumulate_flat<vectors()>(1, all, m.words(), p, z.co, bias + column + c, 0, !chunk);
        });
      }
      for (int64_t c = first; c < last; c += 8) write_gradient(z, {column, width}, c, grad, 1, 0, one, out, stride);
    });
    return 0;
  }
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
    for_each(threads, blocks * ((z.ci + 7) / 8), 1, [&](int64_t i, int64_t) {
      const int64_t b = i % blocks;
      float* part = grads.get() + b * parts * part_size;
      write_gradient(z, block_of(z, 32, b), i / blocks * 8, part, parts, part_size, one, out, stride);
    });
  return 0;
}

}  // namespace

extern "C" {
// `bias`, if it is not null, gets the sum of g over all pixels, which are independent. 0, or 1 if there is no memory.
int sltt_weight_gradient(const uint8_t* bits, const Conv* z, const void* g, int bfloat16, float one, float* out,
                         const int64_t* stride, float* bias, int threads) {
  return with_type(bfloat16, [&](auto t) { return weight_gradient(bits, *z, as(g, t), one, out, stride, bias, threads); });
}
}
