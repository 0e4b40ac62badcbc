// exp of a Pack: the same bits on every machine, which the C library does not promise. Within 2 ulp.
#pragma once

#include <limits>

#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {

// 2^k for integers -1022 <= k <= 1023, given as 1.5 * 2^52 + k, whose low bits are those of k.
DISCEDIT_INLINE Pack power_of_two(Pack shifted) {
  return as<Vector<double>>((as<Vector<std::int64_t>>(shifted.lanes) + 1023) << 52);
}

DISCEDIT_INLINE Pack exponential(Pack x) {
  constexpr double log2_e = 1.44269504088896338700e+00, shift = 6755399441055744.0;
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr double largest = 709.782712893384, smallest = -745.2;
  const Pack within = select(x > Pack(largest), Pack(largest), select(x < Pack(smallest), Pack(smallest), x));
  const Pack k = within * Pack(log2_e) + Pack(shift) - Pack(shift);
  const Pack r = within - k * Pack(ln2_high) - k * Pack(ln2_low);  // the first product is exact
  // Taylor up to r^13 / 13!: |r| <= ln 2 / 2 leaves 4e-18.
  constexpr double inverse_factorial[] = {1.6059043836821613e-10,
                                          2.08767569878681e-09,
                                          2.505210838544172e-08,
                                          2.755731922398589e-07,
                                          2.7557319223985893e-06,
                                          2.48015873015873e-05,
                                          1.984126984126984e-04,
                                          1.388888888888889e-03,
                                          8.333333333333333e-03,
                                          4.1666666666666664e-02,
                                          1.6666666666666666e-01,
                                          0.5,
                                          1.0,
                                          1.0};
  Pack sum(inverse_factorial[0]);
  for (int i = 1; i < 14; ++i) sum = sum * r + Pack(inverse_factorial[i]);
  // In two factors, so that results in the subnormal range come out as well.
  const Pack half = k * Pack(0.5) + Pack(shift) - Pack(shift);
  const Pack scaled = sum * power_of_two(half + Pack(shift)) * power_of_two(k - half + Pack(shift));
  const Pack bounded = select(x > Pack(largest), Pack(std::numeric_limits<double>::infinity()),
                              select(x < Pack(smallest), Pack(0.0), scaled));
  return select(x == x, bounded, x);
}

}  // namespace discedit::DISCEDIT_LEVEL
