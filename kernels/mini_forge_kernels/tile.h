// Matrix products in tiles that are summed up in registers.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace {

long pieces(long n, long size) { return (n + size - 1) / size; }

// sums += a b: a's number [i, k] lies at a + i * a_row + k * a_term, b's row k at b + k * b_row. Each number of b is read
// once for ROWS products, each of a once for all VECTORS.
template <long ROWS, long VECTORS>
[[gnu::always_inline]] inline void sum_up(floats (&sums)[ROWS][VECTORS], const float* a, long a_row, long a_term,
                                          const float* b, long b_row, long terms) {
  for (long k = 0; k < terms; k++, a += a_term, b += b_row)
    UNROLL for (long i = 0; i < ROWS; i++)
      UNROLL for (long v = 0; v < VECTORS; v++) sums[i][v] += a[i * a_row] * load(b + v * WIDTH);
}

// c = sums, or that added to c; of the first `made` rows and what lies beyond `columns` nothing is written.
template <long ROWS, long VECTORS>
[[gnu::always_inline]] inline void put(const floats (&sums)[ROWS][VECTORS], float* c, long c_row, bool adds, long columns,
                                       long made = 0) {
  UNROLL for (long i = 0; i < ROWS; i++)
    UNROLL for (long v = 0; v < VECTORS; v++) {
      const long left = columns - v * WIDTH, there = left > WIDTH ? WIDTH : left < 0 ? 0 : left;
      float* at = c + i * c_row + v * WIDTH;
      if (i >= made) store(at, adds ? load(at, there) + sums[i][v] : sums[i][v], there);
    }
}

// a, 16 rows of 16 numbers, transposed.
void transpose(floats* a) {
  const ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  UNROLL for (int by = 1; by < WIDTH; by *= 2)
    UNROLL for (int i = 0; i < WIDTH; i++)
      if (!(i & by)) {
        const floats first = a[i], second = a[i + by];
        a[i] = __builtin_shuffle(first, second, (place & by) != 0 ? place - by + int(WIDTH) : place);
        a[i + by] = __builtin_shuffle(first, second, (place & by) != 0 ? place + int(WIDTH) : place + by);
      }
}

// visit(first, made, whole) for tiles of SIZE of the numbers from `first` to `last`: the last tile begins so far above
// that it is a whole one, `made` of which are there already; fewer than SIZE in all are visited one by one.
template <long SIZE, class Visit>
void tiles(long first, long last, Visit visit) {
  if (last - first < SIZE) {
    for (long i = first; i < last; i++) visit(i, 0, std::integral_constant<long, 1>{});
    return;
  }
  for (long i = first; i < last; i += SIZE) {
    const long from = std::min(i, last - SIZE);
    visit(from, i - from, std::integral_constant<long, SIZE>{});
  }
}

// c (ROWS, columns) = a b, or that added to c, VECTORS of columns at a time and, where they do not divide them, fewer in the
// end; a's number [i, k] lies at a + i * a_row + k * a_term, and of b's rows whole vectors can be read. Of the first `made`
// rows nothing is written.
template <long ROWS, long VECTORS = 3, bool DIVIDES = false>
void product(const float* a, long a_row, long a_term, const float* b, long b_row, long terms, float* c, long c_row,
             long columns, bool adds, long made) {
  for (; columns > (VECTORS - 1) * WIDTH; columns -= VECTORS * WIDTH, b += VECTORS * WIDTH, c += VECTORS * WIDTH) {
    floats sums[ROWS][VECTORS] = {};
    sum_up(sums, a, a_row, a_term, b, b_row, terms);
    put(sums, c, c_row, adds, columns, made);
  }
  if constexpr (VECTORS > 1 && !DIVIDES)
    if (columns > 0) product<ROWS, VECTORS - 1>(a, a_row, a_term, b, b_row, terms, c, c_row, columns, adds, made);
}

// That for any number of rows; of the 32 registers 24 hold a tile.
void product(const float* a, long a_row, long a_term, const float* b, long b_row, long terms, float* c, long c_row, long rows,
             long columns, bool adds) {
  if (columns % (4 * WIDTH) == 0)
    return tiles<6>(0, rows, [&](long row, long made, auto size) {
      product<size, 4, true>(a + row * a_row, a_row, a_term, b, b_row, terms, c + row * c_row, c_row, columns, adds, made);
    });
  tiles<8>(0, rows, [&](long row, long made, auto size) {
    product<size>(a + row * a_row, a_row, a_term, b, b_row, terms, c + row * c_row, c_row, columns, adds, made);
  });
}

}  // namespace
