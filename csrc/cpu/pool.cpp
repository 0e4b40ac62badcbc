// Statistics of a feature map in one read. Split of work: where the channels lie side by side (channels_last, tokens),
// spans of positions, swept with one accumulator per channel; else (sample, channel) rows, and spans of long rows.
#include "pool.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "../common/map_layout.hpp"
#include "dispatch.hpp"
#include "element.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace discedit::DISCEDIT_LEVEL {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr std::int64_t row_span = 1 << 16;    // elements of one row that are summed as one; depends on shapes alone
constexpr std::int64_t sweep_span = 1 << 18;  // elements of one sample swept as one
constexpr std::int64_t most_positions = 1 << 14;
constexpr int channel_tile = 1024;                // channels swept together: their accumulators stay in L1
constexpr std::int64_t chunk_elements = 1 << 16;  // what a thread takes at a time
constexpr int prefetch_ahead = 4096;              // bytes: beyond the page that the hardware's own reach ends at
static_assert(row_span / block < (1 << 15) && most_positions < (1 << 15), "16-bit lanes count the positive elements");
static_assert(row_span % (2 * block) == 0, "only the last two blocks of a row are partial");

// Accumulators of neighbouring outputs, in their order, each complete or of one span.
struct Strip {
  double sum[channel_tile], square[channel_tile], top[channel_tile], peak[channel_tile], positive[channel_tile];

  // Adds the next span. NaN in `top` stays.
  void add(int part, int i, double value) {
    switch (part) {
      case Parts::sum: sum[i] += value; break;
      case Parts::square: square[i] += value; break;
      case Parts::positive: positive[i] += value; break;
      case Parts::top: top[i] = top[i] >= value || top[i] != top[i] ? top[i] : value; break;
      case Parts::peak: peak[i] = std::max(peak[i], value); break;
    }
  }
  double* of(int part) {
    return part == Parts::sum      ? sum
           : part == Parts::square ? square
           : part == Parts::top    ? top
           : part == Parts::peak   ? peak
                                   : positive;
  }
};

// Which sums of BFloat16 elements float32 may not have held. It overflows where they do not: that shows. Squares are
// rounded to multiples of 2^-149: nothing beside one of 2^-80. Compared as integers, free of branches: it is asked of
// every output.
template <int parts>
DISCEDIT_INLINE std::int64_t doubtful(const Strip& strip, int i) {
  const auto infinity = as<std::int64_t>(std::numeric_limits<double>::infinity());
  const auto low = as<std::int64_t>(0x1p-40), high = as<std::int64_t>(0x1p62);
  std::int64_t result = 0;
  if constexpr (parts & Parts::sum) result |= (as<std::int64_t>(strip.sum[i]) & infinity) == infinity ? Parts::sum : 0;
  if constexpr (parts & Parts::square) {
    const auto top = as<std::int64_t>(strip.top[i]);
    result |= ((top < low) & (top != 0)) ? Parts::square : 0;
    result |= top > high ? Parts::square : 0;
  }
  return result;
}

// From accumulators to statistics, for outputs [from, to) of the strip, of maps of `elements` elements.
DISCEDIT_INLINE void finish(const Strip& strip, int from, int to, double elements, const Statistics& statistics,
                            double* out, std::int64_t plane) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (int k = 0; k < statistics.count; ++k, out += plane) switch (statistics.list[k]) {
      case Statistic::mean:
        for (int i = from; i < to; ++i) out[i - from] = strip.sum[i] / elements;
        break;
      case Statistic::sum:
        for (int i = from; i < to; ++i) out[i - from] = strip.sum[i];
        break;
      case Statistic::l2:
        for (int i = from; i < to; ++i) out[i - from] = std::sqrt(strip.square[i]);
        break;
      case Statistic::rms:
        for (int i = from; i < to; ++i) out[i - from] = std::sqrt(strip.square[i] / elements);
        break;
      case Statistic::absmax:
        for (int i = from; i < to; ++i) out[i - from] = strip.top[i];
        break;
      case Statistic::max:
        for (int i = from; i < to; ++i) out[i - from] = strip.top[i] == strip.top[i] ? strip.peak[i] : nan;
        break;
      case Statistic::positive_fraction:
        for (int i = from; i < to; ++i)
          out[i - from] = strip.top[i] == strip.top[i] ? strip.positive[i] / elements : nan;
        break;
    }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// Floating-point numbers in the order of their bits read as integers; its own inverse.
