// Module discedit._cuda: CUDA arrays in, arrays written in place on the caller's stream, without waiting. As in
// cpu.cpp, shapes are checked here, and Python owns every output and all working memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/bounds.hpp"
#include "../cuda/class_moments.hpp"
#include "../cuda/device.hpp"
#include "../cuda/merge_moments.hpp"
#include "../cuda/one_vs_rest.hpp"
#include "../cuda/pairwise_min.hpp"
#include "../cuda/patch_moments.hpp"
#include "../cuda/pool.hpp"
#include "arguments.hpp"

namespace discedit {
namespace {

cuda::Stream stream_of(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

struct DeviceArray : Array {
  DeviceArray(const py::object& source, const char* op, const char* argument, bool written = false)
      : Array(source, op, argument, written, Memory::device) {}
};
struct DeviceState : State {
  DeviceState(const py::tuple& arrays, const char* op, bool written) : State(arrays, op, written, Memory::device) {}
};

// Working memory: None where none is needed, else at least `size` float64.
class Scratch {
 public:
  Scratch(const py::object& source, std::int64_t size, const Array& beside, const char* op) {
    if (size == 0 && source.is_none()) return;
    array_.emplace(source, op, "scratch", true);
    const TensorView& view = array_->view;
    if (view.size() < size)
      throw py::value_error(std::string(op) + ": scratch must hold at least " + std::to_string(size) +
                            " elements, got shape " + view.shape_text() + ".");
    data = contiguous_data<double>(view, view.size(), op, "scratch");
    if (size > 0) common_device(op, {&beside, &*array_});
  }
  double* data = nullptr;

 private:
  std::optional<DeviceArray> array_;
};

void bind_pool(const py::object& x, int channel_axis, const py::sequence& statistics, const py::object& out,
               const py::object& scratch, std::uintptr_t stream) {
  const char* op = "pool";
  const DeviceArray map(x, op, "x"), result(out, op, "out", true);
  check_map(map.view, channel_axis, op);
  const Statistics wanted = statistics_named(statistics, op);
  const std::int64_t plane = map.view.shape[0] * map.view.shape[channel_axis];
  double* data = contiguous_data<double>(result.view, wanted.count * plane, op, "out");
  const int device = common_device(op, {&map, &result});
  const Scratch memory(scratch, cuda::pool_scratch(map.view, channel_axis), map, op);
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  cuda::pool(map.view, channel_axis, wanted, data, memory.data, stream_of(stream));
}

std::int64_t bind_pool_scratch(const py::object& x, int channel_axis, const py::sequence& statistics) {
  const DeviceArray map(x, "pool", "x");
  check_map(map.view, channel_axis, "pool");
  statistics_named(statistics, "pool");
  return cuda::pool_scratch(map.view, channel_axis);
}

void bind_fold_moments(const py::object& pooled, double scale, const py::object& labels, const py::object& order,
                       const py::tuple& state, std::uintptr_t stream) {
  const char* op = "fold_moments";
  const DeviceArray features(pooled, op, "pooled"), classes(labels, op, "labels");
  const DeviceState into(state, op, true);
  if (features.view.axes != 3)
    throw py::value_error("fold_moments: pooled must have shape (statistics, samples, channels), got " +
                          features.view.shape_text() + ".");
  check_state(into, features.view.shape[2], features.view.shape[0], op);
  const std::int64_t samples = features.view.shape[1];
  const auto* data = contiguous_data<double>(features.view, features.view.size(), op, "pooled");
  const Labels given{contiguous_data<std::int64_t>(classes.view, samples, op, "labels"), samples};
  const int device = common_device(op, {&features, &classes, &into.count()});
  std::optional<DeviceArray> sorted;
  const std::int64_t* by_class = nullptr;
  if (!order.is_none()) {
    sorted.emplace(order, op, "order");
    by_class = contiguous_data<std::int64_t>(sorted->view, samples, op, "order");
    common_device(op, {&features, &*sorted});
  }
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  if (into.vector()) cuda::fold_vector_moments(data, given, by_class, *into.vector(), stream_of(stream));
  else cuda::fold_moments(data, scale, given, by_class, into.scalar(), stream_of(stream));
}

void bind_merge_moments(const py::tuple& into, const py::tuple& other, std::uintptr_t stream) {
  const char* op = "merge_moments";
  const DeviceState a(into, op, true), b(other, op, false);
  if (a.classes != b.classes || a.channels != b.channels || a.dimension() != b.dimension())
    throw py::value_error("merge_moments: the states must have the same kind and shape.");
  const int device = common_device(op, {&a.count(), &b.count()});
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  if (a.vector()) cuda::merge_vector_moments(*a.vector(), *b.vector(), stream_of(stream));
  else cuda::merge_moments(a.scalar(), b.scalar(), stream_of(stream));
}

// Positions must be in range, which is not looked at here.
void bind_patch_moments(const py::object& x, Pair kernel, Pair stride, std::array<int, 4> padding, Pair dilation,
                        const py::object& positions, const py::object& mean, const py::object& scatter,
                        const py::object& scratch, std::uintptr_t stream) {
  const char* op = "patch_moments";
  const DeviceArray map(x, op, "x"), means(mean, op, "mean", true), scatters(scatter, op, "scatter", true);
  const Patches patches(map.view, kernel, stride, padding, dilation, op);
  const std::int64_t taps = patches.rows.kernel * patches.columns.kernel, channels = map.view.shape[1];
  const int device = common_device(op, {&map, &means, &scatters});
  std::optional<DeviceArray> chosen;
  Positions places{nullptr, patches.positions()};
  if (!positions.is_none()) {
    chosen.emplace(positions, op, "positions");
    places = {contiguous_data<std::int64_t>(chosen->view, chosen->view.size(), op, "positions"), chosen->view.size()};
    common_device(op, {&map, &*chosen});
  }
  double* first = contiguous_data<double>(means.view, channels * taps, op, "mean");
  double* second = contiguous_data<double>(scatters.view, channels * taps * taps, op, "scatter");
  const std::int64_t size = cuda::patch_moments_scratch(map.view, patches.rows, patches.columns, places.count);
  const Scratch memory(scratch, size, map, op);
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  cuda::patch_moments(map.view, patches.rows, patches.columns, places, first, second, memory.data, stream_of(stream));
}

std::int64_t bind_patch_moments_scratch(const py::object& x, Pair kernel, Pair stride, std::array<int, 4> padding,
                                        Pair dilation, std::optional<std::int64_t> positions) {
  const DeviceArray map(x, "patch_moments", "x");
  const Patches patches(map.view, kernel, stride, padding, dilation, "patch_moments");
  return cuda::patch_moments_scratch(map.view, patches.rows, patches.columns, positions.value_or(patches.positions()));
}

std::int64_t bind_one_vs_rest_scratch(const py::tuple& state) {
  const DeviceState moments(state, "one_vs_rest", false);
  return cuda::one_vs_rest_scratch(moments.dimension(), moments.classes, moments.channels);
}

void bind_one_vs_rest(const py::tuple& state, const std::string& bound, const std::string& witness,
                      const py::object& out, const py::object& scratch, std::uintptr_t stream) {
  const char* op = "one_vs_rest";
  const DeviceState moments(state, op, false);
  const DeviceArray result(out, op, "out", true);
  double* data = contiguous_data<double>(result.view, moments.classes * moments.channels, op, "out");
  const Bound which = bound_named(bound);
  const Witness features = witness_named(witness, moments, op);
  const int device = common_device(op, {&moments.count(), &result});
  const std::int64_t size = cuda::one_vs_rest_scratch(moments.dimension(), moments.classes, moments.channels);
  const Scratch memory(scratch, size, result, op);
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  if (moments.vector()) cuda::one_vs_rest_vector(*moments.vector(), which, data, memory.data, stream_of(stream));
  else cuda::one_vs_rest(moments.scalar(), which, features, data, memory.data, stream_of(stream));
}

std::int64_t bind_pairwise_min_scratch(const py::tuple& state) {
  const DeviceState moments(state, "pairwise_min", false);
  return cuda::pairwise_min_scratch(moments.classes, moments.channels);
}

void bind_pairwise_min(const py::tuple& state, const std::string& bound, const std::string& witness,
                       const py::object& values, const py::object& pairs, const py::object& scratch,
                       std::uintptr_t stream) {
  const char* op = "pairwise_min";
  const DeviceState moments(state, op, false);
  const DeviceArray smallest(values, op, "values", true), classes(pairs, op, "pairs", true);
  double* value = contiguous_data<double>(smallest.view, moments.channels, op, "values");
  auto* pair = contiguous_data<std::int64_t>(classes.view, 2 * moments.channels, op, "pairs");
  const Bound which = bound_named(bound);
  const Witness features = witness_named(witness, moments, op);
  const int device = common_device(op, {&moments.count(), &smallest, &classes});
  const Scratch memory(scratch, cuda::pairwise_min_scratch(moments.classes, moments.channels), smallest, op);
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  if (moments.vector())
    cuda::pairwise_min_vector(*moments.vector(), which, value, pair, memory.data, stream_of(stream));
  else cuda::pairwise_min(moments.scalar(), which, features, value, pair, memory.data, stream_of(stream));
}

void bind_bound(const std::string& bound, const py::object& mean1, const py::object& cov1, const py::object& mean2,
                const py::object& cov2, const py::object& out, std::uintptr_t stream) {
  const char* op = "bound";
  const Bound which = bound_named(bound);
  const ExplicitLaws laws(mean1, cov1, mean2, cov2, op, cuda::most_dimensions, Memory::device);
  const DeviceArray result(out, op, "out", true);
  double* data = contiguous_data<double>(result.view, laws.pairs, op, "out");
  const Array* of = laws.arrays;
  const int device = common_device(op, {&of[0], &of[1], &of[2], &of[3], &result});
  const py::gil_scoped_release release;
  const cuda::OnDevice current(device, op);
  cuda::batched_bound(which, laws.pairs, laws.d, laws.mean1, laws.cov1, laws.mean2, laws.cov2, data, stream_of(stream));
}

}  // namespace
}  // namespace discedit

#if !defined(DISCEDIT_MODULE)
#define DISCEDIT_MODULE _cuda
#endif

PYBIND11_MODULE(DISCEDIT_MODULE, module) {
  using namespace discedit;
  const auto stream = py::arg("stream");
  module.doc() =
      "CUDA core of discedit. Takes DLPack of CUDA memory, writes into arrays that the caller owns, on the stream "
      "given "
      "as an integer (a cudaStream_t), and does not wait for it.";
  module.def("pool", &bind_pool, py::arg("x"), py::arg("channel_axis"), py::arg("statistics"), py::arg("out"),
             py::arg("scratch"), stream);
  module.def("pool_scratch", &bind_pool_scratch, py::arg("x"), py::arg("channel_axis"), py::arg("statistics"),
             "Number of float64 that the scratch of such a call must hold; 0: it may be None.");
  module.def("fold_moments", &bind_fold_moments, py::arg("pooled"), py::arg("scale"), py::arg("labels"),
             py::arg("order"), py::arg("state"), stream);
  module.def("merge_moments", &bind_merge_moments, py::arg("into"), py::arg("other"), stream);
  module.def("patch_moments", &bind_patch_moments, py::arg("x"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("positions"), py::arg("mean"), py::arg("scatter"),
             py::arg("scratch"), stream);
  module.def("patch_moments_scratch", &bind_patch_moments_scratch, py::arg("x"), py::arg("kernel"), py::arg("stride"),
             py::arg("padding"), py::arg("dilation"), py::arg("positions"),
             "As pool_scratch, for so many positions; None: all.");
  module.def("one_vs_rest", &bind_one_vs_rest, py::arg("state"), py::arg("bound"), py::arg("witness"), py::arg("out"),
             py::arg("scratch"), stream);
  module.def("one_vs_rest_scratch", &bind_one_vs_rest_scratch, py::arg("state"));
  module.def("pairwise_min", &bind_pairwise_min, py::arg("state"), py::arg("bound"), py::arg("witness"),
             py::arg("values"), py::arg("pairs"), py::arg("scratch"), stream);
  module.def("pairwise_min_scratch", &bind_pairwise_min_scratch, py::arg("state"));
  module.def("bound", &bind_bound, py::arg("bound"), py::arg("mean1"), py::arg("cov1"), py::arg("mean2"),
             py::arg("cov2"), py::arg("out"), stream);
}
