// Borrows a TensorView from anything that speaks DLPack, a capsule of it, or a NumPy array (read-only ones too), for
// one call.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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
constexpr std::int32_t cpu = 1, cuda_host = 3;
constexpr std::uint8_t signed_integer = 0, ieee_float = 2, brain_float = 4;
}  // namespace dlpack

class Array {
 public:
  TensorView view;

  Array(const py::object& source, const char* op, const char* argument, bool written = false) {
    if (py::isinstance<py::array>(source)) from_numpy(py::reinterpret_borrow<py::array>(source), op, argument, written);
    else if (py::isinstance<py::capsule>(source)) from_capsule(source, op, argument);
    else if (py::hasattr(source, "__dlpack__")) from_capsule(source.attr("__dlpack__")(), op, argument);
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
  dlpack::Managed* managed_ = nullptr;
  py::object keep_;

  [[noreturn]] static void refuse(const char* op, const char* argument, const std::string& why) {
    throw py::value_error(std::string(op) + ": " + argument + " " + why + ".");
  }

  void set_axes(const char* op, const char* argument, std::int64_t axes) {
    if (axes > TensorView::max_axes)
      refuse(op, argument, "has " + std::to_string(axes) + " axes; at most 8 are supported");
    view.axes = static_cast<int>(axes);
  }

  void from_numpy(const py::array& array, const char* op, const char* argument, bool written) {
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
    if (tensor.device.type != dlpack::cpu && tensor.device.type != dlpack::cuda_host)
      refuse(op, argument, "must be in CPU memory, got DLPack device type " + std::to_string(tensor.device.type));
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

}  // namespace discedit
