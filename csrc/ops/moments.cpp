// moments and cross_moments.
#include "cuda/launches.h"
#include "op.h"
#include "workspace.h"

namespace nk {

std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& data, int64_t d, bool /*exact*/) {
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
