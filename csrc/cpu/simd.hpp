// Vectors of the width that the file is compiled for, on the compiler's vector extensions (GCC, Clang).
//
// Every file of csrc/cpu is compiled once per instruction set, into the namespace DISCEDIT_LEVEL; dispatch.cpp picks
// one of them at run time. No level contracts a * b + c, and sums run over a fixed number of lanes, so that all levels
// give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef DISCEDIT_LEVEL
#define DISCEDIT_LEVEL baseline
#endif
#define DISCEDIT_INLINE inline __attribute__((always_inline))

namespace discedit::DISCEDIT_LEVEL {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
// A vector of `Bytes` bytes; by default, one register.
template <typename T, int Bytes = vector_bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <typename V>
DISCEDIT_INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename V>
DISCEDIT_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}
template <typename To, typename From>
DISCEDIT_INLINE To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits keep their number");
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- Pack: independent float64 problems side by side, one per lane --------------------------------------------------

constexpr int pack_lanes = vector_bytes / 8;

#if defined(__AVX512F__)
struct Mask {  // one bit per lane
  __mmask8 bits;

  friend DISCEDIT_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits & b.bits)}; }
  friend DISCEDIT_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits | b.bits)}; }
  friend DISCEDIT_INLINE Mask operator!(Mask a) { return {static_cast<__mmask8>(~a.bits)}; }
  friend DISCEDIT_INLINE bool any(Mask a) { return a.bits != 0; }
  DISCEDIT_INLINE bool operator[](int lane) const { return (bits >> lane & 1) != 0; }
};
#define DISCEDIT_COMPARE(a, b, symbol, predicate) \
  Mask { _mm512_cmp_pd_mask((a).lanes, (b).lanes, predicate) }
#else
struct Mask {  // all ones or all zeros per lane
  Vector<std::int64_t> bits;

  friend DISCEDIT_INLINE Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend DISCEDIT_INLINE Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend DISCEDIT_INLINE Mask operator!(Mask a) { return {~a.bits}; }
  friend DISCEDIT_INLINE bool any(Mask a) {
#if defined(__AVX2__)
    return _mm256_movemask_pd(as<__m256d>(a.bits)) != 0;
#else
    return (a.bits[0] | a.bits[1]) != 0;
#endif
  }
  DISCEDIT_INLINE bool operator[](int lane) const { return bits[lane] != 0; }
};
#define DISCEDIT_COMPARE(a, b, symbol, predicate) \
  Mask { (a).lanes symbol(b).lanes }
#endif

struct Pack {
  Vector<double> lanes;

  Pack() = default;
  DISCEDIT_INLINE Pack(Vector<double> value) : lanes(value) {}
  DISCEDIT_INLINE Pack(double value) : lanes(value - Vector<double>{}) {}

  DISCEDIT_INLINE static Pack load(const double* from) { return DISCEDIT_LEVEL::load<Vector<double>>(from); }
  DISCEDIT_INLINE void store(double* to) const { DISCEDIT_LEVEL::store(to, lanes); }

  friend DISCEDIT_INLINE Pack operator+(Pack a, Pack b) { return a.lanes + b.lanes; }
  friend DISCEDIT_INLINE Pack operator-(Pack a, Pack b) { return a.lanes - b.lanes; }
  friend DISCEDIT_INLINE Pack operator*(Pack a, Pack b) { return a.lanes * b.lanes; }
  friend DISCEDIT_INLINE Pack operator/(Pack a, Pack b) { return a.lanes / b.lanes; }
  friend DISCEDIT_INLINE Pack operator-(Pack a) { return -a.lanes; }
  DISCEDIT_INLINE Pack& operator+=(Pack b) { return lanes += b.lanes, *this; }
  DISCEDIT_INLINE Pack& operator-=(Pack b) { return lanes -= b.lanes, *this; }
  DISCEDIT_INLINE Pack& operator*=(Pack b) { return lanes *= b.lanes, *this; }
  DISCEDIT_INLINE Pack& operator/=(Pack b) { return lanes /= b.lanes, *this; }

  friend DISCEDIT_INLINE Mask operator<(Pack a, Pack b) { return DISCEDIT_COMPARE(a, b, <, _CMP_LT_OQ); }
  friend DISCEDIT_INLINE Mask operator>(Pack a, Pack b) { return DISCEDIT_COMPARE(a, b, >, _CMP_GT_OQ); }
  friend DISCEDIT_INLINE Mask operator<=(Pack a, Pack b) { return DISCEDIT_COMPARE(a, b, <=, _CMP_LE_OQ); }
  friend DISCEDIT_INLINE Mask operator>=(Pack a, Pack b) { return DISCEDIT_COMPARE(a, b, >=, _CMP_GE_OQ); }
  friend DISCEDIT_INLINE Mask operator==(Pack a, Pack b) { return DISCEDIT_COMPARE(a, b, ==, _CMP_EQ_OQ); }

  friend DISCEDIT_INLINE Pack select(Mask where, Pack yes, Pack no) {
#if defined(__AVX512F__)
    return Vector<double>(_mm512_mask_blend_pd(where.bits, no.lanes, yes.lanes));
#else
    return where.bits ? yes.lanes : no.lanes;
#endif
  }
  friend DISCEDIT_INLINE Pack absolute(Pack a) {
    return as<Vector<double>>(as<Vector<std::int64_t>>(a.lanes) & INT64_MAX);
  }
  friend DISCEDIT_INLINE Pack square_root(Pack a) {
#if defined(__AVX512F__)
    return Vector<double>(_mm512_sqrt_pd(a.lanes));
#elif defined(__AVX2__)
    return Vector<double>(_mm256_sqrt_pd(a.lanes));
#elif defined(__x86_64__)
    return Vector<double>(_mm_sqrt_pd(a.lanes));
#elif defined(__aarch64__)
    return as<Vector<double>>(vsqrtq_f64(as<float64x2_t>(a.lanes)));
#else
    return Vector<double>{std::sqrt(a.lanes[0]), std::sqrt(a.lanes[1])};
#endif
  }
};

// ---- ends of rows ---------------------------------------------------------------------------------------------------

// The first `width` doubles at `from`, filled up with zeros; and the other way.
DISCEDIT_INLINE Pack load_some(const double* from, int width) {
  if (width == pack_lanes) return Pack::load(from);
  double padded[pack_lanes] = {};
  for (int lane = 0; lane < width; ++lane) padded[lane] = from[lane];
  return Pack::load(padded);
}
DISCEDIT_INLINE void store_some(Pack value, double* to, int width) {
  if (width == pack_lanes) return value.store(to);
  double padded[pack_lanes];
  value.store(padded);
  for (int lane = 0; lane < width; ++lane) to[lane] = padded[lane];
}

}  // namespace discedit::DISCEDIT_LEVEL
