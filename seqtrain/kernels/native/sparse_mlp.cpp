// An MLP most of whose hidden channels a gate turns off, for few rows: of the others the weights alone are read.
#include <algorithm>

#include "arrays.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in sparse_mlp/native.py.
struct SparseMLPCall {
  Array value, down;          // [hidden, inner], [hidden, width]
  const float *gate, *x;      // [rows, hidden], [rows, inner]
  float* sums;                // each part's of the result, [parts, rows, width]
  const int64_t* boundaries;  // 0 and the number of rows
  int64_t documents, parts, rows, hidden, inner, width, threads;
  double scale;
};

class SparseMLPWorker {
 public:
  SparseMLPWorker(const SparseMLPCall& call, bool)
      : call_(call), row_(arena_.take(padded(std::max(call.inner, call.width)))) {}

  // All rows' kept channels of one part.
  void forward(const Task& task) {
    const int64_t first = call_.hidden * task.part / call_.parts, end = call_.hidden * (task.part + 1) / call_.parts;
    float* sums = call_.sums + task.part * call_.rows * call_.width;
    std::fill_n(sums, call_.rows * call_.width, 0.0f);
    for (int64_t row = 0; row < call_.rows; ++row) {
      const float *gate = call_.gate + row * call_.hidden, *x = call_.x + row * call_.inner;
      for (int64_t channel = first; channel < end; ++channel) {
        if (gate[channel] == 0) continue;
        const float hidden = gate[channel] * product(x, weights(call_.value, channel, call_.inner), call_.inner);
        add_row(sums + row * call_.width, weights(call_.down, channel, call_.width), hidden, static_cast<int>(call_.width));
      }
    }
  }

  void backward(const Task&) {}

 private:
  // A channel's weights as floats: where they lie, if they are.
  const float* weights(const Array& from, int64_t channel, int64_t size) const {
    if (from.kind == Kind::kFloat) return static_cast<const float*>(from.data) + channel * size;
    widen(from, channel * size, static_cast<int>(size), 1, row_);
    return row_;
  }

  static float product(const float* a, const float* b, int64_t size) {
    const int whole = static_cast<int>(size / kLanes * kLanes);
    float sum = dot(a, b, whole);
    for (int64_t n = whole; n < size; ++n) sum += a[n] * b[n];
    return sum;
  }

  const SparseMLPCall& call_;
  Arena arena_;
  float* row_;
};

}  // namespace seqtrain

extern "C" {

// 0, or 1 where memory ran out.
int seqtrain_sparse_mlp(const seqtrain::SparseMLPCall* call) {
  return seqtrain::run_tasks<seqtrain::SparseMLPWorker>(*call, call->parts, false);
}

int64_t seqtrain_sparse_mlp_call_size() { return sizeof(seqtrain::SparseMLPCall); }
}
