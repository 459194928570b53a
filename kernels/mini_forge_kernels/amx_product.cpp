// x Wᵀ and x W for float32 x and bfloat16 W on the matrix unit of x86 CPUs (AMX). What it computes, and why so, is
// in amx_product.py, which compiles this file and calls the three functions at its end.
//
// The unit has eight tiles of 16 rows of 64 bytes. One instruction, TDPBF16PS, adds the product of a 16 x 32 tile of
// bfloat16 numbers and a 32 x 16 one to a 16 x 16 tile of float32 ones, in 16 cycles:
//
//     C[m, n] += Σ_k A[m, 2k] B[k, 2n] + A[m, 2k+1] B[k, 2n+1]          so B holds pairs of W's rows side by side
//
// It is fed from the caches: `split` lays the parts of x down tile after tile, a thread packs 128 columns of W as
// tiles, and multiplies them with so many rows of x as stay in its second cache (2 MiB on every CPU with AMX).
// Threads share nothing that they write, and how many there are changes no bit of the result.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace {

using bf16 = uint16_t;  // its bits: the upper half of a float32's

constexpr long ROWS = 16, DEPTH = 32, TILE = ROWS * DEPTH;  // of a tile of x: its rows, their numbers, both
constexpr long PARTS = 3;
constexpr long MOST_STEPS = 24;            // tiles of depth that are summed up before the sum is added to `out`
constexpr long PANEL = 2 * ROWS;           // columns of W multiplied at a time
constexpr long PACKED = 4 * PANEL;         // and packed at a time: 256 bytes of a row, or the caches' lines are half used
constexpr long CACHED = 1300 << 10;        // bytes of x's tiles that a thread goes over again for each panel
constexpr long ENOUGH = 8;                 // rows of tiles for which a thread's packing is worth its time

long pieces(long n, long size) { return (n + size - 1) / size; }
__mmask16 first16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
__mmask32 first32(long n) { return n >= 32 ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1; }

__m512 to_float(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// 32 numbers to their three parts, each a row of a tile.
void split_row(__m512 low, __m512 high, bf16* rows) {
  for (long part = 0; part < PARTS; part++) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(rows + part * TILE, rounded);
    low = _mm512_sub_ps(low, to_float(_mm512_castsi512_si256(rounded)));
    high = _mm512_sub_ps(high, to_float(_mm512_extracti64x4_epi64(rounded, 1)));
  }
}

// A 16 x 16 matrix of pairs, transposed.
void transpose(__m512i* a, bf16* out) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // blocks of 4 x 4 are transposed now; these are the blocks
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_si512(out + i * DEPTH, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * DEPTH, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
  }
}

struct Matrix {  // W: `terms` are summed over, `columns` are the result's
  const bf16* at;
  long stride, terms, columns;
  bool transposed;  // whether a column of the result is a row of W
};

// The tile of W for 16 columns and 32 terms, with zeros beyond its end.
void pack(const Matrix& w, long column, long term, bf16* tile) {
  if (w.transposed) {
    __m512i rows[ROWS];
    for (long i = 0; i < ROWS; i++) {
      const __mmask32 there = column + i < w.columns ? first32(w.terms - term) : 0;
      rows[i] = _mm512_maskz_loadu_epi16(there, w.at + (column + i) * w.stride + term);
    }
    return transpose(rows, tile);
  }
  const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __mmask16 there = first16(w.columns - column);
  for (long i = 0; i < DEPTH; i += 2) {
    const bf16* row = w.at + (term + i) * w.stride + column;
    const __m256i even = _mm256_maskz_loadu_epi16(term + i < w.terms ? there : 0, row);
    const __m256i odd = _mm256_maskz_loadu_epi16(term + i + 1 < w.terms ? there : 0, row + w.stride);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
    _mm512_storeu_si512(tile + i / 2 * DEPTH, _mm512_permutexvar_epi16(side_by_side, both));
  }
}

