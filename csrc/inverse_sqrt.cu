// inverse_sqrt and its adjoint by Newton's iteration: one block for a group, one launch.
#include "launches.h"
#include "tensors.h"

namespace nk {

template <int D>
struct Block {
  static constexpr int WARPS = D / 8, THREADS = WARPS * WARP;
};

template <int D>
__global__ __launch_bounds__(Block<D>::THREADS, 1) void inverse_sqrt_kernel(const float* cov, Newton how, int fit,
                                                                            float* scratch, float* W, float* S,
                                                                            float* scale) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  const int64_t group = blockIdx.x, at = group * how.d * how.d;
  const Matrices<D> of{slots + WARP, scratch + group * (FORWARD_MATRICES - fit) * Matrix<D>::SIZE, fit};
  const Matrix<D> M = of[0];
  for_entries<D, Block<D>::WARPS>(
      [&](int i, int j) { M(i, j) = i < how.d && j < how.d ? cov[at + i * how.d + j] : 0.f; });
  __syncthreads();
  whitening_matrix<D, Block<D>::WARPS>(of, how, slots, W + at, S + at, scale + group);
}

template <int D>
__global__ __launch_bounds__(Block<D>::THREADS, 1) void inverse_sqrt_backward_kernel(const float* grad, const float* W,
                                                                                     const float* S, const float* scale,
                                                                                     Newton how, int fit,
                                                                                     float* scratch, float* grad_cov) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  const int64_t group = blockIdx.x, at = group * how.d * how.d;
  const Matrices<D> of{slots + WARP, scratch + group * (BACKWARD_MATRICES - fit) * Matrix<D>::SIZE, fit};
  const Matrix<D> E = of[1], result = of[2];
  for_entries<D, Block<D>::WARPS>([&](int i, int j) {
    E(i, j) = i < how.d && j < how.d ? .5f * (grad[at + i * how.d + j] + grad[at + j * how.d + i]) : 0.f;
  });
  __syncthreads();
  covariance_adjoint<D, Block<D>::WARPS>(of, how, 1.f, slots, W + at, S + at, scale[group]);
  for_entries<D, Block<D>::WARPS>([&](int i, int j) {
    if (i < how.d && j < how.d) grad_cov[at + i * how.d + j] = result(i, j);
  });
}

void launch_inverse_sqrt(const Run& run, const float* cov, int64_t groups, const Newton& how, const Room& room,
                         float* scratch, float* W, float* S, float* scale) {
  with_padded(how.d, [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    run.launch("inverse_sqrt", inverse_sqrt_kernel<D>, groups, Block<D>::THREADS, room.bytes,
               {groups * how.d * how.d * 4, groups * (2 * how.d * how.d + 1) * 4}, cov, how, room.fit, scratch, W, S,
               scale);
  });
}

void launch_inverse_sqrt_backward(const Run& run, const float* grad, const float* W, const float* S, const float* scale,
                                  int64_t groups, const Newton& how, const Room& room, float* scratch,
                                  float* grad_cov) {
  with_padded(how.d, [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    run.launch("inverse_sqrt_backward", inverse_sqrt_backward_kernel<D>, groups, Block<D>::THREADS, room.bytes,
               {groups * (3 * how.d * how.d + 1) * 4, groups * how.d * how.d * 4}, grad, W, S, scale, how, room.fit,
               scratch, grad_cov);
  });
}

// --- ops -----------------------------------------------------------------------------------------------------------

static int64_t check_square(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == t.size(2) && t.size(1) >= 1, op, ": ", name,
                  ": expected shape (G, d, d), got ", text(shape_of(t)));
  return t.size(1);
}

std::tuple<Tensor, Tensor, Tensor> inverse_sqrt(const Tensor& matrix, int64_t iterations, double eps, bool frobenius,
                                                bool eigh) {
  const int64_t d = check_square("inverse_sqrt", "cov", matrix);
  const OnDevice on("inverse_sqrt", matrix);
  const Tensor cov = packed(matrix);
  const int64_t groups = cov.size(0);
  Tensor W = empty({groups, d, d}, ScalarType::Float, cov), S = empty({groups, d, d}, ScalarType::Float, cov);
  Tensor scale = empty({groups, 1}, ScalarType::Float, cov);
  const Room room = small_matrix_room(on.run.device, d, FORWARD_MATRICES);
  const Tensor scratch = scratch_for(room, cov, groups);
  launch_inverse_sqrt(on.run, floats(cov), groups, newton_of("inverse_sqrt", d, iterations, frobenius, eps), room,
                      floats(scratch), floats(W), floats(S), floats(scale));
  return {W, S, scale};
}

Tensor inverse_sqrt_backward(const Tensor& gradient, const Tensor& root, const Tensor& saved_matrix,
                             const Tensor& saved_scale, int64_t iterations, bool frobenius, bool eigh) {
  const char* op = "inverse_sqrt_backward";
  const int64_t d = check_square(op, "grad", gradient), groups = gradient.size(0);
  check_like(op, "W", root, {groups, d, d}, ScalarType::Float, gradient);
  check_like(op, "saved_matrix", saved_matrix, {groups, d, d}, ScalarType::Float, gradient);
  check_like(op, "saved_scale", saved_scale, {groups, 1}, ScalarType::Float, gradient);
  const OnDevice on(op, gradient);
  const Tensor grad = packed(gradient), W = packed(root), S = packed(saved_matrix), scale = packed(saved_scale);
  Tensor grad_cov = empty({groups, d, d}, ScalarType::Float, grad);
  const Room room = small_matrix_room(on.run.device, d, BACKWARD_MATRICES);
  const Tensor scratch = scratch_for(room, grad, groups);
  launch_inverse_sqrt_backward(on.run, floats(grad), floats(W), floats(S), floats(scale), groups,
                               newton_of(op, d, iterations, frobenius, 0.), room, floats(scratch), floats(grad_cov));
  return grad_cov;
}

// The last argument is eigh: a library has the eigendecomposition.
NORMKERNELS_OP(inverse_sqrt, {.half_types = false}, .data = a.tensor(0), .group_size = a.size(0, 1),
               .left = a.boolean(4))
NORMKERNELS_OP(inverse_sqrt_backward, {.half_types = false}, .data = a.tensor(0), .group_size = a.size(0, 1),
               .left = a.boolean(6))

}  // namespace nk
