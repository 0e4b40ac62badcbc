// Batched bounds from explicit means and covariances: one pair per thread. A block's covariances lie side by side in
// memory and are staged in shared memory, so that what a warp reads is contiguous.
#include "bounds.hpp"

#include "launch.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int threads = 64;

struct Laws {
  const double *mean1, *cov1, *mean2, *cov2;
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// Lower triangles of one covariance for each thread, of `first` and the following pairs. All threads call.
template <int Size>
__device__ __forceinline__ void read_triangles(const double* cov, int d, std::int64_t first, std::int64_t pairs,
                                               double (&triangle)[lower(Size, 0)]) {
  constexpr int row = Size * Size | 1;  // odd: no two lanes meet in a bank
  __shared__ double staged[threads * row];
  const int square = d * d;
  const std::int64_t left = (pairs - first) * square;
  const double* from = cov + first * square;
  for (int i = static_cast<int>(threadIdx.x); i < threads * square && i < left; i += threads)
    staged[i / square * row + i % square] = from[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Size; ++i)
#pragma unroll
    for (int j = 0; j <= i; ++j)
      if (i < d) triangle[lower(i, j)] = staged[threadIdx.x * row + i * d + j];
  __syncthreads();
}

// Dimensions up to Size; a coordinate beyond d is 0 in both laws, and so drops out.
// occupancy: 4 blocks of 64 threads per SM
// local memory: 832 bytes per thread
template <int Size>
__global__ void __launch_bounds__(threads, 4)
    bound_of_pairs(Bound bound, std::int64_t pairs, int d, Laws laws, double* out) {
  const std::int64_t items = (pairs + threads - 1) / threads;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t first = item * threads, index = first + threadIdx.x;
    LawPair<double, Size> pair = {};
    read_triangles<Size>(laws.cov1, d, first, pairs, pair.cov1);
    read_triangles<Size>(laws.cov2, d, first, pairs, pair.cov2);
    if (index >= pairs) continue;
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      if (i >= d) continue;
      const double one = laws.mean1[index * d + i], two = laws.mean2[index * d + i];
      pair.delta[i] = one - two;
      pair.noise[i] = rounding_of_moments * absolute(one) + rounding_of_moments * absolute(two);
    }
    out[index] = bound_of(bound, pair, Size);
  }
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void batched_bound(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1, const double* mean2,
                   const double* cov2, double* out, Stream stream) {
  const auto kernel = d == 1   ? bound_of_pairs<1>
                      : d == 2 ? bound_of_pairs<2>
                      : d == 3 ? bound_of_pairs<3>
                      : d == 4 ? bound_of_pairs<4>
                               : bound_of_pairs<most_dimensions>;
  launch("bound", kernel, ceil_div(pairs, threads), threads, stream, bound, pairs, d, Laws{mean1, cov1, mean2, cov2},
         out);
}

}  // namespace discedit::cuda
