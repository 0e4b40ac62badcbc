// Solves A x = b for small symmetric positive semi-definite A with unit-scale diagonal, as A = L D L'.
//
// `Size` is the capacity; `d` the dimension in use. With a compile-time d the loops unroll.
#pragma once

#include "real.hpp"

namespace discedit {

// Where entry (i, j), j <= i, of a symmetric matrix lies when its lower triangle is stored row by row;
// lower(d, 0) is the number of entries.
DISCEDIT_HD constexpr int lower(int i, int j) { return i * (i + 1) / 2 + j; }

// Overwrites `a` with its factor and `x` (holding b) with the solution. A pivot that rounding pushed below `least` is
// lifted to it: the caller only needs a direction, and judges that direction on its own.
template <typename Real, int Size>
DISCEDIT_HD_INLINE void cholesky_solve(Real (&a)[lower(Size, 0)], Real (&x)[Size], int d, double least) {
  Real inverse[Size];
  for (int j = 0; j < d; ++j) {
    inverse[j] = 1.0 / larger(a[lower(j, j)], Real(least));
    // From the last row up: a row needs the undivided entries of the rows above it.
    for (int i = d - 1; i > j; --i) {
      const Real factor = a[lower(i, j)] * inverse[j];
      for (int k = j + 1; k <= i; ++k) a[lower(i, k)] -= factor * a[lower(k, j)];
      x[i] -= factor * x[j];
      a[lower(i, j)] = factor;
    }
  }
  for (int i = d - 1; i >= 0; --i) {
    x[i] *= inverse[i];
    for (int k = i + 1; k < d; ++k) x[i] -= a[lower(k, i)] * x[k];
  }
}

}  // namespace discedit
