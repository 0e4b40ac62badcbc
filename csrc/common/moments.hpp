// Count, mean and central moment sums of one (class, channel), merged exactly.
//
// Formulas: Chan, Golub and LeVeque 1979 (order 2), Pebay 2008 (orders 3 and 4). No power of the raw value is ever
// formed, so a large common offset costs precision in the mean alone.
#pragma once

#include "host_device.hpp"

namespace discedit {

struct Moments {
  double n = 0;     // number of samples
  double mean = 0;  // sum(t) / n
  double m2 = 0;    // sum((t - mean)^2)
  double m3 = 0;    // sum((t - mean)^3)
  double m4 = 0;    // sum((t - mean)^4)
};

DISCEDIT_HD inline Moments merge(const Moments& a, const Moments& b) {
  // Copying the other side keeps its bits: an empty state is a true neutral element.
  if (b.n == 0) return a;
  if (a.n == 0) return b;
  Moments out;
  out.n = a.n + b.n;
  const double delta = b.mean - a.mean;
  const double delta2 = delta * delta;
  const double wa = a.n / out.n;
  const double wb = b.n / out.n;
  const double pair = a.n * wb;  // na nb / n
  out.mean = a.mean + delta * wb;
  out.m2 = a.m2 + b.m2 + delta2 * pair;
  out.m3 = a.m3 + b.m3 + delta * (delta2 * pair * (wa - wb) + 3 * (wa * b.m2 - wb * a.m2));
  out.m4 = a.m4 + b.m4 +
           delta * (delta * (delta2 * pair * (wa * wa - wa * wb + wb * wb) + 6 * (wa * wa * b.m2 + wb * wb * a.m2)) +
                    4 * (wa * b.m3 - wb * a.m3));
  return out;
}

}  // namespace discedit
