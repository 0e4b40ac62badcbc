// Batched bounds from explicit means and covariances: one pair at a time, pairs split over threads.
#include "bounds.hpp"

#include <cmath>

#include "parallel.hpp"

namespace discedit {
namespace {

// Fixed: `Size` is the dimension itself and every loop unrolls. Otherwise it is a capacity, and d < Size.
template <int Size, bool Fixed>
void run(Bound bound, std::int64_t pairs, int dimension, const double* mean1, const double* cov1, const double* mean2,
         const double* cov2, double* out, int threads) {
  parallel_for(pairs, 1024 / (Size * Size) + 16, threads, [&](std::int64_t begin, std::int64_t end) {
    const int d = Fixed ? Size : dimension;
    LawPair<Size> laws;
    for (std::int64_t pair = begin; pair < end; ++pair) {
      const std::int64_t vector = pair * d, matrix = vector * d;
      for (int i = 0; i < d; ++i) {
        const double first = mean1[vector + i], second = mean2[vector + i];
        laws.delta[i] = first - second;
        laws.noise[i] = rounding_of_moments * (std::fabs(first) + std::fabs(second));
        for (int j = 0; j < d; ++j) {
          laws.cov1[i][j] = cov1[matrix + i * d + j];
          laws.cov2[i][j] = cov2[matrix + i * d + j];
        }
      }
      out[pair] = bound_of<Size>(bound, laws, d);
    }
  });
}

}  // namespace

void batched_bound(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1, const double* mean2,
                   const double* cov2, double* out, int threads) {
  switch (d) {
    case 1: return run<1, true>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
    case 2: return run<2, true>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
    case 3: return run<3, true>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
    case 4: return run<4, true>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
    case 8: return run<8, true>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
    default: break;
  }
  if (d <= 8) return run<8, false>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
  if (d <= 16) return run<16, false>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
  return run<max_dimension, false>(bound, pairs, d, mean1, cov1, mean2, cov2, out, threads);
}

}  // namespace discedit
