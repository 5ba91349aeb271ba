// Runs a step's program: instructions in their order, from one call, without Python between them.
#include "step_states.h"

namespace seqtrain {

// Names of instructions, numbered as they stand here; program.py asks for them.
#define SEQTRAIN_INSTRUCTIONS(X) \
  X(elementwise) X(reduce) X(rowwise) X(gather) X(linear) X(batched_product) X(recurrence) X(convolution) X(attention)

enum Code : int32_t {
#define SEQTRAIN_CODE(name) code_##name,
  SEQTRAIN_INSTRUCTIONS(SEQTRAIN_CODE)
#undef SEQTRAIN_CODE
};

enum Type : int32_t { kInFloat, kInDouble, kInComplex, kInComplexDouble };

#define SEQTRAIN_BY_TYPE(function)                                              \
  switch (in.type) {                                                            \
    case kInFloat: return function<float>(in, x, frame);                        \
    case kInDouble: return function<double>(in, x, frame);                      \
    case kInComplex: return function<std::complex<float>>(in, x, frame);        \
    case kInComplexDouble: return function<std::complex<double>>(in, x, frame); \
  }                                                                             \
  return

#define SEQTRAIN_BY_REAL_TYPE(function) \
  return in.type == kInFloat ? function<float>(in, x, frame) : function<double>(in, x, frame)

static void run(const Instruction& in, const Operand* x, const Frame& frame) {
  switch (in.code) {
    case code_elementwise: SEQTRAIN_BY_TYPE(elementwise);
    case code_reduce: SEQTRAIN_BY_TYPE(reduce);
    case code_rowwise: SEQTRAIN_BY_TYPE(rowwise);
    case code_gather: SEQTRAIN_BY_TYPE(gather);
    case code_batched_product: SEQTRAIN_BY_TYPE(batched_product);
    case code_linear: return in.type == kInFloat ? linear(in, x, frame) : linear_in_double(in, x, frame);
    case code_recurrence: SEQTRAIN_BY_REAL_TYPE(recurrence_step);
    case code_convolution: SEQTRAIN_BY_REAL_TYPE(convolution_step);
    case code_attention: SEQTRAIN_BY_REAL_TYPE(attention_step);
  }
}

}  // namespace seqtrain

extern "C" {

// Instructions' names, then those of elementwise operations, each list's separated by blanks.
const char* seqtrain_program_names() {
#define SEQTRAIN_TEXT(name) #name " "
  return SEQTRAIN_INSTRUCTIONS(SEQTRAIN_TEXT) "\n" SEQTRAIN_ELEMENTWISE(SEQTRAIN_TEXT);
#undef SEQTRAIN_TEXT
}

// Bytes of an instruction and of an operand, by which program.py checks its mirrors of them.
int64_t seqtrain_program_sizes() { return sizeof(seqtrain::Instruction) * 1000 + sizeof(seqtrain::Operand); }

// 0, or 1 where memory ran out.
int seqtrain_program_run(const seqtrain::Instruction* instructions, int64_t count, const seqtrain::Operand* operands,
                         char* const* slots, const int64_t* numbers) {
  const seqtrain::FlushToZero flush;
  const seqtrain::Frame frame{slots, numbers};
  try {
    for (int64_t n = 0; n < count; ++n)
      seqtrain::run(instructions[n], operands + instructions[n].first, frame);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// One pass over so many floats by so many threads: what reading weights takes at least.
float seqtrain_read(const float* p, int64_t count, int64_t threads) {
  constexpr int64_t step = 1 << 15;
  std::atomic<float> sum{0};
  seqtrain::in_parallel(threads, (count + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step, end = std::min(count, first + step);
    seqtrain::Vec sums[8] = {};
    for (int64_t i = first; i + 8 * seqtrain::kLanes <= end; i += 8 * seqtrain::kLanes)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sums[j] += seqtrain::load(p + i + j * seqtrain::kLanes);
    for (int j = 1; j < 8; ++j) sums[0] += sums[j];
    sum = sum + seqtrain::total(sums[0]);
  });
  return sum;
}
}
