// The instructions of the matrix unit (AMX) in plain C++, so that amx_product.cpp is tested on CPUs without one: included
// before it. A tile is 16 rows of 64 bytes.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {

inline thread_local uint8_t tiles[8][16][64];

inline float bfloat16(int tile, int row, int column) {
  uint16_t half;
  std::memcpy(&half, &tiles[tile][row][2 * column], 2);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void loadd(int tile, const void* at, long stride) {
  for (int row = 0; row < 16; row++) std::memcpy(tiles[tile][row], (const char*)at + row * stride, 64);
}

inline void stored(int tile, void* at, long stride) {
  for (int row = 0; row < 16; row++) std::memcpy((char*)at + row * stride, tiles[tile][row], 64);
}

// c[m, n] += Σ_k a[m, 2k] b[k, 2n] + a[m, 2k+1] b[k, 2n+1]
inline void dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float before;
      std::memcpy(&before, &tiles[c][m][4 * n], 4);
      double sum = before;
      for (int k = 0; k < 16; k++)
        for (int half = 0; half < 2; half++) sum += bfloat16(a, m, 2 * k + half) * bfloat16(b, k, 2 * n + half);
      const float after = sum;
      std::memcpy(&tiles[c][m][4 * n], &after, 4);
    }
}

}  // namespace emulated

#define _tile_loadconfig(shapes) ((void)(shapes))
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, sizeof emulated::tiles[tile])
#define _tile_loadd(tile, at, stride) emulated::loadd(tile, at, stride)
#define _tile_stored(tile, at, stride) emulated::stored(tile, at, stride)
#define _tile_dpbf16ps(c, a, b) emulated::dpbf16ps(c, a, b)
