// LoRA's own products, for float32 on CPUs with AVX-512: those of dY, and, where dropout stands between x and them, those of
// x. What for is said in low_rank.py, which compiles this file and calls the functions at its end.
//
// `count` projections share x; what they have of their own lies side by side. A mask is a function of a seed and a place,
// made where it is needed: no mask and no masked x lies in memory but for the rows that are in use.

#include <algorithm>
#include <cstdint>

#include "tile.h"

struct Mask {  // of numbers that are kept: those whose hash is `least` or more
  uint64_t seed;
  uint32_t least;
};

namespace {

using uints = uint32_t __attribute__((vector_size(64)));

constexpr long BLOCK = 128;       // rows of x that are masked at a time, or of dY that stay in a core's own cache
constexpr long SIDE = 3 * WIDTH;  // and columns beside these rows

// The last step of MurmurHash3: each bit of the result depends on all of h.
template <class Bits>
Bits mixed(Bits h) {
  h = (h ^ h >> 16) * 0x85ebca6b;
  h = (h ^ h >> 13) * 0xc2b2ae35;
  return h ^ h >> 16;
}

// x's numbers of a row from `column` on, with zeros where the mask drops them.
struct Row {
  uint32_t key, least;

  Row(const Mask& mask, long row)
      : key(mixed(uint32_t(mask.seed) ^ mixed(mixed(uint32_t(mask.seed >> 32)) + uint32_t(row)))), least(mask.least) {}

  floats kept(floats x, long column) const {
    const uints place = uint32_t(column) + uints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return mixed(place * 0x9e3779b1 ^ key) >= least ? x : floats{};
  }
};

// The share of thread i of `threads` in n, in whole pieces.
struct Share {
  long first, last;

  Share(long n, long piece, long i, long threads) {
    const long pieces = (n + piece - 1) / piece;
    first = std::min(n, pieces * i / threads * piece);
    last = std::min(n, pieces * (i + 1) / threads * piece);
  }
};

// SIZE rows of c = a b, of few columns: a is long, and what comes behind these rows of it is on its way meanwhile.
template <long SIZE>
void thin_product(const float* a, long a_row, const float* b, long b_row, long terms, float* c, long c_row, long columns,
                  long made) {
  const float* next = a + SIZE * a_row;
  for (; columns > 0; columns -= WIDTH, b += WIDTH, c += WIDTH) {
    floats sums[SIZE][1] = {};
    for (long k = 0; k < terms; k += WIDTH) {
      if (columns <= WIDTH)  // the last ones: till then these rows are wanted again
        UNROLL for (long i = 0; i < SIZE; i++) __builtin_prefetch(next + i * a_row + k, 0, 2);
      sum_up(sums, a + k, a_row, 1, b + k * b_row, b_row, std::min(WIDTH, terms - k));
    }
    put(sums, c, c_row, false, columns, made);
  }
}

}  // namespace

extern "C" {

extern const long size_of_Mask = sizeof(Mask);

// lows (rows, count * group) = x̃ factors; x (rows, terms), factors (terms, count * group), of each projection `group`
// columns, a multiple of WIDTH, zeros behind its rank; room for 8 rows of x a thread.
void down(const float* x, const float* factors, float* lows, float* room, const Mask* masks, long rows, long terms,
          long count, long x_row, long group, int threads) {
  const long columns = count * group;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < threads; i++) {
    const Share own(rows, 8, i, threads);
    float* masked = room + i * 8 * terms;
    tiles<8>(own.first, own.last, [&](long row, long made, auto size) {
      for (long p = 0; p < count; p++) {
        for (long r = 0; r < size; r++) {
          const Row mask(masks[p], row + r);
          const float* from = x + (row + r) * x_row;
          each(terms, [&](long k, long n) { store(masked + r * terms + k, mask.kept(load(from + k, n), k), n); });
        }
        product<size>(masked, terms, 1, factors + p * group, columns, terms, lows + row * columns + p * group, columns, group,
                      false, made);
      }
    });
  }
}

