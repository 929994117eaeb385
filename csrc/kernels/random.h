// Counter-based random numbers: Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3") with 20 rounds. A number depends on the key and its counter alone, so the
// backward finds again what the forward drew, whatever the order of tiles and threads.
#pragma once

#include "simd/simd.h"

namespace longspan::LONGSPAN_ISA {

struct RandomKey {
  uint32_t a, b;
};

/// Word is uint32_t or a vector of it. Replaces the counter (x, y) by two random words.
template <class Word>
LS_INLINE void threefry(RandomKey key, Word& x, Word& y) {
  constexpr int kRotation[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const uint32_t schedule[3] = {key.a, key.b, 0x1bd11bdau ^ key.a ^ key.b};
  x += schedule[0];
  y += schedule[1];
#pragma GCC unroll 20
  for (int round = 0; round < 20; ++round) {
    const int r = kRotation[round % 8];
    x += y;
    y = (y << r) | (y >> (32 - r));
    y ^= x;
    if (round % 4 == 3) {
      const int s = round / 4 + 1;
      x += schedule[s % 3];
      y += schedule[(s + 1) % 3] + uint32_t(s);
    }
  }
}

/// The key of one (sequence, head) under a seed.
LS_INLINE RandomKey random_key(uint64_t seed, int64_t batch, int64_t head) {
  uint32_t x = uint32_t(batch), y = uint32_t(head);
  threefry(RandomKey{uint32_t(seed), uint32_t(seed >> 32)}, x, y);
  return {x, y};
}

}  // namespace longspan::LONGSPAN_ISA
