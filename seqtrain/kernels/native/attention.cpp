// Causal softmax attention, forward and backward, a block of queries and a block of keys at a time (Dao et al. 2022,
// arXiv 2205.14135): scores stay in cache, and blocks that are masked throughout are never looked at.
//
// Every operand of a product is packed: keys and values of a block are used by all queries, a copy costs under 1% of
// that. A query's place among its document's keys is its number and how many more keys than queries there are.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "parallel.h"

namespace seqtrain {

// Mirrored field by field in softmax_attention/native.py.
struct AttentionCall {
  Array q, k, v, out, d_out, d_q, d_k, d_v;
  float* sums;                // [tokens, heads]: logarithms of sums of exponentials
  const int64_t* boundaries;  // of the documents' queries, [documents + 1]
  const int64_t* keys;        // first and last + 1 of each document's keys, [documents, 2]
  // parts: of a group's queries, each a task; in the backward pass, of a group's heads. window: 0 for none.
  int64_t documents, tokens, key_tokens, heads, groups, key, value, window, parts, threads;
  double scale, cap;
};

constexpr int kQueries = 96;  // sixteen tiles of six rows
constexpr int kKeys = 128;    // of which a block's values take 32 KB, V = 64: they stay in the first-level cache
constexpr int kPanel = 64;    // keys whose numbers lie side by side, transposed: the columns of a tile
constexpr float kHidden = -1e30f;

class AttentionWorker {
 public:
  AttentionWorker(const AttentionCall& call, bool backward)
      : call_(call),
        share_(call.heads / call.groups),
        key_(static_cast<int>(padded(call.key))),
        value_(static_cast<int>(padded(call.value))),
        cap_(static_cast<float>(call.cap)) {
    queries_ = arena_.take(kQueries * key_);
    scores_ = arena_.take(kQueries * kKeys);
    if (!backward) {
      out_ = arena_.take(kQueries * value_);
      return;
    }
    keys_ = arena_.take(kKeys * key_);
    keys_t_ = arena_.take(kKeys * key_);
    values_t_ = arena_.take(kKeys * value_);
    d_out_ = arena_.take(kQueries * value_);
    d_scores_ = arena_.take(kQueries * kKeys);
    d_queries_ = arena_.take(kQueries * key_);
    d_keys_ = arena_.take(kKeys * key_);
    values_ = arena_.take(kKeys * value_);
    d_values_ = arena_.take(kKeys * value_);
  }

  void forward(const Task& task) {
    enter(task.document);
    const int64_t group = task.part / call_.parts, part = task.part % call_.parts;
    const int64_t blocks = (queries_count_ + kQueries - 1) / kQueries;
    if (part >= blocks) return;
    // All keys of the document: its blocks of queries go over them one after the other.
    const int64_t rows = (keys_count_ + kKeys - 1) / kKeys * kKeys;
    if (rows > room_) {
      room_ = rows;
      packed_ = Arena();
      keys_t_ = packed_.take(rows * key_);
      values_ = packed_.take(rows * value_);
    }
    const int64_t last = (blocks - 1 - part) / call_.parts * call_.parts + part;
    const int64_t first = first_key(part * kQueries) / kKeys * kKeys;
    const int64_t end = std::min(keys_count_, offset_ + (last + 1) * kQueries);
    for (int64_t j = first; j < end; j += kKeys) {
      take_keys(call_.k, j, group, call_.key, key_, queries_by_key(j), nullptr);
      take_rows(call_.v, key_place(j), key_rows(j), kKeys, group, call_.value, value_, 1, values_ + j * value_);
    }
    for (int64_t block = part; block < blocks; block += call_.parts)
      for (int64_t h = 0; h < share_; ++h) query_block(block * kQueries, group * share_ + h);
  }

  void backward(const Task& task) {
    enter(task.document);
    const int64_t group = task.part / call_.parts, part = task.part % call_.parts, heads = share_ / call_.parts;
    const int64_t first = group * share_ + part * heads;
    find_deltas(first, heads);
    for (int64_t j = 0; j < keys_count_; j += kKeys) key_block(j, group, part, first, heads);
  }

