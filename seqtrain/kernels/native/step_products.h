// Matrix products of a step's program: a few rows against a large matrix of weights, which is read once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "parallel.h"
#include "step_elements.h"

namespace seqtrain {

// work(task) for each of `tasks`, by threads that take them as they come.
template <class Work>
static void in_parallel(int64_t threads, int64_t tasks, Work work) {
  threads = forked ? 1 : std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t n = 0; n < tasks; ++n) work(n);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const FlushToZero flush;
    for (int64_t n; (n = next++) < tasks;) work(n);
  }
}

// Narrow integers as floats, and bfloat16: by the instructions for it, which GCC does not find by itself.
#if defined(__AVX512F__)
static inline IntVec widened(const int8_t* p) {
  return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline IntVec widened(const uint8_t* p) {
  return reinterpret_cast<IntVec>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline IntVec widened(const uint16_t* p) {
  return reinterpret_cast<IntVec>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX2__)
static inline IntVec widened(const int8_t* p) {
  return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline IntVec widened(const uint8_t* p) {
  return reinterpret_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline IntVec widened(const uint16_t* p) {
  return reinterpret_cast<IntVec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
template <class Number>
static inline IntVec widened(const Number* p) {
  IntVec found;
  for (int i = 0; i < kLanes; ++i) found[i] = p[i];
  return found;
}
#endif

static inline Vec weights(const float* p) { return load(p); }
static inline Vec weights(const uint16_t* p) {
  const IntVec bits = widened(p) << 16;
  return reinterpret_cast<const Vec&>(bits);
}
static inline Vec weights(const int8_t* p) { return __builtin_convertvector(widened(p), Vec); }
static inline float weight(float x) { return x; }
static inline float weight(uint16_t x) { return from_bfloat16(x); }
static inline float weight(int8_t x) { return x; }

// Bytes ahead of a row's reading that memory is asked for: rows lie one after the other.
constexpr int kAhead = 2048;

// sum_k w[k] x[k]: a row at a time, so that weights are read as they lie, which is what a product with one row costs.
template <class W>
static inline float one_dot(int64_t size, const W* w, const float* x) {
  constexpr int many = 8;
  Vec sum[many] = {};
  int64_t k = 0;
  for (; k + many * kLanes <= size; k += many * kLanes)
#pragma GCC unroll 8
    for (int j = 0; j < many; ++j) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + k + j * kLanes) + kAhead, 0, 3);
      sum[j] += weights(w + k + j * kLanes) * load(x + k + j * kLanes);
    }
  for (; k + kLanes <= size; k += kLanes) sum[0] += weights(w + k) * load(x + k);
#pragma GCC unroll 8
  for (int j = many / 2; j; j /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < j; ++i) sum[i] += sum[i + j];
  float rest = total(sum[0]);
  for (; k < size; ++k) rest += weight(w[k]) * x[k];
  return rest;
}

// out[m][r] = sum_k w[r][k] x[m][k] for ROWS rows of weights and COUNT rows of x.
template <int ROWS, int COUNT, class W>
static inline __attribute__((always_inline)) void dots(
    int64_t size, const W* w, int64_t ldw, const float* x, int64_t ldx, float (&out)[COUNT][ROWS]) {
  Vec sum[ROWS][COUNT] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Vec row[COUNT];
#pragma GCC unroll 8
    for (int m = 0; m < COUNT; ++m) row[m] = load(x + m * ldx + k);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec left = weights(w + r * ldw + k);
#pragma GCC unroll 8
      for (int m = 0; m < COUNT; ++m) sum[r][m] += left * row[m];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < COUNT; ++m) {
      float rest = 0;
      for (int64_t i = k; i < size; ++i) rest += weight(w[r * ldw + i]) * x[m * ldx + i];
      out[m][r] = total(sum[r][m]) + rest;
    }
}

// The same for VECS vectors of rows of x, side by side in `columns`, [size, VECS * kLanes]: no sum over a vector's lanes.
template <int ROWS, int VECS, class W>
static inline __attribute__((always_inline)) void columns_of(
    int64_t size, const W* w, int64_t ldw, const float* columns, float* out) {
  Vec sum[ROWS][VECS] = {};
  const auto one = [&](int64_t k) __attribute__((always_inline)) {
    Vec right[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) right[v] = load(columns + (k * VECS + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float left = weight(w[r * ldw + k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) sum[r][v] += left * right[v];
    }
  };
  constexpr int line = kLine / sizeof(W);
  int64_t k = 0;
  for (; k + line <= size; k += line) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(w + (r + ROWS) * ldw + k, 0, 2);
    for (int i = 0; i < line; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) one(k + i + j);
  }
  for (; k < size; ++k) one(k);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) store(out + (r * VECS + v) * kLanes, sum[r][v]);
}

#if defined(__AVX512F__)
constexpr int kMany = 4;  // rows of weights in a tile of several rows of x
constexpr int kTogether = 16;  // in a tile of columns
#else
constexpr int kMany = 2;
constexpr int kTogether = 8;
#endif
// Rows of x from which they are laid side by side: below, too much of a vector would be empty.
constexpr int64_t kSideBySide = kLanes / 2 + 1;

// What a product of M rows of x, [M,K], with weights [N,K] is told.
struct Linear {
  int64_t rows, outputs, inputs, x_row, out_row;
  const float* x;
  float* out;
  const float* bias;
  // Of integer weights: factors for each row and group of inputs; [N, K / group].
  const float* scale;
  int64_t group;
  // Rows of x side by side, [rows / lanes, inputs, lanes], the last ones filled up; null where they are few.
  const float* columns;
};

static inline void finish(const Linear& call, int64_t m, int64_t r, float value) {
  call.out[m * call.out_row + r] = value + (call.bias ? call.bias[r] : 0);
}

template <int ROWS, int COUNT, class W>
static inline void some(const Linear& call, const W* w, int64_t r, int64_t m, const float* scale) {
  float found[COUNT][ROWS];
  dots<ROWS, COUNT>(call.inputs, w, call.inputs, call.x + m * call.x_row, call.x_row, found);
  for (int i = 0; i < COUNT; ++i)
    for (int j = 0; j < ROWS; ++j) finish(call, m + i, r + j, found[i][j] * (scale ? scale[r + j] : 1));
}

template <int ROWS, class W>
static void rows_of_weights(const Linear& call, const W* w, int64_t r, const float* scale) {
  int64_t m = 0;
  for (; m + 4 <= call.rows; m += 4) some<ROWS, 4>(call, w, r, m, scale);
  if (call.rows - m == 3) return some<ROWS, 3>(call, w, r, m, scale);
  if (call.rows - m == 2) return some<ROWS, 2>(call, w, r, m, scale);
  if (call.rows - m == 1) return some<ROWS, 1>(call, w, r, m, scale);
}

template <int ROWS, class W>
static void columns_of_weights(const Linear& call, const W* w, int64_t r, const float* scale) {
  float found[ROWS * kLanes];
  for (int64_t m = 0; m < call.rows; m += kLanes) {
    columns_of<ROWS, 1>(call.inputs, w, call.inputs, call.columns + m * call.inputs, found);
    const int count = static_cast<int>(std::min<int64_t>(kLanes, call.rows - m));
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < ROWS; ++j) finish(call, m + i, r + j, found[j * kLanes + i] * (scale ? scale[r + j] : 1));
  }
}

