// Matrix products alone, in cache, by somebody else's routine: the time a kernel made of these products can't go below.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include <omp.h>

namespace {

// PyTorch's at::native::cpublas::brgemm for one dtype: c [m, n] = a [m, k] b [k, n] (+ c), row-major, sums in float32.
using Routine = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a,
                         const void* b, float* c, bool packed);

struct Product {
  int64_t rows, columns, depth;
};

}  // namespace

extern "C" {

// `repeats` times all `products`, in `threads` threads that share the repeats; each has one buffer for every operand.
// `packed`: right operands of 2 bytes are taken as packed in pairs of rows. 0, or 1 where memory ran out.
int seqtrain_products(Routine multiply, void (*release)(bool), const Product* products, int64_t count, int64_t repeats,
                      int64_t threads, bool packed) {
  int64_t largest = 0;
  for (int64_t p = 0; p < count; ++p)
    largest = std::max({largest, products[p].rows * products[p].depth, products[p].depth * products[p].columns,
                        products[p].rows * products[p].columns});
  int status = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    try {
      std::vector<float> a(largest), b(largest), c(largest);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < repeats; ++n)
        for (int64_t p = 0; p < count; ++p) {
          const Product& x = products[p];
          multiply(x.rows, x.columns, x.depth, x.depth, x.columns, x.columns, false, a.data(), b.data(), c.data(), packed);
        }
      release(packed);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      status = 1;
    }
  }
  return status;
}
}
