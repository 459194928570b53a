// What a product is to be made of, for frozen_product.cpp and amx_product.cpp.

#pragma once

// out (rows, columns) = x w, or that added to out: x (rows, terms), w (terms, columns), of w (columns, terms) if
// is_transposed; and, of rank > 0, low (rows, rank) times factor (rank, columns), likewise transposed. Where `before`
// (rank, terms) is given, of few rows of x and a transposed w, low is scale x beforeᵀ. Strides count numbers, from row to
// row. w's form: `bits` a number; `scales`, `code` and `blocksize` where it has them.
struct Job {
  const float* x;
  float* out;
  const void* w;
  const float *scales, *code, *low, *factor, *before;
  long rows, terms, columns, rank, x_stride, out_stride, w_stride, low_stride, factor_stride, before_stride,
      blocksize;
  float scale;
  int bits, is_transposed, adds, threads;
};

extern "C" {
extern const long size_of_Job = sizeof(Job);
}
