// Elements of a feature map: how a vector of each type becomes float32 and float64, exactly.
#pragma once

#include <type_traits>

#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Integers as wide as the element; what makes up the bits of an infinity.
template <typename T>
struct Bits;
template <>
struct Bits<double> {
  using type = std::int64_t;
  static constexpr type infinity = 0x7ff0000000000000;
};
template <>
struct Bits<float> {
  using type = std::int32_t;
  static constexpr type infinity = 0x7f800000;
};
template <>
struct Bits<BFloat16> {
  using type = std::int16_t;
  static constexpr type infinity = 0x7f80;
};
template <>
struct Bits<Float16> {
  using type = std::int16_t;
  static constexpr type infinity = 0x7c00;
};
template <typename T>
using BitsOf = typename Bits<T>::type;

// ---- one element ----------------------------------------------------------------------------------------------------

DISCEDIT_INLINE double widen(double value) { return value; }
DISCEDIT_INLINE double widen(float value) { return value; }
DISCEDIT_INLINE double widen(BFloat16 value) { return as<float>(static_cast<std::uint32_t>(value.bits) << 16); }

// Float16 bits in the low half of each integer. Exponent and mantissa are moved into place and rescaled by 2^112, which
// is exact and makes subnormals right as well; all-ones exponents (Inf, NaN) get the float32 exponent back.
template <typename Float, typename Integer>
DISCEDIT_INLINE Float widen_half_bits(Integer half) {
  const Integer moved = (half & 0x7fff) << 13;
  const Integer scaled = as<Integer>(as<Float>(moved) * 5192296858534827628530496329220096.0f);
  const Integer special = (half & 0x7c00) == 0x7c00 ? (moved | 0x7f800000) : scaled;
  return as<Float>(special | (half & 0x8000) << 16);
}

DISCEDIT_INLINE double widen(Float16 value) { return widen_half_bits<float>(static_cast<std::uint32_t>(value.bits)); }

// ---- vectors --------------------------------------------------------------------------------------------------------

constexpr int singles = vector_bytes / 4;  // float32 per register
constexpr int doubles = vector_bytes / 8;

DISCEDIT_INLINE Vector<double> low_half(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#elif defined(__x86_64__)
  return _mm_cvtps_pd(x);
#elif defined(__aarch64__)
  return as<Vector<double>>(vcvt_f64_f32(vget_low_f32(as<float32x4_t>(x))));
#else
  return Vector<double>{x[0], x[1]};
#endif
}

DISCEDIT_INLINE Vector<double> high_half(Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__x86_64__)
  return _mm_cvtps_pd(_mm_movehl_ps(x, x));
#elif defined(__aarch64__)
  return as<Vector<double>>(vcvt_high_f64_f32(as<float32x4_t>(x)));
#else
  return Vector<double>{x[2], x[3]};
#endif
}

// `singles` elements of type Float16 as float32.
DISCEDIT_INLINE Vector<float> widen_halves(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load<__m128i>(from));
#elif defined(__aarch64__)
  return as<Vector<float>>(vcvt_f32_f16(as<float16x4_t>(load<std::uint64_t>(from))));
#elif defined(__x86_64__)
  const __m128i bits = _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128());
  return widen_half_bits<Vector<float>>(as<Vector<std::uint32_t>>(bits));
#else
  Vector<std::uint32_t> bits{};
  for (int i = 0; i < singles; ++i) bits[i] = from[i].bits;
  return widen_half_bits<Vector<float>>(bits);
#endif
}

// ---- blocks ---------------------------------------------------------------------------------------------------------
// A block is 32 neighbouring elements. Its elements pair up: (2i, 2i + 1) for BFloat16, whose neighbours come apart
// with a shift and a mask, (i, i + 16) for the others. Part v of a block is `singles` such pairs.

constexpr int block = 32;
constexpr int block_pairs = block / 2;

template <typename T>
constexpr int first_of_pair(int pair) {
  return std::is_same_v<T, BFloat16> ? 2 * pair : pair;
}
template <typename T>
constexpr int second_of_pair(int pair) {
  return std::is_same_v<T, BFloat16> ? 2 * pair + 1 : pair + block_pairs;
}

struct Pairs {
  Vector<float> first, second;
};

