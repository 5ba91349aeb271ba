// What a token does to a layer's state: recurrences, short convolutions, and attention to the keys that are kept.
//
// The state before and after may lie in one place.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "step_products.h"

namespace seqtrain {

// Offset of an operand at (row, head).
static inline int64_t at(const Operand& x, int64_t b, int64_t h) {
  return (b * x.strides[0] + h * x.strides[1]) * width_of(x.dtype);
}

// n numbers of an operand's last dimension at (row, head).
template <class T>
static const T* vector_of(const Frame& frame, const Operand& x, int64_t b, int64_t h, int n, std::vector<T>& buffer) {
  buffer.resize(n);
  return take(x, address(frame, x) + at(x, b, h), x.strides[2], n, buffer.data());
}

// The delta rule, or linear attention without a beta: out, q, k, v, beta, log_decay, read, erase, state, state after.
// sizes: B, H. ints: K, V, whether the decay has channels.
template <class T>
static void recurrence_step(const Instruction& in, const Operand* x, const Frame& frame) {
  const int key = static_cast<int>(in.ints[0]), value = static_cast<int>(in.ints[1]);
  const int64_t heads = in.sizes[1], tasks = in.sizes[0] * heads;
  // Few heads are cut into blocks of columns.
  const int pieces = tasks >= in.threads ? 1 : static_cast<int>(std::min<int64_t>(in.threads, (value + 15) / 16));
  const int width = ((value + pieces - 1) / pieces + 15) / 16 * 16;
  in_parallel(in.threads, tasks * pieces, [&](int64_t task) {
    const int64_t b = task / pieces / heads, h = task / pieces % heads;
    const int first = static_cast<int>(task % pieces) * width, columns = std::min(width, value - first);
    if (columns <= 0) return;
    std::vector<T> buffers[8], factor(key, T(1)), found(columns, T(0)), written(columns), out(columns, T(0));
    auto part = [&](int o, int n) { return x[o].absent ? nullptr : vector_of<T>(frame, x[o], b, h, n, buffers[o]); };
    const T *q = part(1, key), *k = part(2, key), *v = part(3, value) + first, *beta = part(4, 1);
    const T *read = part(6, key), *erase = part(7, key);
    if (const T* log = part(5, in.ints[2] ? key : 1)) {
      if (in.ints[2])
        apply<T>(op_exp, key, factor.data(), log, nullptr, nullptr);
      else
        std::fill(factor.begin(), factor.end(), std::exp(log[0]));
    }
    const T* before = reinterpret_cast<const T*>(address(frame, x[8]) + at(x[8], b, h)) + first;
    T* after = reinterpret_cast<T*>(address(frame, x[9]) + at(x[9], b, h)) + first;
    T *sums = found.data(), *write = written.data(), *reads = out.data();
    if (beta) {
      const T* asks = read ? read : k;
      for (int c = 0; c < key; ++c) {
        const T strength = asks[c] * factor[c];
        const T* row = before + int64_t(c) * value;
        // Where the state after lies is not known to anyone yet.
        for (int w = 0; w < columns; w += kLine / int(sizeof(T))) __builtin_prefetch(after + int64_t(c) * value + w, 1, 2);
#pragma GCC ivdep
        for (int w = 0; w < columns; ++w) sums[w] += strength * row[w];
      }
    }
    for (int w = 0; w < columns; ++w) {
      write[w] = !beta ? v[w] : read ? beta[0] * v[w] : beta[0] * (v[w] - sums[w]);
      sums[w] = read ? beta[0] * sums[w] : T(0);
    }
    for (int c = 0; c < key; ++c) {
      const T *from = before + int64_t(c) * value, kept = factor[c], along = k[c], query = q[c];
      T* row = after + int64_t(c) * value;
      // The two rows are one or have nothing in common: rows are too short for asking which.
      if (read) {
        const T removed = erase[c];
#pragma GCC ivdep
        for (int w = 0; w < columns; ++w) {
          const T now = kept * from[w] + along * write[w] - removed * sums[w];
          row[w] = now;
          reads[w] += query * now;
        }
      } else {
#pragma GCC ivdep
        for (int w = 0; w < columns; ++w) {
          const T now = kept * from[w] + along * write[w];
          row[w] = now;
          reads[w] += query * now;
        }
      }
    }
    const T scale = static_cast<T>(in.scalars[0]);
    for (int w = 0; w < columns; ++w) reads[w] *= scale;
    const int64_t stride = x[0].strides[2];
    put(x[0], address(frame, x[0]) + at(x[0], b, h) + first * stride * width_of(x[0].dtype), stride, columns, reads);
  });
}

// out, x, weight [D,W], bias, state [B,S,D], state after. sizes: B, D. ints: W, dilation, S, whether SiLU follows.
template <class T>
static void convolution_step(const Instruction& in, const Operand* x, const Frame& frame) {
  const int64_t channels = in.sizes[1], past = in.ints[2];
  const int taps = static_cast<int>(in.ints[0]);
  std::vector<T> filters(taps * size_t(kStrip));
  for (int64_t first = 0; first < channels; first += kStrip) {
    const int n = static_cast<int>(std::min<int64_t>(kStrip, channels - first));
    T buffer[kStrip], bias[kStrip] = {}, sums[kStrip];
    auto strip = [&](int o, int64_t row, int64_t stride, T* to) {
      return take(x[o], address(frame, x[o]) + (row + first * stride) * width_of(x[o].dtype), stride, n, to);
    };
    // Once for all rows: a filter's numbers lie side by side, here those of many channels do.
    for (int j = 0; j < taps; ++j) {
      T* to = filters.data() + j * size_t(kStrip);
      const T* from = strip(2, j * x[2].strides[1], x[2].strides[0], to);
      if (from != to) std::copy_n(from, n, to);
    }
    if (!x[3].absent) std::copy_n(strip(3, 0, x[3].strides[1], buffer), n, bias);
    for (int64_t b = 0; b < in.sizes[0]; ++b) {
      const T* now = strip(1, b * x[1].strides[0], x[1].strides[1], buffer);
      std::copy_n(bias, n, sums);
      T* after = reinterpret_cast<T*>(address(frame, x[5])) + b * past * channels + first;
      const T* before = reinterpret_cast<const T*>(address(frame, x[4])) + b * past * channels + first;
      for (int j = 0; j < taps; ++j) {
        const T* tap = filters.data() + j * size_t(kStrip);
        const T* row = j + 1 == taps ? now : before + j * in.ints[1] * channels;
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) sums[i] += row[i] * tap[i];
      }
      for (int64_t s = 0; s < past; ++s)
        std::memmove(after + s * channels, s + 1 == past ? now : before + (s + 1) * channels, sizeof(T) * n);
      if (in.ints[3]) apply<T>(op_silu, n, sums, sums, nullptr, nullptr);
      const int64_t stride = x[0].strides[1];
      put(x[0], address(frame, x[0]) + (b * x[0].strides[0] + first * stride) * width_of(x[0].dtype), stride, n, sums);
    }
  }
}

