// W = (cov + eps I)^(-1/2) by Newton's iteration, and its adjoint: one block for a group, all matrices near it.
//
// Equations and their stability: normkernels/primitives/inverse_sqrt/DERIVATION.md. All matrices but X, U and Z are
// symmetric: only the tiles on and above the diagonal are computed, the others mirrored, which saves nearly half of the
// products.
#pragma once

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "cuts.h"
#include "precision.cuh"

namespace nk {

// A D x D matrix in shared memory, or in global memory where that is too small. A row has 4 more floats, so that the 32
// entries that a warp reads at once are in 32 banks.
template <int D>
struct Matrix {
  static constexpr int STRIDE = D + 4, SIZE = D * STRIDE;
  float* data;

  __device__ __forceinline__ float& operator()(int i, int j) const { return data[i * STRIDE + j]; }

  // The entries of a symmetric matrix as right factor, in an order without bank conflicts.
  __device__ __forceinline__ float mirrored(int i, int j) const { return data[j * STRIDE + i]; }
};

// The matrices of a block: as many in shared memory as fit, the others in global memory.
template <int D>
struct Matrices {
  float *shared, *global;
  int fit;

  __device__ __forceinline__ Matrix<D> operator[](int i) const {
    return {i < fit ? shared + i * Matrix<D>::SIZE : global + (i - fit) * Matrix<D>::SIZE};
  }
};

// Returns the sum over all threads of the block, the same in all of them. slots: one float for each warp.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* slots) {
  for (int other = WARP / 2; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  if (lane() == 0) slots[warp()] = value;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < WARPS; ++i) total += slots[i];
  __syncthreads();
  return total;
}

template <int WARPS>
__device__ __forceinline__ float block_max(float value, float* slots) {
  for (int other = WARP / 2; other; other /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, other));
  if (lane() == 0) slots[warp()] = value;
  __syncthreads();
  float largest = slots[0];
  for (int i = 1; i < WARPS; ++i) largest = fmaxf(largest, slots[i]);
  __syncthreads();
  return largest;
}

// Calls f(i, j) for all entries, spread over the block.
template <int D, int WARPS, class F>
__device__ __forceinline__ void for_entries(F f) {
#pragma unroll 2
  for (int at = threadIdx.x; at < D * D; at += WARPS * WARP) f(at / D, at % D);
}

// A product of D x D matrices in registers: no thread writes before all have read.
template <int D, int WARPS, bool SYMMETRIC>
struct Product {
  static constexpr int SIDE = D / 16, TILES = SYMMETRIC ? SIDE * (SIDE + 1) / 2 : SIDE * SIDE;
  static constexpr int ROUNDS = (TILES + WARPS - 1) / WARPS;
  float value[ROUNDS][2][4] = {};

  // += left right, given by their entries.
  template <class Left, class Right>
  __device__ __forceinline__ void add(Left left, Right right) {
    for_tiles([&](int row, int column, float (&tile)[2][4]) {
      // The large terms are added in float32: tensor cores truncate where they add, and in a converged iteration P Q
      // differs from P by nothing else. The small terms have sums of their own, in which that does not matter.
      float first[2][4] = {}, second[2][4] = {};
#pragma unroll 1
      for (int k = 0; k < D; k += TF32x3::K) {
        const Operand<4> a = TF32x3::left([&](int i, int j) { return left(row + i, k + j); });
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const Operand<2> b = TF32x3::right([&](int i, int j) { return right(k + i, column + 8 * n + j); });
          float large[4] = {};
          TF32x3::multiply(first[n], a.lo, b.hi);
          TF32x3::multiply(second[n], a.hi, b.lo);
          TF32x3::multiply(large, a.hi, b.hi);
#pragma unroll
          for (int i = 0; i < 4; ++i) tile[n][i] += large[i];
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[n][i] += first[n][i] + second[n][i];
      }
    });
  }

  // Calls f(i, j, entry) for all entries.
  template <class F>
  __device__ __forceinline__ void store(F f) {
    for_tiles([&](int row, int column, float (&tile)[2][4]) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        for_each(tile[n], [&](int i, int j, float entry) {
          i += row, j += column + 8 * n;
          if (!SYMMETRIC || i <= j) f(i, j, entry);
          if (SYMMETRIC && i < j) f(j, i, entry);
        });
      }
    });
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_tiles(F f) {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      int tile = warp() + round * WARPS, row = 0;
      if (tile >= TILES) break;
      if constexpr (SYMMETRIC) {
        while (tile >= SIDE - row) tile -= SIDE - row++;
        f(16 * row, 16 * (row + tile), value[round]);
      } else {
        f(16 * (tile / SIDE), 16 * (tile % SIDE), value[round]);
      }
    }
  }
};

