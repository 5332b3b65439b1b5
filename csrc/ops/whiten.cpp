// whiten, and stacked_mix, the last pass of its backward.
#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

Tensor whiten(const Tensor& data, const Tensor& mean, const Tensor& W, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(W.dim() == 3 && W.size(1) == W.size(2), "whiten: W: expected shape (G, d, d), got ",
                  text(shape_of(W)));
  const int64_t groups = W.size(0), d = W.size(1);
  check_data("whiten", "x", data, d);
  check_like("whiten", "W", W, {data.size(1) / d, d, d}, ScalarType::Float, data);
  check_like("whiten", "mean", mean, {data.size(1)}, ScalarType::Float, data);
  const OnDevice on("whiten", data);
  const Tensor x = collapsible(data), center = packed(mean);
  const auto gamma = packed(weight), beta = packed(bias);
  Tensor y = empty_output(data);
  if (d == 1) {
    launch_scale(on.run, columns_of(x, groups), {floats(W), W.stride(0)}, floats(center), nullptr, {},
                 columns_of(y, groups), int(x.element_size()), groups, parameter("whiten", "weight", gamma, x),
                 parameter("whiten", "bias", beta, x));
    return y;
  }
  launch_mix(on.run, columns_of(x, d), floats(center), nullptr, nullptr, columns_of(y, d), int(x.element_size()),
             {floats(W), W.stride(0), W.stride(1), W.stride(2)}, parameter("whiten", "weight", gamma, x),
             parameter("whiten", "bias", beta, x), groups, d);
  return y;
}

// Returns matrix [grad - grad_mean; x - mean] + constant.
Tensor stacked_mix(const Tensor& gradient, const Tensor& data, const Tensor& gradient_mean, const Tensor& mean,
                   const Tensor& matrix, const Tensor& constant) {
  const char* op = "stacked_mix";
  STD_TORCH_CHECK(matrix.dim() == 3 && matrix.size(2) == 2 * matrix.size(1), op,
                  ": matrix: expected shape (G, d, 2 d), got ", text(shape_of(matrix)));
  const int64_t groups = matrix.size(0), d = matrix.size(1);
  check_data(op, "x", data, d);
  check_like(op, "grad", gradient, shape_of(data), data.scalar_type(), data);
  check_like(op, "grad_mean", gradient_mean, {data.size(1)}, ScalarType::Float, data);
  check_like(op, "mean", mean, {data.size(1)}, ScalarType::Float, data);
  check_like(op, "matrix", matrix, {data.size(1) / d, d, 2 * d}, ScalarType::Float, data);
  check_like(op, "constant", constant, {data.size(1)}, ScalarType::Float, data);
  const OnDevice on(op, data);
  const Tensor x = collapsible(data), grad = in_layout_of(x, gradient, d);
  const Tensor center = packed(gradient_mean), shift = packed(mean), bias = packed(constant);
  Tensor y = empty_output(data);
  const Columns seen = columns_of(x, d);
  launch_mix(on.run, columns_of(grad, d), floats(center), &seen, floats(shift), columns_of(y, d), int(x.element_size()),
             {floats(matrix), matrix.stride(0), matrix.stride(1), matrix.stride(2)}, {}, {floats(bias)}, groups, d);
  return y;
}

NORMKERNELS_OP(whiten, {}, .data = a.tensor(0), .group_size = a.size(2, 1))
// scale_kernel, for groups of one channel, has no shift for its second source.
NORMKERNELS_OP(stacked_mix, {.smallest_group = 2}, .data = a.tensor(1), .group_size = a.size(4, 1))

}  // namespace nk
