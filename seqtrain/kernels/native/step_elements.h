// Elementwise operations, reductions and rows of a step's program, on tensors of any strides and dtypes.
//
// A strip of numbers is brought to the type that is computed in, worked on by a plain loop, and put back: casts,
// broadcasts and strides cost what they move, and each operation is written once.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <type_traits>
#include <vector>

#include "arrays.h"

namespace seqtrain {

constexpr int kDims = 6;
constexpr int kStrip = 256;

// dtypes of a program, numbered as `DTYPES` in program.py.
enum Dtype : int32_t { kF32, kBF16, kF64, kI64, kBool, kC64, kC128, kI32, kI8, kU8 };
// A lazily conjugated or negated tensor's marks.
enum Mark : int32_t { kConjugated = 1, kNegated = 2 };

// Mirrored in program.py: where a tensor begins, and how far apart its numbers are along an instruction's dimensions.
struct Operand {
  int32_t slot, dtype, marks, absent;
  int64_t offset;  // bytes
  int64_t strides[kDims];
};

struct Instruction {
  int32_t code, operation, type, dims, operands, first, threads, reduced;
  int64_t sizes[kDims];
  int64_t ints[8];
  double scalars[4];
};

// What a call gives: an address for each slot, and the numbers that change from call to call.
struct Frame {
  char* const* slots;
  const int64_t* numbers;
};

template <class T>
struct IsComplex : std::false_type {};
template <class T>
struct IsComplex<std::complex<T>> : std::true_type {};

template <class T, class From>
static inline T converted(From x) {
  if constexpr (IsComplex<From>::value && !IsComplex<T>::value)
    return static_cast<T>(x.real());
  else if constexpr (IsComplex<From>::value)
    return T(static_cast<typename T::value_type>(x.real()), static_cast<typename T::value_type>(x.imag()));
  else if constexpr (IsComplex<T>::value)
    return T(static_cast<typename T::value_type>(x));
  else
    return static_cast<T>(x);
}

static inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

template <class T, class From>
static void take_strip(const From* p, int64_t stride, int n, T* to) {
  if (stride == 0) {
    std::fill_n(to, n, converted<T>(*p));
  } else if (stride == 1) {
    for (int i = 0; i < n; ++i) to[i] = converted<T>(p[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = converted<T>(p[i * stride]);
  }
}

static int64_t width_of(int32_t dtype) {
  static const int64_t widths[] = {4, 2, 8, 8, 1, 8, 16, 4, 1, 1};
  return widths[dtype];
}

template <class T>
constexpr int32_t dtype_of() {
  if constexpr (std::is_same_v<T, float>) return kF32;
  if constexpr (std::is_same_v<T, double>) return kF64;
  if constexpr (std::is_same_v<T, std::complex<float>>) return kC64;
  return kC128;
}

// n numbers from p on as T: where they lie if they lie so already, else in `buffer`.
template <class T>
static const T* take(const Operand& x, const char* p, int64_t stride, int n, T* buffer) {
  if (x.dtype == dtype_of<T>() && stride == 1 && !x.marks) return reinterpret_cast<const T*>(p);
  switch (x.dtype) {
    case kF32: take_strip(reinterpret_cast<const float*>(p), stride, n, buffer); break;
    case kF64: take_strip(reinterpret_cast<const double*>(p), stride, n, buffer); break;
    case kI64: take_strip(reinterpret_cast<const int64_t*>(p), stride, n, buffer); break;
    case kI32: take_strip(reinterpret_cast<const int32_t*>(p), stride, n, buffer); break;
    case kI8: take_strip(reinterpret_cast<const int8_t*>(p), stride, n, buffer); break;
    case kU8:
    case kBool: take_strip(reinterpret_cast<const uint8_t*>(p), stride, n, buffer); break;
    case kC64: take_strip(reinterpret_cast<const std::complex<float>*>(p), stride, n, buffer); break;
    case kC128: take_strip(reinterpret_cast<const std::complex<double>*>(p), stride, n, buffer); break;
    case kBF16: {
      auto* q = reinterpret_cast<const uint16_t*>(p);
      for (int i = 0; i < n; ++i) buffer[i] = converted<T>(from_bfloat16(q[i * stride]));
    }
  }
  if constexpr (IsComplex<T>::value)
    if (x.marks & kConjugated)
      for (int i = 0; i < n; ++i) buffer[i] = std::conj(buffer[i]);
  if (x.marks & kNegated)
    for (int i = 0; i < n; ++i) buffer[i] = -buffer[i];
  return buffer;
}

template <class To, class T>
static void put_strip(const T* from, int64_t stride, int n, To* p) {
  for (int i = 0; i < n; ++i) p[i * stride] = converted<To>(from[i]);
}

template <class T>
static void put(const Operand& x, char* p, int64_t stride, int n, const T* from) {
  switch (x.dtype) {
    case kF32: return put_strip(from, stride, n, reinterpret_cast<float*>(p));
    case kF64: return put_strip(from, stride, n, reinterpret_cast<double*>(p));
    case kI64: return put_strip(from, stride, n, reinterpret_cast<int64_t*>(p));
    case kI32: return put_strip(from, stride, n, reinterpret_cast<int32_t*>(p));
    case kI8: return put_strip(from, stride, n, reinterpret_cast<int8_t*>(p));
    case kU8: return put_strip(from, stride, n, reinterpret_cast<uint8_t*>(p));
    case kC64: return put_strip(from, stride, n, reinterpret_cast<std::complex<float>*>(p));
    case kC128: return put_strip(from, stride, n, reinterpret_cast<std::complex<double>*>(p));
    case kBool:
      for (int i = 0; i < n; ++i) reinterpret_cast<uint8_t*>(p)[i * stride] = from[i] != T(0);
      return;
    case kBF16:
      for (int i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(p)[i * stride] = to_bfloat16(converted<float>(from[i]));
  }
}

// e^x in float, for every x.
static inline Vec exp_any(Vec x) {
  const Vec low = filled(-87.3f), high = filled(88.72f);
  const IntVec under = x < low, over = x > high, none = x != x;
  const Vec bounded = under ? low : x;
  auto [n, p] = exp_parts(over ? high : bounded);
  // In two factors, of which each is a normal number: 2^128 is none.
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
  const IntVec first = (half + 127) << 23, second = (whole - half + 127) << 23;
  p = p * reinterpret_cast<const Vec&>(first) * reinterpret_cast<const Vec&>(second);
  p = under ? Vec{} : p;
  p = over ? filled(std::numeric_limits<float>::infinity()) : p;
  return none ? x : p;
}

// `f` of vectors over n floats; what is left over by way of one that is filled up.
template <class F>
static void by_vectors(int n, float* out, const float* a, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(a + i)));
  if (i == n) return;
  float rest[kLanes] = {};
  std::memcpy(rest, a + i, sizeof(float) * (n - i));
  store(rest, f(load(rest)));
  std::memcpy(out + i, rest, sizeof(float) * (n - i));
}

static inline Vec sigmoid_of(Vec x) { return filled(1) / (exp_any(-x) + 1); }

// Names of elementwise operations, which program.py asks for: it numbers them as they stand here.
#define SEQTRAIN_ELEMENTWISE(X)                                                                                      \
  X(copy) X(add) X(sub) X(mul) X(div) X(neg) X(exp) X(expm1) X(log) X(log1p) X(sqrt) X(rsqrt) X(reciprocal) X(square) \
  X(abs) X(sign) X(sin) X(cos) X(tanh) X(sigmoid) X(silu) X(relu) X(gelu) X(gelu_tanh) X(elu) X(softplus)            \
  X(log_sigmoid) X(erf) X(floor) X(ceil) X(round) X(trunc) X(pow) X(minimum) X(maximum) X(remainder)                 \
  X(floor_divide) X(logaddexp) X(atan2) X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(logical_and) X(logical_or)             \
  X(logical_xor) X(logical_not) X(where) X(add_scaled) X(add_product) X(add_quotient) X(complex) X(polar)            \
  X(isnan) X(isinf) X(leaky_relu)

enum Elementwise : int32_t {
#define SEQTRAIN_NAME(name) op_##name,
  SEQTRAIN_ELEMENTWISE(SEQTRAIN_NAME)
#undef SEQTRAIN_NAME
};

template <class T>
static bool in_vectors(int32_t operation, int n, T* out, const T* a) {
  if constexpr (std::is_same_v<T, float>) {
    switch (operation) {
      case op_exp: return by_vectors(n, out, a, [](Vec x) { return exp_any(x); }), true;
      case op_sigmoid: return by_vectors(n, out, a, [](Vec x) { return sigmoid_of(x); }), true;
      case op_silu: return by_vectors(n, out, a, [](Vec x) { return x * sigmoid_of(x); }), true;
    }
  }
  return false;
}

template <class T>
static T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

#define SEQTRAIN_EACH(name, value)            \
  case op_##name:                             \
    for (int i = 0; i < n; ++i) out[i] = value; \
    return;

// Operations that complex numbers have, too. `a`, `b`, `c`: inputs; those that are missing are never read.
template <class T>
static void apply(int32_t operation, int n, T* out, const T* a, const T* b, const T* c) {
  if (in_vectors(operation, n, out, a)) return;
  const T one(1);
  switch (operation) {
    SEQTRAIN_EACH(copy, a[i])
    SEQTRAIN_EACH(add, a[i] + b[i])
    SEQTRAIN_EACH(sub, a[i] - b[i])
    SEQTRAIN_EACH(div, a[i] / b[i])
    SEQTRAIN_EACH(neg, -a[i])
    SEQTRAIN_EACH(exp, std::exp(a[i]))
    SEQTRAIN_EACH(log, std::log(a[i]))
    SEQTRAIN_EACH(sqrt, std::sqrt(a[i]))
    SEQTRAIN_EACH(rsqrt, one / std::sqrt(a[i]))
    SEQTRAIN_EACH(reciprocal, one / a[i])
    SEQTRAIN_EACH(square, a[i] * a[i])
    SEQTRAIN_EACH(sin, std::sin(a[i]))
    SEQTRAIN_EACH(cos, std::cos(a[i]))
    SEQTRAIN_EACH(tanh, std::tanh(a[i]))
    SEQTRAIN_EACH(pow, std::pow(a[i], b[i]))
    SEQTRAIN_EACH(eq, T(a[i] == b[i]))
    SEQTRAIN_EACH(ne, T(a[i] != b[i]))
    SEQTRAIN_EACH(where, a[i] != T(0) ? b[i] : c[i])
    SEQTRAIN_EACH(add_scaled, a[i] + b[i] * c[i])
  }
  if constexpr (IsComplex<T>::value) {
    using R = typename T::value_type;
    switch (operation) {
      // Without the standard's search for infinities, which costs a call for each product.
      SEQTRAIN_EACH(mul, T(a[i].real() * b[i].real() - a[i].imag() * b[i].imag(),
                           a[i].real() * b[i].imag() + a[i].imag() * b[i].real()))
      SEQTRAIN_EACH(complex, T(a[i].real(), b[i].real()))
      SEQTRAIN_EACH(polar, std::polar(a[i].real(), b[i].real()))
      SEQTRAIN_EACH(log1p, std::log(one + a[i]))
      SEQTRAIN_EACH(abs, T(std::abs(a[i])))
      case op_expm1:
        for (int i = 0; i < n; ++i) {
          // e^x cos y - 1 without cancellation.
          const R x = a[i].real(), y = a[i].imag(), s = std::sin(y / 2), e = std::exp(x);
          out[i] = T(std::expm1(x) * std::cos(y) - 2 * s * s, e * std::sin(y));
        }
        return;
    }
  } else {
    switch (operation) {
      SEQTRAIN_EACH(mul, a[i] * b[i])
      SEQTRAIN_EACH(expm1, std::expm1(a[i]))
      SEQTRAIN_EACH(log1p, std::log1p(a[i]))
      SEQTRAIN_EACH(abs, std::abs(a[i]))
      SEQTRAIN_EACH(sign, T((a[i] > 0) - (a[i] < 0)))
      SEQTRAIN_EACH(sigmoid, sigmoid(a[i]))
      SEQTRAIN_EACH(silu, a[i] * sigmoid(a[i]))
      SEQTRAIN_EACH(relu, a[i] > 0 || a[i] != a[i] ? a[i] : T(0))
      SEQTRAIN_EACH(leaky_relu, a[i] > 0 ? a[i] : a[i] * b[i])
      SEQTRAIN_EACH(gelu, a[i] * T(0.5) * (one + std::erf(a[i] * T(M_SQRT1_2))))
      SEQTRAIN_EACH(gelu_tanh, a[i] * T(0.5) *
                                   (one + std::tanh(T(M_SQRT2 * M_2_SQRTPI * 0.5) *
                                                    (a[i] + T(0.044715) * a[i] * a[i] * a[i]))))
      SEQTRAIN_EACH(elu, a[i] > 0 ? a[i] : b[i] * std::expm1(a[i]))
      // b: beta, c: where it goes over to x itself.
      SEQTRAIN_EACH(softplus, a[i] * b[i] > c[i] ? a[i] : std::log1p(std::exp(a[i] * b[i])) / b[i])
      SEQTRAIN_EACH(log_sigmoid, std::min(a[i], T(0)) - std::log1p(std::exp(-std::abs(a[i]))))
      SEQTRAIN_EACH(erf, std::erf(a[i]))
      SEQTRAIN_EACH(floor, std::floor(a[i]))
      SEQTRAIN_EACH(ceil, std::ceil(a[i]))
      SEQTRAIN_EACH(round, std::nearbyint(a[i]))
      SEQTRAIN_EACH(trunc, std::trunc(a[i]))
      SEQTRAIN_EACH(minimum, a[i] != a[i] || a[i] < b[i] ? a[i] : b[i])
      SEQTRAIN_EACH(maximum, a[i] != a[i] || a[i] > b[i] ? a[i] : b[i])
      SEQTRAIN_EACH(remainder, a[i] - b[i] * std::floor(a[i] / b[i]))
      SEQTRAIN_EACH(floor_divide, std::floor(a[i] / b[i]))
      SEQTRAIN_EACH(logaddexp, a[i] == b[i] ? a[i] + T(M_LN2)
                                            : std::max(a[i], b[i]) + std::log1p(std::exp(-std::abs(a[i] - b[i]))))
      SEQTRAIN_EACH(atan2, std::atan2(a[i], b[i]))
      SEQTRAIN_EACH(lt, T(a[i] < b[i]))
      SEQTRAIN_EACH(le, T(a[i] <= b[i]))
      SEQTRAIN_EACH(gt, T(a[i] > b[i]))
      SEQTRAIN_EACH(ge, T(a[i] >= b[i]))
      SEQTRAIN_EACH(logical_and, T(a[i] != 0 && b[i] != 0))
      SEQTRAIN_EACH(logical_or, T(a[i] != 0 || b[i] != 0))
      SEQTRAIN_EACH(logical_xor, T((a[i] != 0) != (b[i] != 0)))
      SEQTRAIN_EACH(logical_not, T(a[i] == 0))
      SEQTRAIN_EACH(isnan, T(a[i] != a[i]))
      SEQTRAIN_EACH(isinf, T(std::isinf(a[i])))
    }
  }
}

#undef SEQTRAIN_EACH

static inline char* address(const Frame& frame, const Operand& x) { return frame.slots[x.slot] + x.offset; }

// step(offsets in bytes of all operands) for every index of the instruction's first `dims` dimensions.
template <int MOST, class Step>
static void each_index(const Instruction& in, const Operand* x, int dims, Step step) {
  int64_t index[kDims] = {}, offset[MOST] = {}, count = 1;
  for (int d = 0; d < dims; ++d) count *= in.sizes[d];
  for (int64_t n = 0; n < count; ++n) {
    step(offset);
    for (int d = dims - 1; d >= 0; --d) {
      const bool carry = ++index[d] == in.sizes[d];
      for (int o = 0; o < in.operands; ++o)
        offset[o] += x[o].strides[d] * width_of(x[o].dtype) * (carry ? 1 - in.sizes[d] : 1);
      if (!carry) break;
      index[d] = 0;
    }
  }
}

// out = operation(a, b, c), all of the instruction's sizes.
template <class T>
static void elementwise(const Instruction& in, const Operand* x, const Frame& frame) {
  char* base[4] = {};
  for (int o = 0; o < in.operands; ++o) base[o] = address(frame, x[o]);
  const int last = in.dims - 1;
  T buffers[4][kStrip];
  each_index<4>(in, x, last, [&](const int64_t* offset) {
    for (int64_t done = 0; done < in.sizes[last]; done += kStrip) {
      const int n = static_cast<int>(std::min<int64_t>(kStrip, in.sizes[last] - done));
      const T* inputs[3] = {};
      for (int o = 1; o < in.operands; ++o) {
        const int64_t stride = x[o].strides[last];
        inputs[o - 1] = take(x[o], base[o] + offset[o] + done * stride * width_of(x[o].dtype), stride, n, buffers[o]);
      }
      const int64_t stride = x[0].strides[last];
      char* p = base[0] + offset[0] + done * stride * width_of(x[0].dtype);
      const bool direct = x[0].dtype == dtype_of<T>() && stride == 1;
      T* out = direct ? reinterpret_cast<T*>(p) : buffers[0];
      apply(in.operation, n, out, inputs[0], inputs[1], inputs[2]);
      if (!direct) put(x[0], p, stride, n, out);
    }
  });
}

enum Reduction : int32_t { kSum, kMean, kMost, kLeast, kProduct, kWhereMost };

// out = the reduction of a over the last `reduced` dimensions.
template <class T>
static void reduce(const Instruction& in, const Operand* x, const Frame& frame) {
  char *out = address(frame, x[0]), *a = address(frame, x[1]);
  const int kept = in.dims - in.reduced, last = in.dims - 1;
  Instruction inner = in;
  Operand below[2] = {x[0], x[1]};
  int64_t count = in.sizes[last];
  for (int d = kept; d < last; ++d) {
    inner.sizes[d - kept] = in.sizes[d];
    for (int o = 0; o < 2; ++o) below[o].strides[d - kept] = x[o].strides[d];
    count *= in.sizes[d];
  }
  T buffer[kStrip];
  each_index<2>(in, x, kept, [&](const int64_t* offset) {
    T sum(0), product(1);
    bool begun = false;
    T best(0);
    int64_t seen = 0, where = 0;
    each_index<2>(inner, below, in.reduced - 1, [&](const int64_t* within) {
      const int64_t stride = x[1].strides[last], width = width_of(x[1].dtype);
      for (int64_t done = 0; done < in.sizes[last]; done += kStrip) {
        const int n = static_cast<int>(std::min<int64_t>(kStrip, in.sizes[last] - done));
        const T* p = take(x[1], a + offset[1] + within[1] + done * stride * width, stride, n, buffer);
        if (in.operation <= kMean) {
          T part(0);
          for (int i = 0; i < n; ++i) part += p[i];
          sum += part;
        } else if (in.operation == kProduct) {
          for (int i = 0; i < n; ++i) product *= p[i];
        } else if constexpr (!IsComplex<T>::value) {
          for (int i = 0; i < n; ++i, ++seen, begun = true)
            if (!begun || p[i] != p[i] || (in.operation == kLeast ? p[i] < best : p[i] > best)) best = p[i], where = seen;
        }
      }
    });
    T found = in.operation == kSum       ? sum
              : in.operation == kMean    ? sum / T(static_cast<float>(count))
              : in.operation == kProduct ? product
              : in.operation == kWhereMost ? T(where)
                                         : best;
    put(x[0], out + offset[0], 0, 1, &found);
  });
}

// first, joined with f(0) ... f(n - 1), side by side in many lanes: no result waits for the one before.
template <class T, class F, class Join>
static inline T folded(int64_t n, T first, F f, Join join) {
  constexpr int many = 32;
  T parts[many];
  std::fill(parts, parts + many, first);
  int64_t i = 0;
  for (; i + many <= n; i += many)
    for (int j = 0; j < many; ++j) parts[j] = join(parts[j], f(i + j));
  for (int j = 0; i < n; ++i, ++j) parts[j] = join(parts[j], f(i));
  for (int width = many / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) parts[j] = join(parts[j], parts[j + width]);
  return parts[0];
}

template <class T, class F>
static inline T sum_of(int64_t n, F f) {
  return folded(n, T(0), f, [](T a, T b) { return a + b; });
}

template <class T>
static inline T dot_of(const T* a, const T* b, int64_t n) {
  return sum_of<T>(n, [=](int64_t i) { return a[i] * b[i]; });
}

template <class T>
static inline T largest_of(const T* a, int64_t n) {
  return folded(n, a[0], [=](int64_t i) { return a[i]; }, [](T x, T y) { return x < y ? y : x; });
}

enum RowWise : int32_t { kSoftmax, kLogSoftmax, kRunningSum, kRunningProduct, kLayerNorm, kGatedNorm };

// Of rows, the last dimension: out, a, and what the operation has besides.
template <class T>
static void rowwise(const Instruction& in, const Operand* x, const Frame& frame) {
  const int last = in.dims - 1, n = static_cast<int>(in.sizes[last]);
  char* base[5] = {};
  for (int o = 0; o < in.operands; ++o)
    if (!x[o].absent) base[o] = address(frame, x[o]);
  std::vector<T> buffers(5 * size_t(n));
  each_index<5>(in, x, last, [&](const int64_t* offset) {
    const T* inputs[5] = {};
    for (int o = 1; o < in.operands; ++o)
      if (base[o]) inputs[o] = take(x[o], base[o] + offset[o], x[o].strides[last], n, buffers.data() + size_t(o) * n);
    const T* a = inputs[1];
    T* out = buffers.data();
    if (in.operation == kSoftmax || in.operation == kLogSoftmax) {
      if constexpr (!IsComplex<T>::value) {
        const T most = largest_of(a, n);
        for (int i = 0; i < n; ++i) out[i] = a[i] - most;
        std::vector<T> exponentials(n);
        apply<T>(op_exp, n, exponentials.data(), out, nullptr, nullptr);
        const T sum = sum_of<T>(n, [&](int64_t i) { return exponentials[i]; });
        const T log = std::log(sum);
        for (int i = 0; i < n; ++i) out[i] = in.operation == kSoftmax ? exponentials[i] / sum : out[i] - log;
      }
    } else if (in.operation == kRunningSum || in.operation == kRunningProduct) {
      T sum = in.operation == kRunningSum ? T(0) : T(1);
      for (int i = 0; i < n; ++i) out[i] = sum = in.operation == kRunningSum ? sum + a[i] : sum * a[i];
    } else if constexpr (!IsComplex<T>::value) {
      const T eps = static_cast<T>(in.scalars[0]);
      if (in.operation == kLayerNorm) {
        const T mean = sum_of<T>(n, [=](int64_t i) { return a[i]; }) / n;
        const T variance = sum_of<T>(n, [=](int64_t i) { return (a[i] - mean) * (a[i] - mean); });
        const T factor = 1 / std::sqrt(variance / n + eps);
        for (int i = 0; i < n; ++i) {
          out[i] = (a[i] - mean) * factor;
          if (inputs[2]) out[i] *= inputs[2][i];
          if (inputs[3]) out[i] += inputs[3][i];
        }
      } else {
        // a, weight, gate: see `gated_norm`. ints: whether the gate is SiLU, whether it comes first.
        T* gate = buffers.data() + 4 * size_t(n);
        if (inputs[3]) apply<T>(in.ints[0] ? op_silu : op_sigmoid, n, gate, inputs[3], nullptr, nullptr);
        const bool first = inputs[3] && in.ints[1], after = inputs[3] && !in.ints[1];
        for (int i = 0; i < n; ++i) out[i] = first ? a[i] * gate[i] : a[i];
        const T factor = 1 / std::sqrt(dot_of(out, out, n) / n + eps);
        for (int i = 0; i < n; ++i) out[i] *= factor * (inputs[2] ? inputs[2][i] : T(1)) * (after ? gate[i] : T(1));
      }
    }
    put(x[0], base[0] + offset[0], x[0].strides[last], n, out);
  });
}

// out = a at the places that `index` names: a's address moves by ints[0] numbers for each.
template <class T>
static void gather(const Instruction& in, const Operand* x, const Frame& frame) {
  char *out = address(frame, x[0]), *a = address(frame, x[1]), *index = address(frame, x[2]);
  const int last = in.dims - 1;
  const int64_t width = width_of(x[1].dtype), step = in.ints[0] * width;
  const auto place = [&](const char* p) {
    const int64_t i = x[2].dtype == kI64 ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
    return (i < 0 ? i + in.ints[1] : i) * step;
  };
  T buffer[kStrip];
  each_index<3>(in, x, last, [&](const int64_t* offset) {
    const int64_t size = in.sizes[last], s0 = x[0].strides[last], s1 = x[1].strides[last], s2 = x[2].strides[last];
    const int whole = s2 == 0 ? kStrip : 1;
    for (int64_t done = 0; done < size; done += whole) {
      const int n = static_cast<int>(std::min<int64_t>(whole, size - done));
      const char* from = a + offset[1] + done * s1 * width + place(index + offset[2] + done * s2 * width_of(x[2].dtype));
      const T* p = take(x[1], from, s1, n, buffer);
      put(x[0], out + offset[0] + done * s0 * width_of(x[0].dtype), s0, n, p);
    }
  });
}

}  // namespace seqtrain