// The totals of kLanes vectors, in one.
static inline Vec totals(Vec (&rows)[kLanes]) {
  add_exchanged<1>(rows);
  return rows[0];
}

// scores[s] = scale * q . k_s for the keys from `first` to `end`, `step` floats apart; vectors of keys share their sums.
static void scores_of(const float* q, const float* k, int64_t step, int key, int64_t first, int64_t end, float scale,
                      float* scores) {
  int64_t s = first;
  for (; s + kLanes <= end; s += kLanes) {
    Vec sums[kLanes];
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      const float* row = k + (s + n) * step;
      sums[n] = load(q) * load(row);
      for (int c = kLanes; c < key; c += kLanes) sums[n] += load(q + c) * load(row + c);
    }
    store(scores + s, totals(sums) * scale);
  }
  for (; s < end; ++s) scores[s] = scale * dot_of(q, k + s * step, key);
}

// out += the values from `first` to `end` by their weights.
template <int VECS>
static inline void add_values(const float* weights, const float* v, int64_t step, int64_t first, int64_t end, float* out) {
  Vec sums[VECS];
#pragma GCC unroll 8
  for (int n = 0; n < VECS; ++n) sums[n] = load(out + n * kLanes);
  for (int64_t s = first; s < end; ++s)
#pragma GCC unroll 8
    for (int n = 0; n < VECS; ++n) sums[n] += weights[s] * load(v + s * step + n * kLanes);
#pragma GCC unroll 8
  for (int n = 0; n < VECS; ++n) store(out + n * kLanes, sums[n]);
}

