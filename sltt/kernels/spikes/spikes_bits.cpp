// Spikes as bits: bit i of byte j is element 8 j + i.
#include "../spikes.h"

namespace {

constexpr int64_t PART = 1 << 13;  // bytes of bits in a task

template <class T>
void pack_bits(const T* x, uint8_t* bits, int64_t bytes, int threads) {
  for_each(threads, (bytes + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    const int64_t from = part * PART;
    pack_part(x + 8 * from, bits + from, std::min(PART, bytes - from));
  });
}

// Whether there are elements that are neither 0 nor `one`.
template <class T>
bool has_others(const T* x, T one, int64_t n) {
  int64_t i = 0;
  uint64_t found = 0;
#ifdef __AVX512BW__
  const __m512i m32 = _mm512_set1_epi32(MAGNITUDE<T>), m16 = _mm512_set1_epi16(MAGNITUDE<T>);
  for (; sizeof(T) == 4 && i + 16 <= n; i += 16) {
    const __m512i v = _mm512_loadu_si512(x + i);
    found |= _mm512_mask_cmpneq_epi32_mask(_mm512_test_epi32_mask(v, m32), v, _mm512_set1_epi32(one));
  }
  for (; sizeof(T) == 2 && i + 32 <= n; i += 32) {
    const __m512i v = _mm512_loadu_si512(x + i);
    found |= _mm512_mask_cmpneq_epi16_mask(_mm512_test_epi16_mask(v, m16), v, _mm512_set1_epi16(one));
  }
#endif
  T others = 0;
  for (; i < n; i++) others |= T((x[i] & MAGNITUDE<T>) != 0) & T(x[i] != one);
  return found || others;
}

// Packs elements that are 0 or one value, and returns how many are not 0; -1 where there are other values, which ends
// early. `one` becomes that value, or stays 0. -0 is no spike.
template <class T>
int64_t look(const T* x, uint8_t* bits, int64_t bytes, T* one, int threads) {
  std::atomic<T> common{0};
  std::atomic<bool> failed{false};
  std::atomic<int64_t> total{0};
  for_each(threads, (bytes + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    constexpr int64_t BLOCK = 128;  // bytes of bits between two looks at whether all is well
    T mine = common;
    int64_t number = 0;
    for (int64_t j = part * PART, end = std::min(j + PART, bytes); j < end && !failed; j += BLOCK) {
      const int64_t n = std::min(BLOCK, end - j);
      const T* p = x + 8 * j;
      for (int64_t i = 0; !mine && i < 8 * n; i++)
        if (p[i] & MAGNITUDE<T>) mine = p[i];
      if (has_others(p, mine, 8 * n)) failed = true;
      pack_part(p, bits + j, n);
      number += count(bits + j, n);
    }
    T before = 0;
    if (mine && !common.compare_exchange_strong(before, mine) && before != mine) failed = true;
    total += number;
  });
  *one = common;
  return failed ? -1 : int64_t(total);
}

// `table` has what each byte unpacks to, eight elements.
template <class T>
void unpack_bits(const uint8_t* bits, int64_t bytes, const T* table, T* x, int threads) {
  for_each(threads, (bytes + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    for (int64_t j = part * PART, end = std::min(j + PART, bytes); j < end; j++)
      std::memcpy(x + 8 * j, table + 8 * bits[j], 8 * sizeof(T));
  });
}

// Call function(number), where the number has the type of elements of so many bytes.
template <class F>
auto with_size(int size, const F& function) {
  return size == 2 ? function(uint16_t()) : size == 4 ? function(uint32_t()) : function(uint64_t());
}

}  // namespace

extern "C" {
int64_t sltt_count(const uint8_t* bits, int64_t bytes) { return count(bits, bytes); }
int64_t sltt_same(const uint8_t* a, const uint8_t* b, int64_t bytes) { return !std::memcmp(a, b, bytes); }

// Elements of `size` bytes (2, 4 or 8), 8 · bytes of them.
void sltt_pack_bits(const void* x, int size, uint8_t* bits, int64_t bytes, int threads) {
  with_size(size, [&](auto t) { pack_bits(as(x, t), bits, bytes, threads); });
}

// Of elements of `size` bytes, 8 · bytes of them, see `look`.
int64_t sltt_look(const void* x, int size, uint8_t* bits, int64_t bytes, void* one, int threads) {
  return with_size(size, [&](auto t) { return look(as(x, t), bits, bytes, as(one, t), threads); });
}

void sltt_unpack_bits(const uint8_t* bits, int64_t bytes, const void* table, int size, void* x, int threads) {
  with_size(size, [&](auto t) { unpack_bits(bits, bytes, as(table, t), as(x, t), threads); });
}
}
