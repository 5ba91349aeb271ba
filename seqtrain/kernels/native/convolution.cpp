// Short causal convolution along time with its activation, forward and backward: a row of channels at a time.
//
// The formulas are those of the definition, `reference` in short_convolution/__init__.py. The backward pass computes the
// sums before the activation again. A document is taken in parts; each computes what it needs of the next one's
// gradients again, and the weight's gradient in a place of its own, so that threads change no bit.
#include <vector>

#include "arrays.h"
#include "gate.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in short_convolution/native.py.
struct ConvolutionCall {
  Array x, out, d_out, d_x;
  const float *weight, *bias, *state;  // [taps, width]; [width] or null; [documents, past, width]
  float* final_state;
  const float* d_final;
  float *d_state, *d_weight, *d_bias;  // the last two: [documents, parts, ...]
  const int64_t* boundaries;
  int64_t documents, parts, width, taps, dilation, silu, threads;
};

class ConvolutionWorker {
 public:
  ConvolutionWorker(const ConvolutionCall& call, bool backward)
      : call_(call),
        size_(static_cast<int>(call.width)),
        padded_(static_cast<int>(padded(call.width))),
        taps_(static_cast<int>(call.taps)),
        past_((call.taps - 1) * call.dilation),
        rows_(past_ + 1),
        inputs_(call.taps) {
    weight_ = rows(taps_), bias_ = rows(1), ring_ = rows(past_ + 1), row_ = rows(1);
    for (int j = 0; j < taps_; ++j) std::copy_n(call.weight + int64_t(j) * size_, size_, weight_ + int64_t(j) * padded_);
    if (call.bias) std::copy_n(call.bias, size_, bias_);
    if (backward) d_ring_ = rows(past_ + 1), d_weight_ = rows(taps_), d_bias_ = rows(1), d_out_ = rows(1);
  }

  void forward(const Task& task) { by_taps([&](auto taps) { forward<taps>(task); }); }
  void backward(const Task& task) { by_taps([&](auto taps) { backward<taps>(task); }); }

 private:
  // Zeros, so that what lies behind a row's end adds nothing.
  float* rows(int64_t count) {
    float* found = arena_.take(count * padded_);
    std::fill_n(found, count * padded_, 0.0f);
    return found;
  }

  // The number of taps as a constant where it is the usual one; 0: any.
  template <class Step>
  void by_taps(Step step) {
    taps_ == 4 ? step(std::integral_constant<int, 4>()) : step(std::integral_constant<int, 0>());
  }

  void enter_part(const Task& task) {
    document_ = task.document, start_ = call_.boundaries[document_];
    length_ = call_.boundaries[document_ + 1] - start_;
    first_ = length_ * task.part / call_.parts, last_ = length_ * (task.part + 1) / call_.parts;
    for (int64_t t = first_ - past_; t < first_; ++t) enter(t);
  }

  int64_t slot(int64_t t) const { return (t + past_) % (past_ + 1); }

  const float* state_row(const float* states, int64_t t) const {
    return states + (document_ * past_ + past_ + t) * size_;
  }

  // Puts the input of token t, before the document's first in the state, where `inputs` finds it.
  void enter(int64_t t) {
    float* scratch = ring_ + slot(t) * padded_;
    const Array state{const_cast<float*>(call_.state), Kind::kFloat, 0, 0};
    rows_[slot(t)] = t < 0 ? take_row(state, (document_ * past_ + past_ + t) * size_, size_, scratch)
                           : take_row(call_.x, (start_ + t) * call_.x.token, size_, scratch);
  }

  void find_inputs(int64_t t) {
    for (int j = 0; j < taps_; ++j) inputs_[j] = rows_[slot(t - (taps_ - 1 - j) * call_.dilation)];
  }

  template <int TAPS>
  Vec sum(int n) const {
    Vec found = load(bias_ + n);
#pragma GCC unroll 4
    for (int j = 0; j < (TAPS ? TAPS : taps_); ++j) found += load(weight_ + int64_t(j) * padded_ + n) * load(inputs_[j] + n);
    return found;
  }

