// moments and cross_moments: the reductions over all samples, one launch each. For d = 1 diagonal.cuh has them.
#include "launches.h"
#include "reduce.cuh"
#include "tensors.h"

namespace nk {

template <class T, int D>
__global__ __launch_bounds__(Warps<D, true>::THREADS,
                             D == 64 ? 2 : 1) void moments_kernel(Columns x, int d, Split cut, Merging merging,
                                                                  Workspace workspace, Rounded mean, float* cov) {
  const Shared<D> shared(shared_memory());
  const Matrix<D> total{reinterpret_cast<float*>(shared.rest)};
  if (!reduce_moments<T, D>(x, d, cut, merging, workspace, shared,
                            [&](int i, int j, float entry) { total(i, j) = entry; })) {
    return;
  }
  const int64_t group = blockIdx.x / cut.parts;
  for_entries<D, Warps<D, true>::COUNT>([&](int i, int j) {
    if (i < d && j < d) cov[group * d * d + i * d + j] = total(i, j) / float(x.total);
  });
  for (int i = threadIdx.x; i < d; i += Warps<D, true>::THREADS) mean.store(group * d + i, shared.exact[i]);
}

template <class T, int D>
__global__ __launch_bounds__(Warps<D, false>::THREADS,
                             1) void cross_moments_kernel(Columns y, Columns x, const float* mean, int d, Split cut,
                                                          Merging merging, Workspace workspace, float* cross,
                                                          float* sum) {
  const Shared<D> shared(shared_memory());
  const Matrix<D> total{reinterpret_cast<float*>(shared.rest)};
  if (!reduce_cross<T, D>(y, x, mean, d, cut, merging, workspace, shared,
                          [&](int i, int j, float entry) { total(i, j) = entry; })) {
    return;
  }
  const int64_t group = blockIdx.x / cut.parts;
  for_entries<D, Warps<D, false>::COUNT>([&](int i, int j) {
    if (i < d && j < d) cross[group * d * d + i * d + j] = total(i, j);
  });
  for (int i = threadIdx.x; i < d; i += Warps<D, false>::THREADS) sum[group * d + i] = shared.first[i];
}

template <class T>
__global__ __launch_bounds__(SWEEP_THREADS, SWEEP_BLOCKS) void channel_moments_kernel(Sweep sweep, Source x,
                                                                                      Workspace workspace, Rounded mean,
                                                                                      float* cov) {
  channel_moments<T>(sweep, x, workspace, [&](int64_t channel, double exact, double variance) {
    mean.store(channel, exact);
    cov[channel] = float(variance);
  });
}

template <class T>
__global__ __launch_bounds__(SWEEP_THREADS,
                             SWEEP_BLOCKS) void channel_sums_kernel(Sweep sweep, Source y, Source x, const float* mean,
                                                                    Workspace workspace, float* cross, float* sum) {
  channel_sums<T>(sweep, y, x, mean, workspace, [&](int64_t channel, double of_y, double, double of_products) {
    cross[channel] = float(of_products);
    sum[channel] = float(of_y);
  });
}

void launch_moments(const Run& run, const Columns& x, int element, int64_t groups, int64_t d, const Reduction& how,
                    const Workspace& workspace, const Rounded& mean, float* cov) {
  run.zero(workspace.tickets, how.counters);
  with_kernel(element, d, [&]<class T, int D>() {
    run.launch("moments", moments_kernel<T, D>, groups * how.cut.parts, Warps<D, true>::THREADS, how.room.bytes,
               {x.total * groups * d * element, groups * d * (d + 2) * 4}, x, int(d), how.cut, how.merging, workspace,
               mean, cov);
  });
}

void launch_cross_moments(const Run& run, const Columns& y, const Columns& x, int element, const float* mean,
                          int64_t groups, int64_t d, const Reduction& how, const Workspace& workspace, float* cross,
                          float* sum) {
  run.zero(workspace.tickets, how.counters);
  with_kernel(element, d, [&]<class T, int D>() {
    run.launch("cross_moments", cross_moments_kernel<T, D>, groups * how.cut.parts, Warps<D, false>::THREADS,
               how.room.bytes, {2 * x.total * groups * d * element, groups * d * (d + 1) * 4}, y, x, mean, int(d),
               how.cut, how.merging, workspace, cross, sum);
  });
}

void launch_channel_moments(const Run& run, const Columns& x, int element, const ChannelReduction& how,
                            const Workspace& workspace, const Rounded& mean, float* cov) {
  const Sweep& sweep = how.sweep;
  how.zero(run, workspace);
  run.launch("channel_moments", element == 4 ? channel_moments_kernel<float> : channel_moments_kernel<Half>,
             sweep.blocks(), SWEEP_THREADS, SWEEP_BYTES, {x.total * sweep.channels * element, sweep.channels * 12},
             sweep, Source(x, sweep), workspace, mean, cov);
}

void launch_channel_sums(const Run& run, const Columns& y, const Columns& x, int element, const float* mean,
                         const ChannelReduction& how, const Workspace& workspace, float* cross, float* sum) {
  const Sweep& sweep = how.sweep;
  how.zero(run, workspace);
  run.launch("channel_sums", element == 4 ? channel_sums_kernel<float> : channel_sums_kernel<Half>, sweep.blocks(),
             SWEEP_THREADS, SWEEP_BYTES, {2 * x.total * sweep.channels * element, sweep.channels * 8}, sweep,
             Source(y, sweep), Source(x, sweep), mean, workspace, cross, sum);
}

// --- ops -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& data, int64_t d, bool exact) {
  check_data("moments", "x", data, d);
  const OnDevice on("moments", data);
  const Tensor x = collapsible(data);
  const int element = int(x.element_size());
  const int64_t channels = x.size(1), groups = channels / d;
  Tensor mean = empty({channels}, ScalarType::Float, x), remainder = empty({channels}, ScalarType::Float, x);
  Tensor cov = empty({groups, d, d}, ScalarType::Float, x);
  if (d == 1) {
    const Columns seen = columns_of(x, channels);
    const ChannelReduction how(on.run.device, channels, element, {&seen});
    const Memory memory(how, x);
    launch_channel_moments(on.run, seen, element, how, memory.workspace, {floats(mean), floats(remainder)},
                           floats(cov));
    return {mean, remainder, cov};
  }
  const Columns seen = columns_of(x, d);
  const Reduction how(on.run.device, seen, element, groups, d, 1, 1);
  const Memory memory(how, x);
  launch_moments(on.run, seen, element, groups, d, how, memory.workspace, {floats(mean), floats(remainder)},
                 floats(cov));
  return {mean, remainder, cov};
}

