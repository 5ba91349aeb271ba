// Linear attention and the delta rule, forward and backward: one pass over the chunks of each document and head.
//
// The algebra and the letters are those of delta_rule/chunked.py, and n is v itself in linear attention. Everything of a
// chunk stays in cache.
//
// The forward pass keeps the state before every `every` chunks; the backward pass recomputes the chunks between two of
// these, then goes through them from the last to the first. Without queries there are no outputs, only the state; without
// keys the state only decays, and what is read in it is added to v. Tasks are documents x heads x blocks of value columns,
// which share nothing; each block has its own part of the gradients of q, k, beta and log_decay, summed by the caller.
#include <algorithm>
#include <cmath>

#include <pthread.h>

#include "arrays.h"
#include "decay.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in recurrence.py.
struct Call {
  Array q, k, v, beta, log_decay, out, d_out, d_q, d_k, d_v, d_beta, d_log;
  float *state, *final_state, *checkpoints, *d_final, *d_state;
  const int64_t* boundaries;
  int64_t documents, tokens, heads, key, value, chunk, every, value_blocks, threads;
  DecayKind decay;
  double scale;
};

// Rows `from` to `from + kBlock` of x, VECS vectors of columns of them, and of beta x: side by side, so that no sum waits
// for another. In E, given the rows before; in the transposed solve, given the rows after.
template <Side SIDE, int VECS>
static void solve_rows(int from, int width, const float* pairs, const float* beta, float* x, float* solved) {
  for (int n = 0; n < kBlock; ++n) {
    const int i = SIDE == kTransposed ? from + kBlock - 1 - n : from + n;
    const int first = SIDE == kTransposed ? i + 1 : from;
    Vec sum[VECS];
    float* row = x + int64_t(i) * width;
    for (int v = 0; v < VECS; ++v) sum[v] = load(row + v * kLanes);
    for (int j = first; j < first + n; ++j) {
      const float pair = SIDE == kTransposed ? pairs[j * kMaxChunk + i] : pairs[i * kMaxChunk + j];
      for (int v = 0; v < VECS; ++v) sum[v] -= pair * load(solved + int64_t(j) * width + v * kLanes);
    }
    for (int v = 0; v < VECS; ++v) {
      store(row + v * kLanes, sum[v]);
      store(solved + int64_t(i) * width + v * kLanes, beta[i] * sum[v]);
    }
  }
}

// x from its right side in place, and beta x, [rows, width] each: x + pairs (beta x) = right, `pairs` strictly lower or
// transposed. E and n = beta E in the first case; in the second what reaches v through them.
template <Side SIDE>
static void solve(int rows, int width, const float* pairs, const float* beta, float* x, float* solved) {
  for (int n = 0; n < rows; n += kBlock) {
    const int from = SIDE == kTransposed ? rows - kBlock - n : n, to = from + kBlock;
    float* block = x + int64_t(from) * width;
    if (n && SIDE == kTransposed)
      multiply<kTransposed>(kBlock, width, n, -1, pairs + to * kMaxChunk + from, kMaxChunk, solved + int64_t(to) * width,
                            width, 1, block, width);
    else if (n)
      multiply(kBlock, width, n, -1, pairs + from * kMaxChunk, kMaxChunk, solved, width, 1, block, width);
    by_columns(width, [&](auto vectors, int c) {
      solve_rows<SIDE, vectors>(from, width, pairs, beta, x + c, solved + c);
    });
  }
}

// One thread's buffers, and what it does with a task.
class Worker : InDocument {
 public:
  Worker(const Call& call, bool backward)
      : call_(call),
        delta_(call.beta.kind != Kind::kAbsent),
        reads_(call.q.kind != Kind::kAbsent),
        writes_(call.k.kind != Kind::kAbsent),
        key_(padded(call.key)),
        width_(padded((call.value + call.value_blocks - 1) / call.value_blocks)),
        decay_(call.decay, key_, arena_) {
    const int64_t rows = kMaxChunk, state = int64_t(key_) * width_;
    x_ = arena_.take(2 * rows * key_);
    log_ = arena_.take(rows * (call.decay == DecayKind::kChannel ? key_ : 1));
    beta_ = arena_.take(rows);
    factor_ = arena_.take(key_);
    for (float** buffer : {&v_, &written_}) *buffer = arena_.take(rows * width_);
    read_ = arena_.take(2 * rows * width_);
    state_ = arena_.take(state);
    for (float*& pairs : pairs_) pairs = arena_.take(rows * kMaxChunk);
    if (!backward) return;
    for (float** buffer : {&d_state_, &state_t_, &d_state_t_}) *buffer = arena_.take(state);
    for (float*& pairs : d_pairs_) pairs = arena_.take(rows * kMaxChunk);
    d_written_ = arena_.take(rows * width_);
    written_t_ = arena_.take(int64_t(width_) * kMaxChunk);
    d_start_ = arena_.take(2 * rows * key_);
    d_keys_ = arena_.take(rows * key_);
    d_log_ = arena_.take(rows * (call.decay == DecayKind::kChannel ? key_ : 1));
    states_ = arena_.take(call.every * state);
    if (delta_) {
      errors_ = arena_.take(call.every * rows * width_);
      key_pairs_ = arena_.take(call.every * rows * kMaxChunk);
    }
  }

