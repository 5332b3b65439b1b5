// pop_norm and its backward, two launches each: the reduction, whose last block of a channel goes on to the factors,
// and the map. Algebra: primitives/pop_norm/DERIVATION.md.
#include "diagonal.cuh"
#include "launch.cuh"
#include "launches.h"

namespace nk {

// beta, and the root r of the second moment of x - mean + beta, or of x.
struct Root {
  float beta, r;

  __device__ __forceinline__ Root(const PopOptions& how, const Parameter& bias, int64_t channel, float mean, float var)
      : beta(value_of(bias, channel, 0.f)) {
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
    const float factor = how.scale ? value_of(weight, channel, 1.f) / (how.kappa * root.r) : 1.f;
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
    const double factor = how.scale ? value_of(weight, channel, 1.f) / (double(how.kappa) * r) : 1.;
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

}  // namespace nk
