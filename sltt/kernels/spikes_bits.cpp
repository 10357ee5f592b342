// Spikes as bits: bit i of byte j is element 8 j + i.
#include "spikes.h"

namespace {

constexpr int64_t PART = 1 << 13;  // bytes of bits in a task

template <class T>
void pack_bits(const void* x, uint8_t* bits, int64_t bytes, int threads) {
  for_each(threads, (bytes + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    const int64_t from = part * PART;
    pack_part(static_cast<const T*>(x) + 8 * from, bits + from, std::min(PART, bytes - from));
  });
}

// `table` has what each byte unpacks to, eight elements.
template <class T>
void unpack_bits(const uint8_t* bits, int64_t bytes, const void* table, void* x, int threads) {
  for_each(threads, (bytes + PART - 1) / PART, 1, [&](int64_t part, int64_t) {
    for (int64_t j = part * PART, end = std::min(j + PART, bytes); j < end; j++)
      std::memcpy(static_cast<T*>(x) + 8 * j, static_cast<const T*>(table) + 8 * bits[j], 8 * sizeof(T));
  });
}

}  // namespace

extern "C" {
// Elements of `size` bytes (2, 4 or 8), 8 · bytes of them.
void sltt_pack_bits(const void* x, int size, uint8_t* bits, int64_t bytes, int threads) {
  if (size == 2) pack_bits<uint16_t>(x, bits, bytes, threads);
  if (size == 4) pack_bits<uint32_t>(x, bits, bytes, threads);
  if (size == 8) pack_bits<uint64_t>(x, bits, bytes, threads);
}

void sltt_unpack_bits(const uint8_t* bits, int64_t bytes, const void* table, int size, void* x, int threads) {
  if (size == 2) unpack_bits<uint16_t>(bits, bytes, table, x, threads);
  if (size == 4) unpack_bits<uint32_t>(bits, bytes, table, x, threads);
  if (size == 8) unpack_bits<uint64_t>(bits, bytes, table, x, threads);
}
}