// M <- M Q^2 = M (2.25 I - 1.5 M + .25 M^2)
template <int D, int WARPS>
__device__ __forceinline__ void next_residual(Matrix<D> M, Matrix<D> T) {
  {
    Product<D, WARPS, true> square;
    square.add(M, [&](int i, int j) { return M.mirrored(i, j); });
    square.store([&](int i, int j, float entry) { T(i, j) = entry; });
  }
  __syncthreads();
  Product<D, WARPS, true> next;
  next.add(M, [&](int i, int j) { return .25f * T.mirrored(i, j) - 1.5f * M.mirrored(i, j) + (i == j ? 2.25f : 0.f); });
  __syncthreads();
  next.store([&](int i, int j, float entry) { M(i, j) = entry; });
  __syncthreads();
}

// P <- P Q with Q = (3 I - M) / 2
template <int D, int WARPS>
__device__ __forceinline__ void next_root(Matrix<D> P, Matrix<D> M) {
  Product<D, WARPS, true> next;
  next.add(P, [&](int i, int j) { return (i == j ? 1.5f : 0.f) - .5f * M.mirrored(i, j); });
  __syncthreads();
  next.store([&](int i, int j, float entry) { P(i, j) = entry; });
  __syncthreads();
}

// stopped returns whether a channel's variance inflation factor S_ii (P^2)_ii ends the iteration, the same in all
// threads. S is (d, d), in global memory. In fewer iterations than FIRST_CHECKED no factor can be that large.
constexpr float MOST_INFLATED = 1 / (64 * FLT_EPSILON);
constexpr int FIRST_CHECKED = 15;  // 2.25^15 > MOST_INFLATED > 2.25^14

