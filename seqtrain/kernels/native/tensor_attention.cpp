// Tensor attention, forward and backward: token by token, with both running sums in the first-level cache.
//
// The algebra is that of the definition, `reference` in tensor_attention/__init__.py. A product of two running sums is no
// matrix product, but two rows of V numbers times F features are so few that each token's can be made in turn. Sums are
// kept as those before a block of tokens and those within it, so that rounding grows with the number of blocks. The
// backward pass recomputes a block's sums, then takes its tokens out again one by one. The columns of ones have their own
// arrays, over features.
#include <algorithm>

#include "arrays.h"
#include "parallel.h"

namespace seqtrain {

// Tokens between two saved states.
constexpr int kTokens = 64;

// Mirrored field by field in tensor_attention.py.
struct TensorCall {
  Array q, k1, k2, v1, v2, out, d_out, d_q, d_k1, d_k2, d_v1, d_v2;
  float *state, *final_state, *checkpoints, *d_final, *d_state;
  const float* ratio;  // of each feature to its parent times its variable
  const int64_t *parent, *variable, *boundaries;
  int64_t documents, tokens, heads, key, value, features, threads;
  double scale;
};

// The two sums of a head, or their gradients: rows of values [2, F, width], and of ones [2, F].
struct Sums {
  float* values[2];
  float* ones[2];
};

class TensorWorker : InDocument {
 public:
  TensorWorker(const TensorCall& call, bool backward)
      : call_(call),
        features_(static_cast<int>(call.features)),
        padded_features_(static_cast<int>(padded(call.features))),
        width_(static_cast<int>(padded(call.value))) {
    for (Sums* sums : {&before_, &within_}) take(*sums);
    for (float*& x : x_) x = arena_.take(padded(call.key));
    for (float*& phi : phi_) phi = arena_.take(int64_t(kTokens) * padded_features_);
    for (float*& v : v_) v = arena_.take(int64_t(kTokens) * width_);
    out_ = arena_.take(int64_t(kTokens) * width_);
    if (!backward) return;
    for (Sums* sums : {&d_after_, &d_within_}) take(*sums);
    for (float*& d_phi : d_phi_) d_phi = arena_.take(padded_features_);
    for (float*& d_v : d_v_) d_v = arena_.take(width_);
    d_out_ = arena_.take(width_);
    d_x_ = arena_.take(padded(call.key));
  }

  void forward(const Task& task) {
    enter(call_, task.document, task.part, kTokens);
    load_sums(call_.state, task.document, before_);
    for (int64_t n = 0; n < chunks_; ++n) {
      if (call_.checkpoints) save_sums(before_, call_.checkpoints, checkpoint(n, 1));
      run_block(n);
      for (int i = 0; i < tokens(n); ++i)
        put_row(out_ + int64_t(i) * width_, value(), 1, call_.out, place(n, i) * call_.value);
      merge(within_, before_);
    }
    save_sums(before_, call_.final_state, task.document);
  }

  void backward(const Task& task) {
    enter(call_, task.document, task.part, kTokens);
    load_sums(call_.d_final, task.document, d_after_);
    for (int64_t n = chunks_ - 1; n >= 0; --n) {
      load_sums(call_.checkpoints, checkpoint(n, 1), before_);
      run_block(n);
      clear(d_within_);
      for (int i = tokens(n) - 1; i >= 0; --i) token_gradients(n, i);
      merge(d_within_, d_after_);
    }
    save_sums(d_after_, call_.d_state, task.document);
  }

 private:
  void take(Sums& sums) {
    for (int s = 0; s < 2; ++s) {
      sums.values[s] = arena_.take(int64_t(features_) * width_);
      sums.ones[s] = arena_.take(padded_features_);
    }
  }

  int value() const { return static_cast<int>(call_.value); }

  float* state_row(float* states, int64_t index, int s, int f) const {
    return states + (((index * call_.heads + head_) * 2 + s) * features_ + f) * (call_.value + 1);
  }

  void load_sums(float* states, int64_t index, const Sums& sums) const {
    clear(sums);
    for (int s = 0; s < 2; ++s)
      for (int f = 0; f < features_; ++f) {
        const float* row = state_row(states, index, s, f);
        std::memcpy(sums.values[s] + int64_t(f) * width_, row, sizeof(float) * value());
        sums.ones[s][f] = row[value()];
      }
  }

  void save_sums(const Sums& sums, float* states, int64_t index) const {
    for (int s = 0; s < 2; ++s)
      for (int f = 0; f < features_; ++f) {
        float* row = state_row(states, index, s, f);
        std::memcpy(row, sums.values[s] + int64_t(f) * width_, sizeof(float) * value());
        row[value()] = sums.ones[s][f];
      }
  }