 private:
  void enter(int64_t document) {
    start_ = call_.boundaries[document];
    queries_count_ = call_.boundaries[document + 1] - start_;
    key_start_ = call_.keys[2 * document];
    keys_count_ = call_.keys[2 * document + 1] - key_start_;
    offset_ = keys_count_ - queries_count_;
  }

  // The first key that query i sees, and the one behind the last.
  int64_t first_key(int64_t i) const { return call_.window ? std::max<int64_t>(0, offset_ + i + 1 - call_.window) : 0; }
  int64_t end_key(int64_t i) const { return offset_ + i + 1; }

  int64_t key_place(int64_t j) const { return key_start_ + j; }
  int key_rows(int64_t j) const { return static_cast<int>(std::min<int64_t>(kKeys, keys_count_ - j)); }
  int query_rows(int64_t i) const { return static_cast<int>(std::min<int64_t>(kQueries, queries_count_ - i)); }
  float* queries_by_key(int64_t j) const { return keys_t_ + j * key_; }
  float& sum_of(int64_t i, int64_t head) const { return call_.sums[(start_ + i) * call_.heads + head]; }

  // `count` rows of a head from token `place` on, zeros up to `rows` and in what pads their width.
  static void take_rows(const Array& from, int64_t place, int count, int rows, int64_t head, int64_t size, int width,
                        float factor, float* to) {
    for (int i = 0; i < count; ++i) {
      float* row = to + int64_t(i) * width;
      widen(from, (place + i) * from.token + head * from.head, static_cast<int>(size), factor, row);
      std::fill(row + size, row + width, 0.0f);
    }
    std::fill(to + int64_t(count) * width, to + int64_t(rows) * width, 0.0f);
  }

  // A block of keys or values as panels [width, kPanel] in `to`; their rows in `rows`, or nowhere.
  void take_keys(const Array& from, int64_t j, int64_t group, int64_t size, int width, float* to, float* rows) {
    if (!rows) {
      if (!block_) block_ = arena_.take(kKeys * width);
      rows = block_;
    }
    take_rows(from, key_place(j), key_rows(j), kKeys, group, size, width, 1, rows);
    for (int n = 0; n < kKeys; n += kPanel)
      transpose(kPanel, width, rows + n * width, width, to + n * width, kPanel);
  }

  // scores [rows, columns] = x y^T, y in panels.
  static void products(int rows, int columns, int width, const float* x, const float* panels, float* scores) {
    for (int n = 0; n < columns; n += kPanel)
      multiply(rows, std::min(kPanel, columns - n), width, 1, x, width, panels + n * width, kPanel, 0, scores + n, kKeys);
  }

  Vec capped(Vec x) const {
    const IntVec negative = x < Vec{};
    const Vec t = exp_of((negative ? x : -x) * (2 / cap_)), size = cap_ * (1 - t) / (1 + t);
    return negative ? -size : size;
  }

  // Columns of the block from key j on that query i sees.
  struct Seen {
    int first, end;
  };
  Seen seen(int64_t i, int64_t j, int columns) const {
    const auto within = [&](int64_t key) { return static_cast<int>(std::clamp<int64_t>(key - j, 0, columns)); };
    return {within(first_key(i)), within(end_key(i))};
  }

  // Caps a row's scores, and hides what is not seen.
  void finish_scores(float* row, int columns, Seen seen) const {
    for (int c = 0; c < columns && cap_ > 0; c += kLanes) store(row + c, capped(load(row + c)));
    std::fill(row, row + seen.first, kHidden);
    std::fill(row + std::max(seen.first, seen.end), row + columns, kHidden);
  }