template <typename T, typename Integer>
DISCEDIT_INLINE Integer ordered(Integer bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<BitsOf<T>>::max());
}
template <typename T>
DISCEDIT_INLINE double value_of(BitsOf<T> bits) {
  return widen(as<T>(bits));
}
// The elements whose bits are the low ones of each lane.
template <typename T>
DISCEDIT_INLINE Vector<double> values_of(Vector<std::int64_t> bits) {
  if constexpr (std::is_same_v<T, double>) {
    return as<Vector<double>>(bits);
  } else {
    using Half = Vector<std::uint32_t, vector_bytes / 2>;
    using Float = Vector<float, vector_bytes / 2>;
    const Half low = __builtin_convertvector(bits, Half);
    Float value;
    if constexpr (std::is_same_v<T, float>) value = as<Float>(low);
    else if constexpr (std::is_same_v<T, BFloat16>) value = as<Float>(low << 16);
    else value = widen_half_bits<Float>(low);
    return __builtin_convertvector(value, Vector<double>);
  }
}
template <typename T>
constexpr BitsOf<T> minus_infinity = static_cast<BitsOf<T>>(std::numeric_limits<BitsOf<T>>::min() | Bits<T>::infinity);
template <typename V>
DISCEDIT_INLINE V greater_of(V a, V b) {
  return a > b ? a : b;
}

// What one register of raw elements adds to the integer accumulators. `lowest` holds the same elements, padded with
// minus infinity where `from` is padded with zeros.
template <typename T, int parts>
DISCEDIT_INLINE void add_raw(const T* from, const T* lowest, Vector<BitsOf<T>>& top, Vector<BitsOf<T>>& peak,
                             Vector<BitsOf<T>>& positive) {
  using Raw = Vector<BitsOf<T>>;
  const Raw bits = load<Raw>(from);
  if constexpr (parts & Parts::top) top = greater_of<Raw>(top, bits & std::numeric_limits<BitsOf<T>>::max());
  if constexpr (parts & Parts::peak) peak = greater_of<Raw>(peak, ordered<T>(load<Raw>(lowest)));
  if constexpr (parts & Parts::positive) positive -= (bits > 0);
}

template <typename T>
constexpr int registers_of_block = block * static_cast<int>(sizeof(T)) / vector_bytes;
template <typename T>
constexpr int raw_lanes = vector_bytes / static_cast<int>(sizeof(T));

// ---- across lanes: `doubles` rows at once, each in one register of 64-bit lanes ----

// Of two registers whose lanes form segments of one row each: the first halves of all segments with the second halves.
template <int segment, typename V, typename Combine, std::size_t... Lane>
DISCEDIT_INLINE V halve_segments(V a, V b, Combine combine, std::index_sequence<Lane...>) {
  constexpr auto half = segment / 2;
  return combine(V(__builtin_shufflevector(a, b, (Lane / half * segment + Lane % half)...)),
                 V(__builtin_shufflevector(a, b, (Lane / half * segment + Lane % half + half)...)));
}

// Lane r of the result: the lanes of row r. Lanes l and l + half first, then on down: with what came before, the same
// tree for every width of register.
template <int segment = doubles, typename V, typename Combine>
DISCEDIT_INLINE V across(V* rows, Combine combine) {
  if constexpr (segment == 1) {
    return rows[0];
  } else {
    for (int i = 0; i < segment / 2; ++i)
      rows[i] = halve_segments<segment>(rows[2 * i], rows[2 * i + 1], combine, std::make_index_sequence<doubles>());
    return across<segment / 2>(rows, combine);
  }
}

// The first `count` elements of a block, and neutral ones after them: zeros, and minus infinity for the maximum.
// Up to `limit` memory is readable.
template <typename T>
struct Padded {
  alignas(vector_bytes) T zeros[block];
  alignas(vector_bytes) T lowest[block];

  DISCEDIT_INLINE Padded(const T* from, int count, const T* limit, bool with_lowest) {
    using Raw = Vector<BitsOf<T>>;
#if defined(__AVX512F__)  // a masked load does not touch what it leaves out
    (void)limit;
    constexpr bool readable = true;
#else
    const bool readable = limit - from >= block;
#endif
    if (!readable) {
      std::memset(zeros, 0, sizeof zeros);
      std::memcpy(zeros, from, static_cast<std::size_t>(count) * sizeof(T));
    }
    for (int i = 0; i < registers_of_block<T>; ++i) {
      const int lane = i * raw_lanes<T>;
      const Raw keep = counted(std::make_index_sequence<raw_lanes<T>>()) < static_cast<BitsOf<T>>(count - lane);
      const Raw bits = readable ? load_where(from + lane, keep) : load<Raw>(zeros + lane);
      DISCEDIT_LEVEL::store(zeros + lane, bits);
      if (with_lowest) DISCEDIT_LEVEL::store(lowest + lane, keep ? bits : Raw{} + minus_infinity<T>);
    }
  }

