// Borrows a TensorView from anything that speaks DLPack, a capsule of it, or a NumPy array (read-only ones too), for
// one call.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "../common/tensor_view.hpp"

namespace discedit {

namespace py = pybind11;

// The DLPack C structures, as its specification lays them out (version 0.x capsules, named "dltensor").
namespace dlpack {
struct Device {
  std::int32_t type, id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t axes;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
constexpr std::int32_t cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13;
constexpr std::uint8_t signed_integer = 0, ieee_float = 2, brain_float = 4;
}  // namespace dlpack

// Where an op needs its arrays.
enum class Memory { host, device };

class Array {
 public:
  TensorView view;
  const char* name;  // of the argument
  int device = 0;    // number among those of its kind

  Array(const py::object& source, const char* op, const char* argument, bool written = false,
        Memory memory = Memory::host)
      : name(argument), memory_(memory) {
    if (py::isinstance<py::array>(source)) from_numpy(py::reinterpret_borrow<py::array>(source), op, argument, written);
    else if (py::isinstance<py::capsule>(source)) from_capsule(source, op, argument);
    else if (py::hasattr(source, "__dlpack__")) from_capsule(exported(source), op, argument);
    else
      throw py::type_error(std::string(op) + ": " + argument + " must be a NumPy array or support DLPack, got " +
                           std::string(py::str(py::type::handle_of(source).attr("__name__"))) + ".");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    if (managed_ && managed_->deleter) managed_->deleter(managed_);
  }

 private:
  Memory memory_;
  dlpack::Managed* managed_ = nullptr;
  py::object keep_;

  // The CUDA kernels compiled for the host (tests/cuda_on_host) run on its memory.
  bool on_device() const {
#if defined(DISCEDIT_CUDA_ON_HOST)
    return false;
#else
    return memory_ == Memory::device;
#endif
  }

  [[noreturn]] static void refuse(const char* op, const char* argument, const std::string& why) {
    throw py::value_error(std::string(op) + ": " + argument + " " + why + ".");
  }

  // -1: the exporter must not wait for a stream; work on the caller's stream comes after what wrote the tensor there.
  py::object exported(const py::object& source) const {
    if (!on_device()) return source.attr("__dlpack__")();
    return source.attr("__dlpack__")(py::arg("stream") = -1);
  }

  void set_axes(const char* op, const char* argument, std::int64_t axes) {
    if (axes > TensorView::max_axes)
      refuse(op, argument, "has " + std::to_string(axes) + " axes; at most 8 are supported");
    view.axes = static_cast<int>(axes);
  }

  void from_numpy(const py::array& array, const char* op, const char* argument, bool written) {
    if (on_device()) refuse(op, argument, "must be in CUDA memory, got a NumPy array");
    const py::dtype dtype = array.dtype();
    const char order = dtype.byteorder();
    if (order != '=' && order != '|') refuse(op, argument, "must have native byte order");
    const char kind = dtype.kind();
    const auto bytes = static_cast<std::int64_t>(dtype.itemsize());
    if (kind == 'f' && bytes == 2) view.dtype = DType::float16;
    else if (kind == 'f' && bytes == 4) view.dtype = DType::float32;
    else if (kind == 'f' && bytes == 8) view.dtype = DType::float64;
    else if (kind == 'i' && bytes == 8) view.dtype = DType::int64;
    else refuse(op, argument, "has the unsupported type " + std::string(py::str(dtype)));
    if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
      refuse(op, argument, "must be aligned to its element type; copy it first");
    if (written && !array.writeable()) refuse(op, argument, "is written to and must not be read-only");
    set_axes(op, argument, array.ndim());
    for (int axis = 0; axis < view.axes; ++axis) {
      view.shape[axis] = array.shape(axis);
      if (array.strides(axis) % bytes != 0)
        refuse(op, argument, "has a stride that is no whole number of elements; copy it first");
      view.stride[axis] = array.strides(axis) / bytes;
    }
    view.data = const_cast<void*>(array.data());
    keep_ = array;
  }

  void from_capsule(const py::object& capsule, const char* op, const char* argument) {
    managed_ = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed_) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // ours to delete now
    try {
      read(managed_->tensor, op, argument);
    } catch (...) {
      if (managed_->deleter) managed_->deleter(managed_);
      throw;
    }
  }

  void read(const dlpack::Tensor& tensor, const char* op, const char* argument) {
    const std::int32_t kind = tensor.device.type;
    const bool host = kind == dlpack::cpu || kind == dlpack::cuda_host;
    const bool on_gpu = kind == dlpack::cuda || kind == dlpack::cuda_managed;
    if (memory_ == Memory::host && !host)
      refuse(op, argument, "must be in CPU memory, got DLPack device type " + std::to_string(kind));
    if (memory_ == Memory::device && !on_gpu && !(host && !on_device()))
      refuse(op, argument, "must be in CUDA memory, got DLPack device type " + std::to_string(kind));
    device = tensor.device.id;
    const dlpack::DataType type = tensor.dtype;
    if (type.lanes != 1) refuse(op, argument, "must have scalar elements");
    if (type.code == dlpack::ieee_float && type.bits == 16) view.dtype = DType::float16;
    else if (type.code == dlpack::ieee_float && type.bits == 32) view.dtype = DType::float32;
    else if (type.code == dlpack::ieee_float && type.bits == 64) view.dtype = DType::float64;
    else if (type.code == dlpack::brain_float && type.bits == 16) view.dtype = DType::bfloat16;
    else if (type.code == dlpack::signed_integer && type.bits == 64) view.dtype = DType::int64;
    else
      refuse(op, argument,
             "has an unsupported type (DLPack code " + std::to_string(type.code) + ", " + std::to_string(type.bits) +
                 " bits)");
    set_axes(op, argument, tensor.axes);
    std::int64_t packed = 1;
    for (int axis = view.axes - 1; axis >= 0; --axis) {
      view.shape[axis] = tensor.shape[axis];
      view.stride[axis] = tensor.strides ? tensor.strides[axis] : packed;
      packed *= tensor.shape[axis];
    }
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  }
};

// The device that all arrays of a call lie on.
inline int common_device(const char* op, std::initializer_list<const Array*> arrays) {
  const Array& first = **arrays.begin();
  for (const Array* other : arrays)
    if (other->device != first.device)
      throw py::value_error(std::string(op) + ": " + first.name + " and " + other->name +
                            " must be on the same device, got cuda:" + std::to_string(first.device) +
                            " and cuda:" + std::to_string(other->device) + ".");
  return first.device;
}

}  // namespace discedit
