// x Wᵀ + l Bᵀ and x W + l A for float32 x, l, A, B and bfloat16 W on the matrix unit of x86 CPUs (AMX). What it computes,
// and why so, is in amx_product.py, which compiles this file and calls the two functions at its end.
//
// The unit has eight tiles of 16 rows of 64 bytes. One instruction, TDPBF16PS, adds the product of a 16 x 32 tile of
// bfloat16 numbers and a 32 x 16 one to a 16 x 16 tile of float32 ones, in 16 cycles:
//
//     C[m, n] += Σ_k A[m, 2k] B[k, 2n] + A[m, 2k+1] B[k, 2n+1]          so B holds pairs of W's rows side by side
//
// It is fed from a core's own caches: a thread splits so many rows of x as stay in the second one (2 MiB on every CPU
// with AMX), packs 128 columns of W as tiles, and multiplies all of both. Threads share nothing that they write, and how
// many there are changes no bit of the result.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product_job.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace {

using bf16 = uint16_t;  // its bits: the upper half of a float32's

constexpr long ROWS = 16, DEPTH = 32, TILE = ROWS * DEPTH;  // of a tile of x: its rows, their numbers, both
constexpr long PARTS = 3;
constexpr long PAIR = 2 * ROWS;            // rows of x, and columns of W, that are multiplied at a time
constexpr long MOST_STEPS = 24;            // tiles of depth that are summed up before the sum is added to `out`
constexpr long PACKED = 4 * PAIR;          // columns packed at a time: 256 bytes of a row, or caches' lines are half used
constexpr long CACHED = 800 << 10;         // bytes of x's tiles that a thread goes over again for each panel
constexpr long ROWS_AHEAD = 4;             // of x that are fetched before they are split
constexpr long ENOUGH = 8;                 // rows of tiles for which a thread's packing is worth its time
constexpr long MOST_RANK = 128;

// Of l and of B the parts whose products are summed up, the smallest first: those below 2⁻²⁶ of the largest are left out.
constexpr long PRODUCTS = 6, LEFT[PRODUCTS] = {2, 1, 0, 1, 0, 0}, RIGHT[PRODUCTS] = {0, 1, 2, 0, 1, 0};
constexpr long MOST_LOW_STEPS = PRODUCTS * MOST_RANK / DEPTH;

long pieces(long n, long size) { return (n + size - 1) / size; }
__mmask16 first16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
__mmask32 first32(long n) { return n >= 32 ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1; }

__m512 to_float(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// `count` numbers, up to 32, to their three parts, `apart` from each other, and zeros behind them.
void split(const float* from, long count, bf16* to, long apart) {
  const __mmask32 there = first32(count);
  __m512 low = _mm512_maskz_loadu_ps(there, from), high = _mm512_maskz_loadu_ps(there >> 16, from + 16);
  UNROLL for (long part = 0; part < PARTS; part++, to += apart) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(to, rounded);
    low = _mm512_sub_ps(low, to_float(_mm512_castsi512_si256(rounded)));
    high = _mm512_sub_ps(high, to_float(_mm512_extracti64x4_epi64(rounded, 1)));
  }
}

