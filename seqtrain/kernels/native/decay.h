// What decay does inside a chunk, forward and backward: the products of decay.py, in its letters; `start` are its rows.
// Per channel, blocks of kBlock tokens are re-centred on their own boundaries, and inside a block running products of
// decays are carried from token to token.
#pragma once

#include <algorithm>

#include "arrays.h"
#include "simd.h"

namespace seqtrain {

constexpr int kMaxChunk = 64;
constexpr float kForgotten = -800.0f;  // FORGOTTEN of decay.py

enum class DecayKind : int64_t { kNone = 0, kScalar = 1, kChannel = 2 };

// The rows of one chunk and their products; `key` is the padded key width, and pairs have kMaxChunk columns.
struct Chunk {
  int rows;           // tokens, padded to a multiple of kBlock; padding is zeros
  int reads;          // 0: none; 1: queries; 2: queries and keys
  bool writes;        // whether there are keys
  float* x;           // [2 rows, key]: scaled queries, then keys
  float* start;       // [reads rows, key]; without a scalar decay until `finish_start` is called
  const float* left;  // [rows]: by how much that changes a row of `start`
  float* keys;        // [rows, key]
  float* pairs[2];    // [rows, kMaxChunk] each, zero above the diagonal
  const float* k(int key) const { return x + int64_t(rows) * key; }
  // How many reads meet keys of their own chunk.
  int paired() const { return writes ? reads : 0; }
};

// Zeros above the diagonal of the diagonal blocks; with `strict` on it too. By assignment: products may be infinite.
static void clear_above(float* pairs, int rows, bool strict) {
  for (int i = 0; i < rows; ++i)
    for (int j = strict ? i : i + 1; j < (i / kBlock + 1) * kBlock; ++j) pairs[i * kMaxChunk + j] = 0;
}

class Decay {
 public:
  Decay(DecayKind kind, int key, Arena& arena)
      : kind_(kind),
        key_(key),
        transposed_(arena.take(int64_t(key) * kMaxChunk)),
        start_(arena.take(2 * int64_t(kMaxChunk) * key)),
        keys_(arena.take(int64_t(kMaxChunk) * key)) {
    std::fill_n(from_start_, kMaxChunk, 1.0f);
    if (kind == DecayKind::kScalar) weights_ = arena.take(kMaxChunk * kMaxChunk);
    if (kind == DecayKind::kChannel) {
      const int64_t all = int64_t(kMaxChunk) * key;
      for (float** buffer : {&decay_, &in_start_, &in_end_, &near_keys_, &work_, &far_}) *buffer = arena.take(all);
      near_reads_ = arena.take(2 * all);
      for (float** buffer : {&factor_, &product_}) *buffer = arena.take(key);
      whole_ = arena.take(int64_t(kMaxChunk / kBlock) * key);
    }
  }

  // Fills start, keys and the factor from x and `log` ([rows], or [rows, key] per channel), for reads from `first` on,
  // and the pairs of reads first <= s < pairs_end. Without keys nothing is said of them.
  void prepare(Chunk& chunk, const float* log, int first, int pairs_end) {
    const float* k = chunk.k(key_);
    if (kind_ == DecayKind::kChannel) {
      prepare_channel(chunk, log, first, pairs_end);
    } else {
      if (first < pairs_end) transpose(chunk.rows, key_, k, key_, transposed_, kMaxChunk);
      for (int s = first; s < pairs_end; ++s)
        multiply_to_lower(chunk.rows, key_, chunk.x + int64_t(s) * chunk.rows * key_, key_, transposed_, kMaxChunk,
                          chunk.pairs[s], kMaxChunk);
      chunk.start = chunk.x;
      chunk.keys = const_cast<float*>(k);
      if (kind_ == DecayKind::kScalar) prepare_scalar(chunk, log, first, pairs_end);
    }
    chunk.left = from_start_;
    for (int s = first; s < pairs_end; ++s) clear_above(chunk.pairs[s], chunk.rows, s > 0);
  }

  // Multiplies `start` by `left`. Who needs only what it reads in the state multiplies that instead, which costs less.
  void finish_start(Chunk& chunk) {
    if (kind_ != DecayKind::kScalar) return;
    chunk.start = start_;
    for (int i = 0; i < chunk.rows; ++i)
      for (int s = 0; s < chunk.reads; ++s) {
        const int64_t at = int64_t(s * chunk.rows + i) * key_;
        scale_row(start_ + at, chunk.x + at, from_start_[i], key_);
      }
  }