 private:
  template <std::size_t... Lane>
  DISCEDIT_INLINE static Vector<BitsOf<T>> counted(std::index_sequence<Lane...>) {
    return Vector<BitsOf<T>>{static_cast<BitsOf<T>>(Lane)...};
  }
  DISCEDIT_INLINE static Vector<BitsOf<T>> load_where(const T* from, Vector<BitsOf<T>> keep) {
#if defined(__AVX512F__)
    const __m512i all = as<__m512i>(keep);
    if constexpr (sizeof(T) == 2)
      return as<Vector<BitsOf<T>>>(_mm512_maskz_loadu_epi16(_mm512_movepi16_mask(all), from));
    else if constexpr (sizeof(T) == 4)
      return as<Vector<BitsOf<T>>>(_mm512_maskz_loadu_epi32(_mm512_movepi32_mask(all), from));
    else return as<Vector<BitsOf<T>>>(_mm512_maskz_loadu_epi64(_mm512_movepi64_mask(all), from));
#else
    return load<Vector<BitsOf<T>>>(from) & keep;
#endif
  }
};

// One row, block by block; `fours`: two blocks at a time, where there are two.
template <typename T, int parts, bool fours>
struct Row {
  static constexpr int registers = block_pairs / doubles;
  Vector<double> sum[registers] = {}, square[registers] = {};
  Vector<BitsOf<T>> top{}, peak = Vector<BitsOf<T>>{} + std::numeric_limits<BitsOf<T>>::min(), positive{};

  template <int blocks>
  DISCEDIT_INLINE void add(const T* from, const T* lowest) {
    if constexpr (fours && (parts & (Parts::sum | Parts::square))) {
      for (int part = 0; part < registers / 2; ++part) {
        Vector<float> x[2 * blocks];
        for (int i = 0; i < blocks; ++i) {
          const Pairs pairs = load_pairs(from + i * block, part);
          x[2 * i] = pairs.first;
          x[2 * i + 1] = pairs.second;
        }
        if constexpr (parts & Parts::sum) add_halves(sum, part, sum_of(x));
        if constexpr (parts & Parts::square) add_halves(square, part, squares_of<T>(x));
      }
    } else if constexpr (parts & (Parts::sum | Parts::square)) {
      for (int part = 0; part < registers / 2; ++part) {
        const WidePairs x = load_wide(from, part);
        for (int half = 0; half < 2; ++half) {
          if constexpr (parts & Parts::sum)
            sum[2 * part + half] = add_value<T>(sum[2 * part + half], x.first[half] + x.second[half]);
          if constexpr (parts & Parts::square)
            square[2 * part + half] += add_square<T>(x.first[half] * x.first[half], x.second[half]);
        }
      }
    }
    if constexpr (parts & ~(Parts::sum | Parts::square)) {
      for (int i = 0; i < blocks * registers_of_block<T>; ++i)
        add_raw<T, parts>(from + i * raw_lanes<T>, lowest + i * raw_lanes<T>, top, peak, positive);
    }
  }

  // `count` neighbouring elements; all but the last call of a row give an even number of whole blocks.
  DISCEDIT_INLINE void add_run(const T* from, std::int64_t count, const T* limit) {
    constexpr int blocks = fours ? 2 : 1;
    for (; count >= blocks * block; count -= blocks * block, from += blocks * block) {
      prefetch<blocks * block>(from);
      add<blocks>(from, from);
    }
    if (count >= block) {
      prefetch<block>(from);
      add<1>(from, from);
      count -= block;
      from += block;
    }
    if (count > 0) {
      prefetch<block>(from);
      const Padded<T> padded(from, static_cast<int>(count), limit, parts & Parts::peak);
      add<1>(padded.zeros, padded.lowest);
    }
  }

 private:
  template <int count>
  DISCEDIT_INLINE static void prefetch(const T* from) {
    for (std::size_t line = 0; line < count * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from) + prefetch_ahead + line);
  }
  DISCEDIT_INLINE static void add_halves(Vector<double> (&lanes)[registers], int part, Vector<float> terms) {
    lanes[2 * part] = add_value<T>(lanes[2 * part], low_half(terms));
    lanes[2 * part + 1] = add_value<T>(lanes[2 * part + 1], high_half(terms));
  }
};

// Rows beside each other, one per 64-bit lane of a register.
template <typename T, int parts>
struct Rows {
  Vector<double> sum[doubles], square[doubles];
  Vector<std::int64_t> top[doubles], peak[doubles];
  double positive[doubles];