  void forward(const Task& task) {
    begin(task);
    if (length_ == 1 && !call_.checkpoints && reads_ && writes_) return step();
    copy_state(call_.state, task.document, state_);
    for (int64_t n = 0; n < chunks_; ++n) {
      if (call_.checkpoints && n % call_.every == 0) put_state(state_, call_.checkpoints, checkpoint(n, call_.every));
      Chunk chunk = take(n);
      decay_.prepare(chunk, log_, 0, chunk.paired());
      if (reads_) multiply(chunk.reads * chunk.rows, width_, key_, 1, chunk.start, key_, state_, width_, 0, read_, width_);
      const float* written = write(n, chunk, v_);
      float* out = v_;
      if (chunk.paired()) {
        out = read_ + int64_t(chunk.rows) * width_;  // what `write` needed of it is used
        multiply_lower(chunk.rows, width_, chunk.pairs[0], kMaxChunk, written, width_, 0, out, width_);
      }
      add_to_state(chunk, written, state_);
      for (int i = 0; i < tokens(n) && reads_; ++i) {
        add_row(out + int64_t(i) * width_, read_ + int64_t(i) * width_, chunk.left[i], width_);
        put_value(n, i, out, call_.out, 1);
      }
    }
    put_state(state_, call_.final_state, task.document);
  }

  void backward(const Task& task) {
    begin(task);
    copy_state(call_.d_final, task.document, d_state_);
    const int64_t groups = (chunks_ + call_.every - 1) / call_.every;
    for (int64_t group = groups - 1; group >= 0; --group) {
      const int64_t first = group * call_.every, end = std::min(chunks_, first + call_.every);
      if (reads_ || call_.decay != DecayKind::kNone) recompute(first, end);
      for (int64_t n = end - 1; n >= first; --n) chunk_gradients(n, n - first);
    }
    put_state(d_state_, call_.d_state, task.document);
  }

 private:
  // A document of one token, as in decoding: two passes over the state, without a chunk's padding and products.
  void step() {
    const int key = static_cast<int>(call_.key);
    take(0);
    take_values(0, call_.v, 1, v_);
    const float *q = x_, *k = x_ + int64_t(padded(1)) * key_;
    const float* before = state_of(call_.state, document_);
    float *after = state_of(call_.final_state, document_), *found = read_;
    std::memset(found, 0, sizeof(float) * 2 * width_);
    float* out = found + width_;
    for (int c = 0; c < key; ++c) {
      const float* log = call_.decay == DecayKind::kNone ? nullptr : log_ + (call_.decay == DecayKind::kChannel ? c : 0);
      factor_[c] = log ? std::exp(*log) : 1;
      if (delta_) add_row(found, before + c * call_.value, k[c] * factor_[c], columns_);
    }
    for (int w = 0; w < columns_; ++w) v_[w] = delta_ ? beta_[0] * (v_[w] - found[w]) : v_[w];
    for (int c = 0; c < key; ++c) {
      float* row = after + c * call_.value;
      for (int w = 0; w < columns_; ++w) row[w] = factor_[c] * before[c * call_.value + w] + k[c] * v_[w];
      add_row(out, row, q[c], columns_);
    }
    put_values(0, out, call_.out, 1);
  }

  void begin(const Task& task) {
    value_block_ = task.part % call_.value_blocks;
    enter(call_, task.document, task.part / call_.value_blocks, call_.chunk);
    first_column_ = value_block_ * width_;
    columns_ = static_cast<int>(std::min<int64_t>(width_, call_.value - first_column_));
  }

  float* state_of(float* states, int64_t index) const {
    return states + (index * call_.heads + head_) * call_.key * call_.value + first_column_;
  }

  void copy_state(float* states, int64_t index, float* to) const {
    const float* from = state_of(states, index);
    std::memset(to, 0, sizeof(float) * key_ * width_);
    for (int64_t c = 0; c < call_.key; ++c) std::memcpy(to + c * width_, from + c * call_.value, sizeof(float) * columns_);
  }

  void put_state(const float* state, float* states, int64_t index) const {
    float* to = state_of(states, index);
    for (int64_t c = 0; c < call_.key; ++c) std::memcpy(to + c * call_.value, state + c * width_, sizeof(float) * columns_);
  }

