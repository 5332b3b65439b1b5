// pop_norm and its backward.
#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

std::tuple<Tensor, Tensor, Tensor> pop_norm(const Tensor& data, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& bias, double kappa, double eps, bool center,
                                            bool scale) {
  const char* op = "pop_norm";
  check_data(op, "x", data, 1);
  const OnDevice on(op, data);
  const Tensor x = collapsible(data);
  const auto gamma = packed(weight), beta = packed(bias);
  const int element = int(x.element_size());
  const int64_t channels = x.size(1);
  const Columns seen = columns_of(x, channels);
  const ChannelReduction how(on.run.device, channels, element, {&seen});
  const Memory memory(how, x);
  const auto vector = [&] { return empty({channels}, ScalarType::Float, x); };
  Tensor y = empty_output(data), mean = vector(), var = vector(), factor = vector(), constant = vector();
  launch_pop_forward(on.run, seen, element, how, memory.workspace, {float(kappa), float(eps), center, scale},
                     parameter(op, "weight", gamma, x), parameter(op, "bias", beta, x),
                     {floats(mean), floats(var), floats(factor), floats(constant)});
  launch_scale(on.run, seen, {floats(factor)}, center ? floats(mean) : nullptr, nullptr, {}, columns_of(y, channels),
               element, channels, {}, {floats(constant)});
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> pop_norm_backward(const Tensor& gradient, const Tensor& data,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, const Tensor& mean,
                                                     const Tensor& var, double kappa, double eps, bool center,
                                                     bool scale) {
  const char* op = "pop_norm_backward";
  check_data(op, "x", data, 1);
  check_like(op, "grad", gradient, shape_of(data), data.scalar_type(), data);
  check_like(op, "mean", mean, {data.size(1)}, ScalarType::Float, data);
  check_like(op, "var", var, {data.size(1)}, ScalarType::Float, data);
  const OnDevice on(op, data);
  const Tensor x = collapsible(data), grad = in_layout_of(x, gradient, data.size(1));
  const Tensor mu = packed(mean), v = packed(var);
  const auto gamma = packed(weight), beta = packed(bias);
  const int element = int(x.element_size());
  const int64_t channels = x.size(1);
  // The scale alone needs x: without it dx = dy - mean dy.
  const Columns left = columns_of(grad, channels), seen = scale ? columns_of(x, channels) : left;
  const ChannelReduction how(on.run.device, channels, element, {&seen, &left});
  const Memory memory(how, x);
  const auto vector = [&] { return empty({channels}, ScalarType::Float, x); };
  Tensor dx = empty_output(data), grad_weight = vector(), grad_bias = vector();
  const Tensor of_grad = vector(), of_x = vector(), constant = vector();
  launch_pop_backward(on.run, left, seen, element, how, memory.workspace, {float(kappa), float(eps), center, scale},
                      parameter(op, "weight", gamma, x), parameter(op, "bias", beta, x), floats(mu), floats(v),
                      {floats(of_grad), floats(of_x), floats(constant), floats(grad_weight), floats(grad_bias)});
  const Columns to = columns_of(dx, channels);
  if (scale) {
    launch_scale(on.run, seen, {floats(of_x)}, center ? floats(mu) : nullptr, &left, {floats(of_grad)}, to, element,
                 channels, {}, {floats(constant)});
  } else {
    launch_scale(on.run, left, {}, nullptr, nullptr, {}, to, element, channels, {}, {floats(constant)});
  }
  return {dx, grad_weight, grad_bias};
}

NORMKERNELS_OP(pop_norm, {}, .data = a.tensor(0))
NORMKERNELS_OP(pop_norm_backward, {}, .data = a.tensor(1))

}  // namespace nk