// Outputs `first` to `end`; w: the weights of the first of them.
template <class W>
static void outputs_of(const Linear& call, const W* w, int64_t first, int64_t end, const float* scale) {
  int64_t r = first;
  if (call.rows == 1) {
    for (; r < end; ++r, w += call.inputs) finish(call, 0, r, one_dot(call.inputs, w, call.x) * (scale ? scale[r] : 1));
    return;
  }
  if (call.columns) {
    for (; r + kTogether <= end; r += kTogether, w += kTogether * call.inputs)
      columns_of_weights<kTogether>(call, w, r, scale);
    for (; r < end; ++r, w += call.inputs) columns_of_weights<1>(call, w, r, scale);
    return;
  }
  for (; r + kMany <= end; r += kMany, w += kMany * call.inputs) rows_of_weights<kMany>(call, w, r, scale);
  for (; r < end; ++r, w += call.inputs) rows_of_weights<1>(call, w, r, scale);
}

// Integers of four bits, 8 more than they are, lie in blocks of 32: byte i has the i-th below, and the one 16 further on
// above.
constexpr int kFour = 32;

static inline Vec four_bits(const uint8_t* p, int shift) {
  return __builtin_convertvector(((widened(p) >> shift) & 15) - 8, Vec);
}

// sum_k w[k] x[k] of a row of groups.
static float grouped_dot(const uint8_t* w, const float* scale, const float* x, int64_t inputs, int64_t group) {
  Vec sum[2] = {};
  for (int64_t g = 0; g * group < inputs; ++g) {
    Vec part[2] = {};
    for (int64_t k = g * group; k < (g + 1) * group; k += kFour)
      for (int i = 0; i < kFour / 2; i += kLanes) {
        const uint8_t* p = w + k / 2 + i;
        part[0] += four_bits(p, 0) * load(x + k + i);
        part[1] += four_bits(p, 4) * load(x + k + kFour / 2 + i);
      }
    sum[0] += part[0] * scale[g];
    sum[1] += part[1] * scale[g];
  }
  return total(sum[0] + sum[1]);
}

