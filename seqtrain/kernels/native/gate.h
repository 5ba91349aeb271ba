// Activations of gates with their slopes.
#pragma once

#include "simd.h"

namespace seqtrain {

struct Gate {
  Vec value, slope;
};

// silu(x), or sigmoid(x).
static inline Gate gate_of(Vec x, bool silu) {
  const IntVec negative = x < Vec{};
  const Vec small = exp_of(negative ? x : -x);
  const Vec sigmoid = (negative ? small : filled(1)) / (small + 1);
  const Vec slope = sigmoid * (1 - sigmoid);
  return silu ? Gate{x * sigmoid, sigmoid + x * slope} : Gate{sigmoid, slope};
}

}  // namespace seqtrain
