// iter_norm and its backward, two launches each: the reduction, whose last block of a group goes on to the small matrix
// function, and the mix.
#include "launches.h"
#include "tensors.h"

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
    if (lane() == 0) out.constant[channel + i] = weight(channel + i, 1.f) * left_out + bias(channel + i, 0.f);
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
    E(i, j) = real ? .5f * (weight(channel + i, 1.f) * cross(i, j) + weight(channel + j, 1.f) * cross(j, i)) : 0.f;
  });
  __syncthreads();
  covariance_adjoint<D, WARPS>(of, how, 2.f / m, shared.slots, W, in.S + channel * d, in.scale[group]);
  for (int i = warp(); i < d; i += WARPS) {
    float* const row = out.matrix + (channel + i) * (2 * d);
    const float constant = warp_sum(d, [&](int j) {
      row[j] = W[j * d + i] * weight(channel + j, 1.f);
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

// --- ops -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> iter_norm(const Tensor& data, const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& bias, int64_t d,
                                                             int64_t iterations, double eps, bool frobenius,
                                                             bool eigh) {
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
                                                      bool eigh) {
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
