// Threads take tasks as they come, so that one that is held up by other programs holds up no more than its own task.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <numeric>
#include <vector>

#include <omp.h>

#include "simd.h"

namespace seqtrain {

// A piece of work that shares nothing with others: one part of one document.
struct Task {
  int64_t document, part;
};

// Where a worker is: a document's tokens of one head, in chunks.
class InDocument {
 protected:
  template <class Call>
  void enter(const Call& call, int64_t document, int64_t head, int64_t chunk) {
    document_ = document, head_ = head, heads_ = call.heads, chunk_ = chunk;
    start_ = call.boundaries[document];
    length_ = call.boundaries[document + 1] - start_;
    chunks_ = (length_ + chunk - 1) / chunk;
  }

  // Tokens of chunk n: all, or what the document has left.
  int tokens(int64_t n) const { return static_cast<int>(std::min(chunk_, length_ - n * chunk_)); }

  int64_t place(int64_t n, int i) const { return (start_ + n * chunk_ + i) * heads_ + head_; }

  // The place of chunk n's checkpoint, n a multiple of `every`: rising over documents without a table of them.
  int64_t checkpoint(int64_t n, int64_t every) const { return start_ / (chunk_ * every) + document_ + n / every; }

  int64_t document_ = 0, head_ = 0, heads_ = 0, chunk_ = 1, start_ = 0, length_ = 0, chunks_ = 0;
};

// The OpenMP runtime's threads do not survive a fork; a child that waited for them would wait forever.
inline std::atomic<bool> forked{false};

// All tasks of `call`, each document in so many parts, by workers of a thread each. 0, or 1 where memory ran out.
template <class Worker, class Call>
static int run_tasks(const Call& call, int64_t parts, bool backward) {
  std::vector<int64_t> documents(call.documents);
  std::iota(documents.begin(), documents.end(), 0);
  // Longest first, so that no thread starts a long one when the others are done.
  std::stable_sort(documents.begin(), documents.end(), [&](int64_t a, int64_t b) {
    return call.boundaries[a + 1] - call.boundaries[a] > call.boundaries[b + 1] - call.boundaries[b];
  });
  const int64_t tasks = call.documents * parts;
  std::atomic<int64_t> next{0};
  std::atomic<int> status{0};
  const int threads = forked ? 1 : static_cast<int>(std::min(call.threads, tasks));
  auto work = [&] {
    const FlushToZero flush;
    try {
      Worker worker(call, backward);
      for (int64_t n; (n = next++) < tasks;) {
        const Task task{documents[n / parts], n % parts};
        backward ? worker.backward(task) : worker.forward(task);
      }
    } catch (const std::bad_alloc&) {
      status = 1;
    }
    finish_streams();
  };
  if (threads <= 1) {
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  return status;
}

}  // namespace seqtrain