  void clear(const Sums& sums) const {
    for (int s = 0; s < 2; ++s) {
      std::memset(sums.values[s], 0, sizeof(float) * features_ * width_);
      std::memset(sums.ones[s], 0, sizeof(float) * padded_features_);
    }
  }

  void merge(const Sums& from, const Sums& to) const {
    for (int s = 0; s < 2; ++s) {
      for (int n = 0; n < features_ * width_; n += kLanes)
        store(to.values[s] + n, load(to.values[s] + n) + load(from.values[s] + n));
      for (int n = 0; n < padded_features_; n += kLanes) store(to.ones[s] + n, load(to.ones[s] + n) + load(from.ones[s] + n));
    }
  }

  // Row `which` (q, k1, k2) of a token, and its features.
  void take_features(int64_t at, int which, float* phi) {
    const Array* arrays[3] = {&call_.q, &call_.k1, &call_.k2};
    const float factor = which ? 1 : static_cast<float>(call_.scale);
    widen(*arrays[which], at * call_.key, static_cast<int>(call_.key), factor, x_[which]);
    phi[0] = 1;
    for (int f = 1; f < features_; ++f) phi[f] = phi[call_.parent[f]] * x_[which][call_.variable[f]] * call_.ratio[f];
    for (int f = features_; f < padded_features_; ++f) phi[f] = 0;
  }

  // Turns d_phi into the gradient of row `which`, whose values are in x_.
  void put_features(int64_t at, int which, const float* phi, float* d_phi) {
    const Array* arrays[3] = {&call_.d_q, &call_.d_k1, &call_.d_k2};
    float* d_x = d_x_;
    std::fill(d_x, d_x + call_.key, 0.0f);
    for (int f = features_ - 1; f > 0; --f) {
      const int64_t parent = call_.parent[f], variable = call_.variable[f];
      const float weighted = d_phi[f] * call_.ratio[f];
      d_x[variable] += weighted * phi[parent];
      d_phi[parent] += weighted * x_[which][variable];
    }
    const float factor = which ? 1 : static_cast<float>(call_.scale);
    put_row(d_x, static_cast<int>(call_.key), factor, *arrays[which], at * call_.key);
  }

  // Features, values, outputs and divisors of block n's tokens, and its own sums in within_.
  void run_block(int64_t n) {
    clear(within_);
    for (int i = 0; i < tokens(n); ++i) {
      const int64_t at = place(n, i);
      float* phi[3];
      for (int which = 0; which < 3; ++which) {
        phi[which] = phi_[which] + int64_t(i) * padded_features_;
        take_features(at, which, phi[which]);
      }
      const Array* values[2] = {&call_.v1, &call_.v2};
      float* v[2];
      for (int s = 0; s < 2; ++s) {
        v[s] = v_[s] + int64_t(i) * width_;
        widen(*values[s], at * call_.value, value(), 1, v[s]);
        std::fill(v[s] + value(), v[s] + width_, 0.0f);
      }
      Vec divisor = {};
      for (int f = 0; f < padded_features_; f += kLanes) {
        const Vec one = load(within_.ones[0] + f) + load(phi[1] + f), two = load(within_.ones[1] + f) + load(phi[2] + f);
        store(within_.ones[0] + f, one);
        store(within_.ones[1] + f, two);
        divisor += load(phi[0] + f) * (load(before_.ones[0] + f) + one) * (load(before_.ones[1] + f) + two);
      }
      divisor_[i] = total(divisor);
      const float inverse = 1 / divisor_[i];
      for (int c = 0; c < width_; c += kLanes) {
        const Vec first = load(v[0] + c), second = load(v[1] + c);
        Vec out = {};
        for (int f = 0; f < features_; ++f) {
          const int64_t row = int64_t(f) * width_ + c;
          const Vec one = load(within_.values[0] + row) + phi[1][f] * first;
          const Vec two = load(within_.values[1] + row) + phi[2][f] * second;
          store(within_.values[0] + row, one);
          store(within_.values[1] + row, two);
          out += phi[0][f] * (load(before_.values[0] + row) + one) * (load(before_.values[1] + row) + two);
        }
        store(out_ + int64_t(i) * width_ + c, out * inverse);
      }
    }
  }

