// precondition: BNP's steps 3 to 5 for the gradients of many layers in one launch. Algebra:
// primitives/precondition/DERIVATION.md.
//
// A row, the weights of one output, is read twice, from memory and then from a cache: first for its sum, which also
// tells whether all is finite, then to write it. A warp has a short row, a block a long one.
#include <cfloat>

#include "launches.h"
#include "tensors.h"

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

// --- op ------------------------------------------------------------------------------------------------------------

// Returns whether rows follow each other and their values are dense, the channels (`inner`) or the taps innermost.
static bool dense_rows(const Tensor& weight, bool inner) {
  int64_t expected = 1;
  const auto as_expected = [&](int64_t dim) {
    const bool same = weight.size(dim) == 1 || weight.stride(dim) == expected;
    expected *= weight.size(dim);
    return same;
  };
  bool dense = !inner || as_expected(1);
  for (int64_t dim = weight.dim() - 1; dim >= 2; --dim) dense = dense && as_expected(dim);
  return dense && (inner || as_expected(1)) && as_expected(0);
}

static void check_layer(const char* op, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                        const Tensor& variance, int64_t groups, double q2, const Tensor& first) {
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.numel() > 0, op,
                  ": weight_grads: expected non-empty shapes (O, I / groups, *k), got ", text(shape_of(weight)));
  check_like(op, "weight_grads", weight, shape_of(weight), first.scalar_type(), first);
  const int64_t rows = weight.size(0), inputs = weight.size(1) * groups;
  STD_TORCH_CHECK(groups >= 1 && rows % groups == 0, op, ": groups: expected a divisor of the ", rows, " outputs, got ",
                  groups);
  STD_TORCH_CHECK(q2 > 0, op, ": q2: expected a number above 0, got ", q2);
  STD_TORCH_CHECK(weight.numel() / rows <= INT32_MAX && rows <= INT32_MAX, op, ": weight_grads: expected up to ",
                  INT32_MAX, " outputs and weights of an output, got ", text(shape_of(weight)));
  if (bias.numel() > 0) check_like(op, "bias_grads", bias, {rows}, first.scalar_type(), first);
  check_like(op, "means", mean, {inputs}, ScalarType::Float, first);
  check_like(op, "variances", variance, {inputs}, ScalarType::Float, first);
}

Tensor precondition(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                    const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                    const std::vector<int64_t>& groups, const std::vector<double>& q2, double eps1, double eps2) {
  const char* op = "precondition";
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, op, ": weight_grads: expected at least one layer, got none");
  const auto check_size = [&](const char* name, size_t size) {
    STD_TORCH_CHECK(size == count, op, ": ", name, ": expected one for each of the ", count, " layers, got ", size);
  };
  check_size("bias_grads", biases.size()), check_size("means", means.size());
  check_size("variances", variances.size()), check_size("groups", groups.size()), check_size("q2", q2.size());
  for (size_t i = 0; i < count; ++i) {
    check_layer(op, weights[i], biases[i], means[i], variances[i], groups[i], q2[i], weights[0]);
  }
  const OnDevice on(op, weights[0]);
  const Tensor left = empty({int64_t(count)}, ScalarType::Int, weights[0]);
  unsigned* const counters = static_cast<unsigned*>(left.data_ptr());
  on.run.zero(counters, int64_t(count));
  for (size_t first = 0; first < count; first += MOST_LAYERS) {
    GradientLayers all{};
    all.eps1 = float(eps1), all.eps2 = float(eps2), all.bfloat = weights[0].scalar_type() == ScalarType::BFloat16;
    std::vector<Tensor> kept;                        // until the launch
    std::vector<std::pair<Tensor, Tensor>> changed;  // copies, and where they go back to
    const auto in_place = [&](const Tensor& t, bool dense) {
      if (!dense) changed.emplace_back(packed(t), t);
      return dense ? t : changed.back().first;
    };
    const auto read_only = [&](const Tensor& t) { return floats(kept.emplace_back(packed(t))); };
    for (size_t i = first; i < std::min(count, first + MOST_LAYERS); ++i) {
      const bool positions = dense_rows(weights[i], false), inner = !positions && dense_rows(weights[i], true);
      const Tensor weight = in_place(weights[i], positions || inner);
      const int64_t rows = weight.size(0), channels = weight.size(1);
      all.layer[all.count++] = {
          .weight = static_cast<unsigned char*>(weight.data_ptr()),
          .bias = biases[i].numel() == 0
                      ? nullptr
                      : static_cast<unsigned char*>(in_place(biases[i], biases[i].is_contiguous()).data_ptr()),
          .mean = read_only(means[i]),
          .variance = read_only(variances[i]),
          .q2 = float(q2[i]),
          .rows = int(rows),
          .rows_of_group = int(rows / groups[i]),
          .channels = int(channels),
          .taps = int(weight.numel() / rows / channels),
          .inner = inner,
      };
    }
    launch_precondition(on.run, all, int(weights[0].element_size()), counters + first);
    for (auto& [copy, original] : changed) torch::stable::copy_(original, copy);
  }
  return left;
}

NORMKERNELS_OP(precondition, {}, .data = a.list(0).tensor(0))

}  // namespace nk
