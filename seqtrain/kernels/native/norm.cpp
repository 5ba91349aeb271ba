// Root-mean-square norm with a gate, forward and backward: a row at a time, which stays in the first-level cache.
//
// The formulas are those of the definition, `reference` in gated_norm/__init__.py. The backward pass computes a row's
// norm and gate again: reading kept ones would cost more. Rows are taken in parts whose number depends on theirs alone,
// so that the weight's gradient does not change with the threads.
#include <cmath>

#include "arrays.h"
#include "gate.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in gated_norm/native.py.
struct NormCall {
  Array x, gate, out, d_out, d_x, d_gate;
  const float* weight;        // [width], or [heads, width]
  float* sums;                // the parts' gradients of it, [parts, ...]
  const int64_t* boundaries;  // 0 and the number of tokens: they are one document
  int64_t documents, parts, heads, width, weights, silu, gate_first, threads;
  double eps;
};

enum Gating { kUngated, kBeforeNorm, kAfterNorm };

class NormWorker {
 public:
  NormWorker(const NormCall& call, bool)
      : call_(call), size_(static_cast<int>(call.width)), padded_(static_cast<int>(padded(call.width))) {
    weight_ = row(call.weights);
    for (int64_t n = 0; n < call.weights; ++n)
      std::copy_n(call.weight + n * size_, size_, weight_ + n * padded_);
    d_weight_ = row(call.weights);
    for (float** each : {&x_, &gate_, &d_out_, &y_, &out_, &d_gate_, &slope_}) *each = row(1);
  }

  void forward(const Task& task) {
    if (!call_.gate.data) return each_row(task.part, [&](const Place& at) { norm<kUngated>(at); });
    if (call_.gate_first) return each_row(task.part, [&](const Place& at) { norm<kBeforeNorm>(at); });
    each_row(task.part, [&](const Place& at) { norm<kAfterNorm>(at); });
  }

  void backward(const Task& task) {
    std::fill_n(d_weight_, call_.weights * padded_, 0.0f);
    if (!call_.gate.data)
      each_row(task.part, [&](const Place& at) { gradients<kUngated>(at); });
    else if (call_.gate_first)
      each_row(task.part, [&](const Place& at) { gradients<kBeforeNorm>(at); });
    else
      each_row(task.part, [&](const Place& at) { gradients<kAfterNorm>(at); });
    for (int64_t n = 0; n < call_.weights; ++n)
      std::copy_n(d_weight_ + n * padded_, size_, call_.sums + (task.part * call_.weights + n) * size_);
  }

 private:
  // Offsets of a row in x, the gate, whatever is contiguous, and the padded weights.
  struct Place {
    int64_t x, gate, row, weight;
  };

  // Zeros, so that what lies behind a row's end adds nothing.
  float* row(int64_t count) {
    float* found = arena_.take(count * padded_);
    std::fill_n(found, count * padded_, 0.0f);
    return found;
  }

  template <class Step>
  void each_row(int64_t part, Step step) {
    const int64_t tokens = call_.boundaries[1];
    for (int64_t token = tokens * part / call_.parts; token < tokens * (part + 1) / call_.parts; ++token)
      for (int64_t head = 0; head < call_.heads; ++head)
        step(Place{token * call_.x.token + head * size_, token * call_.gate.token + head * size_,
                   (token * call_.heads + head) * size_, call_.weights == 1 ? 0 : head * padded_});
  }

  // A row as floats: where it lies, if it can be read in whole vectors there.
  const float* take(const Array& from, int64_t offset, float* scratch) const {
    if (from.kind == Kind::kFloat && size_ == padded_) return static_cast<const float*>(from.data) + offset;
    widen(from, offset, size_, 1, scratch);
    return scratch;
  }

  // 1 over the root mean square of what is normalised.
  float inverse(const float* y) const {
    return 1 / std::sqrt(dot(y, y, padded_) / static_cast<float>(size_) + static_cast<float>(call_.eps));
  }

  template <Gating GATING>
  void norm(const Place& at) {
    const float* x = take(call_.x, at.x, x_);
    const float* gate = GATING == kUngated ? nullptr : take(call_.gate, at.gate, gate_);
    const float* weight = weight_ + at.weight;
    const bool silu = call_.silu;
    const float* y = x;
    if (GATING == kBeforeNorm) {
      for (int n = 0; n < padded_; n += kLanes) store(y_ + n, load(x + n) * gate_of(load(gate + n), silu).value);
      y = y_;
    }
    const float factor = inverse(y);
    for (int n = 0; n < padded_; n += kLanes) {
      const Vec out = load(y + n) * factor * load(weight + n);
      store(out_ + n, GATING == kAfterNorm ? out * gate_of(load(gate + n), silu).value : out);
    }
    put_row(out_, size_, 1, call_.out, at.row);
  }

  template <Gating GATING>
  void gradients(const Place& at) {
    const float* x = take(call_.x, at.x, x_);
    const float* gate = GATING == kUngated ? nullptr : take(call_.gate, at.gate, gate_);
    const float* d_out = take(call_.d_out, at.row, d_out_);
    const float* weight = weight_ + at.weight;
    float* d_weight = d_weight_ + at.weight;
    const bool silu = call_.silu;
    const float* y = x;
    if (GATING == kBeforeNorm) {
      for (int n = 0; n < padded_; n += kLanes) {
        const Gate f = gate_of(load(gate + n), silu);
        store(y_ + n, load(x + n) * f.value);
        store(d_gate_ + n, f.value);
        store(slope_ + n, f.slope);
      }
      y = y_;
    }
    const float factor = inverse(y);
    // out_ takes the gradient of the normalised row, then that of x.
    for (int n = 0; n < padded_; n += kLanes) {
      const Vec normed = load(y + n) * factor, d = load(d_out + n), w = load(weight + n);
      if (GATING == kAfterNorm) {
        const Gate f = gate_of(load(gate + n), silu);
        store(d_weight + n, load(d_weight + n) + d * normed * f.value);
        store(d_gate_ + n, d * normed * w * f.slope);
        store(out_ + n, d * w * f.value);
      } else {
        store(d_weight + n, load(d_weight + n) + d * normed);
        store(out_ + n, d * w);
      }
    }
    const float mean = dot(out_, y, padded_) * factor / static_cast<float>(size_);
    for (int n = 0; n < padded_; n += kLanes) {
      const Vec d_y = (load(out_ + n) - load(y + n) * (factor * mean)) * factor;
      if (GATING == kBeforeNorm) {
        store(out_ + n, d_y * load(d_gate_ + n));
        store(d_gate_ + n, d_y * load(x + n) * load(slope_ + n));
      } else {
        store(out_ + n, d_y);
      }
    }
    put_row(out_, size_, 1, call_.d_x, at.row);
    if (GATING != kUngated) put_row(d_gate_, size_, 1, call_.d_gate, at.row);
  }

  const NormCall& call_;
  const int size_, padded_;
  Arena arena_;
  float *weight_, *d_weight_, *x_, *gate_, *d_out_, *y_, *out_, *d_gate_, *slope_;
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_norm_forward(const seqtrain::NormCall* call) {
  return seqtrain::run_tasks<seqtrain::NormWorker>(*call, call->parts, false);
}
int seqtrain_norm_backward(const seqtrain::NormCall* call) {
  return seqtrain::run_tasks<seqtrain::NormWorker>(*call, call->parts, true);
}

int64_t seqtrain_norm_call_size() { return sizeof(seqtrain::NormCall); }
}
