// Tensors as kernels take them. Host code, against LibTorch's stable ABI only: one build survives an upgrade of torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "columns.h"

namespace nk {

// LibTorch's number of a type that ops allocate.
inline int32_t code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      STD_TORCH_CHECK(false, "expected a type that ops allocate, got ", name_of(type));
  }
}

inline Tensor empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType type,
                    const Tensor& like) {
  AtenTensorHandle handle;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), code_of(type),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return empty(shape, strides, type, like);
}

inline bool channels_innermost(const Tensor& x) {
  return x.dim() > 2 && x.size(1) > 1 && x.stride(1) == 1;
}

// Returns an uninitialized tensor of x's type, with its channels innermost or its positions.
inline Tensor empty_output(const Tensor& x, const std::vector<int64_t>& spatial, bool inner) {
  std::vector<int64_t> shape{x.size(0), x.size(1)};
  shape.insert(shape.end(), spatial.begin(), spatial.end());
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  const auto place = [&](size_t dim) { strides[dim] = step, step *= std::max<int64_t>(shape[dim], 1); };
  if (inner) place(1);
  for (size_t dim = shape.size(); dim-- > 2;) place(dim);
  if (!inner) place(1);
  place(0);
  return empty(shape, strides, x.scalar_type(), x);
}

// Like eager/layouts.py's: x's shape but for the spatial dimensions, the channels innermost if x's are.
inline Tensor empty_output(const Tensor& x, const std::vector<int64_t>& spatial) {
  return empty_output(x, spatial, channels_innermost(x));
}

inline std::vector<int64_t> spatial_of(const Tensor& x) {
  return {x.sizes().begin() + 2, x.sizes().end()};
}

inline Tensor empty_output(const Tensor& x) {
  return empty_output(x, spatial_of(x));
}

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline float* floats(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

inline Parameter parameter(const char* op, const char* name, const std::optional<Tensor>& value, const Tensor& x) {
  if (!value) return {};
  const auto type = value->scalar_type();
  check_like(op, name, *value, {x.size(1)}, type == x.scalar_type() ? type : ScalarType::Float, x);
  return {value->data_ptr(), type != ScalarType::Float, type == ScalarType::BFloat16};
}

inline std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  return t ? std::optional(packed(*t)) : t;
}

// Returns x such that its spatial dimensions collapse into one and, if there is a single position, its channels are
// next to each other. It is copied only where that is not so.
inline Tensor collapsible(const Tensor& x) {
  if (x.numel() == x.size(0) * x.size(1) && x.size(1) > 1 && x.stride(1) != 1) return packed(x);
  int64_t expected = -1;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) == 1) continue;
    if (expected >= 0 && x.stride(dim) != expected) return packed(x);
    expected = x.stride(dim) * x.size(dim);
  }
  return x;
}

// Returns a collapsible x as columns; d is the size of its groups of channels.
inline Columns columns_of(const Tensor& x, int64_t d) {
  Columns seen;
  const int64_t samples = x.size(0), channels = x.size(1), bytes = int64_t(x.element_size());
  seen.data = static_cast<unsigned char*>(x.data_ptr());
  seen.total = channels ? x.numel() / channels : 0;
  seen.positions = samples ? seen.total / samples : 1;
  seen.sample_stride = x.stride(0);
  seen.channel_stride = x.stride(1);
  for (int64_t dim = x.dim() - 1; dim >= 2 && seen.position_stride == 0; --dim) {
    if (x.size(dim) != 1) seen.position_stride = x.stride(dim);
  }
  if (seen.positions == 1) {  // the samples are the positions
    seen.position_stride = seen.sample_stride;
    seen.positions = samples;
  }
  if (samples == 1 || seen.sample_stride == seen.positions * seen.position_stride) seen.positions = seen.total;
  seen.bfloat = x.scalar_type() == ScalarType::BFloat16;
  seen.inner = channels > 1 && seen.channel_stride == 1 && (seen.position_stride != 1 || seen.total == samples);

  // The widest access that every start is a multiple of.
  const bool one = seen.positions == seen.total;
  const int64_t along = seen.inner ? d : seen.positions,
                across = seen.inner ? seen.position_stride : seen.channel_stride;
  const bool contiguous = seen.inner || seen.position_stride == 1;
  seen.width = int(bytes);
  for (int width = 16; width > bytes && contiguous; width /= 2) {
    const auto fits = [&](int64_t elements) { return elements * bytes % width == 0; };
    if (reinterpret_cast<uintptr_t>(seen.data) % width == 0 && fits(along) && fits(across) &&
        (one || fits(seen.sample_stride))) {
      seen.width = width;
      break;
    }
  }
  return seen;
}

// Returns y in x's layout, as far as the reductions need it: the same dimension is next to each other in memory.
inline Tensor in_layout_of(const Tensor& x, const Tensor& y, int64_t d) {
  const bool inner = columns_of(x, d).inner;
  const Tensor same = collapsible(y);
  if (columns_of(same, d).inner == inner) return same;
  Tensor copy = empty_output(x, spatial_of(x), inner);
  torch::stable::copy_(copy, y);
  return copy;
}

}  // namespace nk
