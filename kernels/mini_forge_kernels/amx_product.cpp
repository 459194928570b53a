// x Wᵀ + l Bᵀ and x W + l A for float32 x, l, A, B and a frozen W as it is stored, on the matrix unit of x86 CPUs (AMX).
// What it computes, and why so, is in amx_product.py, which compiles this file and calls the two functions at its end.
//
// The unit has eight tiles of 16 rows of 64 bytes. One instruction, TDPBF16PS, adds the product of a 16 x 32 tile of
// bfloat16 numbers and a 32 x 16 one to a 16 x 16 tile of float32 ones, in 16 cycles:
//
//     C[m, n] += Σ_k A[m, 2k] B[k, 2n] + A[m, 2k+1] B[k, 2n+1]          so B holds pairs of W's rows side by side
//
// It is fed from a core's own caches: a thread splits so many rows of x as stay in the second one (2 MiB on every CPU
// with AMX), packs some columns of W as tiles, and multiplies all of both. Threads share nothing that they write, and how
// many there are changes no bit of the result.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "product_job.h"
#include "tile.h"
#include "weights.h"

namespace {

using bf16 = uint16_t;  // its bits: the upper half of a float32's

constexpr long ROWS = 16, DEPTH = 32, TILE = ROWS * DEPTH;  // of a tile of x: its rows, their numbers, both
constexpr long PAIR = 2 * ROWS;            // rows of x, and columns of W, that are multiplied at a time
constexpr long PARTS = 3;                  // of a float32 number
constexpr long CACHED = 880 << 10;         // bytes of x's tiles that a thread goes over again for each panel
constexpr long ROWS_AHEAD = 4;             // of x that are fetched before they are split
constexpr long ENOUGH = 8;                 // rows of tiles for which a thread's packing is worth its time

// How many parts a matrix's numbers have.
template <class Numbers>
constexpr long parts_of = std::is_same_v<Numbers, Bfloat16> ? 1 : PARTS;

// Twice 16 numbers, of which one part after the other is taken, the largest first.
struct Rest {
  floats first, last;

  __m512i part() {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)last, (__m512)first);
    first -= to_float(_mm512_castsi512_si256(rounded));
    last -= to_float(_mm512_extracti64x4_epi64(rounded, 1));
    return rounded;
  }
  static floats to_float(__m256i numbers) { return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16); }
};

// How many numbers there are from `i` on, of `n`, up to WIDTH.
long there(long i, long n) { return std::clamp(n - i, 0L, WIDTH); }

// The 32 numbers of a row from j on, of n.
template <class Numbers>
[[gnu::always_inline]] inline Rest numbers_of(const Numbers& matrix, long row, long j, long n) {
  if (j + DEPTH <= n) return {matrix.row(row, j, WIDTH), matrix.row(row, j + WIDTH, WIDTH)};
  return {matrix.row(row, j, there(j, n)), matrix.row(row, j + WIDTH, there(j + WIDTH, n))};
}

// What stands on the left, x or l: rows of `terms` numbers.
struct Left {
  const Float32 numbers;
  const long terms;

  // Tiles of the rows from `top` to `bottom`, `steps` deep from `first` on: of each PAIR of rows and each step the parts,
  // the smallest first, of two tiles below each other. Zeros beyond the end.
  void tile(long top, long bottom, long first, long steps, bf16* tiles) const {
    for (long row = 0; row < pieces(bottom - top, PAIR) * PAIR; row++)
      for (long step = 0; step < steps; step++) {
        const long term = (first + step) * DEPTH;
        bf16* to = tiles + (row / PAIR * steps + step) * PARTS * 2 * TILE + row % PAIR * DEPTH;
        __builtin_prefetch(numbers.place(top + row + ROWS_AHEAD, term));
        __builtin_prefetch(numbers.place(top + row + ROWS_AHEAD, term + WIDTH));
        Rest rest = numbers_of(numbers, top + row, term, top + row < bottom ? terms : 0);
        UNROLL for (long part = PARTS - 1; part >= 0; part--) _mm512_store_si512(to + part * 2 * TILE, rest.part());
      }
  }
};

// What stands on the right, W or l's factor: `terms` are summed up, `columns` are the result's.
template <class Numbers>
struct Right {
  static constexpr long W_PARTS = parts_of<Numbers>;

  const Numbers numbers;
  const long terms, columns;
  const bool is_transposed;  // whether a column of the result is a row of the matrix

  // Columns from `column` to `end`, `steps` deep from `first` on: of each PAIR of columns and each step the parts, the
  // largest first, of two tiles beside each other. The matrix is read in the order in which it lies.
  void tile(long column, long end, long first, long steps, bf16* tiles) const {
    const long across = pieces(end - column, PAIR) * 2;
    const long outer = is_transposed ? across : steps, inner = is_transposed ? steps : across;
    for (long i = 0; i < outer; i++)
      for (long j = 0; j < inner; j++) {
        const long place = is_transposed ? i : j, step = is_transposed ? j : i, term = (first + step) * DEPTH;
        bf16* to = tiles + ((place / 2 * steps + step) * W_PARTS * 2 + place % 2) * TILE;
        is_transposed ? turned(column + place * ROWS, term, to) : straight(column + place * ROWS, term, to);
      }
  }

