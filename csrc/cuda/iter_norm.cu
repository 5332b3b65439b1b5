// iter_norm and its backward, two launches each: the reduction, whose last block of a group goes on to the small matrix
// function, and the mix.
#include "launch.cuh"
#include "launches.h"
#include "reduce.cuh"

namespace nk {

// Returns the sum over j < count of f(j), the same in all lanes of the warp.
template <class F>
__device__ __forceinline__ float warp_sum(int count, F f) {
  float sum = 0;
  for (int j = lane(); j < count; j += WARP) sum += f(j);
  for (int other = WARP / 2; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  return sum;
}

// Computes mean, W with what its adjoint needs, and constant = bias + A (mean - exact mean) with A = diag(weight) W.
template <class T, int D>
__global__ __launch_bounds__(Warps<D, true>::THREADS,
                             D == 64 ? 2 : 1) void forward_kernel(Columns x, Split cut, Merging merging,
                                                                  Workspace workspace, Newton how, int fit,
                                                                  float* scratch, Parameter weight, Parameter bias,
                                                                  ForwardResults out) {
  constexpr int WARPS = Warps<D, true>::COUNT;
  const int d = how.d;
  const Shared<D> shared(shared_memory());
  const Matrix<D> cov{reinterpret_cast<float*>(shared.rest)};
  if (!reduce_moments<T, D>(x, d, cut, merging, workspace, shared,
                            [&](int i, int j, float entry) { cov(i, j) = entry / float(x.total); })) {
    return;
  }
  const int64_t group = blockIdx.x / cut.parts, channel = group * d;
  const Matrices<D> of{cov.data, scratch + group * (FORWARD_MATRICES - fit) * Matrix<D>::SIZE, fit};
  const Matrix<D> W = of[1];
  for (int i = threadIdx.x; i < d; i += Warps<D, true>::THREADS) {
    const float mean = float(shared.exact[i]);
    out.mean[channel + i] = mean;
    shared.first[i] = float(double(mean) - shared.exact[i]);
  }
  __syncthreads();
  whitening_matrix<D, WARPS>(of, how, shared.slots, out.W + channel * d, out.S + channel * d, out.scale + group);
  for (int i = warp(); i < d; i += WARPS) {
    const float left_out = warp_sum(d, [&](int j) { return W(i, j) * shared.first[j]; });
    if (lane() == 0)
      out.constant[channel + i] = value_of(weight, channel + i, 1.f) * left_out + value_of(bias, channel + i, 0.f);
  }
}

// Computes [A^T | B], the mean of dy and the constant of dx = A^T (dy - mean dy) + B (x - mean) + constant, and the
// gradients of weight and bias. Centring dy avoids the difference of two large numbers where dy has a large mean.
template <class T, int D>
__global__ __launch_bounds__(Warps<D, false>::THREADS,
                             1) void backward_kernel(Columns grad, Columns x, Split cut, Merging merging,
                                                     Workspace workspace, Newton how, int fit, float* scratch,
                                                     Parameter weight, BackwardInputs in, BackwardResults out) {
  constexpr int WARPS = Warps<D, false>::COUNT;
  const int d = how.d;
  const Shared<D> shared(shared_memory());
  const Matrix<D> cross{reinterpret_cast<float*>(shared.rest)};
  if (!reduce_cross<T, D>(grad, x, in.mean, d, cut, merging, workspace, shared,
                          [&](int i, int j, float entry) { cross(i, j) = entry; })) {
    return;
  }
  const int64_t group = blockIdx.x / cut.parts, channel = group * d;
  const Matrices<D> of{cross.data, scratch + group * (BACKWARD_MATRICES - fit) * Matrix<D>::SIZE, fit};
  const Matrix<D> E = of[1], B = of[2];
  const float* const W = in.W + channel * d;
  const float m = float(x.total);
  const float *f = shared.first, *sum_x = shared.second;
  // The rounding of the mean leaves an offset in x - mean, which is taken out of everything linear in x - mean.
  for_entries<D, WARPS>([&](int i, int j) { cross(i, j) -= f[i] * (sum_x[j] / m); });
  __syncthreads();
  for (int i = warp(); i < d; i += WARPS) {
    const float grad_weight = warp_sum(d, [&](int j) { return cross(i, j) * W[i * d + j]; });
    if (lane() == 0) {
      out.grad_weight[channel + i] = grad_weight;
      out.grad_bias[channel + i] = f[i];
      out.grad_mean[channel + i] = f[i] / m;
    }
  }
  for_entries<D, WARPS>([&](int i, int j) {
    const bool real = i < d && j < d;
    E(i, j) = real ? .5f * (value_of(weight, channel + i, 1.f) * cross(i, j) +
                            value_of(weight, channel + j, 1.f) * cross(j, i))
                   : 0.f;
  });
  __syncthreads();
  covariance_adjoint<D, WARPS>(of, how, 2.f / m, shared.slots, W, in.S + channel * d, in.scale[group]);
  for (int i = warp(); i < d; i += WARPS) {
    float* const row = out.matrix + (channel + i) * (2 * d);
    const float constant = warp_sum(d, [&](int j) {
      row[j] = W[j * d + i] * value_of(weight, channel + j, 1.f);
      row[d + j] = B(i, j);
      return B(i, j) * (sum_x[j] / m);
    });
    if (lane() == 0) out.constant[channel + i] = -constant;
  }
}

void launch_forward(const Run& run, const Columns& x, int element, int64_t groups, const Newton& how,
                    const Reduction& reduction, const Workspace& workspace, float* scratch, const Parameter& weight,
                    const Parameter& bias, const ForwardResults& out) {
  run.zero(workspace.tickets, reduction.counters);
  with_kernel(element, how.d, [&]<class T, int D>() {
    run.launch("iter_norm", forward_kernel<T, D>, groups * reduction.cut.parts, Warps<D, true>::THREADS,
               reduction.room.bytes, {x.total * groups * how.d * element, groups * how.d * (2 * how.d + 2) * 4}, x,
               reduction.cut, reduction.merging, workspace, how, reduction.room.fit, scratch, weight, bias, out);
  });
}

void launch_backward(const Run& run, const Columns& grad, const Columns& x, int element, int64_t groups,
                     const Newton& how, const Reduction& reduction, const Workspace& workspace, float* scratch,
                     const Parameter& weight, const BackwardInputs& in, const BackwardResults& out) {
  run.zero(workspace.tickets, reduction.counters);
  with_kernel(element, how.d, [&]<class T, int D>() {
    run.launch(
        "iter_norm_backward", backward_kernel<T, D>, groups * reduction.cut.parts, Warps<D, false>::THREADS,
        reduction.room.bytes,
        {2 * x.total * groups * how.d * element + groups * how.d * 2 * how.d * 4, groups * how.d * (2 * how.d + 4) * 4},
        grad, x, reduction.cut, reduction.merging, workspace, how, reduction.room.fit, scratch, weight, in, out);
  });
}

}  // namespace nk
