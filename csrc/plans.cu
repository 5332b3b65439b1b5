// The calls that the kernels serve, the devices that they run on, and the launches of an op on data of a given shape.
#include "plans.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "launches.h"

#ifndef NORMKERNELS_ARCHITECTURES
#define NORMKERNELS_ARCHITECTURES _80  // or _80_90 and so on
#endif
#ifndef NORMKERNELS_PTX
#define NORMKERNELS_PTX 0
#endif

namespace nk {

#define NORMKERNELS_TEXT_(name) #name
#define NORMKERNELS_TEXT(name) NORMKERNELS_TEXT_(name)

std::vector<int> compiled_architectures() {
  std::istringstream text(NORMKERNELS_TEXT(NORMKERNELS_ARCHITECTURES));
  std::vector<int> found;
  char underscore;
  for (int each; text >> underscore >> each;) found.push_back(each);
  return found;
}

int compiled_ptx() {
  return NORMKERNELS_PTX;
}

// Machine code serves its own generation from its minor version on, except for 8.7, which needs its own; PTX serves
// everything newer.
bool compiled_for(int architecture) {
  static const std::vector<int> all = compiled_architectures();
  for (int known : all) {
    if (known == architecture) return true;
    if (known / 10 == architecture / 10 && known < architecture && architecture != 87) return true;
  }
  return compiled_ptx() != 0 && compiled_ptx() <= architecture;
}

std::map<std::string, Limits>& limits_of_ops() {
  static std::map<std::string, Limits> all;  // in a function: it must be there before the first op is registered
  return all;
}

template <class... Parts>
static std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

std::string refusal(const Limits& limits, const std::string& dtype, int64_t group_size,
                    const std::vector<int64_t>& plane, int architecture) {
  if (!compiled_for(architecture)) {
    std::string known;
    for (int each : compiled_architectures()) known += sentence("sm_", each, ", ");
    return sentence("expected a GPU that the extension was compiled for (", known,
                    compiled_ptx() ? "newer ones by PTX" : "no PTX", "), got sm_", architecture);
  }
  const bool half = dtype == "float16" || dtype == "bfloat16";
  if (dtype != "float32" && !half) return sentence("expected float32 or a half type, got ", dtype);
  if (half && !limits.half_types) return sentence("expected float32, got ", dtype);
  if (group_size > limits.largest_group) {
    return sentence("expected groups of at most ", limits.largest_group, " channels, got ", group_size);
  }
  if (group_size > 0 && group_size < limits.smallest_group) {
    return sentence("expected groups of at least ", limits.smallest_group, " channels, got ", group_size);
  }
  if (plane.size() == 2 && std::max(plane[0], plane[1]) > limits.largest_plane) {
    return sentence("expected planes of at most ", limits.largest_plane, " x ", limits.largest_plane, ", got ",
                    plane[0], " x ", plane[1]);
  }
  return "";
}

std::string refusal(const std::string& op, const std::string& dtype, int64_t group_size,
                    const std::vector<int64_t>& plane, int architecture) {
  const auto found = limits_of_ops().find(op);
  if (found == limits_of_ops().end()) return "expected an op with CUDA kernels, got " + op;
  return refusal(found->second, dtype, group_size, plane, architecture);
}

// --- launch plans --------------------------------------------------------------------------------------------------

std::vector<KernelPlan> launch_plan(const std::string& op, const std::vector<int64_t>& shape, const std::string& dtype,
                                    int64_t group_size, const std::vector<int64_t>& plane, const Device& device) {
  const auto expect = [&](bool met, const std::string& what) {
    if (!met) throw std::invalid_argument(op + ": " + what);
  };
  const std::string reason = refusal(op, dtype, group_size, plane, device.architecture);
  expect(reason.empty(), reason);
  expect(shape.size() >= 2 && *std::min_element(shape.begin(), shape.end()) >= 1,
         "expected a shape (N, C, *) without zeros");
  std::vector<KernelPlan> plans;
  const Run run{op.c_str(), device, nullptr, &plans};
  const int element = dtype == "float32" ? 4 : 2;
  const int64_t channels = shape[1], d = group_size;
  if (op == "spectral_filter") {
    expect(shape.size() == 4 && plane.size() == 2, "expected a shape (N, C, h, w) and a plane (H, W)");
    Planes planes{};
    planes.rows = {0, 1, int(shape[2])}, planes.columns = {0, 1, int(shape[3])};
    launch_filter(run, planes, planes, element, nullptr, {}, plane[0], plane[1], shape[0], channels, nullptr);
    return plans;
  }
  if (op == "precondition") {  // the shape is that of a layer's weights
    GradientLayers all{};
    all.count = 1;
    all.layer[0].rows = all.layer[0].rows_of_group = int(shape[0]);
    all.layer[0].channels = int(channels), all.layer[0].taps = 1;
    for (size_t i = 2; i < shape.size(); ++i) all.layer[0].taps *= int(shape[i]);
    launch_precondition(run, all, element, nullptr);
    return plans;
  }
  Columns x;
  x.total = shape[0];
  for (size_t i = 2; i < shape.size(); ++i) x.total *= shape[i];
  x.positions = x.total / shape[0], x.inner = x.positions == 1, x.width = 16;
  while ((x.inner ? channels : x.positions) * element % x.width != 0) x.width /= 2;
  const ChannelReduction of_x(device, channels, element, {&x}), of_both(device, channels, element, {&x, &x});
  const auto map = [&](const Columns* other) {
    launch_scale(run, x, {}, nullptr, other, {}, x, element, channels, {}, {});
  };
  if (op == "pop_norm") {
    launch_pop_forward(run, x, element, of_x, {}, {}, {}, {}, {});
    map(nullptr);
    return plans;
  }
  if (op == "pop_norm_backward") {
    launch_pop_backward(run, x, x, element, of_both, {}, {}, {}, {}, nullptr, nullptr, {});
    map(&x);
    return plans;
  }
  expect(d >= 1 && channels % d == 0, "expected a group size that divides the channels");
  const int64_t groups = channels / d;
  const Newton how{int(d), 5, false, 0.f};
  if (op == "inverse_sqrt") {
    launch_inverse_sqrt(run, nullptr, groups, how, small_matrix_room(device, d, FORWARD_MATRICES), nullptr, nullptr,
                        nullptr, nullptr);
    return plans;
  }
  if (op == "inverse_sqrt_backward") {
    launch_inverse_sqrt_backward(run, nullptr, nullptr, nullptr, nullptr, groups, how,
                                 small_matrix_room(device, d, BACKWARD_MATRICES), nullptr, nullptr);
    return plans;
  }
  const auto reduction = [&](int sources, int matrices) {
    return Reduction(device, x, element, groups, d, sources, matrices);
  };
  if (d == 1 && op == "moments") {
    launch_channel_moments(run, x, element, of_x, {}, {}, nullptr);
  } else if (d == 1 && op == "cross_moments") {
    launch_channel_sums(run, x, x, element, nullptr, of_both, {}, nullptr, nullptr);
  } else if (d == 1 && op == "whiten") {
    map(nullptr);
  } else if (op == "moments") {
    launch_moments(run, x, element, groups, d, reduction(1, 1), {}, {}, nullptr);
  } else if (op == "cross_moments") {
    launch_cross_moments(run, x, x, element, nullptr, groups, d, reduction(2, 1), {}, nullptr, nullptr);
  } else if (op == "whiten") {
    launch_mix(run, x, nullptr, nullptr, nullptr, x, element, {}, {}, {}, groups, d);
  } else if (op == "stacked_mix") {
    launch_mix(run, x, nullptr, &x, nullptr, x, element, {}, {}, {}, groups, d);
  } else if (op == "iter_norm") {
    launch_forward(run, x, element, groups, how, reduction(1, FORWARD_MATRICES), {}, nullptr, {}, {}, {});
    launch_mix(run, x, nullptr, nullptr, nullptr, x, element, {}, {}, {}, groups, d);
  } else if (op == "iter_norm_backward") {
    launch_backward(run, x, x, element, groups, how, reduction(2, BACKWARD_MATRICES), {}, nullptr, {}, {}, {});
    launch_mix(run, x, nullptr, &x, nullptr, x, element, {}, {}, {}, groups, d);
  }
  return plans;
}

// --- devices -------------------------------------------------------------------------------------------------------

Device device_of(int index) {
#ifdef NORMKERNELS_SIMT
  (void)index;
  const char* shared = std::getenv("NORMKERNELS_SIMT_SHARED_BYTES");
  return {80, 3, shared ? std::atoi(shared) : 232448};  // few blocks, but several
#else
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  STD_TORCH_CHECK(index >= 0, "expected the index of a CUDA device, got ", index);
  if (int(known.size()) <= index) known.resize(size_t(index) + 1, Device{0, 0, 0});
  Device& device = known[size_t(index)];
  if (device.architecture == 0) {
    int major, minor, processors, shared;
    check_cuda("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    check_cuda("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    check_cuda("device", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    check_cuda("device", cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    device = {10 * major + minor, processors, shared};
  }
  return device;
#endif
}

}  // namespace nk