DISCEDIT_INLINE Pairs load_pairs(const float* from, int part) {
  return {load<Vector<float>>(from + part * singles), load<Vector<float>>(from + block_pairs + part * singles)};
}
DISCEDIT_INLINE Pairs load_pairs(const BFloat16* from, int part) {
  const auto both = load<Vector<std::uint32_t>>(from + part * 2 * singles);
  return {as<Vector<float>>(both << 16), as<Vector<float>>(both & 0xffff0000u)};
}
DISCEDIT_INLINE Pairs load_pairs(const Float16* from, int part) {
  return {widen_halves(from + part * singles), widen_halves(from + block_pairs + part * singles)};
}

struct WidePairs {
  Vector<double> first[2], second[2];
};

template <typename T>
DISCEDIT_INLINE WidePairs load_wide(const T* from, int part) {
  const Pairs pairs = load_pairs(from, part);
  return {{low_half(pairs.first), high_half(pairs.first)}, {low_half(pairs.second), high_half(pairs.second)}};
}
DISCEDIT_INLINE WidePairs load_wide(const double* from, int part) {
  const double* first = from + part * singles;
  const double* second = first + block_pairs;
  return {{load<Vector<double>>(first), load<Vector<double>>(first + doubles)},
          {load<Vector<double>>(second), load<Vector<double>>(second + doubles)}};
}

// sum + x * y for factors whose product is exact: fused gives the same bits as not fused.
DISCEDIT_INLINE Vector<double> add_exact_product(Vector<double> sum, Vector<double> x, Vector<double> y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(x, y, sum);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(x, y, sum);
#elif defined(__aarch64__)
  return as<Vector<double>>(vfmaq_f64(as<float64x2_t>(sum), as<float64x2_t>(x), as<float64x2_t>(y)));
#else
  return sum + x * y;
#endif
}
DISCEDIT_INLINE Vector<float> add_exact_product(Vector<float> sum, Vector<float> x, Vector<float> y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, sum);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(x, y, sum);
#elif defined(__aarch64__)
  return as<Vector<float>>(vfmaq_f32(as<float32x4_t>(sum), as<float32x4_t>(x), as<float32x4_t>(y)));
#else
  return sum + x * y;
#endif
}
// sum + x * x, where x came from a `T`: squares of anything narrower than float64 are exact in it.
template <typename T>
DISCEDIT_INLINE Vector<double> add_square(Vector<double> sum, Vector<double> x) {
  if constexpr (std::is_same_v<T, double>) return sum + x * x;
  else return add_exact_product(sum, x, x);
}
// sum + x. As a product with 1, it leaves the adders to the conversions, which need the same ports (Zen).
template <typename T>
DISCEDIT_INLINE Vector<double> add_value(Vector<double> sum, Vector<double> x) {
  if constexpr (std::is_same_v<T, double> || vector_bytes == 16) return sum + x;
  else return add_exact_product(sum, x, Vector<double>{} + 1.0);
}

// ---- four elements of 16 bits in float32 ----------------------------------------------------------------------------
// Off by at most 2^-22 of the sum of the absolute terms, and exact where the four lie within a factor of 2^11 or so.
// Float16 fits float32 with all its squares; sums and squares of BFloat16 can leave its range (`doubtful` in pool.cpp).

template <typename T>
constexpr bool in_fours = sizeof(T) == 2;

DISCEDIT_INLINE Vector<float> sum_of(const Vector<float> (&x)[2]) { return x[0] + x[1]; }
DISCEDIT_INLINE Vector<float> sum_of(const Vector<float> (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// Float16's squares are exact. BFloat16's are rounded where they leave the normal range of float32, and there fused
// would differ from not fused.
template <typename T>
DISCEDIT_INLINE Vector<float> add_square_of(Vector<float> sum, Vector<float> x) {
  if constexpr (std::is_same_v<T, Float16>) return add_exact_product(sum, x, x);
  else return sum + x * x;
}
template <typename T>
DISCEDIT_INLINE Vector<float> squares_of(const Vector<float> (&x)[2]) {
  return add_square_of<T>(x[0] * x[0], x[1]);
}
template <typename T>
DISCEDIT_INLINE Vector<float> squares_of(const Vector<float> (&x)[4]) {
  return add_square_of<T>(x[0] * x[0], x[1]) + add_square_of<T>(x[2] * x[2], x[3]);
}

}  // namespace discedit::DISCEDIT_LEVEL