  template <int TAPS>
  void forward(const Task& task) {
    enter_part(task);
    for (int64_t t = first_; t < last_; ++t) {
      enter(t);
      find_inputs(t);
      for (int n = 0; n < padded_; n += kLanes) {
        const Vec found = sum<TAPS>(n);
        store(row_ + n, call_.silu ? gate_of(found, true).value : found);
      }
      put_row(row_, size_, 1, call_.out, (start_ + t) * size_);
    }
    if (task.part + 1 < call_.parts) return;
    for (int64_t t = length_ - past_; t < length_; ++t) {
      float* to = call_.final_state + (document_ * past_ + past_ + t - length_) * size_;
      if (t < 0)
        std::copy_n(state_row(call_.state, t), size_, to);
      else
        widen(call_.x, (start_ + t) * call_.x.token, size_, 1, to);
    }
  }

  template <int TAPS>
  void backward(const Task& task) {
    enter_part(task);
    std::fill_n(d_weight_, int64_t(taps_) * padded_, 0.0f);
    std::fill_n(d_bias_, padded_, 0.0f);
    std::fill_n(d_ring_, (past_ + 1) * padded_, 0.0f);
    for (int64_t t = first_; t < last_ + past_; ++t) {
      float* d_sums = d_ring_ + slot(t) * padded_;
      if (t < length_)
        find_gradient<TAPS>(t, d_sums);
      else
        std::fill_n(d_sums, padded_, 0.0f);
      if (t - past_ >= first_ || task.part == 0) put_gradient<TAPS>(t - past_);
    }
    const int64_t place = document_ * call_.parts + task.part;
    for (int j = 0; j < taps_; ++j)
      std::copy_n(d_weight_ + int64_t(j) * padded_, size_, call_.d_weight + (place * taps_ + j) * size_);
    std::copy_n(d_bias_, size_, call_.d_bias + place * size_);
  }

  // The gradient of the sums of token t; those of this part add to the weight's.
  template <int TAPS>
  void find_gradient(int64_t t, float* d_sums) {
    enter(t);
    find_inputs(t);
    const float* d_out = take_row(call_.d_out, (start_ + t) * size_, size_, d_out_);
    const bool own = t < last_;
    for (int n = 0; n < padded_; n += kLanes) {
      const Vec d = call_.silu ? load(d_out + n) * gate_of(sum<TAPS>(n), true).slope : load(d_out + n);
      store(d_sums + n, d);
      if (!own) continue;
      store(d_bias_ + n, load(d_bias_ + n) + d);
#pragma GCC unroll 4
      for (int j = 0; j < (TAPS ? TAPS : taps_); ++j) {
        float* to = d_weight_ + int64_t(j) * padded_ + n;
        store(to, load(to) + d * load(inputs_[j] + n));
      }
    }
  }

  // The gradient of the input of token t, once those of the sums of all tokens that read it are there.
  template <int TAPS>
  void put_gradient(int64_t t) {
    for (int j = 0; j < taps_; ++j) inputs_[j] = d_ring_ + slot(t + (taps_ - 1 - j) * call_.dilation) * padded_;
    for (int n = 0; n < padded_; n += kLanes) {
      Vec found = {};
#pragma GCC unroll 4
      for (int j = 0; j < (TAPS ? TAPS : taps_); ++j)
        found += load(weight_ + int64_t(j) * padded_ + n) * load(inputs_[j] + n);
      store(row_ + n, found);
    }
    if (t >= length_ - past_) add_row(row_, state_row(call_.d_final, t - length_), 1, size_);
    if (t < 0)
      std::copy_n(row_, size_, call_.d_state + (document_ * past_ + past_ + t) * size_);
    else
      put_row(row_, size_, 1, call_.d_x, (start_ + t) * size_);
  }

  const ConvolutionCall& call_;
  const int size_, padded_, taps_;
  const int64_t past_;
  Arena arena_;
  // By slot, the inputs of the last tokens; by tap, what it multiplies.
  std::vector<const float*> rows_, inputs_;
  float *weight_, *bias_, *ring_, *row_, *d_ring_ = nullptr, *d_weight_ = nullptr, *d_bias_ = nullptr, *d_out_ = nullptr;
  int64_t document_ = 0, start_ = 0, length_ = 0, first_ = 0, last_ = 0;
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_convolution_forward(const seqtrain::ConvolutionCall* call) {
  return seqtrain::run_tasks<seqtrain::ConvolutionWorker>(*call, call->parts, false);
}
int seqtrain_convolution_backward(const seqtrain::ConvolutionCall* call) {
  return seqtrain::run_tasks<seqtrain::ConvolutionWorker>(*call, call->parts, true);
}

int64_t seqtrain_convolution_call_size() { return sizeof(seqtrain::ConvolutionCall); }
}
