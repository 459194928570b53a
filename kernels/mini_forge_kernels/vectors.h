// Sixteen float32 numbers at a time, a register of AVX-512, by g++'s own vector types.

#pragma once

#include <cstring>

namespace {

using floats = float __attribute__((vector_size(64)));
using ints = int __attribute__((vector_size(64)));

constexpr long WIDTH = 16;

floats all(float x) { return x - floats{}; }
// Of less than WIDTH numbers the others are zeros, and are not written. To copy as many as a variable says is a call.
template <class Vector, class Number>
Vector some(const Number* at, long count) {
  Vector x = {};
  count == WIDTH ? std::memcpy(&x, at, sizeof x) : std::memcpy(&x, at, count * sizeof(Number));
  return x;
}
floats load(const float* at, long count = WIDTH) { return some<floats>(at, count); }
void store(float* at, floats x, long count = WIDTH) {
  count == WIDTH ? std::memcpy(at, &x, sizeof x) : std::memcpy(at, &x, count * sizeof(float));
}

// visit(first, count) for 0 to n, WIDTH numbers at a time and then the rest.
template <class Visit>
void each(long n, Visit visit) {
  long i = 0;
  for (; i + WIDTH <= n; i += WIDTH) visit(i, WIDTH);
  if (i < n) visit(i, n - i);
}

// step(x, x turned round by 8, 4, 2, 1): of a sum or a maximum every place then holds that of all.
template <class Step>
float reduce(floats x, Step step) {
  const ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int by = WIDTH / 2; by; by /= 2) x = step(x, __builtin_shuffle(x, place ^ by));
  return x[0];
}
float sum(floats x) {
  return reduce(x, [](floats a, floats b) { return a + b; });
}
floats larger(floats a, floats b) { return a > b ? a : b; }
float largest(floats x) { return reduce(x, larger); }

// eˣ for x ≤ 0, to 2 units in the last place, and 1e-38 instead of less; NaN of NaN. It is 2ⁿ eᶠ, where n is the integer
// nearest to x / ln 2, and eᶠ the sum of its series, |f| ≤ ln 2 / 2. ln 2 is subtracted in two pieces, n times the first
// of which is exact; adding 1.5·2²³ rounds to an integer.
floats exp(floats x) {
  x = x < -87 ? all(-87) : x;
  const floats n = (x * 1.44269504f + 12582912.f) - 12582912.f;
  const floats f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  constexpr float series[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
  floats sum = all(1.f / 5040);
  for (float c : series) sum = sum * f + c;
  return (floats)((ints)sum + (__builtin_convertvector(n, ints) << 23));
}

// 1 / (1 + e⁻ˣ), 0 below -87
floats sigmoid(floats x) {
  const floats e = x < -87 ? floats{} : exp(x > 0 ? -x : x);
  return (x > 0 ? all(1) : e) / (1 + e);
}

}  // namespace
