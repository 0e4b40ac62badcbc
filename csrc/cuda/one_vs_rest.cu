// One-vs-rest bounds of every (channel, class): linear in the number of classes, and nothing is ever subtracted. Split
// of work: classes in chunks, one thread for each (chunk, channel). First every chunk merges its classes from behind,
// keeping each suffix; then one thread for each channel merges the chunks to what lies before and after each; last,
// every chunk runs forward over its classes, with the merge of all those before at hand.
#include "one_vs_rest.hpp"

#include "law.hpp"

namespace discedit::cuda {
namespace {

// ---- traits ---------------------------------------------------------------------------------------------------------

constexpr int threads = 128;
constexpr int chunk = 16;  // classes

int capacity_of(int dimension) { return dimension <= 4 ? dimension : max_vector; }

// Laws in scratch: number `i` of law `row` at data[(row * fields + i) * channels + channel]. Rows: the suffix of every
// class within its chunk, what lies before each chunk, what lies behind it.
template <typename Kind>
struct Rows {
  double* data;
  std::int64_t classes, channels, chunks;

  __device__ __forceinline__ std::int64_t before(std::int64_t part) const { return classes + part; }
  __device__ __forceinline__ std::int64_t behind(std::int64_t part) const { return classes + chunks + part; }

  __device__ __forceinline__ typename Kind::Law load(const Kind& kind, std::int64_t row, std::int64_t channel) const {
    typename Kind::Law law;
    const double* from = data + row * Kind::fields * channels + channel;
    kind.each(law, [&](int i, double& value) { value = from[i * channels]; });
    return law;
  }
  __device__ __forceinline__ void store(const Kind& kind, const typename Kind::Law& law, std::int64_t row,
                                        std::int64_t channel) const {
    double* to = data + row * Kind::fields * channels + channel;
    kind.each(law, [&](int i, double value) { to[i * channels] = value; });
  }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename Body>
__device__ __forceinline__ void over_items(std::int64_t size, const Body& body) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < size; i += step) body(i);
}

// occupancy: 2 blocks of 128 threads per SM
// local memory: 384 bytes per thread
template <typename Kind>
__global__ void __launch_bounds__(threads, 2) merge_suffixes(Kind kind, Rows<Kind> rows) {
  over_items(rows.chunks * rows.channels, [&](std::int64_t item) {
    const std::int64_t part = item / rows.channels, channel = item % rows.channels;
    const std::int64_t first = part * chunk, last = first + chunk < rows.classes ? first + chunk : rows.classes;
    typename Kind::Law suffix;
    for (std::int64_t cls = last; cls-- > first;) {
      suffix = kind.merged(suffix, kind.load(cls, channel));
      rows.store(kind, suffix, cls, channel);
    }
  });
}

// occupancy: 2 blocks of 128 threads per SM
template <typename Kind>
__global__ void __launch_bounds__(threads, 2) merge_chunks(Kind kind, Rows<Kind> rows) {
  over_items(2 * rows.channels, [&](std::int64_t item) {
    const bool forward = item < rows.channels;
    const std::int64_t channel = forward ? item : item - rows.channels;
    typename Kind::Law merged;
    for (std::int64_t i = 0; i < rows.chunks; ++i) {
      const std::int64_t part = forward ? i : rows.chunks - 1 - i;
      rows.store(kind, merged, forward ? rows.before(part) : rows.behind(part), channel);
      merged = kind.merged(merged, rows.load(kind, part * chunk, channel));
    }
  });
}

// Neighbouring lanes write `classes` apart, a whole sector of the output each in the course of a chunk.
// occupancy: 2 blocks of 128 threads per SM
// local memory: 1536 bytes per thread
template <typename Kind>
__global__ void __launch_bounds__(threads, 2) compare(Kind kind, Rows<Kind> rows, Bound bound, double* out) {
  over_items(rows.chunks * rows.channels, [&](std::int64_t item) {
    const std::int64_t part = item / rows.channels, channel = item % rows.channels;
    const std::int64_t first = part * chunk, last = first + chunk < rows.classes ? first + chunk : rows.classes;
    typename Kind::Law before = rows.load(kind, rows.before(part), channel);
    for (std::int64_t cls = first; cls < last; ++cls) {
      typename Kind::Law rest = rows.load(kind, rows.behind(part), channel);
      if (cls + 1 < last) rest = kind.merged(rows.load(kind, cls + 1, channel), rest);
      rest = kind.merged(before, rest);
      const typename Kind::Law own = kind.load(cls, channel);
      const bool both = own.n > 0 && rest.n > 0;
      out[channel * rows.classes + cls] = both ? kind.between(bound, own, rest) : not_a_number;
      before = kind.merged(before, own);
    }
  });
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <typename Kind>
void run(const Kind& kind, Bound bound, double* out, double* scratch, Stream stream) {
  constexpr const char* op = "one_vs_rest";
  const std::int64_t classes = kind.state.classes, channels = kind.state.channels, chunks = ceil_div(classes, chunk);
  const Rows<Kind> rows{scratch, classes, channels, chunks};
  const std::int64_t blocks = ceil_div(chunks * channels, threads);
  launch(op, merge_suffixes<Kind>, blocks, threads, stream, kind, rows);
  if (blocks > 0) launch(op, merge_chunks<Kind>, ceil_div(2 * channels, threads), threads, stream, kind, rows);
  launch(op, compare<Kind>, blocks, threads, stream, kind, rows, bound, out);
}

}  // namespace

// ---- dispatch -------------------------------------------------------------------------------------------------------

std::int64_t one_vs_rest_scratch(int dimension, std::int64_t classes, std::int64_t channels) {
  const int size = capacity_of(dimension), fields = dimension ? 1 + size + lower(size, 0) : 5;
  return (classes + 2 * ceil_div(classes, chunk)) * fields * channels;
}

void one_vs_rest(const MomentState& state, Bound bound, Witness witness, double* out, double* scratch, Stream stream) {
  if (witness == Witness::linear) return run(ScalarLaw<Witness::linear>{state}, bound, out, scratch, stream);
  return run(ScalarLaw<Witness::quadratic>{state}, bound, out, scratch, stream);
}

void one_vs_rest_vector(const VectorState& state, Bound bound, double* out, double* scratch, Stream stream) {
  switch (state.dimension) {
    case 1: return run(VectorLaw<1>{state}, bound, out, scratch, stream);
    case 2: return run(VectorLaw<2>{state}, bound, out, scratch, stream);
    case 3: return run(VectorLaw<3>{state}, bound, out, scratch, stream);
    case 4: return run(VectorLaw<4>{state}, bound, out, scratch, stream);
    default: return run(VectorLaw<max_vector>{state}, bound, out, scratch, stream);
  }
}

}  // namespace discedit::cuda
