// x Wᵀ and x W for float32 x and a frozen W as it is stored, bfloat16, 8 or 4 bits, and a low-rank term beside it. What
// for is said in frozen_product.py, which compiles this file and calls the function at its end.
//
// A thread makes a panel, some columns of W, float32, term after term, for so many terms as stay in its second cache, and
// multiplies it with all its rows of x. A tile, ROWS rows of the result by one panel, is summed up in registers: each
// number of the panel is read once for ROWS products, each of x once for PANEL. Threads share nothing that they write, and
// how many there are changes no bit of the result.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product_job.h"
#include "tile.h"
#include "weights.h"

namespace {

constexpr long ROWS = 8, VECTORS = 3;     // of a tile: 24 of 32 registers
constexpr long PANEL = VECTORS * WIDTH;
constexpr long MOST_TERMS = 1536;         // of a panel
constexpr long MOST_SUMMED = 320;         // terms that are summed up before the sum is added to `out`: as many roundings
constexpr long MOST_RANK = 128;           // and of `low` beside them
constexpr long PACKED = 96 * (MOST_TERMS + MOST_RANK);  // numbers of panels that are made at a time, 640 KB
constexpr long AHEAD = 16;                // terms of a panel that are fetched before they are written to
constexpr long ROWS_AHEAD = 32;           // of W that are fetched before they are read, where it is read row by row;
constexpr long NUMBERS_AHEAD = 64;        // and of each row's numbers where many rows are read side by side
constexpr long FAR_AHEAD = 2048;          // numbers of W that are fetched where it is read from beginning to end
constexpr long FEW = 8;                   // rows of x for which making panels takes longer than it saves
constexpr long LEAST = 1 << 16;           // multiplications for which a second thread is woken up

// A tile of the result, of `now` terms from `first` on and, behind these in the panel, `rank` more.
struct Tile {
  const Job& job;
  long column, first, now, rank;

  // `count` rows. Of the last rows a tile is made that begins so far above that it is a whole one.
  void multiply(long row, long count, const float* panel) const {
    const long made = ROWS - count;  // before, above `row`
    if (row >= made) return sums<ROWS>(row - made, made, panel);
    for (long i = 0; i < count; i++) sums<1>(row + i, 0, panel);
  }

  template <long COUNT>
  void sums(long row, long made, const float* panel) const {
    const float *from = job.x + row * job.x_stride + first, *next = from + COUNT * job.x_stride;
    float* to = job.out + row * job.out_stride + column;
    UNROLL for (long i = 0; i < COUNT; i++)  // on its way while the sums are made, and so is the next tile's x
      UNROLL for (long v = 0; v < VECTORS; v++) __builtin_prefetch(to + i * job.out_stride + v * WIDTH, 1);
    const long part = pieces(now, pieces(now, MOST_SUMMED));
    for (long start = 0; start < now; start += part) {
      floats sums[COUNT][VECTORS] = {};
      const long end = std::min(now, start + part);
      for (long k = start; k < end; k += WIDTH) {
        UNROLL for (long i = 0; i < COUNT; i++) __builtin_prefetch(next + i * job.x_stride + k);
        sum_up(sums, from + k, job.x_stride, 1, panel + k * PANEL, PANEL, std::min(WIDTH, end - k));
      }
      if (end == now && rank) sum_up(sums, job.low + row * job.low_stride, job.low_stride, 1, panel + now * PANEL, PANEL, rank);
      put(sums, to, job.out_stride, job.adds || first + start > 0, job.columns - column, made);
    }
  }
};

struct alignas(64) Line {
  float numbers[WIDTH];
};

template <class Weights>
struct Product {
  const Job& job;
  const Weights w;
  const Float32 factor = {job.factor, job.factor_stride};

  void run() const {
    if (job.is_transposed && job.rows <= FEW / 2) return dot_products<FEW / 2>();
    if (job.is_transposed && job.rows <= FEW) return dot_products<FEW>();
    const long panels = pieces(job.columns, PANEL), tiles = pieces(job.rows, ROWS), threads = job.threads;
    long across = threads;  // threads side by side; the others below them, who make the same panels again
    for (long fewer = threads - 1; fewer; fewer--)
      if (threads % fewer == 0 && most_tiles(fewer) < most_tiles(across)) across = fewer;
    const long down = threads / across;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < threads; i++) {
      const long y = i / across, z = i % across;
      compute(std::min(job.rows, tiles * y / down * ROWS), std::min(job.rows, tiles * (y + 1) / down * ROWS),
              panels * z / across * PANEL, std::min(job.columns, panels * (z + 1) / across * PANEL));
    }
  }

  // Of the thread that has most.
  long most_tiles(long across) const {
    return pieces(pieces(job.columns, PANEL), across) * pieces(pieces(job.rows, ROWS), job.threads / across);
  }

