// The diagonal scan, real or complex, forward and backward: a block of channels at a time, token by token.
//
// The formulas are those of the definition, `reference` in diagonal_scan/__init__.py, and of `_gradients` in its
// chunked.py. Complex numbers are pairs of floats that lie side by side, and widths count floats. No channel knows of
// another, so that blocks and threads change no bit.
#include <algorithm>
#include <cmath>

#include "arrays.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in diagonal_scan/native.py.
struct ScanCall {
  Array x, decay, out, d_out, d_x, d_log;
  const float *state, *shared;  // [documents, width]; [width], the decay of all tokens, or null
  float* final_state;
  const float* d_final;
  float *d_state, *sums;  // sums: [documents, width], the gradient of the logarithm of `shared`
  const int64_t* boundaries;
  // logarithms: whether `decay` holds those of decays. Without `shared` it has a row a token.
  int64_t documents, parts, width, is_complex, logarithms, threads;
};

// Tokens whose gradients are summed by themselves, so that long rows lose no digits.
constexpr int64_t kSummed = 256;

template <int... LANE>
static inline Vec swapped(Vec x, std::integer_sequence<int, LANE...>) {
#if __GNUC__ >= 12 || defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE ^ 1)...);
#else
  return __builtin_shuffle(x, IntVec{(LANE ^ 1)...});
#endif
}

template <int... LANE>
static inline Vec doubled(Vec x, std::integer_sequence<int, LANE...>) {
#if __GNUC__ >= 12 || defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE & ~1)...);
#else
  return __builtin_shuffle(x, IntVec{(LANE & ~1)...});
#endif
}

template <int... LANE>
static inline Vec signs(std::integer_sequence<int, LANE...>) {
  return Vec{(LANE & 1 ? 1.0f : -1.0f)...};
}

// a b, or conj(a) b.
template <bool COMPLEX, bool CONJUGATE = false>
static inline Vec product(Vec a, Vec b) {
  if constexpr (!COMPLEX) return a * b;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  const Vec real = doubled(a, lanes), imaginary = doubled(swapped(a, lanes), lanes) * signs(lanes);
  const Vec crossed = imaginary * swapped(b, lanes);
  return CONJUGATE ? real * b - crossed : real * b + crossed;
}

// Angles above which their reduction to a quarter turn by floats loses digits.
constexpr float kFar = 8192.0f;

// e^z for numbers of which no angle is larger than kFar, within a few units in the last place: cosines in even lanes are
// sines a quarter turn on.
static inline Vec complex_exp_of(Vec z) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  const Vec magic = filled(12582912.0f), angle = doubled(swapped(z, lanes), lanes);
  const Vec n = (angle * 0.636619772f + magic) - magic;
  const Vec r = ((angle - n * 1.5703125f) - n * 4.83751296997e-4f) - n * 7.54978995489e-8f;
  const Vec square = r * r;
  const Vec sine = r + r * square * ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f);
  const Vec cosine =
      square * square * ((2.443315711810e-5f * square - 1.388731625494e-3f) * square + 4.166664568299e-2f) -
      0.5f * square + 1;
  const Vec even = signs(lanes);
  const IntVec quarter = __builtin_convertvector(n, IntVec) - (even < Vec{});
  const IntVec odd = (quarter & 1) != 0, negative = (quarter & 2) != 0;
  const Vec turned = odd ? cosine : sine;
  return exp_of(doubled(z, lanes)) * (negative ? -turned : turned);
}

class ScanWorker {
 public:
  ScanWorker(const ScanCall& call, bool)
      : call_(call), most_(padded((call.width + call.parts - 1) / call.parts)) {
    for (float** each : {&x_, &decay_, &h_, &carry_, &row_, &d_log_, &part_, &total_}) {
      *each = arena_.take(most_);
      std::fill_n(*each, most_, 0.0f);
    }
  }

  void forward(const Task& task) {
    if (!enter(task)) return;
    call_.is_complex ? forward<true>() : forward<false>();
  }

  void backward(const Task& task) {
    if (!enter(task)) return;
    call_.is_complex ? backward<true>() : backward<false>();
  }

 private:
  // Whether the part has any channels.
  bool enter(const Task& task) {
    document_ = task.document, start_ = call_.boundaries[document_], end_ = call_.boundaries[document_ + 1];
    channel_ = task.part * most_;
    size_ = static_cast<int>(std::min(most_, call_.width - channel_));
    if (size_ <= 0) return false;
    lanes_ = static_cast<int>(padded(size_));
    if (call_.shared) std::copy_n(call_.shared + channel_, size_, decay_);
    return true;
  }