static float grouped_dot(const int8_t* w, const float* scale, const float* x, int64_t inputs, int64_t group) {
  Vec sum = {};
  for (int64_t g = 0; g * group < inputs; ++g) {
    Vec part = {};
    for (int64_t k = g * group; k < (g + 1) * group; k += kLanes) part += weights(w + k) * load(x + k);
    sum += part * scale[g];
  }
  return total(sum);
}

static void widen_group(const uint8_t* w, int64_t size, float scale, float* to) {
  for (int64_t k = 0; k < size; k += kFour)
    for (int i = 0; i < kFour / 2; i += kLanes) {
      store(to + k + i, four_bits(w + k / 2 + i, 0) * scale);
      store(to + k + kFour / 2 + i, four_bits(w + k / 2 + i, 4) * scale);
    }
}

static void widen_group(const int8_t* w, int64_t size, float scale, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) store(to + k, weights(w + k) * scale);
  for (; k < size; ++k) to[k] = w[k] * scale;
}

// Integer weights in groups. `each`: numbers in a byte.
template <class W>
static void outputs_of_groups(const Linear& call, const W* w, int each, int64_t first, int64_t end) {
  const int64_t groups = call.inputs / call.group, bytes = call.inputs / each;
  if (call.rows == 1) {
    for (int64_t r = first; r < end; ++r)
      finish(call, 0, r, grouped_dot(w + r * bytes, call.scale + r * groups, call.x, call.inputs, call.group));
    return;
  }
  // Many rows of x share what is unpacked.
  std::vector<float> wide(kTogether * call.inputs);
  for (int64_t r = first; r < end; r += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, end - r);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t g = 0; g < groups; ++g)
        widen_group(w + (r + i) * bytes + g * call.group / each, call.group, call.scale[(r + i) * groups + g],
                    wide.data() + i * call.inputs + g * call.group);
    outputs_of(call, wide.data(), r, r + count, nullptr);
  }
}

constexpr int64_t kTaskNumbers = 1 << 15;  // weights that a thread takes at a time