  // state [key, width] = factor * state + a^T b, with a [depth, key] and b [depth, width].
  void step(float* state, int width, int depth, const float* a, const float* b) const {
    if (kind_ == DecayKind::kChannel) decay_state(state, width);
    const float factor = kind_ == DecayKind::kScalar ? from_start_[last_] : 1.0f;
    multiply<kTransposed>(key_, width, depth, 1, a, key_, b, width, factor, state, width);
  }

  // state [key, width] = factor * state.
  void decay_state(float* state, int width) const {
    if (kind_ == DecayKind::kNone) return;
    for (int c = 0; c < key_; ++c) {
      float* row = state + int64_t(c) * width;
      scale_row(row, row, kind_ == DecayKind::kScalar ? from_start_[last_] : factor_[c], width);
    }
  }

  // Turns d_start [reads rows, key] into the gradient of x and d_keys [rows, key] into that of k, apart from x's second
  // part, and fills d_log, given d_pairs too (overwritten) and state and d_state [key, width] at the chunk's boundaries.
  void gradients(const Chunk& chunk, float* d_start, float* d_keys, float* const d_pairs[2], const float* state,
                 const float* d_state, int width, float* d_log) {
    for (int s = 0; s < chunk.paired(); ++s) clear_above(d_pairs[s], chunk.rows, s > 0);
    if (kind_ == DecayKind::kChannel)
      return channel_gradients(chunk, d_start, d_keys, d_pairs, state, d_state, width, d_log);
    if (kind_ == DecayKind::kScalar) scalar_gradients(chunk, d_start, d_keys, d_pairs, state, d_state, width, d_log);
    for (int s = 0; s < chunk.paired(); ++s) {
      const int64_t at = int64_t(s) * chunk.rows * key_;
      multiply_lower(chunk.rows, key_, d_pairs[s], kMaxChunk, chunk.k(key_), key_, 1, d_start + at, key_);
      multiply_lower_transposed(chunk.rows, key_, d_pairs[s], kMaxChunk, chunk.x + at, key_, 1, d_keys, key_);
    }
  }

 private:
  void prepare_scalar(Chunk& chunk, const float* log, int first, int pairs_end) {
    const int rows = chunk.rows;
    last_ = rows - 1;
    // As a float and its remainder: strong decays take b into the thousands, where one float is wrong by 1e-4.
    float high[kMaxChunk], low[kMaxChunk];
    double sum = 0;
    for (int i = 0; i < rows; ++i) {
      sum += std::max(log[i], kForgotten);
      high[i] = static_cast<float>(sum);
      low[i] = static_cast<float>(sum - high[i]);
    }
    for (int i = 0; i < rows; i += kLanes) {
      store(from_start_ + i, exp_of(load(high + i) + load(low + i)));
      store(to_end_ + i, exp_of((high[last_] - load(high + i)) + (low[last_] - load(low + i))));
    }
    for (int i = 0; i < rows && chunk.paired(); ++i)
      for (int j = 0; j <= i; j += kLanes) {
        const Vec difference = (high[i] - load(high + j)) + (low[i] - load(low + j));
        const IntVec future = difference > Vec{};
        const Vec weight = exp_of(future ? Vec{} : difference);
        store(weights_ + i * kMaxChunk + j, weight);
        for (int s = first; s < pairs_end; ++s) {
          float* pair = chunk.pairs[s] + i * kMaxChunk + j;
          store(pair, load(pair) * weight);
        }
      }
    const float* k = chunk.keys;
    chunk.keys = keys_;
    for (int i = 0; i < rows && chunk.writes; ++i)
      scale_row(keys_ + int64_t(i) * key_, k + int64_t(i) * key_, to_end_[i], key_);
  }

