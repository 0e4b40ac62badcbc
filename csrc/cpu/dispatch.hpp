// Run-time choice of instruction set: the compiler makes one clone of a marked function per level, the loader picks.
//
// Sums are written over a fixed number of lanes and compiled without contraction, so every level gives the same bits.
#pragma once

#include <cstddef>  // any standard header: it tells whether this is glibc, whose loader can pick clones

// DISCEDIT_NO_CLONES: one level only, that of the compiler's flags. tests/test_dispatch.py compares such builds.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(DISCEDIT_NO_CLONES)
#define DISCEDIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define DISCEDIT_HAS_CLONES 1
#else
#define DISCEDIT_CLONES
#define DISCEDIT_HAS_CLONES 0
#endif

#if defined(__GNUC__)
#define DISCEDIT_INLINE inline __attribute__((always_inline))
#else
#define DISCEDIT_INLINE inline
#endif

namespace discedit {

// Name of the level that the marked functions run at on this machine.
inline const char* instruction_set() {
#if DISCEDIT_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace discedit
