// Smallest bound over all pairs of classes, channel by channel: classes sorted by mean, each compared with those above
// it until none can be nearer than the best pair so far.
//
// What is returned is always the careful bound of common/bounds.hpp, on the two classes' own moments. Two cheaper lower
// bounds on it decide which pairs need it. Let g = value / (1 - value), so that fisher's g is F / 2 and minimax's k^2;
// k^2 >= F / 2, so for either it is enough to leave out pairs with F / 2 >= best g.
//
//   reach   F >= gap^2 / (var1 + var2) in each coordinate alone. `bound_of` holds what it returns to that, up to the
//           rounding charged: a relative part far below `margin`, and `noise` of the means. With
//           (x + y)^2 <= (1 + t) x^2 + (1 + 1 / t) y^2, a pair is out where gap^2 >= 2 g (1 + t) (var1 + var2) +
//           (1 + 1 / t) noise^2. That holds for any moments, sound or not, however large the noise.
//   screen  F of the quadratic witness in closed form, as numerator < g * determinant, with no division. The bound may
//           fall below it by what rounding does to an ill-conditioned pair, so the screen speaks only for pairs whose
//           determinant shows that this is less than `margin` (see `Screen`); the others are evaluated carefully
//           unless out of reach.
//
// Classes are visited in the same order and evaluated in the same batches at every register width.
#include "pairwise_min.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/witness.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

constexpr int strip = 8;  // pairs screened, and pairs evaluated, together
constexpr int long_strips = 4;
static_assert(strip % pack_lanes == 0, "a strip is made of whole packs");

constexpr double margin = 1e-3;
// F from which on every bound rounds to 1, and no pair can beat any other.
constexpr double certain = 1e20;

// Largest F that a pair may have and still need a look, when `value` is the best so far.
double reach_of(double value) {
  return value < 1 - 1e-10 ? std::min(certain, 2 * value / (1 - value) * (1 + margin) * (1 + margin)) : certain;
}

// ---- traits: where a law's moments lie, and its careful bound -------------------------------------------------------

// Moments of `strip` pairs, one field after the other.
struct Batch {
  double n[2][strip];
  double fields[2][max_vector + lower(max_vector, 0)][strip];
};

template <Witness witness>
struct ScalarLaw {
  static constexpr bool screened = witness == Witness::quadratic;
  static constexpr int tile = 16;  // channels read together: two cache lines of each row
  static constexpr int max_coordinates = 1;
  const MomentState& state;

  int coordinates() const { return 1; }
  int fields() const { return 4; }
  const double* field(int i) const {
    const double* const rows[] = {state.mean, state.m2, state.m3, state.m4};
    return rows[i];
  }
  static int mean_field(int) { return 0; }
  int variance_field(int) const { return 1; }

  DISCEDIT_INLINE Pack between(Bound bound, const Batch& batch, int from) const {
    const auto load = [&](int side) -> MomentsOf<Pack> {
      const auto& fields = batch.fields[side];
      return {Pack::load(batch.n[side] + from), Pack::load(fields[0] + from), Pack::load(fields[1] + from),
              Pack::load(fields[2] + from), Pack::load(fields[3] + from)};
    };
    if constexpr (witness == Witness::linear) return bound_of(bound, linear_witness(load(0), load(1)), 1);
    else return bound_of(bound, quadratic_witness(load(0), load(1)), 2);
  }
};

template <int Size, bool Fixed>
struct VectorLaw {
  static constexpr bool screened = false;
  static constexpr int tile = 8;
  static constexpr int max_coordinates = Size;
  const VectorState& state;

  DISCEDIT_INLINE int coordinates() const { return Fixed ? Size : state.dimension; }
  int fields() const { return coordinates() + lower(coordinates(), 0); }
  const double* field(int i) const {
    const std::int64_t size = state.classes * state.channels;
    return i < coordinates() ? state.mean + i * size : state.scatter + (i - coordinates()) * size;
  }
  static int mean_field(int coordinate) { return coordinate; }
  int variance_field(int coordinate) const { return coordinates() + lower(coordinate, coordinate); }