  // One thread's share: rows [top, bottom) and columns [left, right) of the result.
  void compute(long top, long bottom, long left, long right) const {
    static thread_local std::vector<Line> room(PACKED / WIDTH);  // more than a thread's stack may have
    float* const packed = room.data()->numbers;
    const long steps = pieces(job.terms, pieces(job.terms, MOST_TERMS));  // of equal parts of the terms
    for (long first = 0; first < job.terms; first += steps) {
      const long now = std::min(steps, job.terms - first), rank = first + now == job.terms ? job.rank : 0;
      const long size = now + rank, width = PACKED / (size * PANEL) * PANEL;
      for (long column = left; column < right; column += width) {
        const long end = std::min(right, column + width);
        for (long c = column; c < end; c += PANEL) {
          float* panel = packed + (c - column) * size;
          pack(w, c, first, now, panel);
          pack(factor, c, 0, rank, panel + now * PANEL);
        }
        for (long row = top; row < bottom; row += ROWS)
          for (long c = column; c < end; c += PANEL)
            Tile{job, c, first, now, rank}.multiply(row, std::min(ROWS, bottom - row), packed + (c - column) * size);
      }
    }
  }

  // A side's numbers for a panel's columns, term after term, zeros beyond its end. What is written to is on its way from
  // the second cache meanwhile, and what is read next from memory, whose rows are too short for the CPU to foresee it.
  template <class Side>
  void pack(const Side& side, long column, long first, long now, float* panel) const {
    long here[VECTORS];  // columns there are, of each vector
    for (long v = 0; v < VECTORS; v++) here[v] = std::clamp(job.columns - column - v * WIDTH, 0L, WIDTH);
    if (!job.is_transposed) {
      for (long k = 0; k < now; k++, panel += PANEL)
        UNROLL for (long v = 0; v < VECTORS; v++) {
          __builtin_prefetch(panel + AHEAD * PANEL + v * WIDTH, 1);
          __builtin_prefetch(side.place(first + k + ROWS_AHEAD, column + v * WIDTH));
          store(panel + v * WIDTH, side.row(first + k, column + v * WIDTH, here[v]));
        }
      return;
    }
    for (long k = 0; k < now; k += WIDTH, panel += WIDTH * PANEL)
      for (long v = 0; v < VECTORS; v++) {
        floats a[WIDTH];
        const long row = column + v * WIDTH, count = std::min(WIDTH, now - k);
        if (count == WIDTH && here[v] == WIDTH) {
          UNROLL for (long i = 0; i < WIDTH; i++) {
            __builtin_prefetch(side.place(row + i, first + k + NUMBERS_AHEAD));
            a[i] = side.row(row + i, first + k, WIDTH);
          }
        } else {
          for (long i = 0; i < WIDTH; i++) a[i] = side.row(row + i, first + k, i < here[v] ? count : 0);
        }
        transpose(a);
        for (long i = 0; i < count; i++) {
          __builtin_prefetch(panel + (i + AHEAD) * PANEL + v * WIDTH, 1);
          store(panel + i * PANEL + v * WIDTH, a[i]);
        }
      }
  }

  // Of few rows of x: w is read as it is, once, and its numbers are used at once, for COUNT rows even if there are fewer.
  template <long COUNT>
  void dot_products() const {
    const float* rows[COUNT];
    for (long i = 0; i < COUNT; i++) rows[i] = job.x + std::min(i, job.rows - 1) * job.x_stride;
    float made[COUNT][MOST_RANK];
    const float* lows[COUNT];
    for (long i = 0; i < COUNT; i++)
      lows[i] = job.before ? made[i] : job.low + std::min(i, job.rows - 1) * job.low_stride;
    const Float32 before = {job.before, job.before_stride};
#pragma omp parallel num_threads(job.threads) if (job.terms * job.columns > LEAST)
    {
#pragma omp for schedule(static)
      for (long r = 0; r < (job.before ? job.rank : 0); r++) {
        floats sums[COUNT] = {};
        add(sums, rows, before, r, job.terms);
        for (long i = 0; i < COUNT; i++) made[i][r] = job.scale * sum(sums[i]);
      }
#pragma omp for schedule(static)
      for (long column = 0; column < job.columns; column++) {
        floats sums[COUNT] = {};
        add(sums, rows, w, column, job.terms);
        add(sums, lows, factor, column, job.rank);
        for (long i = 0; i < job.rows; i++) {
          float& at = job.out[i * job.out_stride + column];
          at = job.adds ? at + sum(sums[i]) : sum(sums[i]);
        }
      }
    }
  }

  template <long COUNT, class Side>
  static void add(floats (&sums)[COUNT], const float* const (&rows)[COUNT], const Side& side, long column, long terms) {
    each(terms, [&](long k, long count) {
      __builtin_prefetch(side.place(column, k + FAR_AHEAD));
      const floats numbers = side.row(column, k, count);
      UNROLL for (long i = 0; i < COUNT; i++) sums[i] += load(rows[i] + k, count) * numbers;
    });
  }
};

}  // namespace

extern "C" {

void product(const Job* job) {
  with_weights(*job, [&](auto w) { Product<decltype(w)>{*job, w}.run(); });
}

}
