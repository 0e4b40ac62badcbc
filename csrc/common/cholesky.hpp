// Solves (A + ridge I) x = b for small symmetric positive semi-definite A with unit-scale diagonal.
//
// `Size` is the row stride and capacity; `d` the dimension in use. With a compile-time d the loops unroll.
#pragma once

#include <cmath>

#include "host_device.hpp"

namespace discedit {

// Overwrites the lower triangle of `a` with its factor and `x` (holding b) with the solution. A pivot that rounding
// pushed below the ridge is lifted to it: the caller only needs a direction, and judges that direction on its own.
template <int Size>
DISCEDIT_HD inline void cholesky_solve(double (&a)[Size][Size], double (&x)[Size], int d, double ridge) {
  for (int j = 0; j < d; ++j) {
    double pivot = a[j][j] + ridge;
    for (int k = 0; k < j; ++k) pivot -= a[j][k] * a[j][k];
    pivot = std::sqrt(pivot > ridge ? pivot : ridge);
    a[j][j] = pivot;
    for (int i = j + 1; i < d; ++i) {
      double entry = a[i][j];
      for (int k = 0; k < j; ++k) entry -= a[i][k] * a[j][k];
      a[i][j] = entry / pivot;
    }
  }
  for (int i = 0; i < d; ++i) {
    for (int k = 0; k < i; ++k) x[i] -= a[i][k] * x[k];
    x[i] /= a[i][i];
  }
  for (int i = d - 1; i >= 0; --i) {
    for (int k = i + 1; k < d; ++k) x[i] -= a[k][i] * x[k];
    x[i] /= a[i][i];
  }
}

}  // namespace discedit