  template <bool fours>
  DISCEDIT_INLINE void put(int lane, const Row<T, parts, fours>& row) {
    if constexpr (parts & Parts::sum) sum[lane] = folded(row.sum);
    if constexpr (parts & Parts::square) square[lane] = folded(row.square);
    if constexpr (parts & Parts::top) top[lane] = as<Vector<std::int64_t>>(row.top);
    if constexpr (parts & Parts::peak) peak[lane] = as<Vector<std::int64_t>>(row.peak);
    if constexpr (parts & Parts::positive) {
      std::int64_t count = 0;
      for (int i = 0; i < raw_lanes<T>; ++i) count += row.positive[i];
      positive[lane] = static_cast<double>(count);
    }
  }

  // As outputs `to`.. of the strip.
  DISCEDIT_INLINE void unload(Strip& strip, int to) {
    const auto plus = [](auto a, auto b) { return a + b; };
    if constexpr (parts & Parts::sum) DISCEDIT_LEVEL::store(strip.sum + to, across(sum, plus));
    if constexpr (parts & Parts::square) DISCEDIT_LEVEL::store(strip.square + to, across(square, plus));
    if constexpr (parts & Parts::top) DISCEDIT_LEVEL::store(strip.top + to, values_of<T>(greatest_of(top)));
    if constexpr (parts & Parts::peak)
      DISCEDIT_LEVEL::store(strip.peak + to, values_of<T>(ordered_lanes(greatest_of(peak))));
    if constexpr (parts & Parts::positive) std::copy(positive, positive + doubles, strip.positive + to);
  }

 private:
  template <int registers>
  DISCEDIT_INLINE static Vector<double> folded(const Vector<double> (&lanes)[registers]) {
    Vector<double> half[registers / 2];
    for (int i = 0; i < registers / 2; ++i) half[i] = lanes[i] + lanes[i + registers / 2];
    if constexpr (registers == 2) return half[0];
    else return folded(half);
  }

  DISCEDIT_INLINE static Vector<std::int64_t> ordered_lanes(Vector<std::int64_t> bits) {
    return as<Vector<std::int64_t>>(ordered<T>(as<Vector<BitsOf<T>>>(bits)));
  }
  // In the low bits of each 64-bit lane.
  DISCEDIT_INLINE static Vector<std::int64_t> greatest_of(Vector<std::int64_t>* rows) {
    using Raw = Vector<BitsOf<T>>;
    using Wide = Vector<std::int64_t>;
    const auto most = [](Wide a, Wide b) { return as<Wide>(greater_of<Raw>(as<Raw>(a), as<Raw>(b))); };
    Wide greatest = across(rows, most);
    for (int bits = 32; bits >= 8 * static_cast<int>(sizeof(T)); bits /= 2) greatest = most(greatest, greatest >> bits);
    return greatest;
  }
};

// Elements [begin, end) of the map at `map`. What is not contiguous goes through a small buffer.
template <typename T, int parts, bool fours>
DISCEDIT_INLINE void add_elements(Row<T, parts, fours>& row, const T* map, const Layout& layout, std::int64_t begin,
                                  std::int64_t end, const T* limit) {
  const std::int64_t inner = layout.inner(), stride = layout.inner_stride();
  if (layout.axes <= 1 && (stride == 1 || inner == 1)) return row.add_run(map + begin, end - begin, limit);
  constexpr int capacity = 16 * block;
  T buffer[capacity];
  int held = 0;
  for (std::int64_t index = begin; index < end;) {
    const std::int64_t along = index % inner;
    const T* from = map + layout.offset(index);
    const int count = static_cast<int>(std::min<std::int64_t>({inner - along, end - index, capacity - held}));
    if (stride == 1) std::memcpy(buffer + held, from, static_cast<std::size_t>(count) * sizeof(T));
    else
      for (int i = 0; i < count; ++i) buffer[held + i] = from[i * stride];
    held += count;
    index += count;
    if (held == capacity || index == end) {
      row.add_run(buffer, held, buffer + capacity);
      held = 0;
    }
  }
}

// Accumulators of the channels of one tile, block by block; within a block in the order of its pairs.
template <typename T>
struct Sweep {
  static constexpr int blocks = std::max(channel_tile / block, block);  // narrow maps need up to 31
  using Integer = BitsOf<T>;
  double sum[blocks][block], square[blocks][block];
  Integer top[blocks][block], peak[blocks][block], positive[blocks][block];

  template <int parts>
  DISCEDIT_INLINE void clear(int used) {
    const auto count = static_cast<std::size_t>(used);
    if constexpr (parts & Parts::sum) std::memset(sum, 0, count * sizeof sum[0]);
    if constexpr (parts & Parts::square) std::memset(square, 0, count * sizeof square[0]);
    if constexpr (parts & Parts::top) std::memset(top, 0, count * sizeof top[0]);
    if constexpr (parts & Parts::peak) std::fill(peak[0], peak[used], std::numeric_limits<Integer>::min());
    if constexpr (parts & Parts::positive) std::memset(positive, 0, count * sizeof positive[0]);
  }

