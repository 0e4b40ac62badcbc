// Batched bounds from explicit means and covariances: one pair per lane, packs of pairs split over threads.
#include "bounds.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "exponential.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

// Contiguous laws: means (pairs, d) and covariances (pairs, d, d).
struct Laws {
  const double *mean1, *cov1, *mean2, *cov2;

  Laws from(std::int64_t pair, int d) const {
    return {mean1 + pair * d, cov1 + pair * d * d, mean2 + pair * d, cov2 + pair * d * d};
  }
};

// Asks for a part of what a later pack will read, row `i` of `d` of each array: gathers across pairs hide the order of
// memory from the processor, and asking for everything at once would stall it.
DISCEDIT_INLINE void prefetch_row(const Laws& later, int i, int d) {
  constexpr int line = 64 / sizeof(double);
  __builtin_prefetch(later.mean1 + i * pack_lanes);
  __builtin_prefetch(later.mean2 + i * pack_lanes);
  for (int c = 0; c < d * pack_lanes; c += line) {
    __builtin_prefetch(later.cov1 + i * d * pack_lanes + c);
    __builtin_prefetch(later.cov2 + i * d * pack_lanes + c);
  }
}

// One element of each of a pack's pairs, `stride` apart.
template <int... lane>
DISCEDIT_INLINE Pack gather(const double* from, std::int64_t stride, std::integer_sequence<int, lane...>) {
  return Vector<double>{from[lane * stride]...};
}

template <int Size>
DISCEDIT_INLINE LawPair<Pack, Size> pair_of_pack(const Laws& laws, const Laws& later, int d) {
  const auto element = [](const double* from, std::int64_t stride) {
    return gather(from, stride, std::make_integer_sequence<int, pack_lanes>());
  };
  LawPair<Pack, Size> pair;
  for (int i = 0; i < d; ++i) {
    prefetch_row(later, i, d);
    const Pack first = element(laws.mean1 + i, d), second = element(laws.mean2 + i, d);
    pair.delta[i] = first - second;
    pair.noise[i] = rounding_of_moments * absolute(first) + rounding_of_moments * absolute(second);
    for (int j = 0; j <= i; ++j) {
      pair.cov1[lower(i, j)] = element(laws.cov1 + i * d + j, d * d);
      pair.cov2[lower(i, j)] = element(laws.cov2 + i * d + j, d * d);
    }
  }
  return pair;
}

// Laws that are constant and equal, but for the `left` pairs that exist.
class Padded {
 public:
  Padded(const Laws& rest, std::int64_t left, int d)
      : vectors_(static_cast<std::size_t>(2 * d * pack_lanes)),
        matrices_(static_cast<std::size_t>(2 * d * d * pack_lanes)) {
    double *const mean2 = vectors_.data() + d * pack_lanes, *const cov2 = matrices_.data() + d * d * pack_lanes;
    std::copy_n(rest.mean1, left * d, vectors_.data());
    std::copy_n(rest.mean2, left * d, mean2);
    std::copy_n(rest.cov1, left * d * d, matrices_.data());
    std::copy_n(rest.cov2, left * d * d, cov2);
    laws = {vectors_.data(), matrices_.data(), mean2, cov2};
  }
  Laws laws;

 private:
  std::vector<double> vectors_, matrices_;
};

// Calls evaluate(pair, first, width) for packs of laws; `width` of them exist.
template <int Size, typename Evaluate>
void over_packs(std::int64_t pairs, int d, const Laws& laws, std::int64_t begin, std::int64_t end,
                const Evaluate& evaluate) {
  const std::int64_t ahead = std::max(32 / (d * d), 1);
  for (std::int64_t pack = begin; pack < end; ++pack) {
    const std::int64_t pair = pack * pack_lanes, left = pairs - pair;
    if (left >= pack_lanes) {
      const Laws here = laws.from(pair, d), later = laws.from(pair + ahead * pack_lanes, d);
      evaluate(pair_of_pack<Size>(here, later, d), pair, pack_lanes);
    } else {
      const Padded rest(laws.from(pair, d), left, d);
      evaluate(pair_of_pack<Size>(rest.laws, rest.laws, d), pair, static_cast<int>(left));
    }
  }
}