// out = x W^T + bias; operands: out, x, weights, bias, scale. ints: M, N, K, strides of rows of x and out, the
// group, and whether the weights are of four bits.
static void linear(const Instruction& in, const Operand* x, const Frame& frame) {
  auto floats = [&](int o) { return x[o].absent ? nullptr : reinterpret_cast<float*>(address(frame, x[o])); };
  Linear call{in.ints[0], in.ints[1], in.ints[2], in.ints[3], in.ints[4], floats(1), floats(0), floats(3),
                    floats(4), in.ints[5], nullptr};
  const void* w = address(frame, x[2]);
  std::vector<float> columns;
  if (call.rows >= kSideBySide) {
    columns.resize((call.rows + kLanes - 1) / kLanes * kLanes * call.inputs);
    for (int64_t m = 0; m < call.rows; ++m) {
      float* to = columns.data() + m / kLanes * kLanes * call.inputs + m % kLanes;
      for (int64_t k = 0; k < call.inputs; ++k) to[k * kLanes] = call.x[m * call.x_row + k];
    }
    call.columns = columns.data();
  }
  const int64_t step = std::max<int64_t>(kTogether, kTaskNumbers / call.inputs / kTogether * kTogether);
  in_parallel(in.threads, (call.outputs + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step, end = std::min(call.outputs, first + step);
    if (in.ints[6]) return outputs_of_groups(call, static_cast<const uint8_t*>(w), 2, first, end);
    switch (x[2].dtype) {
      case kF32: return outputs_of(call, static_cast<const float*>(w) + first * call.inputs, first, end, nullptr);
      case kBF16: return outputs_of(call, static_cast<const uint16_t*>(w) + first * call.inputs, first, end, nullptr);
      case kI8:
        // A row is one group: its factor comes last.
        if (call.group == call.inputs && call.rows == 1)
          return outputs_of(call, static_cast<const int8_t*>(w) + first * call.inputs, first, end, call.scale);
        return outputs_of_groups(call, static_cast<const int8_t*>(w), 1, first, end);
    }
  });
}

// The same in float64, for what is checked in it.
static void linear_in_double(const Instruction& in, const Operand* x, const Frame& frame) {
  auto doubles = [&](int o) { return x[o].absent ? nullptr : reinterpret_cast<double*>(address(frame, x[o])); };
  const double *rows = doubles(1), *w = doubles(2), *bias = doubles(3);
  double* out = doubles(0);
  for (int64_t m = 0; m < in.ints[0]; ++m)
    for (int64_t r = 0; r < in.ints[1]; ++r)
      out[m * in.ints[4] + r] = dot_of(rows + m * in.ints[3], w + r * in.ints[2], in.ints[2]) + (bias ? bias[r] : 0);
}

// out[b] = x[b] y[b]; sizes: b, m, n, k; operands' strides along b, their rows and their columns.
template <class T>
static void batched_product(const Instruction& in, const Operand* x, const Frame& frame) {
  const int64_t rows = in.sizes[1], columns = in.sizes[2], depth = in.sizes[3];
  T* out = reinterpret_cast<T*>(address(frame, x[0]));
  const T *left = reinterpret_cast<const T*>(address(frame, x[1])), *right = reinterpret_cast<const T*>(address(frame, x[2]));
  const int64_t *o = x[0].strides, *a = x[1].strides, *b = x[2].strides;
  in_parallel(in.threads, in.sizes[0], [&](int64_t n) {
    std::vector<T> sums(columns), row(depth);
    for (int64_t m = 0; m < rows; ++m) {
      const T *p = left + n * a[0] + m * a[1], *q = right + n * b[0];
      T* to = out + n * o[0] + m * o[1];
      if (b[1] == 1 && b[2] != 1 && !IsComplex<T>::value) {
        for (int64_t k = 0; k < depth; ++k) row[k] = p[k * a[2]];
        for (int64_t c = 0; c < columns; ++c) to[c * o[2]] = dot_of(row.data(), q + c * b[2], depth);
        continue;
      }
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t k = 0; k < depth; ++k) {
        const T factor = p[k * a[2]];
        const T* from = q + k * b[1];
        if (b[2] == 1)
          for (int64_t c = 0; c < columns; ++c) sums[c] += factor * from[c];
        else
          for (int64_t c = 0; c < columns; ++c) sums[c] += factor * from[c * b[2]];
      }
      for (int64_t c = 0; c < columns; ++c) to[c * o[2]] = sums[c];
    }
  });
}

}  // namespace seqtrain
