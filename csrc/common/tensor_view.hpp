// A borrowed strided array: what the bindings hand to the ops. Owns nothing, knows nothing of torch or NumPy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace discedit {

enum class DType { float16, bfloat16, float32, float64, int64 };

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::int64: return "int64";
  }
  return "unknown";
}

struct TensorView {
  static constexpr int max_axes = 8;

  void* data = nullptr;
  DType dtype = DType::float32;
  int axes = 0;
  std::int64_t shape[max_axes] = {};
  std::int64_t stride[max_axes] = {};  // in elements, may be 0 or negative

  std::int64_t size() const {
    std::int64_t total = 1;
    for (int axis = 0; axis < axes; ++axis) total *= shape[axis];
    return total;
  }

  bool contiguous() const {
    if (size() == 0) return true;
    std::int64_t expected = 1;
    for (int axis = axes - 1; axis >= 0; --axis) {
      if (shape[axis] != 1 && stride[axis] != expected) return false;
      expected *= shape[axis];
    }
    return true;
  }

  std::string shape_text() const {
    std::string text = "(";
    for (int axis = 0; axis < axes; ++axis) {
      if (axis) text += ", ";
      text += std::to_string(shape[axis]);
    }
    return text + (axes == 1 ? ",)" : ")");
  }
};

// Typed pointer to an array that must be contiguous, of the given type and number of elements.
template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<std::int64_t> {
  static constexpr DType value = DType::int64;
};

template <typename T>
T* contiguous_data(const TensorView& view, std::int64_t size, const char* op, const char* argument) {
  if (view.dtype != DTypeOf<T>::value)
    throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + name(DTypeOf<T>::value) + ", got " +
                                name(view.dtype) + ".");
  if (view.size() != size)
    throw std::invalid_argument(std::string(op) + ": " + argument + " must hold " + std::to_string(size) +
                                " elements, got shape " + view.shape_text() + ".");
  if (!view.contiguous())
    throw std::invalid_argument(std::string(op) + ": " + argument +
                                " must be contiguous, got strides of a view of shape " + view.shape_text() + ".");
  return static_cast<T*>(view.data);
}

}  // namespace discedit