// A 16 x 16 matrix of pairs, transposed.
void transpose(const bf16* from, long stride, bf16* to) {
  __m512i a[16], b[16];
  UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {  // blocks of 4 x 4 are transposed now; these are the blocks
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; i++) {
    _mm512_store_si512(to + i * DEPTH, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_store_si512(to + (8 + i) * DEPTH, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
  }
}

struct Matrix {  // W: `terms` are summed over, `columns` are the result's
  const bf16* at;
  long stride, terms, columns;
  bool is_transposed;  // whether a column of the result is a row of W

  // The tile for 16 columns and 32 terms, with zeros beyond the end.
  void pack(long column, long term, bf16* tile) const {
    if (is_transposed) {
      const bf16* from = at + column * stride + term;
      if (column + ROWS <= columns && term + DEPTH <= terms) return transpose(from, stride, tile);
      alignas(64) bf16 rows[TILE];
      for (long i = 0; i < ROWS; i++) {
        const __mmask32 there = column + i < columns ? first32(terms - term) : 0;
        _mm512_store_si512(rows + i * DEPTH, _mm512_maskz_loadu_epi16(there, from + i * stride));
      }
      return transpose(rows, DEPTH, tile);
    }
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                  23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __mmask16 there = first16(columns - column);
    for (long i = 0; i < DEPTH; i += 2) {
      const bf16* row = at + (term + i) * stride + column;
      const __m256i even = _mm256_maskz_loadu_epi16(term + i < terms ? there : 0, row);
      const __m256i odd = _mm256_maskz_loadu_epi16(term + i + 1 < terms ? there : 0, row + stride);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_store_si512(tile + i / 2 * DEPTH, _mm512_permutexvar_epi16(side_by_side, both));
    }
  }

  // Columns from `column` to `end`, `steps` tiles deep: panels of two tiles of columns, in the order of the depth. W is
  // read in the order in which it lies.
  void pack_columns(long column, long end, long term, long steps, bf16* packed) const {
    const long tiles = pieces(end - column, PAIR) * 2;
    const long outer = is_transposed ? tiles : steps, inner = is_transposed ? steps : tiles;
    for (long i = 0; i < outer; i++)
      for (long j = 0; j < inner; j++) {
        const long tile = is_transposed ? i : j, step = is_transposed ? j : i;
        pack(column + tile * ROWS, term + step * DEPTH, packed + (tile / 2 * steps + step) * 2 * TILE + tile % 2 * TILE);
      }
  }
};

// Tiles that are multiplied: of each step of depth two of W's and `parts` times two of x's.
struct Terms {
  const bf16 *x, *w;
  long steps;

  // Meanwhile the part of the result that is made next, at `next`, is fetched: two of its rows with each step.
  template <long parts, bool has_both>
  void sum_up(const float* next, long stride) const {
    const bf16 *a = x, *b = w;
    for (long step = 0; step < steps; step++, b += 2 * TILE) {
      for (long i = 0; i < 2; i++, next += stride) {
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + ROWS, 1);
      }
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + TILE, 64);
      UNROLL for (long part = 0; part < parts; part++, a += 2 * TILE) {
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (has_both) {
          _tile_loadd(5, a + TILE, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
};

// The part of the result, up to PAIR rows and columns, that lies at `at`, and where the next one does.
struct Place {
  float *at, *next;
  long stride, rows, columns;
  bool adds;

  void multiply(const Terms& whole, const Terms& low) const {
    if (rows >= PAIR && columns >= PAIR) return multiply<true>(whole, low, at, stride);
    alignas(64) float sums[PAIR * PAIR];
    if (adds) copy(at, stride, sums, PAIR);
    rows > ROWS ? multiply<true>(whole, low, sums, PAIR) : multiply<false>(whole, low, sums, PAIR);
    copy(sums, PAIR, at, stride);
  }

  void copy(const float* from, long from_stride, float* to, long to_stride) const {
    for (long row = 0; row < std::min(rows, PAIR); row++)
      for (long column = 0; column < std::min(columns, PAIR); column += ROWS) {
        const __mmask16 there = first16(columns - column);
        const __m512 numbers = _mm512_maskz_loadu_ps(there, from + row * from_stride + column);
        _mm512_mask_storeu_ps(to + row * to_stride + column, there, numbers);
      }
  }

  template <bool has_both>
  void multiply(const Terms& whole, const Terms& low, float* to, long to_stride) const {
    float* const below = to + ROWS * to_stride;
    if (adds) {
      _tile_loadd(0, to, to_stride * 4);
      _tile_loadd(1, to + ROWS, to_stride * 4);
      _tile_loadd(2, below, to_stride * 4);
      _tile_loadd(3, below + ROWS, to_stride * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    whole.sum_up<PARTS, has_both>(next, stride);
    low.sum_up<1, has_both>(next, stride);
    _tile_stored(0, to, to_stride * 4);  // all that is on its way in the unit ends before the first of these
    _tile_stored(1, to + ROWS, to_stride * 4);
    _tile_stored(2, below, to_stride * 4);
    _tile_stored(3, below + ROWS, to_stride * 4);
  }
};

struct alignas(64) Line {
  bf16 numbers[DEPTH];
};

// What a thread works in; it keeps it.
struct Room {
  std::vector<Line> lines;

  bf16* of(long numbers) {
    lines.resize(std::max(lines.size(), size_t(pieces(numbers, DEPTH))));
    return lines.data()->numbers;
  }
};

struct Product {
  const Job& job;
  const Matrix w = {(const bf16*)job.w, job.w_stride, job.terms, job.columns, bool(job.is_transposed)};
  const long low_steps = pieces(PRODUCTS * job.rank, DEPTH);

  // One thread's share: rows [top, bottom) and columns [left, right) of the result.
  void compute(long top, long bottom, long left, long right) const {
    static thread_local Room x_room, low_room, w_room, factor_room;
    const long depth = pieces(job.terms, DEPTH), steps = pieces(depth, pieces(depth, MOST_STEPS));
    const long pairs = pieces(bottom - top, PAIR), size = steps * PARTS * 2 * TILE;  // of the tiles of a pair's rows
    const long block = pieces(pairs, pieces(pairs, std::max(1L, CACHED / long(size * sizeof(bf16)))));
    bf16 *const x = x_room.of(block * size), *const low = low_room.of(block * low_steps * 2 * TILE),
         *const packed = w_room.of(PACKED * MOST_STEPS * DEPTH), *const factor = factor_room.of(PACKED * low_steps * DEPTH);
    for (long first = 0; first < depth; first += steps) {
      const long now = std::min(steps, depth - first), beside = first + now == depth ? low_steps : 0;
      for (long row = top; row < bottom; row += block * PAIR) {
        const long end = std::min(bottom, row + block * PAIR);
        split_rows(row, end, first, now, x);
        if (beside) split_low(row, end, low);
        for (long column = left; column < right; column += PACKED) {
          const long last = std::min(right, column + PACKED);
          w.pack_columns(column, last, first * DEPTH, now, packed);
          if (beside) pack_factor(column, last, factor);
          for (long c = column; c < last; c += PAIR)
            for (long r = row; r < end; r += PAIR) {
              const long pair = (r - row) / PAIR, panel = (c - column) / PAIR;
              float* const next = job.out + (r + PAIR < end ? (r + PAIR) * job.out_stride + c : row * job.out_stride + c + PAIR);
              const Place place = {job.out + r * job.out_stride + c, next, job.out_stride, end - r, job.columns - c,
                                   job.adds || first > 0};
              place.multiply({x + pair * now * PARTS * 2 * TILE, packed + panel * now * 2 * TILE, now},
                             {low + pair * low_steps * 2 * TILE, factor + panel * low_steps * 2 * TILE, beside});
            }
        }
      }
    }
  }

  // Rows [top, bottom) of x, as tiles: pair by pair, step by step, the smallest parts first. Beyond `bottom` zeros.
  void split_rows(long top, long bottom, long first, long steps, bf16* tiles) const {
    for (long row = 0; row < pieces(bottom - top, PAIR) * PAIR; row++) {
      bf16* to = tiles + row / PAIR * steps * PARTS * 2 * TILE + row % PAIR * DEPTH;
      for (long step = 0; step < steps; step++, to += PARTS * 2 * TILE) {
        const long term = (first + step) * DEPTH;
        const float* from = job.x + (top + row) * job.x_stride + term;
        __builtin_prefetch(from + ROWS_AHEAD * job.x_stride);
        __builtin_prefetch(from + ROWS_AHEAD * job.x_stride + ROWS);
        split(from, top + row < bottom ? job.terms - term : 0, to + (PARTS - 1) * 2 * TILE, -2 * TILE);
      }
    }
  }

  // Likewise l's, those of PRODUCTS beside each other.
  void split_low(long top, long bottom, bf16* tiles) const {
    alignas(64) bf16 line[(MOST_LOW_STEPS + 1) * DEPTH];
    for (long row = 0; row < pieces(bottom - top, PAIR) * PAIR; row++) {
      parts_beside(job.low + (top + row) * job.low_stride, top + row < bottom ? job.rank : 0, LEFT, line);
      for (long step = 0; step < low_steps; step++)
        std::memcpy(tiles + (row / PAIR * low_steps + step) * 2 * TILE + row % PAIR * DEPTH, line + step * DEPTH, 2 * DEPTH);
    }
  }

  // And columns of l's factor, from `column` to `end`.
  void pack_factor(long column, long end, bf16* packed) const {
    static thread_local Room room;
    const long terms = low_steps * DEPTH, columns = end - column;
    bf16* const numbers = room.of(PACKED * terms + DEPTH);
    if (job.is_transposed) {
      for (long i = 0; i < columns; i++)
        parts_beside(job.factor + (column + i) * job.factor_stride, job.rank, RIGHT, numbers + i * terms);
    } else {
      alignas(64) bf16 parts[PARTS][PACKED];
      for (long r = 0; r < job.rank; r++) {
        for (long i = 0; i < columns; i += DEPTH)
          split(job.factor + r * job.factor_stride + column + i, columns - i, parts[0] + i, PACKED);
        for (long p = 0; p < PRODUCTS; p++)
          std::memcpy(numbers + (p * job.rank + r) * PACKED, parts[RIGHT[p]], sizeof parts[0]);
      }
    }
    const long stride = job.is_transposed ? terms : PACKED;
    Matrix{numbers, stride, PRODUCTS * job.rank, columns, w.is_transposed}.pack_columns(0, columns, 0, low_steps, packed);
  }

  // A row of l's or the factor's: of each of PRODUCTS the part that `which` says, and zeros behind all. Whole registers are
  // written; what is too much is written over, but for the last, for which there is room.
  void parts_beside(const float* from, long count, const long* which, bf16* line) const {
    alignas(64) bf16 parts[PARTS][MOST_RANK];
    for (long i = 0; i < job.rank; i += DEPTH) split(from + i, count - i, parts[0] + i, MOST_RANK);
    for (long p = 0; p < PRODUCTS; p++, line += job.rank)
      for (long i = 0; i < job.rank; i += DEPTH)
        _mm512_storeu_si512(line + i, _mm512_load_si512(parts[which[p]] + i));
    _mm512_storeu_si512(line, _mm512_setzero_si512());
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

void product(const Job* job) {
  const long threads = job->threads, tiles = pieces(job->rows, ROWS), panels = pieces(job->columns, PAIR);
  long down = threads;  // threads one below the other; the others beside them
  while (down > 1 && (threads % down || tiles < down * ENOUGH)) down--;
  const long across = threads / down;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long share = 0; share < threads; share++) {
    const long y = share / across, z = share % across;
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    Product{*job}.compute(tiles * y / down * ROWS, std::min(job->rows, tiles * (y + 1) / down * ROWS),
                          panels * z / across * PAIR, std::min(job->columns, panels * (z + 1) / across * PAIR));
    _tile_release();
  }
}

}