  void query_block(int64_t i, int64_t head) {
    const int count = query_rows(i), rows = static_cast<int>(padded(count));
    take_rows(call_.q, start_ + i, count, rows, head, call_.key, key_, static_cast<float>(call_.scale), queries_);
    std::fill(out_, out_ + int64_t(rows) * value_, 0.0f);
    std::fill(most_, most_ + rows, kHidden);
    std::fill(total_, total_ + rows, 0.0f);
    const int64_t end = end_key(i + count - 1);
    for (int64_t j = first_key(i) / kKeys * kKeys; j < end; j += kKeys) {
      const int columns = static_cast<int>(padded(std::min<int64_t>(kKeys, end - j)));
      products(rows, columns, key_, queries_, queries_by_key(j), scores_);
      const bool whole = cap_ == 0 && j >= first_key(i + count - 1) && j + columns <= end_key(i);
      for (int r = 0; r < count; ++r) {
        float* row = scores_ + r * kKeys;
        if (!whole) finish_scores(row, columns, seen(i + r, j, columns));
        exponentials(row, columns, r);
      }
      std::fill(scores_ + count * kKeys, scores_ + rows * kKeys, 0.0f);
      multiply(rows, value_, columns, 1, scores_, kKeys, values_ + j * value_, value_, 1, out_, value_);
    }
    for (int r = 0; r < count; ++r) {
      put_row(out_ + int64_t(r) * value_, static_cast<int>(call_.value), 1 / total_[r], call_.out,
              ((start_ + i + r) * call_.heads + head) * call_.value);
      sum_of(i + r, head) = most_[r] + std::log(total_[r]);
    }
  }

  // Puts e^(score - the largest so far) in the place of row r's scores; what it has of earlier keys follows.
  void exponentials(float* row, int columns, int r) {
    Vec most = load(row);
    for (int c = kLanes; c < columns; c += kLanes) {
      const Vec x = load(row + c);
      const IntVec above = x > most;
      most = above ? x : most;
    }
    float parts[kLanes];
    store(parts, most);
    const float largest = *std::max_element(parts, parts + kLanes);
    if (largest > most_[r]) {
      const float factor = std::exp(most_[r] - largest);
      most_[r] = largest;
      total_[r] *= factor;
      scale_row(out_ + int64_t(r) * value_, out_ + int64_t(r) * value_, factor, value_);
    }
    const float base = most_[r];
    Vec sums = {};
    for (int c = 0; c < columns; c += kLanes) {
      const Vec found = exp_of(load(row + c) - base);
      store(row + c, found);
      sums += found;
    }
    total_[r] += total(sums);
  }

  // Of each query and head the product of its output and its gradient.
  void find_deltas(int64_t first, int64_t heads) {
    deltas_.resize(queries_count_ * heads);
    const int size = static_cast<int>(call_.value);
    for (int64_t i = 0; i < queries_count_; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((start_ + i) * call_.heads + first + h) * call_.value;
        widen(call_.out, at, size, 1, values_);
        widen(call_.d_out, (start_ + i) * call_.d_out.token + (first + h) * call_.d_out.head, size, 1, d_values_);
        std::fill(values_ + size, values_ + value_, 0.0f);
        std::fill(d_values_ + size, d_values_ + value_, 0.0f);
        deltas_[i * heads + h] = dot(values_, d_values_, value_);
      }
  }

  // What the block of keys from j on gives all queries that see it, and gets from them.
  void key_block(int64_t j, int64_t group, int64_t part, int64_t first, int64_t heads) {
    const int count = key_rows(j), all = static_cast<int>(padded(count));
    take_keys(call_.k, j, group, call_.key, key_, keys_t_, keys_);
    take_keys(call_.v, j, group, call_.value, value_, values_t_, values_);
    std::fill(d_keys_, d_keys_ + kKeys * key_, 0.0f);
    std::fill(d_values_, d_values_ + kKeys * value_, 0.0f);
    // The first query that sees the first key, and the one behind the last that sees the last.
    const int64_t from = std::max<int64_t>(0, j - offset_) / kBlock * kBlock;
    const int64_t end =
        call_.window ? std::min(queries_count_, j + count - 1 - offset_ + call_.window) : queries_count_;
    for (int64_t i = from; i < end; i += kQueries)
      for (int64_t h = 0; h < heads; ++h) {
        const int queries = static_cast<int>(std::min<int64_t>(query_rows(i), end - i));
        const int columns = static_cast<int>(padded(std::min<int64_t>(count, end_key(i + queries - 1) - j)));
        pair(i, queries, j, std::min(all, columns), first + h, deltas_.data() + i * heads + h, heads);
      }
    for (int n = 0; n < count; ++n) {
      const int64_t row = (part * call_.key_tokens + key_place(j) + n) * call_.groups + group;
      put_row(d_keys_ + int64_t(n) * key_, static_cast<int>(call_.key), 1, call_.d_k, row * call_.key);
      put_row(d_values_ + int64_t(n) * value_, static_cast<int>(call_.value), 1, call_.d_v, row * call_.value);
    }
  }