  DISCEDIT_INLINE Pack between(Bound bound, const Batch& batch, int from) const {
    const int d = coordinates();
    const auto load = [&](int side) {
      VectorMomentsOf<Pack, Size> law;
      law.n = Pack::load(batch.n[side] + from);
      for (int i = 0; i < d; ++i) law.mean[i] = Pack::load(batch.fields[side][i] + from);
      for (int i = 0; i < lower(d, 0); ++i) law.scatter[i] = Pack::load(batch.fields[side][d + i] + from);
      return law;
    };
    return bound_of(bound, vector_witness(load(0), load(1), d), d);
  }
};

// ---- kernel ---------------------------------------------------------------------------------------------------------

// The classes that have samples. Rows of numbers per class are `stride` long: whole strips, one of them beyond the
// last class, and an odd number of cache lines, so that rows do not compete for the same lines of the cache.
struct Present {
  std::vector<std::int64_t> classes;
  std::vector<double> n;
  int count = 0, stride = 0;

  explicit Present(std::int64_t all, const std::int64_t* counts) {
    for (std::int64_t cls = 0; cls < all; ++cls) {
      if (counts[cls] == 0) continue;
      classes.push_back(cls);
      n.push_back(static_cast<double>(counts[cls]));
    }
    count = static_cast<int>(classes.size());
    stride = (((count + strip - 1) / strip + 1) | 1) * strip;
  }
};

// One coordinate of every class, in units of a shift and scale that bring the means into [-1, 1] and the variances
// into [0, 1]; beyond the last class, means far away.
struct Coordinate {
  double *mean, *var;
  double inverse_scale, centre;
  double noise;   // of the difference of any two means, that of the scaling included
  double spread;  // of the means, in units of the largest deviation
};

// Closed form of the quadratic witness's F: mean and covariance of (z, z^2), z the coordinate above.
//
// Every error here and in the careful bound perturbs the covariance M of a pair by at most about 40 epsilon of its
// terms' size `gross`, or the means by at most e = (e0, e1). With z centred anywhere within the classes, the variance
// of z^2 is at most `most` = 2 var(z^2) + 8 var(z), and determinant >= condition * var(z) * most bounds the smallest
// eigenvalue of M in unit-diagonal units. So errors of the first kind move F by at most 40 epsilon / condition <
// margin, and those of the second move sqrt(F) by at most sqrt(e' M^-1 e) <= `blur`.
struct Screen {
  static constexpr double condition = 1e-9;
  static constexpr double least_variance = 1e-6;
  double *square, *cross, *square_var;  // E z^2, cov(z, z^2), var(z^2); cross is NaN for a class that is not screened
  double least;                         // determinant / var(z) of a pair that is screened
  double blur;
};

template <typename Law>
class Search {
 public:
  Search(const Law& law, Bound bound, const Present& present)
      : law_(law), bound_(bound), present_(present), count_(present.count), stride_(present.stride) {
    const auto rows = static_cast<std::size_t>(law.fields() * Law::tile + law.fields() + 2 * law.coordinates() + 9);
    // Rows begin with a cache line, so that no strip of one takes more than one.
    double* next = scratch(0, rows * static_cast<std::size_t>(stride_) + strip);
    while (reinterpret_cast<std::uintptr_t>(next) % (strip * sizeof(double)) != 0) ++next;
    const auto take = [&](int number) {
      double* rows_taken = next;
      next += static_cast<std::int64_t>(number) * stride_;
      return rows_taken;
    };
    tile_ = take(law.fields() * Law::tile);
    sorted_ = take(law.fields());
    sorted_n_ = take(1);
    for (int k = 0; k < law.coordinates(); ++k) coordinates_[k].mean = take(1), coordinates_[k].var = take(1);
    suffix_ = take(1);
    screen_.square = take(1), screen_.cross = take(1), screen_.square_var = take(1);
    keys_ = reinterpret_cast<std::uint64_t*>(take(1)), other_keys_ = reinterpret_cast<std::uint64_t*>(take(1));
    key_ = take(1), place_ = take(1);
    for (int s = 0; s < stride_; ++s) place_[s] = s;
    order_.resize(static_cast<std::size_t>(stride_));
  }

