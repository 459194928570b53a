// The numbers of a matrix as it is stored: float32, bfloat16, 8 or 4 bits.

#pragma once

#include <cstdint>

#include "product_job.h"
#include "vectors.h"

namespace {

// W as it lies in memory: `row(i, j, count)` gives the numbers j to j + count of its row i, and zeros behind; `place(i, j)`
// says where number j of row i lies.
struct Float32 {
  const float* at;
  long stride;

  const void* place(long i, long j) const { return at + i * stride + j; }
  floats row(long i, long j, long count) const { return load(at + i * stride + j, count); }
};

struct Bfloat16 {
  const uint16_t* at;
  long stride;

  const void* place(long i, long j) const { return at + i * stride + j; }
  floats row(long i, long j, long count) const {
    using Bits = uint16_t __attribute__((vector_size(32)));
    return (floats)(__builtin_convertvector(some<Bits>(at + i * stride + j, count), ints) << 16);
  }
};

struct EightBits {  // rows of `width` numbers, each row with its scale
  const int8_t* at;
  long width;
  const float* scales;

  const void* place(long i, long j) const { return at + i * width + j; }
  floats row(long i, long j, long count) const {
    using Bytes = int8_t __attribute__((vector_size(16)));
    using Shorts = int16_t __attribute__((vector_size(32)));  // g++ 12 makes floats of bytes one by one
    const auto wide = __builtin_convertvector(some<Bytes>(at + i * width + j, count), Shorts);
    return count ? __builtin_convertvector(__builtin_convertvector(wide, ints), floats) * scales[i] : floats{};
  }
};

struct FourBits {  // rows of `width` numbers, two a byte, the first in its upper half; each block with its scale
  const uint8_t* at;
  long width;
  const float* scales;
  floats code;
  long blocksize;

  const void* place(long i, long j) const { return at + (i * width + j) / 2; }
  floats row(long i, long j, long count) const {
    const long n = i * width + j;
    if (count < WIDTH || n % 2 || n % blocksize + WIDTH > blocksize) return one_by_one(n, count);
    int bytes[2];
    std::memcpy(bytes, at + n / 2, sizeof bytes);
    const ints first = bytes[0] - ints{}, last = bytes[1] - ints{};
    const ints four_bytes = __builtin_shuffle(first, last, ints{0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16});
    const ints place = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
    return __builtin_shuffle(code, four_bytes >> place & 15) * scales[n / blocksize];
  }
  floats one_by_one(long n, long count) const {
    floats x = {};
    for (long i = 0; i < count; i++, n++) x[i] = code[at[n / 2] >> (n % 2 ? 0 : 4) & 15] * scales[n / blocksize];
    return x;
  }
};

// use(w) of a job's w.
template <class Use>
void with_weights(const Job& job, Use use) {
  if (job.bits == 16) use(Bfloat16{(const uint16_t*)job.w, job.w_stride});
  if (job.bits == 8) use(EightBits{(const int8_t*)job.w, job.w_stride, job.scales});
  if (job.bits == 4) use(FourBits{(const uint8_t*)job.w, job.w_stride, job.scales, load(job.code), job.blocksize});
}

}  // namespace
