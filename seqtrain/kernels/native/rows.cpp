// Passes over rows that know nothing of each other: SwiGLU, and cross-entropy with its gradient.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "gate.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in swiglu/native.py. `up` is [rows, 2 width], gates then values, d_up as well.
struct SwigluCall {
  Array up, out, d_out, d_up;
  const int64_t* boundaries;  // 0 and the number of rows: they are one document
  int64_t documents, parts, width, threads;
};

class SwigluWorker {
 public:
  SwigluWorker(const SwigluCall& call, bool)
      : call_(call), size_(static_cast<int>(call.width)), padded_(static_cast<int>(padded(call.width))) {
    for (float** each : {&gate_, &value_, &d_out_, &out_}) {
      *each = arena_.take(padded_);
      std::fill_n(*each, padded_, 0.0f);
    }
  }

  void forward(const Task& task) {
    each_row(task, [&](int64_t row, const float* gate, const float* value) {
      for (int n = 0; n < padded_; n += kLanes) store(out_ + n, gate_of(load(gate + n), true).value * load(value + n));
      put_row(out_, size_, 1, call_.out, row * size_);
    });
  }

  void backward(const Task& task) {
    each_row(task, [&](int64_t row, const float* gate, const float* value) {
      const float* d_out = take_row(call_.d_out, row * size_, size_, d_out_);
      for (int n = 0; n < padded_; n += kLanes) {
        const Gate f = gate_of(load(gate + n), true);
        const Vec d = load(d_out + n);
        store(out_ + n, d * load(value + n) * f.slope);
        store(d_out_ + n, d * f.value);
      }
      put_row(out_, size_, 1, call_.d_up, row * 2 * size_);
      put_row(d_out_, size_, 1, call_.d_up, row * 2 * size_ + size_);
    });
  }

 private:
  template <class Step>
  void each_row(const Task& task, Step step) {
    const int64_t rows = call_.boundaries[1];
    for (int64_t row = rows * task.part / call_.parts; row < rows * (task.part + 1) / call_.parts; ++row) {
      const int64_t at = row * call_.up.token;
      step(row, take_row(call_.up, at, size_, gate_), take_row(call_.up, at + size_, size_, value_));
    }
  }

  const SwigluCall& call_;
  const int size_, padded_;
  Arena arena_;
  float *gate_, *value_, *d_out_, *out_;
};

// Mirrored field by field in linear_cross_entropy/native.py. With `gradient`, that of the logits takes their place.
struct SoftmaxCall {
  Array logits;
  const int64_t *labels, *boundaries;
  float* losses;
  int64_t documents, parts, width, ignored, gradient, threads;
};

class SoftmaxWorker {
 public:
  SoftmaxWorker(const SoftmaxCall& call, bool)
      : call_(call), size_(static_cast<int>(call.width)), padded_(static_cast<int>(padded(call.width))) {
    own_ = call.logits.kind == Kind::kFloat && size_ == padded_;
    if (!own_) scratch_ = arena_.take(padded_);
  }

  void forward(const Task& task) {
    const int64_t rows = call_.boundaries[1];
    for (int64_t row = rows * task.part / call_.parts; row < rows * (task.part + 1) / call_.parts; ++row) one_row(row);
  }
  void backward(const Task&) {}

 private:
  void one_row(int64_t row) {
    const int64_t at = row * size_, label = call_.labels[row];
    float* x = own_ ? static_cast<float*>(call_.logits.data) + at : scratch_;
    if (!own_) {
      widen(call_.logits, at, size_, 1, x);
      std::fill(x + size_, x + padded_, -std::numeric_limits<float>::infinity());
    }
    const bool counted = label != call_.ignored;
    const float most = largest(x), chosen = counted ? x[label] - most : 0;
    const float sum = exponentials(x, most);
    call_.losses[row] = counted ? std::log(sum) - chosen : 0;
    if (!call_.gradient) return;
    const float factor = counted ? 1 / sum : 0;
    if (own_) {
      scale_row(x, x, factor, padded_);
      if (counted) x[label] -= 1;
      return;
    }
    scale_row(x, x, factor, padded_);
    if (counted) x[label] -= 1;
    call_.logits.kind == Kind::kFloat ? narrow(x, size_, 1, static_cast<float*>(call_.logits.data) + at)
                                      : narrow(x, size_, 1, static_cast<uint16_t*>(call_.logits.data) + at);
  }

  float largest(const float* x) const {
    Vec found = load(x);
    for (int n = kLanes; n < padded_; n += kLanes) {
      const Vec next = load(x + n);
      const IntVec above = next > found;
      found = above ? next : found;
    }
    float parts[kLanes];
    store(parts, found);
    return *std::max_element(parts, parts + kLanes);
  }

  // Puts exp(x - most) in the place of x, and gives the sum.
  float exponentials(float* x, float most) const {
    Vec sums[2] = {};
    for (int n = 0; n < padded_; n += kLanes) {
      const Vec found = exp_of(load(x + n) - most);
      store(x + n, found);
      sums[n / kLanes % 2] += found;
    }
    return total(sums[0] + sums[1]);
  }

  const SoftmaxCall& call_;
  const int size_, padded_;
  bool own_;
  Arena arena_;
  float* scratch_ = nullptr;
};

}  // namespace seqtrain

extern "C" {

// All return 0, or 1 where memory ran out.
int seqtrain_swiglu_forward(const seqtrain::SwigluCall* call) {
  return seqtrain::run_tasks<seqtrain::SwigluWorker>(*call, call->parts, false);
}
int seqtrain_swiglu_backward(const seqtrain::SwigluCall* call) {
  return seqtrain::run_tasks<seqtrain::SwigluWorker>(*call, call->parts, true);
}
int seqtrain_softmax(const seqtrain::SoftmaxCall* call) {
  return seqtrain::run_tasks<seqtrain::SoftmaxWorker>(*call, call->parts, false);
}

int64_t seqtrain_swiglu_call_size() { return sizeof(seqtrain::SwigluCall); }
int64_t seqtrain_softmax_call_size() { return sizeof(seqtrain::SoftmaxCall); }
}