  // Rows [padded(tokens), padded width] of chunk n, with zeros for padding.
  void take_rows(int64_t n, const Array& from, int64_t column, int columns, int to_width, float factor, float* to) const {
    const int count = tokens(n), rows = static_cast<int>(padded(count));
    for (int i = 0; i < count; ++i) {
      float* row = to + int64_t(i) * to_width;
      widen(from, (start_ + n * chunk_ + i) * from.token + head_ * from.head + column, columns, factor, row);
      if (columns < to_width) std::memset(row + columns, 0, sizeof(float) * (to_width - columns));
    }
    std::memset(to + int64_t(count) * to_width, 0, sizeof(float) * (rows - count) * to_width);
  }

  void take_values(int64_t n, const Array& from, float factor, float* to) const {
    take_rows(n, from, first_column_, columns_, width_, factor, to);
  }

  void put_value(int64_t n, int i, const float* rows, const Array& to, float factor) const {
    put_row(rows + int64_t(i) * width_, columns_, factor, to, place(n, i) * call_.value + first_column_);
  }

  void put_values(int64_t n, const float* rows, const Array& to, float factor) const {
    for (int i = 0; i < tokens(n); ++i) put_value(n, i, rows, to, factor);
  }

  // Rows of a gradient that this task's block of columns only has a part of.
  void put_part(int64_t n, const float* rows, int64_t width, int row_width, const Array& to, float factor) const {
    const int64_t block = value_block_ * call_.tokens * call_.heads;
    for (int i = 0; i < tokens(n); ++i)
      put_row(rows + int64_t(i) * row_width, static_cast<int>(width), factor, to, (block + place(n, i)) * width);
  }

  Chunk take(int64_t n) {
    const int rows = static_cast<int>(padded(tokens(n))), reads = delta_ ? 2 : reads_;
    Chunk chunk{rows, reads, writes_, x_, nullptr, nullptr, nullptr, {pairs_[0], pairs_[1]}};
    const int key = static_cast<int>(call_.key);
    if (reads_) take_rows(n, call_.q, 0, key, key_, static_cast<float>(call_.scale), x_);
    if (writes_) take_rows(n, call_.k, 0, key, key_, 1, x_ + int64_t(rows) * key_);
    if (delta_) take_rows(n, call_.beta, 0, 1, 1, 1, beta_);
    if (call_.decay == DecayKind::kScalar) take_rows(n, call_.log_decay, 0, 1, 1, 1, log_);
    if (call_.decay == DecayKind::kChannel) take_rows(n, call_.log_decay, 0, key, key_, 1, log_);
    return chunk;
  }

  // The values really written in chunk n, given what reads found in the incoming state; `values` takes v, or E in the
  // delta rule.
  const float* write(int64_t n, const Chunk& chunk, float* values) {
    take_values(n, call_.v, 1, values);
    if (!delta_) return values;
    const float* found = read_ + int64_t(chunk.rows) * width_;
    for (int i = 0; i < chunk.rows; ++i)
      add_row(values + int64_t(i) * width_, found + int64_t(i) * width_, -chunk.left[i], width_);
    solve<kPlain>(chunk.rows, width_, chunk.pairs[1], beta_, values, written_);
    return written_;
  }

  void add_to_state(const Chunk& chunk, const float* written, float* state) const {
    writes_ ? decay_.step(state, width_, chunk.rows, chunk.keys, written) : decay_.decay_state(state, width_);
  }

  // States, errors and pairs of keys of the chunks from `first` to `end`.
  void recompute(int64_t first, int64_t end) {
    const int64_t state = int64_t(key_) * width_;
    copy_state(call_.checkpoints, checkpoint(first, call_.every), states_);
    for (int64_t n = first; n < end; ++n) {
      const int64_t at = n - first;
      const bool last = n + 1 == end;
      if (last && !delta_) break;
      Chunk chunk = take(n);
      float* values = delta_ ? errors_ + at * kMaxChunk * width_ : v_;
      if (delta_) chunk.pairs[1] = key_pairs_ + at * kMaxChunk * kMaxChunk;
      decay_.prepare(chunk, log_, 1, chunk.reads);
      const int64_t keys = int64_t(chunk.rows) * key_, found = int64_t(chunk.rows) * width_;
      if (delta_)
        multiply(chunk.rows, width_, key_, 1, chunk.start + keys, key_, states_ + at * state, width_, 0, read_ + found, width_);
      const float* written = write(n, chunk, values);
      if (last) break;
      std::memcpy(states_ + (at + 1) * state, states_ + at * state, sizeof(float) * state);
      add_to_state(chunk, written, states_ + (at + 1) * state);
    }
  }