  // The parts of 16 columns and 32 terms, zeros beyond the end.
  void turned(long column, long term, bf16* to) const {
    if (column + ROWS <= columns && term + DEPTH <= terms) return turned<true>(column, term, to);
    turned<false>(column, term, to);
  }

  template <bool is_whole>
  void turned(long column, long term, bf16* to) const {
    floats rows[W_PARTS][ROWS];  // pairs of numbers
    UNROLL for (long i = 0; i < ROWS; i++) {
      if constexpr (is_whole && W_PARTS == 1) {
        rows[0][i] = load((const float*)numbers.place(column + i, term));
        continue;
      }
      Rest rest = numbers_of(numbers, column + i, term, is_whole ? term + DEPTH : column + i < columns ? terms : 0);
      UNROLL for (long part = 0; part < W_PARTS; part++) rows[part][i] = (floats)rest.part();
    }
    UNROLL for (long part = 0; part < W_PARTS; part++) {
      transpose(rows[part]);
      UNROLL for (long i = 0; i < ROWS; i++) store((float*)(to + part * 2 * TILE + i * DEPTH), rows[part][i]);
    }
  }

  void straight(long column, long term, bf16* to) const {
    if (column + ROWS <= columns && term + DEPTH <= terms) return straight<true>(column, term, to);
    straight<false>(column, term, to);
  }

  template <bool is_whole>
  void straight(long column, long term, bf16* to) const {
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                  23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto row = [&](long k) {
      return numbers.row(k, column, is_whole ? WIDTH : k < terms ? there(column, columns) : 0);
    };
    for (long i = 0; i < DEPTH; i += 2, to += DEPTH) {
      Rest rest = {row(term + i), row(term + i + 1)};
      UNROLL for (long part = 0; part < W_PARTS; part++)
        _mm512_store_si512(to + part * 2 * TILE, _mm512_permutexvar_epi16(side_by_side, rest.part()));
    }
  }
};

// A PAIR of rows and one of columns, as tiles. Of three parts with three, those products are left out that come to 2⁻²⁴ of
// the numbers' own at most, and to 2⁻²⁷ in the mean.
template <long W_PARTS>
struct Terms {
  const bf16 *x, *w;
  const long steps;