  void run(std::int64_t channel, int width, std::int64_t channels, double* values, std::int64_t* pairs) {
    read(channel, width, channels);
    for (int i = 0; i < width; ++i) {
      raw_ = tile_ + static_cast<std::int64_t>(i) * law_.fields() * stride_;
      best_ = {not_a_number, -1, -1};
      if (standardise()) search();
      values[channel + i] = best_.value;
      pairs[2 * (channel + i)] = best_.first < 0 ? -1 : present_.classes[static_cast<std::size_t>(best_.first)];
      pairs[2 * (channel + i) + 1] = best_.second < 0 ? -1 : present_.classes[static_cast<std::size_t>(best_.second)];
    }
  }

 private:
  struct Best {
    double value;
    int first, second;
  };

  // A tile of channels, turned to rows over classes and filled up with the first class.
  void read(std::int64_t channel, int width, std::int64_t channels) {
    for (int field = 0; field < law_.fields(); ++field) {
      const double* rows = law_.field(field) + channel;
      double* to = tile_ + static_cast<std::int64_t>(field) * stride_;
      const std::int64_t step = static_cast<std::int64_t>(law_.fields()) * stride_;
      for (int position = 0; position < stride_; ++position) {
        const std::int64_t cls = present_.classes[static_cast<std::size_t>(position < count_ ? position : 0)];
        const double* row = rows + cls * channels;
        for (int i = 0; i < width; ++i) to[i * step + position] = row[i];
      }
    }
  }

  const double* raw(int field) const { return raw_ + static_cast<std::int64_t>(field) * stride_; }
  double* sorted(int field) const { return sorted_ + static_cast<std::int64_t>(field) * stride_; }

  // Shift and scale of every coordinate, and the classes sorted by the one that separates them best. False where some
  // mean or variance is not finite.
  bool standardise() {
    int sharpest = 0;
    for (int k = 0; k < law_.coordinates(); ++k) {
      const double *mean = raw(law_.mean_field(k)), *m2 = raw(law_.variance_field(k));
      double low = mean[0], high = mean[0], most = 0, check = 0;
      for (int position = 0; position < count_; ++position) {
        low = std::min(low, mean[position]);
        high = std::max(high, mean[position]);
        most = std::max(most, m2[position] / present_.n[static_cast<std::size_t>(position)]);
        check += mean[position] * 0 + m2[position] * 0;
      }
      if (!(check == 0)) return false;
      Coordinate& out = coordinates_[k];
      const double deviation = std::sqrt(most), scale = std::max(high / 2 - low / 2, deviation);
      out.inverse_scale = scale < std::numeric_limits<double>::min() ? 0 : 1 / scale;
      out.centre = high / 2 + low / 2;
      out.noise =
          2 * rounding_of_moments * (std::max(std::fabs(low), std::fabs(high)) * out.inverse_scale) + 8 * epsilon;
      out.spread = high - low > 0 ? (high / 2 - low / 2) / deviation : 0;
      if (out.spread > coordinates_[sharpest].spread) sharpest = k;
    }
    sort_by(sharpest);
    for (int field = 0; field < law_.fields(); ++field) copy_sorted(raw(field), sorted(field));
    copy_sorted(present_.n.data(), sorted_n_);
    for (int k = 0; k < law_.coordinates(); ++k) {
      const Coordinate& coordinate = coordinates_[k];
      const double *mean = sorted(law_.mean_field(k)), *m2 = sorted(law_.variance_field(k));
      const Pack centre = coordinate.centre, inverse = coordinate.inverse_scale;
      for (int s = 0; s < stride_; s += pack_lanes) {
        ((Pack::load(mean + s) - centre) * inverse).store(coordinate.mean + s);
        (Pack::load(m2 + s) / Pack::load(sorted_n_ + s) * inverse * inverse).store(coordinate.var + s);
      }
      for (int s = count_; s < stride_; ++s) coordinate.mean[s] = 1e30 * (s + 1 - count_), coordinate.var[s] = 1;
    }
    std::swap(coordinates_[0], coordinates_[sharpest]);  // from here on, the first is the one that is sorted
    double most = 0;
    for (int s = count_ - 1; s >= 0; --s) suffix_[s] = most = std::max(most, coordinates_[0].var[s]);
    if constexpr (Law::screened) prepare_screen();
    return true;
  }