  // Each product's share of d_log comes from the product itself, so that no factor is divided out, and each running sum
  // goes over just the pairs that hold the decay: a total less the rest would drown strong decays in rounding.
  void scalar_gradients(const Chunk& chunk, float* d_start, float* d_keys, float* const d_pairs[2], const float* state,
                        const float* d_state, int width, float* d_log) {
    const int rows = chunk.rows;
    double written = 0;
    for (int t = 0; t < rows; ++t) {
      d_log[t] = static_cast<float>(written);
      if (chunk.writes) written += dot(chunk.keys + int64_t(t) * key_, d_keys + int64_t(t) * key_, key_);
    }
    double read = double(from_start_[last_]) * dot(state, d_state, key_ * width);
    float below[kMaxChunk] = {};  // for each column, the sum over the rows from t on
    IntVec lane;
    for (int n = 0; n < kLanes; ++n) lane[n] = n;
    for (int t = rows - 1; t >= 0; --t) {
      for (int s = 0; s < chunk.reads; ++s) {
        const int64_t at = int64_t(s * rows + t) * key_;
        read += dot(chunk.start + at, d_start + at, key_);
      }
      Vec across = {};
      for (int j = 0; j < t && chunk.paired(); j += kLanes) {
        const IntVec past = lane < t - j;
        Vec inside = {};
        for (int s = 0; s < chunk.reads; ++s) {
          float* d_pair = d_pairs[s] + t * kMaxChunk + j;
          inside += load(chunk.pairs[s] + t * kMaxChunk + j) * load(d_pair);
        }
        // A token's product with its own key holds no decay; left in, it would cancel only up to rounding.
        const Vec sum = load(below + j) + (past ? inside : Vec{});
        store(below + j, sum);
        across += past ? sum : Vec{};
      }
      d_log[t] += static_cast<float>(read + total(across));
    }
    for (int i = 0; i < rows; ++i) {
      if (chunk.writes) scale_row(d_keys + int64_t(i) * key_, d_keys + int64_t(i) * key_, to_end_[i], key_);
      for (int s = 0; s < chunk.reads; ++s) {
        float* row = d_start + int64_t(s * rows + i) * key_;
        scale_row(row, row, from_start_[i], key_);
      }
      for (int s = 0; s < chunk.paired(); ++s) {
        float* pair = d_pairs[s] + i * kMaxChunk;
        for (int j = 0; j <= i; j += kLanes) store(pair + j, load(pair + j) * load(weights_ + i * kMaxChunk + j));
      }
    }
  }

