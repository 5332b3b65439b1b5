// precondition: BNP's steps 3 to 5 for the gradients of many layers in one launch. Algebra:
// primitives/precondition/DERIVATION.md.
//
// A row, the weights of one output, is read twice, from memory and then from a cache: first for its sum, which also
// tells whether all is finite, then to write it. A warp has a short row, a block a long one.
#include <cfloat>

#include "diagonal.cuh"
#include "launch.cuh"
#include "launches.h"

namespace nk {

// Returns the value of a whole team, a warp or a block, from those of its threads; the order is fixed.
template <class F>
__device__ __forceinline__ float over_team(bool block, float value, F f) {
  for (int other = WARP / 2; other; other /= 2) value = f(value, __shfl_xor_sync(~0u, value, other));
  if (!block) return value;
  float* const slots = reinterpret_cast<float*>(shared_memory());
  if (lane() == 0) slots[warp()] = value;
  __syncthreads();  // every warp's value is there
  value = slots[0];
  for (int k = 1; k < ROW_WARPS; ++k) value = f(value, slots[k]);
  __syncthreads();  // and read, before the next takes its place
  return value;
}

// Calls f(place, values, their channels) for a thread's accesses to a row; 64 bytes of them are under way.
template <class T, int V, class F>
__device__ __forceinline__ void for_row(const GradientLayer& layer, T* row, int thread, int threads, F f) {
  constexpr int AT_ONCE = ACCESSES<T, V, 1>;
  const unsigned count = unsigned(layer.channels) * layer.taps / V, fast = layer.inner ? layer.channels : layer.taps;
  auto* const accesses = reinterpret_cast<Access<T, V>*>(row);
#pragma unroll 1
  for (unsigned first = thread; first < count; first += AT_ONCE * threads) {
    Access<T, V> values[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (first + k * threads < count) values[k] = accesses[first + k * threads];
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      const unsigned i = first + k * threads;
      if (i >= count) break;
      unsigned slow = i * V / fast, at = i * V % fast;  // one division for V values
      int channel[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        channel[j] = int(layer.inner ? at : slow);
        if (++at == fast) at = 0, ++slow;
      }
      f(accesses[i], values[k], channel);
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void precondition_row(const GradientLayers& all, const GradientLayer& layer, int row,
                                                 bool block, unsigned* left) {
  const int thread = block ? int(threadIdx.x) : lane(), threads = block ? ROW_THREADS : WARP;
  const int first = row / layer.rows_of_group * layer.channels;
  const float *mean = layer.mean + first, *variance = layer.variance + first;
  float most = -INFINITY;
  for (int j = thread; j < layer.channels; j += threads) most = fmaxf(most, variance[j]);
  most = over_team(block, most, [](float a, float b) { return fmaxf(a, b); });
  const float added = all.eps1 * most + all.eps2;

  T* const weights = reinterpret_cast<T*>(layer.weight) + int64_t(row) * layer.channels * layer.taps;
  T* const bias = reinterpret_cast<T*>(layer.bias) + row;
  const float of_bias = layer.bias == nullptr ? 0.f : to_float(*bias, all.bfloat);
  const auto changed = [&](float value, int j) {
    return (value - mean[j] * of_bias) * (1.f / (layer.q2 * (variance[j] + added)));
  };
  const float largest = sizeof(T) == 4 ? FLT_MAX : all.bfloat ? 3.3895314e38f : 65504.f;  // the largest T
  float sum = 0;
  for_row<T, V>(layer, weights, thread, threads, [&](const auto&, const auto& values, const int (&channel)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float value = changed(values.get(k, all.bfloat), channel[k]);
      sum += fabsf(value) <= largest ? mean[channel[k]] * value : INFINITY;
    }
  });
  sum = over_team(block, sum, [](float a, float b) { return a + b; });
  const float result = layer.bias == nullptr ? sum : of_bias / layer.q2 - sum;  // step 5, with the results of step 4
  if (!(fabsf(result) <= (layer.bias == nullptr ? FLT_MAX : largest))) {
    if (thread == 0) atomicAdd(left, 1u);
    return;
  }
  for_row<T, V>(layer, weights, thread, threads, [&](auto& place, const auto& values, const int (&channel)[V]) {
    Access<T, V> written;
#pragma unroll
    for (int k = 0; k < V; ++k) written.set(k, changed(values.get(k, all.bfloat), channel[k]), all.bfloat);
    place = written;
  });
  if (layer.bias != nullptr && thread == 0) from_float(*bias, result, all.bfloat);
}

// left (layers,): rows that are left as they are, because something in them is not finite.
template <class T>
__global__ __launch_bounds__(ROW_THREADS, 3) void precondition_kernel(GradientLayers all, unsigned* left) {
  int number = 0;
  while (number + 1 < all.count && int(blockIdx.x) >= all.layer[number + 1].first_block) ++number;
  const GradientLayer layer = all.layer[number];
  const bool block = layer.is_long();
  const int row = (int(blockIdx.x) - layer.first_block) * layer.rows_of_block() + (block ? 0 : warp());
  if (row >= layer.rows) return;
  layer.vector == 1 ? precondition_row<T, 1>(all, layer, row, block, left + number)
                    : precondition_row<T, 16 / sizeof(T)>(all, layer, row, block, left + number);
}

void launch_precondition(const Run& run, GradientLayers all, int element, unsigned* left) {
  int64_t blocks = 0, values = 0, vectors = 0;
  for (int i = 0; i < all.count; ++i) {
    GradientLayer& layer = all.layer[i];
    const int64_t row = int64_t(layer.channels) * layer.taps;
    layer.first_block = int(blocks);
    layer.vector = reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0 && row * element % 16 == 0 ? 16 / element : 1;
    blocks += (layer.rows + layer.rows_of_block() - 1) / layer.rows_of_block();
    values += layer.rows * (row + (layer.bias == nullptr ? 0 : 1));
    vectors += layer.rows / layer.rows_of_group * layer.channels;
  }
  run.launch("precondition", element == 4 ? precondition_kernel<float> : precondition_kernel<Half>, blocks, ROW_THREADS,
             ROW_WARPS * int64_t(sizeof(float)), {values * element + vectors * 8, values * element}, all, left);
}

}  // namespace nk