  void copy_sorted(const double* from, double* to) const {
    for (int s = 0; s < stride_; ++s) to[s] = from[order_[static_cast<std::size_t>(s)]];
  }

  // Radix sort by 24 bits of the scaled mean; what these do not tell apart, if anything, by comparison.
  void sort_by(int k) {
    const double* mean = raw(law_.mean_field(k));
    const double centre = coordinates_[k].centre, inverse = coordinates_[k].inverse_scale;
    for (int i = 0; i < count_; ++i) {
      key_[i] = (mean[i] - centre) * inverse;
      const double level = std::clamp((key_[i] + 1) * (1 << 23), 0.0, double((1 << 24) - 1));
      keys_[i] = static_cast<std::uint64_t>(static_cast<std::uint32_t>(level)) << 32 | static_cast<std::uint32_t>(i);
    }
    if (count_ < 128) {
      std::sort(keys_, keys_ + count_);
    } else {
      std::uint64_t *from = keys_, *to = other_keys_;
      for (int shift = 32; shift < 56; shift += 8) {
        int start[257] = {};
        for (int i = 0; i < count_; ++i) ++start[(from[i] >> shift & 255) + 1];
        for (int bucket = 0; bucket < 256; ++bucket) start[bucket + 1] += start[bucket];
        for (int i = 0; i < count_; ++i) to[start[from[i] >> shift & 255]++] = from[i];
        std::swap(from, to);
      }
      if (from != keys_) std::copy_n(from, count_, keys_);
    }
    for (int s = 0; s < stride_; ++s)
      order_[static_cast<std::size_t>(s)] = s < count_ ? static_cast<std::int32_t>(keys_[s] & 0xffffffff) : 0;
    const auto before = [this](int i, int j) { return key_[i] < key_[j] || (key_[i] == key_[j] && i < j); };
    if (!std::is_sorted(order_.begin(), order_.begin() + count_, before))
      std::sort(order_.begin(), order_.begin() + count_, before);
  }

  void prepare_screen() {
    const Coordinate& z = coordinates_[0];
    const double *m2 = sorted(1), *m3 = sorted(2), *m4 = sorted(3);
    const Pack inverse = z.inverse_scale;
    Pack gross[strip / pack_lanes] = {};
    for (int s = 0; s < stride_; s += pack_lanes) {
      const MomentsOf<Pack> law{Pack::load(sorted_n_ + s), 0.0, Pack::load(m2 + s), Pack::load(m3 + s),
                                Pack::load(m4 + s)};
      const Pack mean = Pack::load(z.mean + s);
      const detail::Standardised<Pack> one = detail::standardise(law, Pack(0), inverse);
      const Pack square = one.var * one.var;
      const Mask sound = (one.var >= Screen::least_variance) & (one.fourth - square >= 1e-6 * one.fourth) &
                         (one.fourth < infinity) & (absolute(one.third) < infinity);
      (one.var + mean * mean).store(screen_.square + s);
      select(sound, one.third + 2 * (mean * one.var), Pack(not_a_number)).store(screen_.cross + s);
      (one.fourth - square + 4 * (mean * one.third) + 4 * (mean * mean * one.var)).store(screen_.square_var + s);
      Pack& top = gross[s / pack_lanes % (strip / pack_lanes)];
      top = larger(select(sound, one.fourth + square + 4 * absolute(one.third) + 4 * one.var, Pack(0)), top);
    }
    // Beyond the last class, the same as for the means: a pair that is out of reach.
    std::fill(screen_.square + count_, screen_.square + stride_, 0.0);
    std::fill(screen_.cross + count_, screen_.cross + stride_, 0.0);
    std::fill(screen_.square_var + count_, screen_.square_var + stride_, 1.0);
    double most = 0;
    for (const Pack& top : gross)
      for (int lane = 0; lane < pack_lanes; ++lane) most = std::max(most, top.lanes[lane]);
    screen_.least = Screen::condition * (4 * most + 16 * suffix_[0]);
    const double e0 = z.noise, e1 = 2 * z.noise + 50 * epsilon;
    screen_.blur = std::sqrt(2 * (most * e0 * e0 / Screen::least_variance + e1 * e1) / screen_.least);
    // Where the noise of the means is no small matter, only the careful bound can tell.
    if (!(screen_.blur < 1e-2)) {
      std::fill(screen_.cross, screen_.cross + stride_, not_a_number);
      screen_.blur = 0;
    }
  }