  // Meanwhile the part of the result that is made next, at `next`, is fetched: two of its rows with each step.
  template <bool has_both>
  void sum_up(const float* next, long stride) const {
    const bf16 *a = x, *b = w;
    for (long step = 0; step < steps; step++, a += PARTS * 2 * TILE) {
      for (long i = 0; i < 2; i++, next += stride) {
        __builtin_prefetch(next, 1);
        __builtin_prefetch(next + ROWS, 1);
      }
      UNROLL for (long part = 0; part < W_PARTS; part++, b += 2 * TILE) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + TILE, 64);
        UNROLL for (long i = part; i < PARTS; i++) {
          _tile_loadd(4, a + i * 2 * TILE, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (has_both) {
            _tile_loadd(5, a + i * 2 * TILE + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
    }
  }
};

// The part of the result, up to PAIR rows and columns, that lies at `at`, and where the next one does.
struct Place {
  float *const at, *const next;
  const long stride, rows, columns;
  const bool adds;

  // Nothing that is there already is in the sums while they are made: each of their steps rounds to the digits of all.
  template <long W_PARTS>
  void multiply(const Terms<W_PARTS>& whole, const Terms<PARTS>& low) const {
    if (!adds && rows >= PAIR && columns >= PAIR) return multiply<true>(whole, low, at, stride);
    alignas(64) float sums[PAIR * PAIR];
    rows > ROWS ? multiply<true>(whole, low, sums, PAIR) : multiply<false>(whole, low, sums, PAIR);
    for (long row = 0; row < std::min(rows, PAIR); row++)
      for (long column = 0; column < std::min(columns, PAIR); column += WIDTH) {
        const long count = there(column, columns);
        const floats sum = load(sums + row * PAIR + column);
        float* to = at + row * stride + column;
        store(to, adds ? load(to, count) + sum : sum, count);
      }
  }

  template <bool has_both, long W_PARTS>
  void multiply(const Terms<W_PARTS>& whole, const Terms<PARTS>& low, float* to, long to_stride) const {
    asm volatile("" ::: "memory");  // g++ does not know that the unit reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    whole.template sum_up<has_both>(next, stride);
    low.template sum_up<has_both>(next, stride);
    _tile_stored(0, to, to_stride * 4);  // it waits for all that is on its way in the unit, the others for nothing more
    _tile_stored(1, to + ROWS, to_stride * 4);
    _tile_stored(2, to + ROWS * to_stride, to_stride * 4);
    _tile_stored(3, to + ROWS * to_stride + ROWS, to_stride * 4);
  }
};

// What a thread works in.
struct Room {
  struct alignas(64) Line {
    bf16 numbers[DEPTH];
  };
  std::vector<Line> lines;

  bf16* of(long tiles) {
    lines.resize(std::max(lines.size(), size_t(tiles * ROWS)));
    return lines.data()->numbers;
  }
};

// It keeps them from one product to the next.
thread_local Room x_room, low_room, w_room, factor_room;

template <class Weights>
struct Product {
  static constexpr long W_PARTS = parts_of<Weights>;
  static constexpr long PACKED = (W_PARTS == 1 ? 4 : 2) * PAIR;  // columns packed at a time: what there is room for in the cache
  // Tiles of depth that are summed up before the sum is added to `out`. To store sums takes as long as 4 steps of one part;
  // but the fewer steps, the more rows of x stay in the cache, and the fewer times W is packed: with three parts, a long work.
  static constexpr long MOST_STEPS = W_PARTS == 1 ? 24 : 16;

  const Job& job;
  const Right<Weights> w;
  const Left x = {{job.x, job.x_stride}, job.terms}, low = {{job.low, job.low_stride}, job.rank};
  const Right<Float32> factor = {{job.factor, job.factor_stride}, job.rank, job.columns, w.is_transposed};

  // One thread's share: rows [top, bottom) and columns [left, right) of the result.
  void compute(long top, long bottom, long left, long right) const {
    if (left >= right) return;  // more threads than columns
    const long depth = pieces(job.terms, DEPTH), steps = pieces(depth, pieces(depth, MOST_STEPS));
    const long low_steps = pieces(job.rank, DEPTH), pairs = pieces(bottom - top, PAIR);
    const long size = steps * PARTS * 2 * TILE, low_size = low_steps * PARTS * 2 * TILE;  // of the tiles of a PAIR of rows
    const long w_size = steps * W_PARTS * 2 * TILE;                                       // and of columns
    const long block = pieces(pairs, pieces(pairs, std::max(1L, CACHED / long(size * sizeof(bf16)))));
    bf16 *const x_tiles = x_room.of(block * size / TILE), *const low_tiles = low_room.of(block * low_size / TILE),
         *const w_tiles = w_room.of(PACKED / PAIR * w_size / TILE),
         *const factor_tiles = factor_room.of(PACKED / PAIR * low_size / TILE);
    for (long first = 0; first < depth; first += steps) {
      const long now = std::min(steps, depth - first), beside = first + now == depth ? low_steps : 0;
      for (long row = top; row < bottom; row += block * PAIR) {
        const long end = std::min(bottom, row + block * PAIR);
        x.tile(row, end, first, now, x_tiles);
        low.tile(row, end, 0, beside, low_tiles);
        for (long column = left; column < right; column += PACKED) {
          const long last = std::min(right, column + PACKED);
          w.tile(column, last, first, now, w_tiles);
          factor.tile(column, last, 0, beside, factor_tiles);
          for (long c = 0; column + c * PAIR < last; c++)
            for (long r = 0; row + r * PAIR < end; r++) {
              float* const at = job.out + (row + r * PAIR) * job.out_stride + column + c * PAIR;
              float* const next = row + (r + 1) * PAIR < end ? at + PAIR * job.out_stride
                                                             : job.out + row * job.out_stride + column + (c + 1) * PAIR;
              const Place place = {at, next, job.out_stride, end - row - r * PAIR, job.columns - column - c * PAIR,
                                   job.adds || first > 0};
              const Terms<W_PARTS> whole = {x_tiles + r * now * PARTS * 2 * TILE, w_tiles + c * now * W_PARTS * 2 * TILE, now};
              place.multiply(whole, {low_tiles + r * low_size, factor_tiles + c * low_size, beside});
            }
        }
      }
    }
  }
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes_of_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <class Weights>
void run(const Job& job, const Weights& w) {
  const Product<Weights> whole = {job, {w, job.terms, job.columns, bool(job.is_transposed)}};
  const long threads = job.threads, rows = pieces(job.rows, ROWS), columns = pieces(job.columns, PAIR);  // in tiles, in pairs
  long down = threads;  // threads one below the other; the others beside them
  while (down > 1 && (threads % down || rows < down * ENOUGH)) down--;
  const long across = threads / down;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long share = 0; share < threads; share++) {
    const long y = share / across, z = share % across;
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
    whole.compute(rows * y / down * ROWS, std::min(job.rows, rows * (y + 1) / down * ROWS),
                  columns * z / across * PAIR, std::min(job.columns, columns * (z + 1) / across * PAIR));
    _tile_release();
  }
}

}  // namespace

extern "C" {

// Asks Linux for the tiles (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); 0 where it lends them.
int allow_tiles() { return int(syscall(SYS_arch_prctl, 0x1023, 18)); }

void product(const Job* job) {
  with_weights(*job, [&](auto w) { run(*job, w); });
}

}