// Softmax attention of one token a row to the keys before it and its own, which it adds to them. Operands: out, q, k, v,
// the kept keys [B,capacity,G,K] and values, how many of them count for each row. sizes: B, H, G. ints: K, V, and where
// the frame's numbers begin: the first row that is kept, rows kept, capacity. scalars: scale, cap.
template <class T>
static void attention_step(const Instruction& in, const Operand* x, const Frame& frame) {
  const int64_t heads = in.sizes[1], groups = in.sizes[2], share = heads / groups;
  const int key = static_cast<int>(in.ints[0]), value = static_cast<int>(in.ints[1]);
  const int64_t start = frame.numbers[in.ints[2]], rows = frame.numbers[in.ints[2] + 1];
  const int64_t capacity = frame.numbers[in.ints[2] + 2];
  const T scale = static_cast<T>(in.scalars[0]), cap = static_cast<T>(in.scalars[1]);
  // A row's groups lie side by side, so that one task reads all memory in order; few rows are cut into groups.
  const int64_t pieces = in.sizes[0] >= in.threads ? 1 : groups;
  in_parallel(in.threads, in.sizes[0] * pieces, [&](int64_t task) {
    const int64_t b = task / pieces, from = groups * (task % pieces) / pieces;
    const int64_t to = groups * (task % pieces + 1) / pieces, heads_of_task = (to - from) * share;
    std::vector<T> buffer, row(std::max(key, value)), queries(heads_of_task * key), outs(heads_of_task * value, T(0));
    std::vector<T> scores(heads_of_task * (rows + 1));
    auto place = [&](int o, int64_t s, int64_t g, int width) {
      return address(frame, x[o]) + ((b * capacity + start + s) * groups + g) * width * width_of(x[o].dtype);
    };
    const int64_t counted = x[6].absent ? rows : reinterpret_cast<const int64_t*>(address(frame, x[6]))[b * x[6].strides[0]];
    const int64_t first = std::max<int64_t>(0, rows - counted);
    for (int64_t g = from; g < to; ++g) {
      put(x[4], place(4, rows, g, key), 1, key, vector_of<T>(frame, x[2], b, g, key, buffer));
      put(x[5], place(5, rows, g, value), 1, value, vector_of<T>(frame, x[3], b, g, value, buffer));
    }
    for (int64_t h = 0; h < heads_of_task; ++h)
      std::copy_n(vector_of<T>(frame, x[1], b, from * share + h, key, buffer), key, queries.data() + h * key);
    // So many keys, or values, of all groups at a time: read in order, they stay in the first cache for all heads.
    constexpr int64_t many = 16;
    const bool direct = std::is_same_v<T, float> && x[4].dtype == kF32 && key % kLanes == 0 && value % kLanes == 0;
    for (int64_t s = first; s <= rows; s += many)
      for (int64_t h = 0; h < heads_of_task; ++h) {
        const int64_t g = from + h / share, end = std::min(rows + 1, s + many);
        T* line = scores.data() + h * (rows + 1);
        if constexpr (std::is_same_v<T, float>)
          if (direct) {
            const float* k = reinterpret_cast<const float*>(place(4, 0, g, key));
            scores_of(queries.data() + h * key, k, groups * key, key, s, end, scale, line);
            continue;
          }
        for (int64_t n = s; n < end; ++n)
          line[n] = scale * dot_of(queries.data() + h * key, take(x[4], place(4, n, g, key), 1, key, row.data()), key);
      }
    for (int64_t h = 0; h < heads_of_task; ++h) {
      T* line = scores.data() + h * (rows + 1);
      for (int64_t s = first; s <= rows && cap > 0; ++s) line[s] = cap * std::tanh(line[s] / cap);
      const T most = largest_of(line + first, rows + 1 - first);
      for (int64_t s = first; s <= rows; ++s) line[s] -= most;
      for (int64_t s = first; s <= rows; s += kStrip) {
        const int n = static_cast<int>(std::min<int64_t>(kStrip, rows + 1 - s));
        apply<T>(op_exp, n, line + s, line + s, nullptr, nullptr);
      }
      const T factor = 1 / sum_of<T>(rows + 1 - first, [=](int64_t s) { return line[first + s]; });
      for (int64_t s = first; s <= rows; ++s) line[s] *= factor;
    }
    for (int64_t s = first; s <= rows; s += many)
      for (int64_t h = 0; h < heads_of_task; ++h) {
        const int64_t g = from + h / share, end = std::min(rows + 1, s + many);
        const T* line = scores.data() + h * (rows + 1);
        T* out = outs.data() + h * value;
        if constexpr (std::is_same_v<T, float>)
          if (direct) {
            const float* v = reinterpret_cast<const float*>(place(5, 0, g, value));
            by_columns(value, [&](auto vectors, int c) {
              add_values<vectors>(line, v + c, groups * value, s, end, out + c);
            });
            continue;
          }
        for (int64_t n = s; n < end; ++n) {
          const T* v = take(x[5], place(5, n, g, value), 1, value, row.data());
          for (int w = 0; w < value; ++w) out[w] += line[n] * v[w];
        }
      }
    for (int64_t h = 0; h < heads_of_task; ++h)
      put(x[0], address(frame, x[0]) + at(x[0], b, from * share + h), x[0].strides[2], value, outs.data() + h * value);
  });
}

}  // namespace seqtrain