// Fixed: `Size` is the dimension itself and every loop unrolls. Otherwise it is a capacity, and d <= Size.
template <int Size, bool Fixed>
void run(Bound bound, std::int64_t pairs, int dimension, const Laws& laws, double* out, int threads) {
  const std::int64_t packs = (pairs + pack_lanes - 1) / pack_lanes;
  parallel_for(packs, 1024 / (Size * Size) + 4, threads, [&](std::int64_t begin, std::int64_t end) {
    const int d = Fixed ? Size : dimension;
    over_packs<Size>(pairs, d, laws, begin, end, [&](const LawPair<Pack, Size>& pair, std::int64_t first, int width) {
      store_some(bound_of(bound, pair, d), out + first, width);
    });
  });
}

// Rarer members: a capacity will do.
template <int Size>
void run_member(const Rule& rule, std::int64_t pairs, int d, const Laws& laws, const double* radius, double* out,
                int threads) {
  const std::int64_t packs = (pairs + pack_lanes - 1) / pack_lanes;
  parallel_for(packs, 256 / (Size * Size) + 4, threads, [&](std::int64_t begin, std::int64_t end) {
    over_packs<Size>(pairs, d, laws, begin, end, [&](const LawPair<Pack, Size>& pair, std::int64_t first, int width) {
      const Pack ball = radius ? load_some(radius + first, width) : Pack(0);
      store_some(member_of(rule, pair, ball, d), out + first, width);
    });
  });
}

}  // namespace

void batched_bound(Bound bound, std::int64_t pairs, int d, const double* mean1, const double* cov1, const double* mean2,
                   const double* cov2, double* out, int threads) {
  const Laws laws{mean1, cov1, mean2, cov2};
  switch (d) {
    case 1: return run<1, true>(bound, pairs, d, laws, out, threads);
    case 2: return run<2, true>(bound, pairs, d, laws, out, threads);
    case 3: return run<3, true>(bound, pairs, d, laws, out, threads);
    case 4: return run<4, true>(bound, pairs, d, laws, out, threads);
    case 8: return run<8, true>(bound, pairs, d, laws, out, threads);
    default: break;
  }
  if (d <= 8) return run<8, false>(bound, pairs, d, laws, out, threads);
  if (d <= 16) return run<16, false>(bound, pairs, d, laws, out, threads);
  return run<max_dimension, false>(bound, pairs, d, laws, out, threads);
}

void batched_member(const Rule& rule, std::int64_t pairs, int d, const double* mean1, const double* cov1,
                    const double* mean2, const double* cov2, const double* radius, double* out, int threads) {
  const Laws laws{mean1, cov1, mean2, cov2};
  if (d == 1) return run_member<1>(rule, pairs, d, laws, radius, out, threads);
  if (d == 2) return run_member<2>(rule, pairs, d, laws, radius, out, threads);
  if (d <= 8) return run_member<8>(rule, pairs, d, laws, radius, out, threads);
  return run_member<max_dimension>(rule, pairs, d, laws, radius, out, threads);
}

void batched_witness(bool published, std::int64_t pairs, const double* mean1, const double* second1,
                     const double* mean2, const double* second2, double* out, int threads) {
  const std::int64_t packs = (pairs + pack_lanes - 1) / pack_lanes;
  parallel_for(packs, 4096, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pack = begin; pack < end; ++pack) {
      const std::int64_t pair = pack * pack_lanes;
      const int width = static_cast<int>(std::min<std::int64_t>(pairs - pair, pack_lanes));
      const auto element = [&](const double* from) { return load_some(from + pair, width); };
      const Pack value = witness_of(published, element(mean1), element(second1), element(mean2), element(second2));
      store_some(value, out + pair, width);
    }
  });
}

}  // namespace discedit::DISCEDIT_LEVEL
