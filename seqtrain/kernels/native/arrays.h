// Arrays of the caller's, of one dtype each, rows of them as floats, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"

namespace seqtrain {

enum class Kind : int64_t { kAbsent = 0, kFloat = 1, kBFloat16 = 2 };

// Numbers from a token to the next, and from a head to the next: inputs are read where they lie, in a projection of which
// they are a part, or one row for many heads.
struct Array {
  void* data;
  Kind kind;
  int64_t token, head;
};

static int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

static void widen(const Array& from, int64_t offset, int count, float factor, float* to) {
  if (from.kind == Kind::kFloat) {
    const float* p = static_cast<const float*>(from.data) + offset;
    for (int n = 0; n < count; ++n) to[n] = p[n] * factor;
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from.data) + offset;
  for (int n = 0; n < count; ++n) {
    const uint32_t bits = uint32_t(p[n]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    to[n] = x * factor;
  }
}

static uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// Numbers `offset` ... `offset + count` as floats that can be read in whole vectors: where they lie, or in `scratch`.
static const float* take_row(const Array& from, int64_t offset, int count, float* scratch) {
  if (from.kind == Kind::kFloat && count % kBlock == 0) return static_cast<const float*>(from.data) + offset;
  widen(from, offset, count, 1, scratch);
  return scratch;
}

static void narrow(const float* from, int count, float factor, float* to) {
  for (int n = 0; n < count; ++n) to[n] = from[n] * factor;
}

static void narrow(const float* from, int count, float factor, uint16_t* to) {
  for (int n = 0; n < count; ++n) to[n] = to_bfloat16(from[n] * factor);
}

// Rows of whole cache lines go past the caches: written there, each line would first be read, and a call writes more than
// they keep for its reader.
template <class Number>
static void put_row(const float* from, int count, float factor, Number* to) {
  constexpr int line = kLine / sizeof(Number);
  if (count % line || reinterpret_cast<uintptr_t>(to) % kLine) return narrow(from, count, factor, to);
  for (int n = 0; n < count; n += line) {
    alignas(kLine) Number numbers[line];
    narrow(from + n, line, factor, numbers);
    stream_line(to + n, numbers);
  }
}

static void put_row(const float* from, int count, float factor, const Array& to, int64_t offset) {
  if (to.kind == Kind::kFloat)
    put_row(from, count, factor, static_cast<float*>(to.data) + offset);
  else
    put_row(from, count, factor, static_cast<uint16_t*>(to.data) + offset);
}

// Scratch memory of one worker, freed with it.
class Arena {
 public:
  float* take(int64_t floats) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64 + 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    blocks_.emplace_back(static_cast<float*>(memory), &std::free);
    return blocks_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float, void (*)(void*)>> blocks_;
};

}  // namespace seqtrain