  // The block at `offset` of `together` positions at once: the accumulators are loaded and stored once for all.
  template <int parts, int together, bool fours>
  DISCEDIT_INLINE void add(int index, const T* const (&position)[together], const T* const (&lowest)[together],
                           std::int64_t offset) {
    if constexpr (parts & (Parts::sum | Parts::square)) {
      for (int part = 0; part < block_pairs / singles; ++part) {
        double* sums = sum[index] + part * singles;
        double* squares = square[index] + part * singles;
        Vector<double> s[4], q[4];
        for (int i = 0; i < 4; ++i) {
          const int place = (i / 2) * block_pairs + (i % 2) * doubles;
          if constexpr (parts & Parts::sum) s[i] = load<Vector<double>>(sums + place);
          if constexpr (parts & Parts::square) q[i] = load<Vector<double>>(squares + place);
        }
        if constexpr (fours) {
          for (int p = 0; p < together; p += 4) {
            Vector<float> first[4], second[4];
            for (int i = 0; i < 4; ++i) {
              const Pairs x = load_pairs(position[p + i] + offset, part);
              first[i] = x.first;
              second[i] = x.second;
            }
            const auto add_halves = [](Vector<double>(&to)[4], Vector<float> low, Vector<float> high) {
              const Vector<double> wide[4] = {low_half(low), high_half(low), low_half(high), high_half(high)};
              for (int i = 0; i < 4; ++i) to[i] = add_value<T>(to[i], wide[i]);
            };
            if constexpr (parts & Parts::sum) add_halves(s, sum_of(first), sum_of(second));
            if constexpr (parts & Parts::square) add_halves(q, squares_of<T>(first), squares_of<T>(second));
          }
        } else {
          for (int p = 0; p < together; ++p) {
            const WidePairs x = load_wide(position[p] + offset, part);
            const Vector<double> wide[4] = {x.first[0], x.first[1], x.second[0], x.second[1]};
            for (int i = 0; i < 4; ++i) {
              if constexpr (parts & Parts::sum) s[i] = add_value<T>(s[i], wide[i]);
              if constexpr (parts & Parts::square) q[i] = add_square<T>(q[i], wide[i]);
            }
          }
        }
        for (int i = 0; i < 4; ++i) {
          const int place = (i / 2) * block_pairs + (i % 2) * doubles;
          if constexpr (parts & Parts::sum) DISCEDIT_LEVEL::store(sums + place, s[i]);
          if constexpr (parts & Parts::square) DISCEDIT_LEVEL::store(squares + place, q[i]);
        }
      }
    }
    if constexpr (parts & ~(Parts::sum | Parts::square)) {
      using Raw = Vector<Integer>;
      for (int i = 0; i < registers_of_block<T>; ++i) {
        const int lane = i * raw_lanes<T>;
        Raw most = load<Raw>(top[index] + lane), highest{}, count{};
        if constexpr (parts & Parts::peak) highest = load<Raw>(peak[index] + lane);
        if constexpr (parts & Parts::positive) count = load<Raw>(positive[index] + lane);
        for (int p = 0; p < together; ++p)
          add_raw<T, parts>(position[p] + offset + lane, lowest[p] + offset + lane, most, highest, count);
        DISCEDIT_LEVEL::store(top[index] + lane, most);
        if constexpr (parts & Parts::peak) DISCEDIT_LEVEL::store(peak[index] + lane, highest);
        if constexpr (parts & Parts::positive) DISCEDIT_LEVEL::store(positive[index] + lane, count);
      }
    }
  }

  // Block `index` as outputs `to`.. of the strip.
  template <int parts>
  DISCEDIT_INLINE void unload(int index, Strip& strip, int to) const {
    if constexpr (parts & Parts::sum) put_pairs(sum[index], strip.sum + to);
    if constexpr (parts & Parts::square) put_pairs(square[index], strip.square + to);
    for (int i = 0; i < block; ++i) {
      if constexpr (parts & Parts::top) strip.top[to + i] = value_of<T>(top[index][i]);
      if constexpr (parts & Parts::peak)
        strip.peak[to + i] = value_of<T>(static_cast<Integer>(ordered<T>(peak[index][i])));
      if constexpr (parts & Parts::positive) strip.positive[to + i] = static_cast<double>(positive[index][i]);
    }
  }

