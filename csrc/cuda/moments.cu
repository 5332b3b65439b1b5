// moments and cross_moments: the reductions over all samples, one launch each. For d = 1 diagonal.cuh has them.
#include "diagonal.cuh"
#include "launch.cuh"
#include "launches.h"
#include "reduce.cuh"

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

Reduction::Reduction(const Device& device, const Columns& x, int element, int64_t groups, int64_t d, int sources,
                     int matrices) {
  with_kernel(element, d, [&]<class T, int D>() {
    const bool one = sources == 1;
    room = make_room<D>(device, matrices, Shared<D>::VECTORS, one ? tile_bytes<T, D, 1>() : tile_bytes<T, D, 2>());
    const int threads = one ? Warps<D, true>::THREADS : Warps<D, false>::THREADS;
    const int tile = one ? Stages<D, 1>::COLUMNS : Stages<D, 2>::COLUMNS;
    cut = split(x.total, groups, tile, resident(device, threads, room.bytes), MOST_MERGED * MOST_MERGED);
    merging = Merging(cut.parts);
    floats = groups * (cut.parts + merging.sets) * Partial<D>::SIZE;
    counters = groups * (merging.sets + 1);
  });
}

}  // namespace nk