template <int D, int WARPS>
__device__ __forceinline__ bool stopped(Matrix<D> P, const float* S, int d, int iteration, float* slots) {
  if (iteration < FIRST_CHECKED) return false;
  float most = 0;
  for (int i = warp(); i < d; i += WARPS) {
    float squares = 0;
    for (int j = lane(); j < d; j += WARP) squares += P(i, j) * P(i, j);
    for (int other = WARP / 2; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    most = fmaxf(most, fmaxf(S[i * d + i], FLT_EPSILON * FLT_EPSILON) * squares);
  }
  return block_max<WARPS>(most, slots) > MOST_INFLATED;
}

// Computes P = P_T of eq. 17 for S = M, which is overwritten; S is the same in global memory. Ends with a barrier.
template <int D, int WARPS>
__device__ __forceinline__ void newton(Matrix<D> M, Matrix<D> P, Matrix<D> T, const float* S, int d, int iterations,
                                       float* slots) {
  for_entries<D, WARPS>([&](int i, int j) {
    const float identity = i == j ? 1.f : 0.f;
    P(i, j) = iterations ? 1.5f * identity - .5f * M(i, j) : identity;
  });
  __syncthreads();
  for (int k = 1; k < iterations && !stopped<D, WARPS>(P, S, d, k, slots); ++k) {
    next_residual<D, WARPS>(M, T);
    next_root<D, WARPS>(P, M);
  }
}

// Computes dP = sym dL/dS for dM = sym dL/dP_T and M = S; both are overwritten; S is the same in global memory. Ends
// with a barrier.
template <int D, int WARPS>
__device__ __forceinline__ void newton_adjoint(Matrix<D> M, Matrix<D> dM, Matrix<D> P, Matrix<D> dP, Matrix<D> T,
                                               const float* S, int d, int iterations, float* slots) {
  for_entries<D, WARPS>([&](int i, int j) {
    P(i, j) = (i == j ? 1.5f : 0.f) - .5f * M(i, j);
    dP(i, j) = iterations ? -.5f * dM(i, j) : 0.f;
  });
  __syncthreads();
  for (int k = 1; k < iterations && !stopped<D, WARPS>(P, S, d, k, slots); ++k) {
    {
      Product<D, WARPS, false> X;
      X.add(dM, [&](int i, int j) { return M.mirrored(i, j); });
      X.store([&](int i, int j, float entry) { T(i, j) = entry; });
    }
    __syncthreads();
    {
      Product<D, WARPS, false> U;
      U.add(M, [&](int i, int j) { return .5f * T(i, j) + T(j, i); });
      __syncthreads();
      U.store([&](int i, int j, float entry) { T(i, j) = .25f * entry - 1.5f * T(i, j); });  // Z, in place
    }
    __syncthreads();
    for_entries<D, WARPS>([&](int i, int j) { dM(i, j) = 2.25f * dM(i, j) + (T(i, j) + T(j, i)); });
    __syncthreads();
    next_residual<D, WARPS>(M, T);
    {
      Product<D, WARPS, false> Y;  // dP Q - P dM / 2
      Y.add(dP, [&](int i, int j) { return (i == j ? 1.5f : 0.f) - .5f * M.mirrored(i, j); });
      Y.add(P, [&](int i, int j) { return -.5f * dM.mirrored(i, j); });
      Y.store([&](int i, int j, float entry) { T(i, j) = entry; });
    }
    __syncthreads();
    for_entries<D, WARPS>([&](int i, int j) { dP(i, j) = .5f * (T(i, j) + T(j, i)); });
    next_root<D, WARPS>(P, M);
  }
}

// Returns the upper bound of the largest eigenvalue that eq. 14 divides by: trace or Frobenius norm. NaN stays NaN.
template <int D, int WARPS>
__device__ __forceinline__ float scale_of(Matrix<D> cov, bool frobenius, float* slots) {
  float scale = 0;
  if (frobenius) {
    float largest = FLT_MIN;
    for_entries<D, WARPS>([&](int i, int j) { largest = fmaxf(largest, fabsf(cov(i, j))); });
    largest = block_max<WARPS>(largest, slots);
    for_entries<D, WARPS>([&](int i, int j) {
      const float relative = cov(i, j) / largest;  // squares do not underflow
      scale += relative * relative;
    });
    scale = largest * sqrtf(block_sum<WARPS>(scale, slots));
  } else {
    for (int i = threadIdx.x; i < D; i += WARPS * WARP) scale += cov(i, i);
    scale = block_sum<WARPS>(scale, slots);
  }
  return scale < FLT_MIN ? FLT_MIN : scale;  // eps = 0 and a constant batch: W stays finite
}

// Computes W, S and scale of a group from its covariance in `of[0]` (zero beyond d), into global memory; W stays in
// `of[1]`.
template <int D, int WARPS>
__device__ void whitening_matrix(const Matrices<D>& of, const Newton& how, float* slots, float* W_out, float* S_out,
                                 float* scale_out) {
  const Matrix<D> M = of[0], P = of[1];
  const int d = how.d;
  for (int i = threadIdx.x; i < d; i += WARPS * WARP) M(i, i) += how.eps;
  __syncthreads();
  const float scale = scale_of<D, WARPS>(M, how.frobenius, slots);
  if (threadIdx.x == 0) *scale_out = scale;
  for_entries<D, WARPS>([&](int i, int j) {
    const bool real = i < d && j < d;
    const float entry = real ? M(i, j) / scale : i == j ? 1.f : 0.f;  // beyond d the identity, which stays
    M(i, j) = entry;
    if (real) S_out[i * d + j] = entry;
  });
  __syncthreads();
  newton<D, WARPS>(M, P, of[2], S_out, d, how.iterations, slots);
  const float root = sqrtf(scale);
  for_entries<D, WARPS>([&](int i, int j) {
    if (i < d && j < d) W_out[i * d + j] = P(i, j) /= root;
  });
  __syncthreads();
}

// Computes factor sym dL/dcov in `of[2]`, from sym dL/dW in `of[1]` (zero beyond d): eq. 6, where both S and W depend
// on the scale.
template <int D, int WARPS>
__device__ void covariance_adjoint(const Matrices<D>& of, const Newton& how, float factor, float* slots, const float* W,
                                   const float* S, float scale) {
  const Matrix<D> M = of[0], dM = of[1], dS = of[2];
  const int d = how.d;
  const float root = sqrtf(scale);
  float along = 0;  // <E, W>
  for_entries<D, WARPS>([&](int i, int j) {
    const bool real = i < d && j < d;
    if (real) along += dM(i, j) * W[i * d + j];
    M(i, j) = real ? S[i * d + j] : i == j ? 1.f : 0.f;
    dM(i, j) /= root;
  });
  along = block_sum<WARPS>(along, slots);
  newton_adjoint<D, WARPS>(M, dM, of[3], dS, of[4], S, d, how.iterations, slots);
  float within = 0;  // <dS, S>
  for_entries<D, WARPS>([&](int i, int j) {
    if (i < d && j < d) within += dS(i, j) * S[i * d + j];
  });
  const float d_scale = -(block_sum<WARPS>(within, slots) + .5f * along) / scale;
  for_entries<D, WARPS>([&](int i, int j) {
    if (i < d && j < d) {
      const float along_scale = how.frobenius ? S[i * d + j] : i == j ? 1.f : 0.f;
      dS(i, j) = factor * (dS(i, j) / scale + d_scale * along_scale);
    }
  });
  __syncthreads();
}

// --- host ----------------------------------------------------------------------------------------------------------

// Calls f with std::integral_constant<int, D> for the padded group size.
template <class F>
void with_padded(int64_t d, F f) {
  if (d <= 16) return f(std::integral_constant<int, 16>());
  if (d <= 32) return f(std::integral_constant<int, 32>());
  if (d <= 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 128>());
}

// Makes room for `matrices` after `before` bytes, in the place of `tiles` bytes.
template <int D>
Room make_room(const Device& device, int matrices, int64_t before, int64_t tiles) {
  constexpr int64_t matrix = Matrix<D>::SIZE * int64_t(sizeof(float));
  const int fit = int(std::clamp<int64_t>((device.shared_bytes - before) / matrix, 1, matrices));
  return {fit, before + std::max(tiles, fit * matrix), int64_t(matrices - fit) * Matrix<D>::SIZE};
}

}  // namespace nk
