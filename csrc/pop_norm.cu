// pop_norm and its backward, two launches each: the reduction, whose last block of a channel goes on to the factors,
// and the map. Algebra: primitives/pop_norm/DERIVATION.md.
#include "launches.h"
#include "tensors.h"

namespace nk {

// beta, and the root r of the second moment of x - mean + beta, or of x.
struct Root {
  float beta, r;

  __device__ __forceinline__ Root(const PopOptions& how, const Parameter& bias, int64_t channel, float mean, float var)
      : beta(bias(channel, 0.f)) {
    const float away = how.center ? beta : mean;
    r = sqrtf(var + away * away + how.eps);
  }
};

// Computes mean and variance, and the factor and constant of y = factor (x - mean) + constant, of factor x if not
// centred.
template <class T>
__global__ __launch_bounds__(SWEEP_THREADS, SWEEP_BLOCKS) void pop_forward_kernel(Sweep sweep, Source x,
                                                                                  Workspace workspace, PopOptions how,
                                                                                  Parameter weight, Parameter bias,
                                                                                  PopForward out) {
  channel_moments<T>(sweep, x, workspace, [&](int64_t channel, double exact, double variance) {
    const float mean = float(exact), var = float(variance);
    const Root root(how, bias, channel, mean, var);
    const float factor = how.scale ? weight(channel, 1.f) / (how.kappa * root.r) : 1.f;
    out.mean[channel] = mean;
    out.var[channel] = var;
    out.factor[channel] = factor;
    // The constant takes out the offset that the rounding of the mean leaves in x - mean.
    out.constant[channel] = how.center ? factor * float(double(root.beta) + (double(mean) - exact)) : 0.f;
  });
}

// Computes the factors and constant of dx = of_grad dy + of_x (x - mean) + constant, and the gradients of weight and
// bias.
template <class T>
__global__ __launch_bounds__(SWEEP_THREADS, SWEEP_BLOCKS) void pop_backward_kernel(Sweep sweep, Source grad, Source x,
                                                                                   Workspace workspace, PopOptions how,
                                                                                   Parameter weight, Parameter bias,
                                                                                   const float* mean, const float* var,
                                                                                   PopBackward out) {
  const float* const shift = how.center ? mean : nullptr;
  channel_sums<T>(sweep, grad, x, shift, workspace, [&](int64_t channel, double f, double sum_x, double products) {
    const Root root(how, bias, channel, mean[channel], var[channel]);
    const double m = double(sweep.total), r = root.r;
    const double factor = how.scale ? weight(channel, 1.f) / (double(how.kappa) * r) : 1.;
    const double offset = how.center ? sum_x / m : 0.;  // left in x - mean by the rounding of the mean
    const double D = products - offset * f, e = D + (how.center ? root.beta * f : 0.);  // e = sum dy x~
    const double of_x = how.scale ? -factor * e / (m * r * r) : 0.;
    out.of_grad[channel] = float(factor);
    out.of_x[channel] = float(of_x);
    out.constant[channel] = how.center ? float(-factor * f / m - of_x * offset) : 0.f;
    out.grad_weight[channel] = how.scale ? float(e / (double(how.kappa) * r)) : 0.f;
    // Rejected: f - beta e / r^2, which loses (beta / sigma)^2 of its digits.
    const double inner = how.scale ? (f * (double(var[channel]) + double(how.eps)) - root.beta * D) / (r * r) : f;
    out.grad_bias[channel] = how.center ? float(factor * inner) : 0.f;
  });
}

void launch_pop_forward(const Run& run, const Columns& x, int element, const ChannelReduction& how,
                        const Workspace& workspace, const PopOptions& options, const Parameter& weight,
                        const Parameter& bias, const PopForward& out) {
  const Sweep& sweep = how.sweep;
  how.zero(run, workspace);
  run.launch("pop_norm", element == 4 ? pop_forward_kernel<float> : pop_forward_kernel<Half>, sweep.blocks(),
             SWEEP_THREADS, SWEEP_BYTES, {x.total * sweep.channels * element, sweep.channels * 16}, sweep,
             Source(x, sweep), workspace, options, weight, bias, out);
}

void launch_pop_backward(const Run& run, const Columns& grad, const Columns& x, int element,
                         const ChannelReduction& how, const Workspace& workspace, const PopOptions& options,
                         const Parameter& weight, const Parameter& bias, const float* mean, const float* var,
                         const PopBackward& out) {
  const Sweep& sweep = how.sweep;
  how.zero(run, workspace);
  run.launch("pop_norm_backward", element == 4 ? pop_backward_kernel<float> : pop_backward_kernel<Half>, sweep.blocks(),
             SWEEP_THREADS, SWEEP_BYTES, {2 * x.total * sweep.channels * element, sweep.channels * 20}, sweep,
             Source(grad, sweep), Source(x, sweep), workspace, options, weight, bias, mean, var, out);
}

// --- ops -----------------------------------------------------------------------------------------------------------

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
