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

}  // namespace

extern "C" {
// Elements of `size` bytes (2, 4 or 8), 8 · bytes of them.
void sltt_pack_bits(const void* x, int size, uint8_t* bits, int64_t bytes, int threads) {
  if (size == 2) pack_bits<uint16_t>(x, bits, bytes, threads);
  if (size == 4) pack_bits<uint32_t>(x, bits, bytes, threads);
  if (size == 8) pack_bits<uint64_t>(x, bits, bytes, threads);
}
}
