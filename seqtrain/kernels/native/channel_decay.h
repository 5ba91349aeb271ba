// The per-channel half of `Decay`; included by decay.h.
#pragma once

namespace seqtrain {

inline void Decay::prepare_channel(Chunk& chunk, const float* log, int first, int pairs_end) {
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
      multiply_row(near_reads_ + int64_t(s) * rows * key_ + at, chunk.x + int64_t(s) * rows * key_ + at, in_start_ + at, key_);
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

inline void Decay::diagonal_pairs(Chunk& chunk, int block, int first, int pairs_end) {
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

inline void Decay::channel_gradients(const Chunk& chunk, float* d_start, float* d_keys, float* const d_pairs[2],
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

// What pairs of tokens of different blocks give the reads in d_start and, in work_, the keys, each up to its block's boundary.
inline void Decay::other_blocks(const Chunk& chunk, float* const d_pairs[2], float* d_start) {
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
inline void Decay::diagonal_gradients(const Chunk& chunk, int block, float* const d_pairs[2], float* d_reads, float* d_k) {
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

}  // namespace seqtrain