  int64_t at() const { return document_ * call_.width + channel_; }

  const float* decay_row(int64_t t) {
    if (call_.shared) return decay_;
    const float* found = take_row(call_.decay, t * call_.decay.token + channel_, size_, row_);
    if (!call_.logarithms) return found;
    if (call_.is_complex) return complex_decay(found);
    for (int n = 0; n < lanes_; n += kLanes) store(decay_ + n, exp_of(load(found + n)));
    return decay_;
  }

  const float* complex_decay(const float* log) {
    Vec largest = {};
    for (int n = 0; n < lanes_; n += kLanes) {
      const Vec z = load(log + n), size = z < Vec{} ? -z : z;
      largest = size > largest ? size : largest;
      store(decay_ + n, complex_exp_of(z));
    }
    if (!(total(largest) > kFar)) return decay_;
    for (int n = 0; n < size_; n += 2) {
      const double factor = std::exp(double(log[n]));
      decay_[n] = static_cast<float>(factor * std::cos(double(log[n + 1])));
      decay_[n + 1] = static_cast<float>(factor * std::sin(double(log[n + 1])));
    }
    return decay_;
  }

  template <bool COMPLEX>
  void forward() {
    std::copy_n(call_.state + at(), size_, h_);
    for (int64_t t = start_; t < end_; ++t) {
      const float* decay = decay_row(t);
      const float* x = take_row(call_.x, t * call_.x.token + channel_, size_, x_);
      for (int n = 0; n < lanes_; n += kLanes)
        store(h_ + n, product<COMPLEX>(load(decay + n), load(h_ + n)) + load(x + n));
      put_row(h_, size_, 1, call_.out, t * call_.width + channel_);
    }
    std::copy_n(h_, size_, call_.final_state + at());
  }

  template <bool COMPLEX>
  void backward() {
    // carry_: what of the gradient of h after a token comes to h before it.
    std::copy_n(call_.d_final + at(), size_, carry_);
    std::fill_n(total_, lanes_, 0.0f);
    std::fill_n(part_, lanes_, 0.0f);
    const Array state{const_cast<float*>(call_.state), Kind::kFloat, 0, 0};
    for (int64_t t = end_ - 1; t >= start_; --t) {
      const float* decay = decay_row(t);
      const float* d_out = take_row(call_.d_out, t * call_.width + channel_, size_, x_);
      const float* before = t == start_ ? take_row(state, at(), size_, h_)
                                        : take_row(call_.out, (t - 1) * call_.width + channel_, size_, h_);
      for (int n = 0; n < lanes_; n += kLanes) {
        const Vec g = load(d_out + n) + load(carry_ + n);
        const Vec carried = product<COMPLEX, true>(load(decay + n), g);
        store(x_ + n, g);
        store(carry_ + n, carried);
        store(d_log_ + n, product<COMPLEX, true>(load(before + n), carried));
      }
      put_row(x_, size_, 1, call_.d_x, t * call_.width + channel_);
      if (!call_.shared) {
        put_row(d_log_, size_, 1, call_.d_log, t * call_.width + channel_);
        continue;
      }
      add(part_, d_log_);
      if ((t - start_) % kSummed == 0) {
        add(total_, part_);
        std::fill_n(part_, lanes_, 0.0f);
      }
    }
    std::copy_n(carry_, size_, call_.d_state + at());
    if (call_.shared) std::copy_n(total_, size_, call_.sums + at());
  }

  void add(float* to, const float* from) const {
    for (int n = 0; n < lanes_; n += kLanes) store(to + n, load(to + n) + load(from + n));
  }

  const ScanCall& call_;
  const int64_t most_;
  Arena arena_;
  float *x_, *decay_, *h_, *carry_, *row_, *d_log_, *part_, *total_;
  int64_t document_ = 0, start_ = 0, end_ = 0, channel_ = 0;
  int size_ = 0, lanes_ = 0;
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_scan_forward(const seqtrain::ScanCall* call) {
  return seqtrain::run_tasks<seqtrain::ScanWorker>(*call, call->parts, false);
}
int seqtrain_scan_backward(const seqtrain::ScanCall* call) {
  return seqtrain::run_tasks<seqtrain::ScanWorker>(*call, call->parts, true);
}

int64_t seqtrain_scan_call_size() { return sizeof(seqtrain::ScanCall); }
}
