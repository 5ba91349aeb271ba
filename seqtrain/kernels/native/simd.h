// Vectors of floats in the compiler's own vector types, and the matrix products of a chunk built on them.
//
// PyTorch's brgemm was measured next to these tiles on the chunk's shapes, in cache, on one AVX-512 core: 179-191 GF/s
// against 180-197. They also take a transposed left side as it lies, run without AVX-512, and need no PyTorch header,
// so that a build takes seconds. Matrices are row-major; column counts are multiples of kBlock.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace seqtrain {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kWide = 4;  // vectors a wide tile spans; 6 x 4 sums fit 32 registers
constexpr int kWideRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kWide = 2;
constexpr int kWideRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kWide = 4;
constexpr int kWideRows = 4;
#endif

// Tokens and widths are padded to multiples of this, and triangular products skip blocks of it.
constexpr int kBlock = 16;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
static inline Vec filled(float x) { return x - Vec{}; }

static inline float total(Vec x) {
  float parts[kLanes];
  store(parts, x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int n = 0; n < width; ++n) parts[n] += parts[n + width];
  return parts[0];
}

// e^x = 2^n y, n an integer, y between the roots of 1/2 and 2.
struct Exponential {
  Vec n, y;
};

static inline Exponential exp_parts(Vec x) {
  const Vec magic = filled(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return {n, y};
}

// e^x for x <= 0, within 2 units in the last place; 0 below the smallest normal number.
static inline Vec exp_of(Vec x) {
  const Vec low = filled(-87.3f);
  const IntVec gone = x < low;
  const auto [n, y] = exp_parts(gone ? low : x);
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return gone ? Vec{} : y * reinterpret_cast<const Vec&>(exponent);
}

// Subnormal numbers as zero while it lives: decayed products reach them, and each costs over a hundred cycles.
class FlushToZero {
#if defined(__SSE__)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  FlushToZero() {}
  ~FlushToZero() {}
#endif
};

constexpr int kLine = 64;  // bytes of a cache line

// Copies a line, both sides aligned to it, past the caches. Others may see it once `finish_streams` was called.
static inline void stream_line(void* to, const void* from) {
#if defined(__SSE__)
  auto* target = static_cast<float*>(to);
  auto* source = static_cast<const float*>(from);
  for (int n = 0; n < kLine / 4; n += 4) _mm_stream_ps(target + n, _mm_load_ps(source + n));
#else
  std::memcpy(to, from, kLine);
#endif
}

static inline void finish_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

enum Side { kPlain, kTransposed };

// c = beta * c + alpha * a b for ROWS rows and VECS vectors of columns; a is [ROWS, depth], or [depth, ROWS] transposed.
template <int ROWS, int VECS, Side SIDE>
static inline __attribute__((always_inline)) void tile(
    int depth, float alpha, const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  Vec sum[ROWS][VECS] = {};
  for (int k = 0; k < depth; ++k) {
    Vec right[VECS];
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) right[v] = load(b + int64_t(k) * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float left = SIDE == kTransposed ? a[int64_t(k) * lda + r] : a[int64_t(r) * lda + k];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) {
      float* p = c + int64_t(r) * ldc + v * kLanes;
      store(p, beta == 0 ? alpha * sum[r][v] : alpha * sum[r][v] + beta * load(p));
    }
  }
}

template <int VECS, Side SIDE>
static void panel(
    int rows, int depth, float alpha, const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  constexpr int most = VECS == kWide ? kWideRows : 8;
  const int64_t step = SIDE == kTransposed ? 1 : lda;
  int r = 0;
  // Row counts are multiples of kBlock; where `most` is 6, the last 8 rows are taken as 4 + 4, never as 6 + 2.
  for (; rows - r >= most && (rows - r == most || rows - r - most >= 4); r += most)
    tile<most, VECS, SIDE>(depth, alpha, a + r * step, lda, b, ldb, beta, c + int64_t(r) * ldc, ldc);
  for (; r < rows; r += 4)
    tile<4, VECS, SIDE>(depth, alpha, a + r * step, lda, b, ldb, beta, c + int64_t(r) * ldc, ldc);
}

// c [rows, columns] = beta * c + alpha * a b; b is [depth, columns]; a is [rows, depth], or [depth, rows] transposed.
template <Side SIDE = kPlain>
static void multiply(int rows, int columns, int depth, float alpha, const float* a, int lda, const float* b, int ldb,
                     float beta, float* c, int ldc) {
  int j = 0;
  for (; j + kWide * kLanes <= columns; j += kWide * kLanes)
    panel<kWide, SIDE>(rows, depth, alpha, a, lda, b + j, ldb, beta, c + j, ldc);
  if (kWide > 2 && j + 2 * kLanes <= columns) {
    panel<2, SIDE>(rows, depth, alpha, a, lda, b + j, ldb, beta, c + j, ldc);
    j += 2 * kLanes;
  }
  for (; j < columns; j += kLanes) panel<1, SIDE>(rows, depth, alpha, a, lda, b + j, ldb, beta, c + j, ldc);
}

