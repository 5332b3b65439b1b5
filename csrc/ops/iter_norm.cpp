// iter_norm and its backward.
#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> iter_norm(const Tensor& data, const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& bias, int64_t d,
                                                             int64_t iterations, double eps, bool frobenius,
                                                             bool /*eigh*/) {
  check_data("iter_norm", "x", data, d);
  const OnDevice on("iter_norm", data);
  const Tensor x = collapsible(data);
  const auto gamma = packed(weight), beta = packed(bias);
  const int element = int(x.element_size());
  const int64_t channels = x.size(1), groups = channels / d;
  const Columns seen = columns_of(x, d);
  const Reduction reduction(on.run.device, seen, element, groups, d, 1, FORWARD_MATRICES);
  const Memory memory(reduction, x);
  const Tensor scratch = scratch_for(reduction.room, x, groups);
  Tensor y = empty_output(data), mean = empty({channels}, ScalarType::Float, x),
         constant = empty({channels}, ScalarType::Float, x);
  Tensor W = empty({groups, d, d}, ScalarType::Float, x), S = empty({groups, d, d}, ScalarType::Float, x);
  Tensor scale = empty({groups, 1}, ScalarType::Float, x);
  const Parameter scaled = parameter("iter_norm", "weight", gamma, x);
  launch_forward(on.run, seen, element, groups, newton_of("iter_norm", d, iterations, frobenius, eps), reduction,
                 memory.workspace, floats(scratch), scaled, parameter("iter_norm", "bias", beta, x),
                 {floats(mean), floats(W), floats(S), floats(scale), floats(constant)});
  launch_mix(on.run, seen, floats(mean), nullptr, nullptr, columns_of(y, d), element, {floats(W), d * d, d, 1}, scaled,
             {floats(constant)}, groups, d);
  return {y, mean, W, S, scale};
}

std::tuple<Tensor, Tensor, Tensor> iter_norm_backward(const Tensor& gradient, const Tensor& data,
                                                      const std::optional<Tensor>& weight, const Tensor& center,
                                                      const Tensor& root, const Tensor& saved_matrix,
                                                      const Tensor& saved_scale, int64_t iterations, bool frobenius,
                                                      bool /*eigh*/) {
  const char* op = "iter_norm_backward";
  STD_TORCH_CHECK(root.dim() == 3 && root.size(1) == root.size(2), op, ": W: expected shape (G, d, d), got ",
                  text(shape_of(root)));
  const int64_t groups = root.size(0), d = root.size(1), channels = groups * d;
  check_data(op, "x", data, d);
  check_like(op, "grad", gradient, shape_of(data), data.scalar_type(), data);
  check_like(op, "mean", center, {data.size(1)}, ScalarType::Float, data);
  check_like(op, "W", root, {data.size(1) / d, d, d}, ScalarType::Float, data);
  check_like(op, "saved_matrix", saved_matrix, {groups, d, d}, ScalarType::Float, data);
  check_like(op, "saved_scale", saved_scale, {groups, 1}, ScalarType::Float, data);
  const OnDevice on(op, data);
  const Tensor x = collapsible(data), grad = in_layout_of(x, gradient, d);
  const Tensor mean = packed(center), W = packed(root), S = packed(saved_matrix), scale = packed(saved_scale);
  const auto gamma = packed(weight);
  const int element = int(x.element_size());
  const Columns left = columns_of(grad, d), seen = columns_of(x, d);
  const Reduction reduction(on.run.device, seen, element, groups, d, 2, BACKWARD_MATRICES);
  const Memory memory(reduction, x);
  const Tensor scratch = scratch_for(reduction.room, x, groups);
  Tensor dx = empty_output(data), grad_weight = empty({channels}, ScalarType::Float, x);
  Tensor grad_bias = empty({channels}, ScalarType::Float, x), constant = empty({channels}, ScalarType::Float, x);
  Tensor matrix = empty({groups, d, 2 * d}, ScalarType::Float, x);
  Tensor grad_mean = empty({channels}, ScalarType::Float, x);
  launch_backward(on.run, left, seen, element, groups, newton_of(op, d, iterations, frobenius, 0.), reduction,
                  memory.workspace, floats(scratch), parameter(op, "weight", gamma, x),
                  {floats(mean), floats(W), floats(S), floats(scale)},
                  {floats(matrix), floats(grad_mean), floats(constant), floats(grad_weight), floats(grad_bias)});
  launch_mix(on.run, left, floats(grad_mean), &seen, floats(mean), columns_of(dx, d), element,
             {floats(matrix), 2 * d * d, 2 * d, 1}, {}, {floats(constant)}, groups, d);
  return {dx, grad_weight, grad_bias};
}

// The last argument is eigh: a library has the eigendecomposition.
NORMKERNELS_OP(iter_norm, {}, .data = a.tensor(0), .group_size = a.integer(3), .left = a.boolean(7))
NORMKERNELS_OP(iter_norm_backward, {}, .data = a.tensor(1), .group_size = a.size(4, 1), .left = a.boolean(9))

}  // namespace nk