// sums (32, 32) = 32 rows of x times a panel, over `steps` tiles of depth. Of one row of tiles, `below` is null.
void multiply(const bf16* x, const bf16* below, const bf16* panel, long steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long step = 0; step < steps; step++) {
    _tile_loadd(6, panel + step * TILE, 64);
    _tile_loadd(7, panel + (steps + step) * TILE, 64);
    for (long part = PARTS - 1; part >= 0; part--) {  // the smallest first
      const long tile = (step * PARTS + part) * TILE;
      _tile_loadd(4, x + tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (below) {
        _tile_loadd(5, below + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + ROWS, PANEL * 4);
  if (below) {
    _tile_stored(2, sums + ROWS * PANEL, PANEL * 4);
    _tile_stored(3, sums + ROWS * PANEL + ROWS, PANEL * 4);
  }
}

// out (rows, columns) = sums, or that added to it.
void put(const float* sums, float* out, long stride, long rows, long columns, bool adds) {
  for (long row = 0; row < std::min(rows, PANEL); row++)
    for (long column = 0; column < std::min(columns, PANEL); column += 16) {
      const __mmask16 there = first16(columns - column);
      float* at = out + row * stride + column;
      __m512 sum = _mm512_load_ps(sums + row * PANEL + column);
      if (adds) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, at));
      _mm512_mask_storeu_ps(at, there, sum);
    }
}

struct Product {
  const bf16* parts;
  Matrix w;
  float* out;
  long rows, stride;
  bool adds;

  // One thread's share: rows of tiles [top, bottom) and columns [left, right) of the result.
  void compute(long top, long bottom, long left, long right) const {
    alignas(64) bf16 packed[PACKED / ROWS * MOST_STEPS * TILE];
    const long depth = pieces(w.terms, DEPTH);
    const long steps = pieces(depth, pieces(depth, MOST_STEPS));  // of equal parts of the depth
    const long fit = std::max(2L, CACHED / long(steps * PARTS * TILE * sizeof(bf16)) & ~1L);
    for (long first = 0; first < depth; first += steps)
      for (long row = top; row < bottom; row += fit)
        for (long column = left; column < right; column += PACKED) {
          const long now = std::min(steps, depth - first);
          pack_columns(column, right, first, now, packed);
          for (long panel = column; panel < std::min(right, column + PACKED); panel += PANEL)
            multiply_panel(packed + (panel - column) / ROWS * now * TILE, row, std::min(bottom, row + fit), panel, first, now);
        }
  }

  // PACKED columns of W, tiles of one after the other below each other; read in the order in which they lie.
  void pack_columns(long column, long right, long first, long steps, bf16* packed) const {
    const long tiles = pieces(std::min(PACKED, right - column), PANEL) * (PANEL / ROWS);
    const long outer = w.transposed ? tiles : steps, inner = w.transposed ? steps : tiles;
    for (long i = 0; i < outer; i++)
      for (long j = 0; j < inner; j++) {
        const long tile = w.transposed ? i : j, step = w.transposed ? j : i;
        pack(w, column + tile * ROWS, (first + step) * DEPTH, packed + (tile * steps + step) * TILE);
      }
  }

  void multiply_panel(const bf16* panel, long top, long bottom, long column, long first, long steps) const {
    alignas(64) float sums[PANEL * PANEL];
    const long next = pieces(w.terms, DEPTH) * PARTS * TILE;  // row of tiles
    for (long tile = top; tile < bottom; tile += 2) {
      const bf16* x = parts + tile * next + first * PARTS * TILE;
      multiply(x, tile + 1 < bottom ? x + next : nullptr, panel, steps, sums);
      put(sums, out + tile * ROWS * stride + column, stride, std::min(rows, bottom * ROWS) - tile * ROWS,
          w.columns - column, adds || first > 0);
    }
  }
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_of_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace

extern "C" {

// Asks Linux for the tiles (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); 0 where it lends them.
int allow_tiles() { return int(syscall(SYS_arch_prctl, 0x1023, 18)); }

// x (rows, columns) float32, its rows `stride` apart → parts (⌈rows/16⌉, ⌈columns/32⌉, 3, 16, 32), zeros beyond x.
void split(const float* x, long rows, long columns, long stride, bf16* parts, int threads) {
  const long depth = pieces(columns, DEPTH), tiles = pieces(rows, ROWS);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < tiles * ROWS; row++)
    for (long step = 0; step < depth; step++) {
      const float* from = x + row * stride + step * DEPTH;
      const __mmask32 there = row < rows ? first32(columns - step * DEPTH) : 0;
      split_row(_mm512_maskz_loadu_ps(there, from), _mm512_maskz_loadu_ps(there >> 16, from + 16),
                parts + (row / ROWS * depth + step) * PARTS * TILE + row % ROWS * DEPTH);
    }
}

// out (rows, columns) float32 = x times w, or that added to it: x (rows, terms) as `split` leaves it; w bfloat16,
// (columns, terms) if transposed, else (terms, columns). Strides count numbers.
void product(const bf16* parts, const bf16* w, float* out, long rows, long terms, long columns, long w_stride,
             long out_stride, int transposed, int adds, int threads) {
  const Product whole = {parts, {w, w_stride, terms, columns, bool(transposed)}, out, rows, out_stride, bool(adds)};
  const long tiles = pieces(rows, ROWS), panels = pieces(columns, PANEL);
  long down = threads;  // threads one below the other; the others beside them
  while (down > 1 && (threads % down || tiles < down * ENOUGH)) down--;
  const long across = threads / down;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long share = 0; share < threads; share++) {
    const long y = share / across, x = share % across;
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    whole.compute(tiles * y / down, tiles * (y + 1) / down, panels * x / across * PANEL,
                  std::min(columns, panels * (x + 1) / across * PANEL));
    _tile_release();
  }
}

}