  // ---- candidates: pairs that the careful bound is evaluated for ----

  void add(int i, int j) {
    candidates_[candidate_count_][0] = i;
    candidates_[candidate_count_][1] = j;
    if (++candidate_count_ == strip) evaluate();
  }

  void evaluate() {
    if (candidate_count_ == 0) return;
    for (int slot = 0; slot < strip; ++slot) {
      const int* pair = candidates_[slot < candidate_count_ ? slot : 0];
      const bool swapped = origin(pair[0]) > origin(pair[1]);
      for (int side = 0; side < 2; ++side) {
        const int s = pair[side ^ static_cast<int>(swapped)];
        batch_.n[side][slot] = sorted_n_[s];
        for (int field = 0; field < law_.fields(); ++field) batch_.fields[side][field][slot] = sorted(field)[s];
      }
    }
    double values[strip];
    for (int from = 0; from < strip; from += pack_lanes) law_.between(bound_, batch_, from).store(values + from);
    for (int slot = 0; slot < candidate_count_; ++slot) {
      if (best_.first >= 0 && !std::isnan(best_.value) && !(values[slot] < best_.value)) continue;
      const int one = origin(candidates_[slot][0]), two = origin(candidates_[slot][1]);
      best_ = {values[slot], std::min(one, two), std::max(one, two)};
    }
    candidate_count_ = 0;
    set_reach();
  }

  int origin(int s) const { return order_[static_cast<std::size_t>(s)]; }

  void set_reach() {
    reach_ = reach_of(best_.value);
    const double root = std::sqrt(reach_) + screen_.blur;
    screen_reach_ = std::min(certain, root * root);
  }

  // Whether the pair's means are too far apart in some coordinate.
  bool out_of_reach(int i, int j) const {
    for (int k = 0; k < law_.coordinates(); ++k) {
      const Coordinate& z = coordinates_[k];
      const double gap = z.mean[j] - z.mean[i];
      if (gap * gap >= reach_ * (z.var[i] + z.var[j]) + blur_of(z)) return true;
    }
    return false;
  }

  // ---- screens: one class, its numbers in registers, against a pack of others ----

  struct Ratio {
    Pack numerator, denominator;
    Mask unclear;  // not to be screened
  };

  struct QuadraticScreen {
    const double *means, *vars, *squares, *crosses, *square_vars;
    Pack mean, var, square, cross, square_var, least;

    template <typename Read>
    DISCEDIT_INLINE QuadraticScreen(const Search& search, const Read& read)
        : means(search.coordinates_[0].mean),
          vars(search.coordinates_[0].var),
          squares(search.screen_.square),
          crosses(search.screen_.cross),
          square_vars(search.screen_.square_var),
          mean(read(means)),
          var(read(vars)),
          square(read(squares)),
          cross(read(crosses)),
          square_var(read(square_vars)),
          least(search.screen_.least) {}

    DISCEDIT_INLINE static double reach(const Search& search) { return search.screen_reach_; }
    DISCEDIT_INLINE Ratio ratio(int j) const {
      const Pack gap = Pack::load(means + j) - mean, square_gap = Pack::load(squares + j) - square;
      const Pack v = Pack::load(vars + j) + var, w = Pack::load(square_vars + j) + square_var;
      const Pack c = Pack::load(crosses + j) + cross;
      const Pack determinant = v * w - c * c;
      return {gap * (w * gap - (c + c) * square_gap) + v * square_gap * square_gap, determinant,
              !(determinant >= least * v)};
    }
    DISCEDIT_INLINE Mask maybe(int j, Pack reach) const {
      const Ratio f = ratio(j);
      return (f.numerator <= reach * f.denominator) | f.unclear;
    }
  };

