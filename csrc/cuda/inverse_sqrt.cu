// inverse_sqrt and its adjoint by Newton's iteration: one block for a group, one launch.
#include "launch.cuh"
#include "launches.h"
#include "small_matrix.cuh"

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

Room small_matrix_room(const Device& device, int64_t d, int matrices) {
  Room room;
  with_padded(d, [&](auto padded) {
    room = make_room<decltype(padded)::value>(device, matrices, WARP * int64_t(sizeof(float)), 0);
  });
  return room;
}

}  // namespace nk