 private:
  DISCEDIT_INLINE static void put_pairs(const double* lanes, double* to) {
    for (int pair = 0; pair < block_pairs; pair += doubles) {
      const auto first = load<Vector<double>>(lanes + pair), second = load<Vector<double>>(lanes + block_pairs + pair);
      if constexpr (first_of_pair<T>(1) == 1) {
        DISCEDIT_LEVEL::store(to + pair, first);
        DISCEDIT_LEVEL::store(to + block_pairs + pair, second);
      } else {
        constexpr auto lane = std::make_index_sequence<doubles>();
        DISCEDIT_LEVEL::store(to + 2 * pair, zipped<0>(first, second, lane));
        DISCEDIT_LEVEL::store(to + 2 * pair + doubles, zipped<doubles / 2>(first, second, lane));
      }
    }
  }
  // a[from], b[from], a[from + 1], b[from + 1], ..
  template <int from, std::size_t... Lane>
  DISCEDIT_INLINE static Vector<double> zipped(Vector<double> a, Vector<double> b, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(a, b, (from + Lane / 2 + Lane % 2 * doubles)...);
  }
};

// Prefetches rows of `bytes` bytes, `stride` bytes apart, `distance` bytes ahead, in the order in which they lie in
// memory: that is what it likes best, also where several rows are read side by side.
struct Ahead {
  std::int64_t stride, gap;
  const char *end, *line;

  DISCEDIT_INLINE Ahead(const void* first, std::int64_t bytes, std::int64_t stride_bytes, std::int64_t distance)
      : stride(stride_bytes),
        gap(stride_bytes - bytes),
        end(static_cast<const char*>(first) + distance / bytes * stride_bytes + bytes),
        line(end - bytes + distance % bytes) {}

  template <int lines>
  DISCEDIT_INLINE void fetch() {
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(line);
      next();
    }
  }

 private:
  DISCEDIT_INLINE void next() {
    line += 64;
    if (line >= end) {
      line += gap;
      end += stride;
    }
  }
};

template <int parts>
constexpr int several_wide = parts == Parts::sum || parts == Parts::square ? 1 : 2;