  void prepare_channel(Chunk& chunk, const float* log, int first, int pairs_end) {
    const int rows = chunk.rows, blocks = rows / kBlock;
    const float* k = chunk.k(key_);
    for (int64_t n = 0; n < int64_t(rows) * key_; n += kLanes) store(decay_ + n, exp_of(load(log + n)));
    for (int c = 0; c < key_; c += kLanes) {
      for (int block = 0; block < blocks; ++block) {
        Vec product = filled(1.0f);
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i) {
          product *= load(decay_ + int64_t(i) * key_ + c);
          store(in_start_ + int64_t(i) * key_ + c, product);
        }
        store(whole_ + int64_t(block) * key_ + c, product);
        product = filled(1.0f);
        for (int i = (block + 1) * kBlock - 1; i >= block * kBlock; --i) {
          store(in_end_ + int64_t(i) * key_ + c, product);
          product *= load(decay_ + int64_t(i) * key_ + c);
        }
      }
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t at = int64_t(i) * key_;
      if (chunk.writes) multiply_row(near_keys_ + at, k + at, in_end_ + at, key_);
      for (int s = first; s < chunk.reads; ++s)
        multiply_row(near_reads_ + int64_t(s) * rows * key_ + at, chunk.x + int64_t(s) * rows * key_ + at, in_start_ + at,
                     key_);
    }
    chunk.start = start_;
    chunk.keys = keys_;
    for (int c = 0; c < key_; c += kLanes) {
      Vec product = filled(1.0f);
      for (int block = 0; block < blocks; ++block) {
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i)
          for (int s = first; s < chunk.reads; ++s) {
            const int64_t at = int64_t(s * rows + i) * key_ + c;
            store(start_ + at, load(near_reads_ + at) * product);
          }
        product *= load(whole_ + int64_t(block) * key_ + c);
      }
      store(factor_ + c, product);
      product = filled(1.0f);
      for (int block = blocks - 1; block >= 0 && chunk.writes; --block) {
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i) {
          const int64_t at = int64_t(i) * key_ + c;
          store(keys_ + at, load(near_keys_ + at) * product);
        }
        product *= load(whole_ + int64_t(block) * key_ + c);
      }
    }
    // Keys of earlier blocks, transposed, decayed up to the start of the block that reads them.
    for (int block = 0; block < blocks && first < pairs_end; ++block) {
      const int from = block * kBlock;
      for (int s = first; s < pairs_end; ++s)
        if (block)
          multiply(kBlock, from, key_, 1, near_reads_ + int64_t(s * rows + from) * key_, key_, transposed_, kMaxChunk, 0,
                   chunk.pairs[s] + from * kMaxChunk, kMaxChunk);
      diagonal_pairs(chunk, block, first, pairs_end);
      if (block + 1 == blocks) break;
      for (int c = 0; c < key_ && block; ++c)
        scale_row(transposed_ + int64_t(c) * kMaxChunk, transposed_ + int64_t(c) * kMaxChunk,
                  whole_[int64_t(block) * key_ + c], from);
      transpose(kBlock, key_, near_keys_ + int64_t(from) * key_, key_, transposed_ + from, kMaxChunk);
    }
  }

  void diagonal_pairs(Chunk& chunk, int block, int first, int pairs_end) {
    const int rows = chunk.rows, from = block * kBlock, to = from + kBlock;
    const float* k = chunk.k(key_);
    if (first == 0)
      for (int j = from; j < to; ++j)
        chunk.pairs[0][j * kMaxChunk + j] = dot(chunk.x + int64_t(j) * key_, k + int64_t(j) * key_, key_);
    for (int j = from; j < to; ++j) {
      const float* running = k + int64_t(j) * key_;
      for (int i = j + 1; i < to; ++i) {
        Vec sum[2] = {};
        const float* decay = decay_ + int64_t(i) * key_;
        const float* read[2] = {chunk.x + int64_t(i) * key_, chunk.x + int64_t(rows + i) * key_};
        for (int c = 0; c < key_; c += kLanes) {
          const Vec left = load(running + c) * load(decay + c);
          store(product_ + c, left);
          for (int s = first; s < pairs_end; ++s) sum[s] += left * load(read[s] + c);
        }
        running = product_;
        for (int s = first; s < pairs_end; ++s) chunk.pairs[s][i * kMaxChunk + j] = total(sum[s]);
      }
    }
  }

  void channel_gradients(const Chunk& chunk, float* d_start, float* d_keys, float* const d_pairs[2],
                                       const float* state, const float* d_state, int width, float* d_log) {
    const int rows = chunk.rows, blocks = rows / kBlock;
    const float* k = chunk.k(key_);
    // What the keys before a token give the outgoing state, and what is left of the incoming one.
    for (int c = 0; c < key_; ++c)
      product_[c] = factor_[c] * dot(state + int64_t(c) * width, d_state + int64_t(c) * width, width);
    for (int t = 0; t < rows; ++t)
      for (int c = 0; c < key_; c += kLanes) {
        const int64_t at = int64_t(t) * key_ + c;
        const Vec before = load(product_ + c);
        store(d_log + at, before);
        if (chunk.writes) store(product_ + c, before + load(chunk.keys + at) * load(d_keys + at));
      }
    // Reads and keys relative to their own blocks' boundaries: d_start and work_ take their gradients from other blocks.
    for (int c = 0; c < key_; c += kLanes) {
      Vec before = filled(1.0f), after = filled(1.0f);
      for (int block = 0; block < blocks; ++block) {
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i)
          for (int s = 0; s < chunk.reads; ++s) {
            float* p = d_start + int64_t(s * rows + i) * key_ + c;
            store(p, load(p) * before);
          }
        before *= load(whole_ + int64_t(block) * key_ + c);
      }
      for (int block = blocks - 1; block >= 0 && chunk.writes; --block) {
        for (int i = block * kBlock; i < (block + 1) * kBlock; ++i) {
          float* p = d_keys + int64_t(i) * key_ + c;
          store(p, load(p) * after * load(in_end_ + int64_t(i) * key_ + c));
        }
        after *= load(whole_ + int64_t(block) * key_ + c);
      }
    }
    if (chunk.paired()) {
      for (int64_t n = 0; n < int64_t(rows) * key_; n += kLanes) store(work_ + n, Vec{});
      other_blocks(chunk, d_pairs, d_start);
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t at = int64_t(i) * key_;
      if (chunk.paired()) multiply_row(work_ + at, work_ + at, in_end_ + at, key_);
      for (int s = 0; s < chunk.reads; ++s)
        multiply_row(d_start + int64_t(s) * rows * key_ + at, d_start + int64_t(s) * rows * key_ + at, in_start_ + at, key_);
    }
    for (int block = 0; block < blocks && chunk.paired(); ++block)
      diagonal_gradients(chunk, block, d_pairs, d_start, work_);
    // The gradient of b, and its sum from each token on.
    for (int c = 0; c < key_ && chunk.reads; c += kLanes) {
      Vec sum = {};
      for (int t = rows - 1; t >= 0; --t) {
        const int64_t at = int64_t(t) * key_ + c;
        if (chunk.writes) sum -= load(k + at) * load(work_ + at);
        for (int s = 0; s < chunk.reads; ++s) {
          const int64_t read = int64_t(s) * rows * key_ + at;
          sum += load(chunk.x + read) * load(d_start + read);
        }
        store(d_log + at, load(d_log + at) + sum);
      }
    }
    // A token's product with its own key holds no decay and comes last.
    for (int i = 0; i < rows && chunk.paired(); ++i) {
      const Vec own = filled(d_pairs[0][i * kMaxChunk + i]);
      for (int c = 0; c < key_; c += kLanes) {
        const int64_t at = int64_t(i) * key_ + c;
        store(d_keys + at, load(d_keys + at) + load(work_ + at) + own * load(chunk.x + at));
        store(d_start + at, load(d_start + at) + own * load(k + at));
      }
    }
  }

  // What pairs of tokens of different blocks give reads, in d_start, and keys, in work_, each up to its block's boundary.
  void other_blocks(const Chunk& chunk, float* const d_pairs[2], float* d_start) {
    const int rows = chunk.rows, blocks = rows / kBlock;
    for (int block = 1; block < blocks; ++block) {
      const int from = block * kBlock;
      std::memcpy(far_ + int64_t(from - kBlock) * key_, near_keys_ + int64_t(from - kBlock) * key_,
                  sizeof(float) * kBlock * key_);
      for (int i = 0; i < from - kBlock; ++i)
        multiply_row(far_ + int64_t(i) * key_, far_ + int64_t(i) * key_, whole_ + int64_t(block - 1) * key_, key_);
      for (int s = 0; s < chunk.reads; ++s)
        multiply(kBlock, key_, from, 1, d_pairs[s] + from * kMaxChunk, kMaxChunk, far_, key_, 1,
                 d_start + int64_t(s * rows + from) * key_, key_);
    }
    for (int block = blocks - 1; block >= 1; --block) {
      const int from = block * kBlock;
      for (int i = 0; i < from && block + 1 < blocks; ++i)
        multiply_row(work_ + int64_t(i) * key_, work_ + int64_t(i) * key_, whole_ + int64_t(block) * key_, key_);
      for (int s = 0; s < chunk.reads; ++s)
        multiply<kTransposed>(from, key_, kBlock, 1, d_pairs[s] + from * kMaxChunk, kMaxChunk,
                              near_reads_ + int64_t(s * rows + from) * key_, key_, 1, work_, key_);
    }
  }

  // Adds what pairs inside a block give their reads and keys, without products of a token with itself.
  void diagonal_gradients(const Chunk& chunk, int block, float* const d_pairs[2], float* d_reads, float* d_k) {
    const int rows = chunk.rows, from = block * kBlock, to = from + kBlock;
    const float* k = chunk.k(key_);
    for (int j = from; j < to; ++j) {
      const float* running = k + int64_t(j) * key_;
      for (int i = j + 1; i < to; ++i) {
        const float* decay = decay_ + int64_t(i) * key_;
        for (int s = 0; s < chunk.reads; ++s) {
          const float weight = d_pairs[s][i * kMaxChunk + j];
          float* d_read = d_reads + int64_t(s * rows + i) * key_;
          for (int c = 0; c < key_; c += kLanes) {
            const Vec left = s ? load(product_ + c) : load(running + c) * load(decay + c);
            if (!s) store(product_ + c, left);
            store(d_read + c, load(d_read + c) + weight * left);
          }
        }
        running = product_;
      }
      for (int c = 0; c < key_; c += kLanes) {
        Vec back = {};
        for (int i = to - 1; i > j; --i) {
          for (int s = 0; s < chunk.reads; ++s)
            back += d_pairs[s][i * kMaxChunk + j] * load(chunk.x + int64_t(s * rows + i) * key_ + c);
          back *= load(decay_ + int64_t(i) * key_ + c);
        }
        float* p = d_k + int64_t(j) * key_ + c;
        store(p, load(p) + back);
      }
    }
  }

  DecayKind kind_;
  int key_;
  int last_ = 0;
  float* transposed_;             // [key, kMaxChunk]: keys
  float *start_, *keys_;          // what a Chunk points to
  float* weights_ = nullptr;      // [kMaxChunk, kMaxChunk]: e^{b_i - b_j}
  float from_start_[kMaxChunk];   // e^{b_i}; ones where the decay is not scalar
  float to_end_[kMaxChunk];       // e^{b_C - b_i}
  // Per channel, [kMaxChunk, key]: decays; their products from a block's start to a token and from it to the block's
  // end; reads and keys times these.
  float *decay_ = nullptr, *in_start_ = nullptr, *in_end_ = nullptr, *near_reads_ = nullptr, *near_keys_ = nullptr;
  float *work_ = nullptr, *far_ = nullptr;
  float *factor_ = nullptr, *product_ = nullptr;                      // [key]
  float* whole_ = nullptr;                                            // [blocks, key]: products over whole blocks
};

}  // namespace seqtrain