  // `count` queries of a head from i on with the block of keys from j on.
  void pair(int64_t i, int count, int64_t j, int columns, int64_t head, const float* deltas, int64_t step) {
    const int rows = static_cast<int>(padded(count));
    const float scale = static_cast<float>(call_.scale);
    take_rows(call_.q, start_ + i, count, rows, head, call_.key, key_, scale, queries_);
    take_rows(call_.d_out, start_ + i, count, rows, head, call_.value, value_, 1, d_out_);
    products(rows, columns, key_, queries_, keys_t_, scores_);
    products(rows, columns, value_, d_out_, values_t_, d_scores_);
    const bool whole = cap_ == 0 && j >= first_key(i + count - 1) && j + columns <= end_key(i);
    for (int r = 0; r < count; ++r) {
      float *row = scores_ + r * kKeys, *d_row = d_scores_ + r * kKeys;
      if (!whole) finish_scores(row, columns, seen(i + r, j, columns));
      const float sum = sum_of(i + r, head), delta = deltas[r * step];
      for (int c = 0; c < columns; c += kLanes) {
        const Vec score = load(row + c), weight = exp_of(score - sum);
        Vec d_score = weight * (load(d_row + c) - delta);
        if (cap_ > 0) {
          const Vec part = score * (1 / cap_);
          const IntVec hidden = score == filled(kHidden);
          d_score = hidden ? Vec{} : d_score * (1 - part * part);
        }
        store(row + c, weight);
        store(d_row + c, d_score);
      }
    }
    std::fill(scores_ + count * kKeys, scores_ + rows * kKeys, 0.0f);
    std::fill(d_scores_ + count * kKeys, d_scores_ + rows * kKeys, 0.0f);
    multiply<kTransposed>(columns, value_, rows, 1, scores_, kKeys, d_out_, value_, 1, d_values_, value_);
    multiply<kTransposed>(columns, key_, rows, 1, d_scores_, kKeys, queries_, key_, 1, d_keys_, key_);
    multiply(rows, key_, columns, 1, d_scores_, kKeys, keys_, key_, 0, d_queries_, key_);
    float* d_q = static_cast<float*>(call_.d_q.data);
    for (int r = 0; r < count; ++r)
      add_row(d_q + ((start_ + i + r) * call_.heads + head) * call_.key, d_queries_ + int64_t(r) * key_, scale,
              static_cast<int>(call_.key));
  }

  const AttentionCall& call_;
  const int64_t share_;
  const int key_, value_;
  const float cap_;
  int64_t start_ = 0, queries_count_ = 0, key_start_ = 0, keys_count_ = 0, offset_ = 0, room_ = 0;
  Arena arena_, packed_;
  float *queries_, *scores_, *block_ = nullptr;
  // Forward, of all keys of the document; backward, of a block.
  float *keys_t_ = nullptr, *values_ = nullptr;
  float* out_ = nullptr;
  float most_[kQueries], total_[kQueries];
  float *keys_ = nullptr, *values_t_ = nullptr, *d_out_ = nullptr, *d_scores_ = nullptr, *d_queries_ = nullptr,
        *d_keys_ = nullptr, *d_values_ = nullptr;
  std::vector<float> deltas_;
};

}  // namespace seqtrain

extern "C" {

// Both return 0, or 1 where memory ran out.
int seqtrain_attention_forward(const seqtrain::AttentionCall* call) {
  return seqtrain::run_tasks<seqtrain::AttentionWorker>(*call, call->groups * call->parts, false);
}
int seqtrain_attention_backward(const seqtrain::AttentionCall* call) {
  return seqtrain::run_tasks<seqtrain::AttentionWorker>(*call, call->groups * call->parts, true);
}

int64_t seqtrain_attention_call_size() { return sizeof(seqtrain::AttentionCall); }
}