// Positions [begin, end) of the map at `map`, whose `width` channels lie side by side, into the strip.
template <typename T, int parts, bool fours>
DISCEDIT_INLINE void sweep_positions(const T* map, const Layout& layout, int width, std::int64_t begin,
                                     std::int64_t end, Strip& strip) {
  Sweep<T> sweep;
  const auto add_padded = [&](int index, const T* from, int count) {
    const Padded<T> padded(from, count, from + count, parts & Parts::peak);
    sweep.template add<parts, 1, false>(index, {padded.zeros}, {padded.lowest}, 0);
  };

  if (width >= block) {
    // The last block reaches back over channels of the one before rather than beyond the row.
    const int blocks = (width + block - 1) / block;
    const auto offset = [&](int index) { return std::min(index * block, width - block); };
    sweep.template clear<parts>(blocks);
    const bool even = layout.axes <= 1;
    const auto at = [&](std::int64_t position) {
      return map + (even ? position * layout.inner_stride() : layout.offset(position));
    };
    std::int64_t position = begin;
    // Several positions at once spare accumulator traffic, which counts where the elements are small.
    constexpr int several = sizeof(T) > 2 ? several_wide<parts> : 8;
    const auto size = static_cast<std::int64_t>(sizeof(T));
    Ahead ahead(at(begin), width * size, (even ? layout.inner_stride() : width) * size,
                several * width * size + prefetch_ahead);
    const auto sweep_by = [&](auto count) {
      constexpr int together = decltype(count)::value;
      for (; position + together <= end; position += together) {
        const T* rows[together];
        for (int i = 0; i < together; ++i) rows[i] = at(position + i);
        for (int index = 0; index < blocks; ++index) {
          ahead.template fetch<together * block * sizeof(T) / 64>();
          sweep.template add<parts, together, fours>(index, rows, rows, offset(index));
        }
      }
    };
    sweep_by(std::integral_constant<int, several>());
    if constexpr (several > 4) sweep_by(std::integral_constant<int, 4>());
    for (; position < end; ++position) {
      const T* const row[1] = {at(position)};
      for (int index = 0; index < blocks; ++index) sweep.template add<parts, 1, false>(index, row, row, offset(index));
    }
    for (int index = 0; index < blocks; ++index) sweep.template unload<parts>(index, strip, offset(index));
    return;
  }

  // Fewer channels than a block: where positions follow each other without a gap, as many as make whole blocks count as
  // one position with that many channels; else each is padded.
  const bool dense = layout.axes == 1 && layout.inner_stride() == width;
  const int multiple = dense ? block / std::gcd(width, block) : 1;
  const int wide = width * multiple, blocks = (wide + block - 1) / block;
  sweep.template clear<parts>(blocks);
  std::int64_t position = begin;
  for (; position < end; position += multiple) {
    const T* from = map + layout.offset(position);
    const auto count = static_cast<int>(std::min<std::int64_t>(wide, (end - position) * width));
    for (int index = 0; index * block < count; ++index) {
      if (count - index * block >= block) sweep.template add<parts, 1, false>(index, {from}, {from}, index * block);
      else add_padded(index, from + index * block, count - index * block);
    }
  }
  Strip one;
  for (int index = 0; index < blocks; ++index) {
    sweep.template unload<parts>(index, one, 0);
    for (int i = 0; i < block && index * block + i < wide; ++i) {
      const int lane = index * block + i, channel = lane % width;
      for (int part = 1; part <= Parts::positive; part *= 2) {
        if (!(parts & part)) continue;
        if (lane < width) strip.of(part)[channel] = one.of(part)[i];
        else if (lane < (end - begin) * width) strip.add(part, channel, one.of(part)[i]);
      }
    }
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// How the outputs of one statistic (sample, channel) are cut: strips of neighbours, each in `spans` spans of its maps.
struct Cut {
  std::int64_t outputs, spans, span;
  bool sweeps;
  int tile;            // channels of a sweep's strip, or rows of a strip
  std::int64_t tiles;  // strips per sample, or in all

  std::int64_t strips(const Layout& layout) const { return sweeps ? layout.samples * tiles : tiles; }
};

Cut cut_of(const Layout& layout) {
  Cut cut{};
  cut.outputs = layout.samples * layout.channels;
  cut.sweeps = layout.by_columns();
  if (cut.sweeps) {
    cut.tiles = (layout.channels + channel_tile - 1) / channel_tile;
    const std::int64_t blocks = (layout.channels + block - 1) / block;
    cut.tile = static_cast<int>((blocks + cut.tiles - 1) / cut.tiles) * block;  // even tiles of whole blocks
    const std::int64_t width = std::min<std::int64_t>(cut.tile, layout.channels);
    cut.span = std::clamp<std::int64_t>(sweep_span / width / block * block, block, most_positions);
  } else {
    cut.tile = static_cast<int>(
        std::clamp<std::int64_t>(chunk_elements / std::max<std::int64_t>(1, layout.elements), 1, channel_tile));
    cut.tiles = (cut.outputs + cut.tile - 1) / cut.tile;
    cut.span = row_span;
  }
  // A rest shorter than half a span goes with the span before it.
  cut.spans = std::max<std::int64_t>(1, (layout.elements + cut.span / 2) / cut.span);
  return cut;
}

template <typename T, int parts>
void launch(const T* data, const Layout& layout, const Statistics& statistics, const Planes<double>& out, int threads) {
  const Cut cut = cut_of(layout);
  const T* const limit = data + layout.reach();
  const auto elements = static_cast<double>(layout.elements);
  // Of maps in several spans, each span's accumulators: partial[(bit of the part * spans + span) * outputs + output].
  double* partial = cut.spans > 1 ? scratch(1, static_cast<std::size_t>(5 * cut.spans * cut.outputs)) : nullptr;
  const auto place = [&](int part, std::int64_t span) {
    return partial + (__builtin_ctz(static_cast<unsigned>(part)) * cut.spans + span) * cut.outputs;
  };
  const auto first_output = [&](std::int64_t strip) {
    if (!cut.sweeps) return strip * cut.tile;
    return strip / cut.tiles * layout.channels + strip % cut.tiles * cut.tile;
  };
  const auto width_of = [&](std::int64_t strip) {
    const std::int64_t left =
        cut.sweeps ? layout.channels - strip % cut.tiles * cut.tile : cut.outputs - strip * cut.tile;
    return static_cast<int>(std::min<std::int64_t>(cut.tile, left));
  };
  // Elements [from, to) of the maps of `width` outputs.
  const auto accumulate = [&](auto fours, Strip& strip, std::int64_t output, int width, std::int64_t from,
                              std::int64_t to) {
    constexpr bool by_four = decltype(fours)::value;
    std::int64_t channel = output % layout.channels;
    const T* sample = data + output / layout.channels * layout.sample_stride;
    if (cut.sweeps) return sweep_positions<T, parts, by_four>(sample + channel, layout, width, from, to, strip);
    Rows<T, parts> rows{};
    for (int i = 0; i < width; ++i) {
      Row<T, parts, by_four> row;
      add_elements(row, sample + channel * layout.channel_stride, layout, from, to, limit);
      rows.put(i % doubles, row);
      if (i % doubles == doubles - 1 || i == width - 1) rows.unload(strip, i / doubles * doubles);
      if (++channel == layout.channels) {
        channel = 0;
        sample += layout.sample_stride;
      }
    }
  };
  const auto finish_all = [&](const Strip& strip, std::int64_t output, int width) {
    for (int from = 0, to; from < width; from = to) {
      const std::int64_t sample = (output + from) / layout.channels, channel = (output + from) % layout.channels;
      to = out.row == layout.channels
               ? width
               : static_cast<int>(std::min<std::int64_t>(width, from + layout.channels - channel));
      finish(strip, from, to, elements, statistics, out.data + sample * out.row + channel, out.plane);
    }
  };
  const std::int64_t strips = cut.strips(layout);
  const std::int64_t work = std::max<std::int64_t>(1, std::min(cut.span, layout.elements) * cut.tile);

  parallel_for(strips * cut.spans, chunk_elements / work, threads, [&](std::int64_t begin, std::int64_t end) {
    Strip strip;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t index = item / cut.spans, span = item % cut.spans;
      const std::int64_t from = span * cut.span;
      const std::int64_t to = span + 1 == cut.spans ? layout.elements : from + cut.span;
      const std::int64_t output = first_output(index);
      const int width = width_of(index);
      accumulate(std::bool_constant<in_fours<T>>(), strip, output, width, from, to);
      if constexpr (std::is_same_v<T, BFloat16>) {
        std::int64_t doubts = 0;
        for (int i = 0; i < width; ++i) doubts |= doubtful<parts>(strip, i);
        if (doubts) {
          Strip exact;
          accumulate(std::false_type(), exact, output, width, from, to);
          for (int i = 0; i < width; ++i) {
            doubts = doubtful<parts>(strip, i);
            if (doubts & Parts::sum) strip.sum[i] = exact.sum[i];
            if (doubts & Parts::square) strip.square[i] = exact.square[i];
          }
        }
      }
      if (!partial) {
        finish_all(strip, output, width);
      } else {
        for (int part = 1; part <= Parts::positive; part *= 2)
          if (parts & part) std::memcpy(place(part, span) + output, strip.of(part), sizeof(double) * width);
      }
    }
  });
  if (!partial) return;

  parallel_for(strips, chunk_elements / cut.spans / cut.tile, threads, [&](std::int64_t begin, std::int64_t end) {
    Strip strip;
    for (std::int64_t index = begin; index < end; ++index) {
      const std::int64_t output = first_output(index);
      const int width = width_of(index);
      for (int part = 1; part <= Parts::positive; part *= 2) {
        if (!(parts & part)) continue;
        std::memcpy(strip.of(part), place(part, 0) + output, sizeof(double) * width);
        for (std::int64_t span = 1; span < cut.spans; ++span)
          for (int i = 0; i < width; ++i) strip.add(part, i, place(part, span)[output + i]);
      }
      finish_all(strip, output, width);
    }
  });
}

// One kernel for each usual set of accumulators; any other set runs in the next larger.
template <typename T>
void launch(const TensorView& x, int channel_axis, const Statistics& statistics, const Planes<double>& out,
            int threads) {
  const T* data = static_cast<const T*>(x.data);
  const Layout layout = layout_of(x, channel_axis);
  constexpr int squares = Parts::square | (std::is_same_v<T, BFloat16> ? Parts::top : 0);  // to tell what is doubtful
  constexpr int sums = Parts::sum | squares, all = 31;
  const int parts = parts_of(statistics);
  const auto fits = [&](int kernel) { return (parts & ~kernel) == 0; };
  if (fits(Parts::sum)) return launch<T, Parts::sum>(data, layout, statistics, out, threads);
  if (fits(squares)) return launch<T, squares>(data, layout, statistics, out, threads);
  if (fits(sums)) return launch<T, sums>(data, layout, statistics, out, threads);
  if (fits(Parts::top)) return launch<T, Parts::top>(data, layout, statistics, out, threads);
  if (fits(sums | Parts::top)) return launch<T, sums | Parts::top>(data, layout, statistics, out, threads);
  return launch<T, all>(data, layout, statistics, out, threads);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

void pool(const TensorView& x, int channel_axis, const Statistics& statistics, const Planes<double>& out, int threads) {
  switch (x.dtype) {
    case DType::float32: return launch<float>(x, channel_axis, statistics, out, threads);
    case DType::float64: return launch<double>(x, channel_axis, statistics, out, threads);
    case DType::bfloat16: return launch<BFloat16>(x, channel_axis, statistics, out, threads);
    case DType::float16: return launch<Float16>(x, channel_axis, statistics, out, threads);
    default:
      throw std::invalid_argument(std::string("pool: x must be float16, bfloat16, float32 or float64, got ") +
                                  name(x.dtype) + ".");
  }
}

}  // namespace discedit::DISCEDIT_LEVEL