// Of one projection dl (rows, rank) = dY B and dB (columns, rank) = dYᵀ l, in one pass over dY (rows, columns). Rows of B
// (columns, rank) and l (rows, rank) are so long that whole vectors can be read. room: for a dB of each thread but the
// first; their sum in the threads' order is dB, whose last bits so depend on how many these are.
void pull_back(const float* dY, const float* B, const float* l, float* dl, float* dB, float* room, long rows, long columns,
               long rank, long dY_row, long B_row, long l_row, long dl_row, int threads) {
  const long size = columns * rank;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long i = 0; i < threads; i++) {
      const Share own(rows, WIDTH, i, threads);
      float* const part = i ? room + (i - 1) * size : dB;
      if (own.first == own.last) std::fill(part, part + size, 0.f);
      for (long top = own.first; top < own.last; top += BLOCK) {
        const long bottom = std::min(own.last, top + BLOCK);
        tiles<WIDTH>(top, bottom, [&](long row, long made, auto height) {
          thin_product<height>(dY + row * dY_row, dY_row, B, B_row, columns, dl + row * dl_row, dl_row, rank, made);
        });
        tiles<WIDTH>(0, columns, [&](long column, long made, auto height) {
          product<height, 1>(dY + top * dY_row + column, 1, dY_row, l + top * l_row, l_row, bottom - top,
                             part + column * rank, rank, rank, top > own.first, made);
        });
      }
    }
#pragma omp for schedule(static)
    for (long column = 0; column < columns; column++)
      for (long i = 1; i < threads; i++)
        each(rank, [&](long r, long n) {
          const long at = column * rank + r;
          store(dB + at, load(dB + at, n) + load(room + (i - 1) * size + at, n), n);
        });
  }
}

// dA (count * rank, terms) = dlᵀ x̃: of each projection `rank` rows. dl (rows, count * rank).
void outer(const float* dl, const float* x, float* dA, const Mask* masks, long rows, long terms, long count, long x_row,
           long rank, int threads) {
  const long dl_row = count * rank;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < threads; i++) {
    const Share own(terms, WIDTH, i, threads);
    alignas(64) float masked[BLOCK * SIDE];
    for (long top = 0; top < rows; top += BLOCK)
      for (long left = own.first; left < own.last; left += SIDE)
        for (long p = 0; p < count; p++) {
          const long bottom = std::min(rows, top + BLOCK), width = std::min(SIDE, own.last - left);
          for (long row = top; row < bottom; row++) {
            const Row mask(masks[p], row);
            each(width, [&](long k, long n) {
              store(masked + (row - top) * SIDE + k, mask.kept(load(x + row * x_row + left + k, n), left + k));
            });
          }
          tiles<8>(0, rank, [&](long r, long made, auto size) {
            product<size>(dl + top * dl_row + p * rank + r, 1, dl_row, masked, SIDE, bottom - top,
                          dA + (p * rank + r) * terms + left, terms, width, top > 0, made);
          });
        }
  }
}

// dx (rows, terms) = Σ over projections of mask ⊙ (dl A): A (count * rank, terms), its rows `a_row` apart and so long
// that whole vectors can be read.
void up(const float* dl, const float* a, float* dx, const Mask* masks, long rows, long terms, long count, long rank,
        long a_row, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < threads; i++) {
    const Share own(rows, 8, i, threads);
    tiles<8>(own.first, own.last, [&](long row, long made, auto size) {
      for (long column = 0; column < terms; column += WIDTH) {
        floats total[size][1] = {};
        for (long p = 0; p < count; p++) {
          floats sums[size][1] = {};
          sum_up(sums, dl + (row * count + p) * rank, count * rank, 1, a + p * rank * a_row + column, a_row, rank);
          for (long r = 0; r < size; r++) total[r][0] += Row(masks[p], row + r).kept(sums[r][0], column);
        }
        put(total, dx + row * terms + column, terms, false, terms - column, made);
      }
    });
  }
}

}