  // Gradients of chunk n's inputs; d_state_ goes from the chunk's end to its start.
  void chunk_gradients(int64_t n, int64_t at) {
    Chunk chunk = take(n);
    const int rows = chunk.rows, both = chunk.reads * rows;
    if (delta_) chunk.pairs[1] = key_pairs_ + at * kMaxChunk * kMaxChunk;
    decay_.prepare(chunk, log_, 0, std::min(chunk.paired(), 1));
    decay_.finish_start(chunk);
    const float* state = states_ + at * int64_t(key_) * width_;
    // d_read: gradients of what the reads find, [d_out; -solved].
    float *d_read = read_, *solved = read_ + int64_t(rows) * width_;
    if (reads_) take_values(n, call_.d_out, 1, d_read);
    if (chunk.paired())
      multiply_lower_transposed(rows, width_, chunk.pairs[0], kMaxChunk, d_read, width_, 0, d_written_, width_);
    if (writes_)
      multiply(rows, width_, key_, 1, chunk.keys, key_, d_state_, width_, chunk.paired() > 0, d_written_, width_);
    float* written = v_;
    if (delta_) {
      const float* errors = errors_ + at * kMaxChunk * width_;
      for (int i = 0; i < rows; ++i) scale_row(written + int64_t(i) * width_, errors + int64_t(i) * width_, beta_[i], width_);
      solve<kTransposed>(rows, width_, chunk.pairs[1], beta_, d_written_, solved);
      put_values(n, solved, call_.d_v, 1);
      for (int i = 0; i < rows; ++i)
        beta_[i] = dot(d_written_ + int64_t(i) * width_, errors + int64_t(i) * width_, width_);
      put_part(n, beta_, 1, 1, call_.d_beta, 1);
      scale_row(solved, solved, -1, rows * width_);
    } else if (writes_) {
      take_values(n, call_.v, 1, written);
      put_values(n, d_written_, call_.d_v, 1);
    }
    if (reads_) {
      transpose(key_, width_, state, width_, state_t_, key_);
      multiply(both, key_, width_, 1, d_read, width_, state_t_, key_, 0, d_start_, key_);
    }
    if (writes_) {
      transpose(key_, width_, d_state_, width_, d_state_t_, key_);
      multiply(rows, key_, width_, 1, written, width_, d_state_t_, key_, 0, d_keys_, key_);
    }
    if (chunk.paired()) transpose(rows, width_, written, width_, written_t_, kMaxChunk);
    for (int s = 0; s < chunk.paired(); ++s)
      multiply_to_lower(rows, width_, d_read + int64_t(s) * rows * width_, width_, written_t_, kMaxChunk, d_pairs_[s], kMaxChunk);
    decay_.gradients(chunk, d_start_, d_keys_, d_pairs_, state, d_state_, width_, d_log_);
    reads_ ? decay_.step(d_state_, width_, both, chunk.start, d_read) : decay_.decay_state(d_state_, width_);
    const int key = static_cast<int>(call_.key);
    if (reads_) put_part(n, d_start_, key, key_, call_.d_q, static_cast<float>(call_.scale));
    if (delta_)
      for (int64_t m = 0; m < int64_t(rows) * key_; m += kLanes)
        store(d_keys_ + m, load(d_keys_ + m) + load(d_start_ + int64_t(rows) * key_ + m));
    if (writes_) put_part(n, d_keys_, key, key_, call_.d_k, 1);
    if (call_.decay == DecayKind::kScalar) put_part(n, d_log_, 1, 1, call_.d_log, 1);
    if (call_.decay == DecayKind::kChannel) put_part(n, d_log_, key, key_, call_.d_log, 1);
  }

  const Call& call_;
  const bool delta_, reads_, writes_;
  const int key_, width_;  // padded widths: of keys, and of a block of value columns
  Arena arena_;
  Decay decay_;
  int64_t value_block_ = 0, first_column_ = 0;
  int columns_ = 0;
  float *x_, *log_, *beta_, *factor_, *v_, *written_, *read_, *state_;
  float* pairs_[2];
  float *d_state_ = nullptr, *state_t_ = nullptr, *d_state_t_ = nullptr, *d_written_ = nullptr, *written_t_ = nullptr;
  float *d_start_ = nullptr, *d_keys_ = nullptr, *d_log_ = nullptr;
  float* d_pairs_[2] = {nullptr, nullptr};
  // Of the chunks between two checkpoints.
  float *states_ = nullptr, *errors_ = nullptr, *key_pairs_ = nullptr;
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_forward(const seqtrain::Call* call) {
  return seqtrain::run_tasks<seqtrain::Worker>(*call, call->heads * call->value_blocks, false);
}
int seqtrain_backward(const seqtrain::Call* call) {
  return seqtrain::run_tasks<seqtrain::Worker>(*call, call->heads * call->value_blocks, true);
}

// The size of Call, by which the caller checks its own picture of it.
int64_t seqtrain_call_size() { return sizeof(seqtrain::Call); }

__attribute__((constructor)) static void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { seqtrain::forked = true; });
}
}
