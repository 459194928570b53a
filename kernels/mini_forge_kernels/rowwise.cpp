// RMSNorm, SwiGLU, the rotation of RoPE, and their gradients, for float32 on CPUs: each reads its inputs once and writes
// its result once. The equations are in rms_norm.py, swiglu.py and rope.py; rowwise.py compiles this file.
//
// Strides count numbers from row to row (of heads: from head to head); a row's numbers lie one after another, and a
// result's rows too. A gradient may be written over the one it is made from.

#include "vectors.h"

namespace {

constexpr long LEAST = 1 << 14;  // numbers for which a second thread is woken up

struct Unit {  // h = g σ(slope g) (u + offset), with g ≤ limit and u within ± limit
  float limit, slope, offset;

  floats below(floats x) const { return x > limit ? all(limit) : x; }
  floats within(floats x) const { return x < -limit ? all(-limit) : below(x); }
};

// A row of `width` numbers under a norm.
struct Normed {
  const float *x, *w;
  long width;

  float r(float eps) const {
    floats squares = {};
    each(width, [&](long i, long count) {
      const floats a = load(x + i, count);
      squares += a * a;
    });
    return 1 / __builtin_sqrtf(sum(squares) / width + eps);
  }
  void write(float r, float* y) const {
    each(width, [&](long i, long count) { store(y + i, load(x + i, count) * r * load(w + i, count), count); });
  }
  // dx = r (w dy - x r² mean(w dy x))
  void gradient(float r, const float* dy, float* dx) const {
    floats products = {};
    each(width, [&](long i, long count) { products += load(w + i, count) * load(dy + i, count) * load(x + i, count); });
    const float shared = r * r * sum(products) / width;
    each(width, [&](long i, long count) {
      store(dx + i, r * (load(w + i, count) * load(dy + i, count) - load(x + i, count) * shared), count);
    });
  }
};

}  // namespace

extern "C" {

void rms_norm(const float* x, const float* w, float* y, float* r, long rows, long width, long x_stride, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > LEAST)
  for (long row = 0; row < rows; row++) {
    const Normed normed = {x + row * x_stride, w, width};
    normed.write(r[row] = normed.r(eps), y + row * width);
  }
}

void rms_norm_gradient(const float* dy, const float* x, const float* w, const float* r, float* dx, long rows, long width,
                       long dy_stride, long x_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > LEAST)
  for (long row = 0; row < rows; row++)
    Normed{x + row * x_stride, w, width}.gradient(r[row], dy + row * dy_stride, dx + row * width);
}

void rms_norm_vjp(const float* dy, const float* x, const float* w, float* y, float* dx, long rows, long width, long dy_stride,
                  long x_stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > LEAST)
  for (long row = 0; row < rows; row++) {
    const Normed normed = {x + row * x_stride, w, width};
    const float r = normed.r(eps);
    normed.write(r, y + row * width);
    normed.gradient(r, dy + row * dy_stride, dx + row * width);
  }
}

void swiglu(const float* gate, const float* up, float* h, long rows, long width, long gate_stride, long up_stride,
            float limit, float slope, float offset, int threads) {
  const Unit unit = {limit, slope, offset};
#pragma omp parallel for num_threads(threads) if (rows * width > LEAST)
  for (long row = 0; row < rows; row++)
    each(width, [&](long i, long count) {
      const floats g = unit.below(load(gate + row * gate_stride + i, count));
      const floats u = unit.within(load(up + row * up_stride + i, count));
      store(h + row * width + i, g * sigmoid(slope * g) * (u + offset), count);
    });
}

// h is made again where there is a place for it.
void swiglu_gradient(const float* dh, const float* gate, const float* up, float* h, float* dgate, float* dup, long rows,
                     long width, long dh_stride, long gate_stride, long up_stride, float limit, float slope, float offset,
                     int threads) {
  const Unit unit = {limit, slope, offset};
#pragma omp parallel for num_threads(threads) if (rows * width > LEAST)
  for (long row = 0; row < rows; row++)
    each(width, [&](long i, long count) {
      const floats gate_ = load(gate + row * gate_stride + i, count), up_ = load(up + row * up_stride + i, count);
      const floats g = unit.below(gate_), u = unit.within(up_), s = sigmoid(slope * g);
      const floats upstream = load(dh + row * dh_stride + i, count);
      if (h) store(h + row * width + i, g * s * (u + offset), count);
      const floats dg = upstream * (u + offset) * s * (1 + slope * g * (1 - s)), du = upstream * g * s;
      store(dgate + row * width + i, gate_ > limit ? floats{} : dg, count);
      store(dup + row * width + i, up_ > limit || up_ < -limit ? floats{} : du, count);
    });
}

// y = (x₁c - x₂s, x₂c + x₁s) of the halves x₁, x₂ of each head; sign -1 turns the other way.
void rotate(const float* x, const float* cos, const float* sin, float* y, long rows, long heads, long channels,
            long x_stride, long head_stride, float sign, int threads) {
  const long half = channels / 2;
#pragma omp parallel for num_threads(threads) if (rows * heads * channels > LEAST)
  for (long row = 0; row < rows; row++)
    for (long head = 0; head < heads; head++) {
      const float* from = x + row * x_stride + head * head_stride;
      float* to = y + (row * heads + head) * channels;
      each(half, [&](long i, long count) {
        const floats c = load(cos + row * channels + i, count), s = sign * load(sin + row * channels + i, count);
        const floats first = load(from + i, count), second = load(from + half + i, count);
        store(to + i, first * c - second * s, count);
        store(to + half + i, second * c + first * s, count);
      });
    }
}

}