// c = beta * c + lower b, `lower` [rows, rows] having zeros above its diagonal.
static void multiply_lower(
    int rows, int columns, const float* lower, int ldl, const float* b, int ldb, float beta, float* c, int ldc) {
  for (int i = 0; i < rows; i += kBlock)
    multiply(kBlock, columns, i + kBlock, 1, lower + int64_t(i) * ldl, ldl, b, ldb, beta, c + int64_t(i) * ldc, ldc);
}

// c = beta * c + lower^T b.
static void multiply_lower_transposed(
    int rows, int columns, const float* lower, int ldl, const float* b, int ldb, float beta, float* c, int ldc) {
  for (int j = 0; j < rows; j += kBlock)
    multiply<kTransposed>(kBlock, columns, rows - j, 1, lower + int64_t(j) * ldl + j, ldl, b + int64_t(j) * ldb, ldb,
                          beta, c + int64_t(j) * ldc, ldc);
}

// The blocks on and below the diagonal of c = a b: a [rows, depth], b [depth, rows].
static void multiply_to_lower(int rows, int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc) {
  for (int i = 0; i < rows; i += kBlock)
    multiply(kBlock, i + kBlock, depth, 1, a + int64_t(i) * lda, lda, b, ldb, 0, c + int64_t(i) * ldc, ldc);
}

// step(vectors, column) for all columns, so many vectors at a time that their sums hide each other's latency; `vectors`
// is a constant.
template <class Step>
static void by_columns(int columns, Step step) {
  constexpr int many = 4, few = kBlock / kLanes;
  int c = 0;
  for (; c + many * kLanes <= columns; c += many * kLanes) step(std::integral_constant<int, many>(), c);
  for (; c < columns; c += few * kLanes) step(std::integral_constant<int, few>(), c);
}

// Lanes in blocks of SIZE: the odd blocks of `a` change places with the even ones of `b`.
template <int SIZE, int... LANE>
static inline __attribute__((always_inline)) void exchange(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
#if __GNUC__ >= 12 || defined(__clang__)
  const Vec even = __builtin_shufflevector(a, b, (LANE / SIZE % 2 ? LANE - SIZE + kLanes : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE / SIZE % 2 ? LANE + kLanes : LANE + SIZE)...);
#else
  const Vec even = __builtin_shuffle(a, b, IntVec{(LANE / SIZE % 2 ? LANE - SIZE + kLanes : LANE)...});
  b = __builtin_shuffle(a, b, IntVec{(LANE / SIZE % 2 ? LANE + kLanes : LANE + SIZE)...});
#endif
  a = even;
}

// One step of a transposition in registers, for row numbers that differ in the bit SIZE.
template <int SIZE>
static inline __attribute__((always_inline)) void exchange_rows(Vec (&rows)[kLanes]) {
  if constexpr (SIZE < kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r)
      if (!(r & SIZE)) exchange<SIZE>(rows[r], rows[r + SIZE], std::make_integer_sequence<int, kLanes>());
  }
}

// Leaves the totals of kLanes vectors in rows[0], begun with SIZE = 1.
template <int SIZE>
static inline __attribute__((always_inline)) void add_exchanged(Vec (&rows)[kLanes]) {
  if constexpr (SIZE < kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; r += 2 * SIZE) {
      exchange<SIZE>(rows[r], rows[r + SIZE], std::make_integer_sequence<int, kLanes>());
      rows[r] += rows[r + SIZE];
    }
    add_exchanged<2 * SIZE>(rows);
  }
}

// out [columns, rows] = a^T; both sizes are multiples of kBlock.
static void transpose(int rows, int columns, const float* a, int lda, float* out, int ldo) {
  for (int i = 0; i < rows; i += kLanes)
    for (int j = 0; j < columns; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(a + int64_t(i + r) * lda + j);
      exchange_rows<1>(block);
      exchange_rows<2>(block);
      exchange_rows<4>(block);
      exchange_rows<8>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(out + int64_t(j + r) * ldo + i, block[r]);
    }
}

static float dot(const float* a, const float* b, int size) {
  Vec sum[2] = {};
  int n = 0;
  for (; n + 2 * kLanes <= size; n += 2 * kLanes) {
    sum[0] += load(a + n) * load(b + n);
    sum[1] += load(a + n + kLanes) * load(b + n + kLanes);
  }
  for (; n < size; n += kLanes) sum[0] += load(a + n) * load(b + n);
  return total(sum[0] + sum[1]);
}

static void scale_row(float* out, const float* x, float factor, int size) {
  for (int n = 0; n < size; n += kLanes) store(out + n, load(x + n) * factor);
}

// Of any size, as rows of the caller's states are.
static void add_row(float* __restrict out, const float* __restrict x, float factor, int size) {
  for (int n = 0; n < size; ++n) out[n] += factor * x[n];
}

static void multiply_row(float* out, const float* x, const float* y, int size) {
  for (int n = 0; n < size; n += kLanes) store(out + n, load(x + n) * load(y + n));
}

}  // namespace seqtrain
