// Errors that say what was expected and what came, with the op's name. Host code.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>
#include <vector>

namespace nk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(type);
  }
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ")";
  return out.str();
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Returns whether `x` has a shape and no memory.
inline bool is_meta(const Tensor& x) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  return device_type == aoti_torch_device_type_meta();
}

// Throws unless `t` has this shape and type and lies on x's device.
inline void check_like(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                       ScalarType type, const Tensor& x) {
  STD_TORCH_CHECK(shape_of(t) == shape, op, ": ", name, ": expected shape ", text(shape), ", got ", text(shape_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, ": expected ", name_of(type), ", got ",
                  name_of(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), op, ": ", name, ": expected a tensor on the device of the data, index ",
                  x.get_device_index(), ", got one on device index ", t.get_device_index());
}

// Throws unless `x` is (N, C, *) and its channels fall into groups of d.
inline void check_data(const char* op, const char* name, const Tensor& x, int64_t d) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": ", name, ": expected shape (N, C) or (N, C, *), got ", text(shape_of(x)));
  STD_TORCH_CHECK(d >= 1 && x.size(1) >= 1 && x.size(1) % d == 0, op, ": expected a group size that divides the ",
                  x.size(1), " channels, got ", d);
}

}  // namespace nk