std::tuple<Tensor, Tensor> cross_moments(const Tensor& left, const Tensor& data, const Tensor& mean, int64_t d) {
  check_data("cross_moments", "x", data, d);
  check_like("cross_moments", "y", left, shape_of(data), data.scalar_type(), data);
  check_like("cross_moments", "mean", mean, {data.size(1)}, ScalarType::Float, data);
  const OnDevice on("cross_moments", data);
  const Tensor x = collapsible(data), y = in_layout_of(x, left, d), center = packed(mean);
  const int element = int(x.element_size());
  const int64_t channels = x.size(1), groups = channels / d;
  Tensor cross = empty({groups, d, d}, ScalarType::Float, x), sum = empty({channels}, ScalarType::Float, x);
  if (d == 1) {
    const Columns seen = columns_of(x, channels), other = columns_of(y, channels);
    const ChannelReduction how(on.run.device, channels, element, {&seen, &other});
    const Memory memory(how, x);
    launch_channel_sums(on.run, other, seen, element, floats(center), how, memory.workspace, floats(cross),
                        floats(sum));
    return {cross, sum};
  }
  const Columns seen = columns_of(x, d);
  const Reduction how(on.run.device, seen, element, groups, d, 2, 1);
  const Memory memory(how, x);
  launch_cross_moments(on.run, columns_of(y, d), seen, element, floats(center), groups, d, how, memory.workspace,
                       floats(cross), floats(sum));
  return {cross, sum};
}

// moments is exact for an eigendecomposition, which comes from a library.
NORMKERNELS_OP(moments, {}, .data = a.tensor(0), .group_size = a.integer(1), .left = a.boolean(2))
NORMKERNELS_OP(cross_moments, {}, .data = a.tensor(1), .group_size = a.integer(3))

}  // namespace nk