  // The pairs that are within reach in every coordinate.
  struct ReachScreen {
    const Search& search;
    Pack mean[Law::max_coordinates], var[Law::max_coordinates], blur[Law::max_coordinates];

    template <typename Read>
    DISCEDIT_INLINE ReachScreen(const Search& from, const Read& read) : search(from) {
      for (int k = 0; k < search.law_.coordinates(); ++k) {
        const Coordinate& z = search.coordinates_[k];
        mean[k] = read(z.mean), var[k] = read(z.var), blur[k] = blur_of(z);
      }
    }

    DISCEDIT_INLINE static double reach(const Search& search) { return search.reach_; }
    DISCEDIT_INLINE Mask maybe(int j, Pack reach) const {
      Mask within = !none();
      for (int k = 0; k < search.law_.coordinates(); ++k) {
        const Coordinate& z = search.coordinates_[k];
        const Pack gap = Pack::load(z.mean + j) - mean[k];
        within = within & !(gap * gap >= reach * (Pack::load(z.var + j) + var[k]) + blur[k]);
      }
      return within;
    }
  };
  using Screened = std::conditional_t<Law::screened, QuadraticScreen, ReachScreen>;

  static DISCEDIT_INLINE double blur_of(const Coordinate& z) { return (1 + 1 / margin) * z.noise * z.noise; }

  // The best neighbours in the sorted order, one of each `strip` columns, for a small reach from the start.
  void seed() {
    constexpr double tiny = 1e-300;
    Pack top[strip / pack_lanes], at[strip / pack_lanes];
    for (int part = 0; part < strip / pack_lanes; ++part) top[part] = infinity, at[part] = 0.0;
    for (int s = 0; s < count_ - 1; s += strip) {
      for (int part = 0; part < strip / pack_lanes; ++part) {
        const int i = s + part * pack_lanes;
        Pack ratio = 0;
        for (int k = 0; k < law_.coordinates(); ++k) {
          const double *mean = coordinates_[k].mean, *var = coordinates_[k].var;
          const Pack gap = Pack::load(mean + i + 1) - Pack::load(mean + i);
          ratio = larger(gap * gap / (Pack::load(var + i + 1) + Pack::load(var + i) + tiny), ratio);
        }
        if constexpr (Law::screened) {
          const QuadraticScreen screen(*this, [i](const double* row) { return Pack::load(row + i); });
          const Ratio both = screen.ratio(i + 1);
          ratio = select(both.unclear, ratio, both.numerator / both.denominator);
        }
        const Mask less = ratio < top[part];
        top[part] = select(less, ratio, top[part]);
        at[part] = select(less, Pack(s), at[part]);
      }
    }
    for (int column = 0; column < strip; ++column) {
      const int s = static_cast<int>(at[column / pack_lanes].lanes[column % pack_lanes]) + column;
      if (s + 1 < count_) add(s, s + 1);
    }
    evaluate();
  }

  void search() {
    candidate_count_ = 0;
    reach_ = screen_reach_ = certain;
    seed();
    const Coordinate& z = coordinates_[0];
    const double blur = blur_of(z);
    for (int i = 0; i < count_ - 1 && best_.value != 0; ++i) {
      // By whole strips, the first of which may begin before i.
      for (int j = (i + 1) / strip * strip; j < count_;) {
        const int nearest = std::max(j, i + 1);
        const double gap = z.mean[nearest] - z.mean[i];
        if (gap * gap >= reach_ * (z.var[i] + suffix_[nearest]) + blur) break;
        // Near by, one strip at a time; further out, the test above would cost too much of the time.
        const int end = std::min(count_, j + (j - i > long_strips * strip ? long_strips * strip : strip));
        while ((j = next_strip(i, j, end)) < end) {
          look_at(i, j);
          j += strip;
        }
        j = end;
      }
    }
    evaluate();
  }