  // Gradients of the i-th token of block n; within_ loses the token, d_within_ gains what it owes to the sums.
  void token_gradients(int64_t n, int i) {
    const int64_t at = place(n, i);
    const float* phi[3];
    for (int which = 0; which < 3; ++which) phi[which] = phi_[which] + int64_t(i) * padded_features_;
    const float* v[2] = {v_[0] + int64_t(i) * width_, v_[1] + int64_t(i) * width_};
    const float* out = out_ + int64_t(i) * width_;
    widen(call_.d_out, at * call_.value, value(), 1 / divisor_[i], d_out_);
    std::fill(d_out_ + value(), d_out_ + width_, 0.0f);
    const float d_divisor = -dot(d_out_, out, width_);
    for (float* d_v : d_v_) std::fill(d_v, d_v + width_, 0.0f);
    for (int f = 0; f < padded_features_; f += kLanes) {
      const Vec one = load(before_.ones[0] + f) + load(within_.ones[0] + f);
      const Vec two = load(before_.ones[1] + f) + load(within_.ones[1] + f);
      store(within_.ones[0] + f, load(within_.ones[0] + f) - load(phi[1] + f));
      store(within_.ones[1] + f, load(within_.ones[1] + f) - load(phi[2] + f));
      const Vec owed = d_divisor * load(phi[0] + f);
      const Vec d_one = load(d_within_.ones[0] + f) + owed * two, d_two = load(d_within_.ones[1] + f) + owed * one;
      store(d_within_.ones[0] + f, d_one);
      store(d_within_.ones[1] + f, d_two);
      store(d_phi_[0] + f, d_divisor * one * two);
      store(d_phi_[1] + f, load(d_after_.ones[0] + f) + d_one);
      store(d_phi_[2] + f, load(d_after_.ones[1] + f) + d_two);
    }
    for (int f = 0; f < features_; ++f) {
      Vec sum[3] = {};
      for (int c = 0; c < width_; c += kLanes) {
        const int64_t row = int64_t(f) * width_ + c;
        const Vec first = load(v[0] + c), second = load(v[1] + c), d = load(d_out_ + c);
        const Vec own_one = load(within_.values[0] + row), own_two = load(within_.values[1] + row);
        const Vec one = load(before_.values[0] + row) + own_one, two = load(before_.values[1] + row) + own_two;
        store(within_.values[0] + row, own_one - phi[1][f] * first);
        store(within_.values[1] + row, own_two - phi[2][f] * second);
        const Vec owed = d * phi[0][f];
        Vec d_one = load(d_within_.values[0] + row) + owed * two, d_two = load(d_within_.values[1] + row) + owed * one;
        store(d_within_.values[0] + row, d_one);
        store(d_within_.values[1] + row, d_two);
        d_one += load(d_after_.values[0] + row);
        d_two += load(d_after_.values[1] + row);
        sum[0] += d * one * two;
        sum[1] += d_one * first;
        sum[2] += d_two * second;
        store(d_v_[0] + c, load(d_v_[0] + c) + phi[1][f] * d_one);
        store(d_v_[1] + c, load(d_v_[1] + c) + phi[2][f] * d_two);
      }
      for (int which = 0; which < 3; ++which) d_phi_[which][f] += total(sum[which]);
    }
    put_row(d_v_[0], value(), 1, call_.d_v1, at * call_.value);
    put_row(d_v_[1], value(), 1, call_.d_v2, at * call_.value);
    const Array* rows[3] = {&call_.q, &call_.k1, &call_.k2};
    for (int which = 0; which < 3; ++which) {
      const float factor = which ? 1 : static_cast<float>(call_.scale);
      widen(*rows[which], at * call_.key, static_cast<int>(call_.key), factor, x_[which]);
      put_features(at, which, phi[which], d_phi_[which]);
    }
  }

  const TensorCall& call_;
  const int features_, padded_features_, width_;
  Arena arena_;
  Sums before_, within_;  // sums before the block, and of its tokens so far
  Sums d_after_{}, d_within_{};
  float *x_[3], *phi_[3], *v_[2], *out_;
  float *d_phi_[3] = {}, *d_v_[2] = {}, *d_out_ = nullptr, *d_x_ = nullptr;
  float divisor_[kTokens];
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_tensor_forward(const seqtrain::TensorCall* call) {
  return seqtrain::run_tasks<seqtrain::TensorWorker>(*call, call->heads, false);
}
int seqtrain_tensor_backward(const seqtrain::TensorCall* call) {
  return seqtrain::run_tasks<seqtrain::TensorWorker>(*call, call->heads, true);
}

int64_t seqtrain_tensor_call_size() { return sizeof(seqtrain::TensorCall); }
}
