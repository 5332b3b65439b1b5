// Merges the results of a reduction's blocks for their parts of the columns, in the launch that made them and in a
// fixed order. There are two levels, and at each the block that arrives last merges. One block for all would read the
// results at the speed of one multiprocessor. Algebra: primitives/moments/DERIVATION.md.
#pragma once

#include "columns.cuh"
#include "cuts.h"
#include "small_matrix.cuh"

namespace nk {

// A reduction's result for some columns, in global memory: two vectors and a matrix.
//   moments: the mean as the sum of two floats, and sum (x - mean)(x - mean)^T
//   cross moments: sum y, sum (x - mean), and sum y (x - mean)^T
template <int D>
struct Partial {
  static constexpr int SIZE = 2 * D + D * D;
  float* data;

  __device__ __forceinline__ float* first() const { return data; }
  __device__ __forceinline__ float* second() const { return data + D; }
  __device__ __forceinline__ float* matrix() const { return data + 2 * D; }
};

// Shared memory of a block: vectors, then tiles, and in their place the matrices that come after them.
template <int D>
struct Shared {
  static constexpr int VECTORS = (2 * D + WARP + MOST_MERGED * D) * int(sizeof(float)) + D * int(sizeof(double));
  double* exact;                               // (D), the mean
  float *first, *second, *slots, *deviations;  // (D), (D), (32), (MOST_MERGED, D)
  float* center;                               // (D), the mean in float32; later the deviations
  unsigned char* rest;

  __device__ __forceinline__ explicit Shared(unsigned char* memory)
      : exact(reinterpret_cast<double*>(memory)),
        first(reinterpret_cast<float*>(exact + D)),
        second(first + D),
        slots(second + D),
        deviations(slots + WARP),
        center(deviations),
        rest(memory + VECTORS) {}
};

// Returns whether this block comes last of `expected`: then it sees what all of them have written.
__device__ __forceinline__ bool comes_last(unsigned* ticket, int expected, float* slots) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) slots[0] = atomicAdd(ticket, 1u) == unsigned(expected - 1) ? 1.f : 0.f;
  __syncthreads();
  const bool last = slots[0] != 0.f;
  __threadfence();
  __syncthreads();
  return last;
}

// Calls f(i, j, sum over `count` partial results of their matrices and of between(k, i, j)).
template <int D, int THREADS, class Between, class F>
__device__ __forceinline__ void merge_matrices(const float* partials, int count, Between between, F f) {
#pragma unroll 1
  for (int at = 4 * threadIdx.x; at < D * D; at += 4 * THREADS) {
    const int i = at / D, j = at % D;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      // .cg: other blocks' results are in the second-level cache
      const float4 m = __ldcg(reinterpret_cast<const float4*>(partials + k * Partial<D>::SIZE + 2 * D + at));
      sum.x += m.x + between(k, i, j);
      sum.y += m.y + between(k, i, j + 1);
      sum.z += m.z + between(k, i, j + 2);
      sum.w += m.w + between(k, i, j + 3);
    }
    f(i, j, sum.x);
    f(i, j + 1, sum.y);
    f(i, j + 2, sum.z);
    f(i, j + 3, sum.w);
  }
}

// Merges moments by Chan's formula: writes the mean of all to shared.exact, and calls
// f(i, j, sum (x - mean)(x - mean)^T). A partial result has `each` columns, the last one the rest of `columns`.
template <int D, int THREADS, class F>
__device__ __forceinline__ void merge_moments(const float* partials, int count, int64_t each, int64_t columns,
                                              const Shared<D>& shared, F f) {
  const auto columns_of = [&](int k) { return min(each, columns - k * each); };
#pragma unroll 1
  for (int c = threadIdx.x; c < D; c += THREADS) {
    double sum = 0;
    for (int k = 0; k < count; ++k) {
      const float* mean = partials + k * Partial<D>::SIZE + c;
      sum += (double(__ldcg(mean)) + double(__ldcg(mean + D))) * double(columns_of(k));
    }
    shared.exact[c] = sum / double(columns);
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < count * D; at += THREADS) {
    const float* mean = partials + at / D * Partial<D>::SIZE + at % D;
    shared.deviations[at] = float(double(__ldcg(mean)) - shared.exact[at % D] + double(__ldcg(mean + D)));
  }
  __syncthreads();
  const auto between = [&](int k, int i, int j) {  // symmetric bit by bit
    return float(columns_of(k)) * (shared.deviations[k * D + i] * shared.deviations[k * D + j]);
  };
  merge_matrices<D, THREADS>(partials, count, between, f);
  __syncthreads();
}

// Writes the sums of the vectors to shared.first and shared.second, and calls f(i, j, sum of the matrices).
template <int D, int THREADS, class F>
__device__ __forceinline__ void merge_cross(const float* partials, int count, const Shared<D>& shared, F f) {
  for (int c = threadIdx.x; c < 2 * D; c += THREADS) {
    double sum = 0;
    for (int k = 0; k < count; ++k) sum += double(__ldcg(partials + k * Partial<D>::SIZE + c));
    float* const to = c < D ? shared.first : shared.second;
    to[c % D] = float(sum);
  }
  merge_matrices<D, THREADS>(partials, count, [](int, int, int) { return 0.f; }, f);
  __syncthreads();
}

// The place of a block in a reduction.
template <int D>
struct Place {
  int64_t group;
  int part, set, in_set;
  float *parts, *sets;
  unsigned *ticket, *last_ticket;

  __device__ __forceinline__ Place(const Workspace& workspace, const Split& cut, const Merging& merging)
      : group(blockIdx.x / cut.parts), part(int(blockIdx.x % cut.parts)), set(part / merging.fan) {
    in_set = min(merging.fan, cut.parts - set * merging.fan);
    parts = workspace.partials + group * (cut.parts + merging.sets) * Partial<D>::SIZE;
    sets = parts + int64_t(cut.parts) * Partial<D>::SIZE;
    ticket = workspace.tickets + group * (merging.sets + 1) + set;
    last_ticket = workspace.tickets + group * (merging.sets + 1) + merging.sets;
  }
};

// Merges the parts of a group in two levels, after this block has written its own; returns true in the group's last
// block, which alone goes on. merge(partials, count, columns of each, columns of all, f) merges some parts and calls
// f(i, j, entry) for their matrix; vectors(c, first, second) gives the vectors of the merged parts.
template <int D, int THREADS, class Merge, class Vectors, class F>
__device__ __forceinline__ bool merge_levels(const Place<D>& here, const Split& cut, const Merging& merging,
                                             int64_t total, float* slots, Merge merge, Vectors vectors, F f) {
  if (!comes_last(here.ticket, here.in_set, slots)) return false;
  if (merging.sets == 1) {
    merge(here.parts, cut.parts, cut.chunk, total, f);
    return true;
  }
  const int64_t each = merging.fan * cut.chunk, rest = total - here.set * each;
  const Partial<D> merged{here.sets + here.set * Partial<D>::SIZE};
  merge(here.parts + int64_t(here.set) * merging.fan * Partial<D>::SIZE, here.in_set, cut.chunk, min(each, rest),
        [&](int i, int j, float entry) { merged.matrix()[i * D + j] = entry; });
  for (int c = threadIdx.x; c < D; c += THREADS) vectors(c, merged.first()[c], merged.second()[c]);
  if (!comes_last(here.last_ticket, merging.sets, slots)) return false;
  merge(here.sets, merging.sets, each, total, f);
  return true;
}

}  // namespace nk