  // Calls `found(j, mask)` for the packs of the strip at j, with the pairs (i, .), . > i, that may beat the best.
  template <typename Found>
  DISCEDIT_INLINE void screen_strip(const Screened& screen, int i, int j, Pack reach, const Found& found) const {
    for (int part = j; part < j + strip; part += pack_lanes) {
      Mask maybe = screen.maybe(part, reach);
      if (j <= i) maybe = maybe & (Pack::load(place_ + part) > static_cast<double>(i));
      found(part, maybe);
    }
  }

  // First strip of [from, to) with such a pair, or at least `to`. Nothing is called within: the numbers of class i stay
  // in registers.
  __attribute__((noinline)) int next_strip(int i, int from, int to) const {
    const Screened screen(*this, [i](const double* row) { return Pack(row[i]); });
    const Pack reach = screen.reach(*this);
    for (int j = from; j < to; j += strip) {
      Mask some = none();
      screen_strip(screen, i, j, reach, [&](int, Mask maybe) { some = some | maybe; });
      if (any(some)) return j;
    }
    return to;
  }

  __attribute__((noinline)) void look_at(int i, int j) {
    const Screened screen(*this, [i](const double* row) { return Pack(row[i]); });
    screen_strip(screen, i, j, screen.reach(*this), [&](int at, Mask maybe) {
      const int lanes = std::min(pack_lanes, count_ - at);
      for (int lane = 0; lane < lanes; ++lane)
        if (maybe[lane] && !out_of_reach(i, at + lane)) add(i, at + lane);
    });
  }

  static DISCEDIT_INLINE Mask none() { return Pack(1) < Pack(0); }

  const Law& law_;
  const Bound bound_;
  const Present& present_;
  const int count_, stride_;

  double *tile_, *sorted_, *sorted_n_, *suffix_, *key_, *place_;
  std::uint64_t *keys_, *other_keys_;
  const double* raw_ = nullptr;
  std::vector<std::int32_t> order_;  // sorted place -> place among the present classes

  Coordinate coordinates_[Law::max_coordinates] = {};
  Screen screen_ = {};
  Best best_ = {};
  double reach_ = certain, screen_reach_ = certain;

  Batch batch_;
  int candidates_[strip][2];
  int candidate_count_ = 0;
};

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename Law>
void run(const Law& law, Bound bound, double* values, std::int64_t* pairs, int threads) {
  const std::int64_t channels = law.state.channels;
  const Present present(law.state.classes, law.state.count);
  if (present.count < 2) {
    std::fill(values, values + channels, not_a_number);
    std::fill(pairs, pairs + 2 * channels, -1);
    return;
  }
  const std::int64_t tiles = (channels + Law::tile - 1) / Law::tile;
  parallel_for(tiles, 256 / present.count, threads, [&](std::int64_t begin, std::int64_t end) {
    Search<Law> search(law, bound, present);
    for (std::int64_t channel = begin * Law::tile; channel < std::min(end * Law::tile, channels); channel += Law::tile)
      search.run(channel, static_cast<int>(std::min<std::int64_t>(Law::tile, channels - channel)), channels, values,
                 pairs);
  });
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void pairwise_min(const MomentState& state, Bound bound, Witness witness, double* values, std::int64_t* pairs,
                  int threads) {
  if (witness == Witness::linear) return run(ScalarLaw<Witness::linear>{state}, bound, values, pairs, threads);
  return run(ScalarLaw<Witness::quadratic>{state}, bound, values, pairs, threads);
}

void pairwise_min_vector(const VectorState& state, Bound bound, double* values, std::int64_t* pairs, int threads) {
  switch (state.dimension) {
    case 1: return run(VectorLaw<1, true>{state}, bound, values, pairs, threads);
    case 2: return run(VectorLaw<2, true>{state}, bound, values, pairs, threads);
    case 3: return run(VectorLaw<3, true>{state}, bound, values, pairs, threads);
    case 4: return run(VectorLaw<4, true>{state}, bound, values, pairs, threads);
    case 8: return run(VectorLaw<8, true>{state}, bound, values, pairs, threads);
    default: return run(VectorLaw<max_vector, false>{state}, bound, values, pairs, threads);
  }
}

}  // namespace discedit::DISCEDIT_LEVEL
