// What the kernels serve, the devices that they run on, and the launches of an op on data of a given shape.
#include "plans.h"

#include <cstdlib>
#include <mutex>
#include <numeric>
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

constexpr int LARGEST_GROUP = 128, LARGEST_PLANE = 64;

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

// Machine code serves its own generation from its minor version on, PTX everything newer.
static bool compiled_for(int architecture) {
  static const std::vector<int> all = compiled_architectures();
  for (int known : all) {
    if (known / 10 == architecture / 10 && known <= architecture) return true;
  }
  return compiled_ptx() != 0 && compiled_ptx() <= architecture;
}

std::string refusal(const std::string& op, const std::string& dtype, int64_t group_size,
                    const std::vector<int64_t>& plane, int architecture) {
  std::ostringstream reason;
  if (!compiled_for(architecture)) {
    reason << "expected a GPU that the extension was compiled for (";
    for (int known : compiled_architectures()) reason << "sm_" << known << ", ";
    reason << (compiled_ptx() ? "newer ones by PTX" : "no PTX") << "), got sm_" << architecture;
  } else if (dtype != "float32" && dtype != "float16" && dtype != "bfloat16") {
    reason << "expected float32 or a half type, got " << dtype;
  } else if (group_size > LARGEST_GROUP) {
    reason << "expected groups of at most " << LARGEST_GROUP << " channels, got " << group_size;
  } else if (plane.size() == 2 && std::max(plane[0], plane[1]) > LARGEST_PLANE) {
    reason << "expected planes of at most " << LARGEST_PLANE << " x " << LARGEST_PLANE << ", got " << plane[0] << " x "
           << plane[1];
  }
  (void)op;
  return reason.str();
}

// --- launch plans
// ----------------------------------------------------------------------------------------------------------

// Contiguous or channels_last data of this shape, nowhere.
static Columns columns_like(const std::vector<int64_t>& shape, bool channels_last, int64_t d, int64_t bytes) {
  Columns seen;
  const int64_t samples = shape[0], channels = shape[1];
  int64_t positions = 1;
  for (size_t i = 2; i < shape.size(); ++i) positions *= shape[i];
  seen.total = samples * positions;
  seen.inner = channels > 1 && (channels_last || positions == 1);
  seen.positions = seen.inner || samples == 1 ? seen.total : positions;
  seen.sample_stride = channels * positions;
  seen.channel_stride = seen.inner ? 1 : positions;
  seen.position_stride = seen.inner ? channels : 1;
  seen.width = 16;
  const int64_t along = seen.inner ? std::gcd(d, channels) : positions;
  while (seen.width > bytes && along * bytes % seen.width) seen.width /= 2;
  return seen;
}

std::vector<KernelPlan> launch_plan(const std::string& op, const std::vector<int64_t>& shape, const std::string& dtype,
                                    bool channels_last, int64_t group_size, const std::vector<int64_t>& plane,
                                    const Device& device) {
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
  const Columns x = columns_like(shape, channels_last, d, element);
  const auto reduction = [&](int sources) { return Reduction(device, x, groups, d, sources); };
  if (op == "moments") {
    launch_moments(run, x, element, groups, d, reduction(1), {}, nullptr, nullptr);
  } else if (op == "cross_moments") {
    launch_cross_moments(run, x, x, element, nullptr, groups, d, reduction(2), {}, nullptr, nullptr);
  } else if (op == "whiten") {
    launch_mix(run, x, nullptr, nullptr, nullptr, x, element, {}, {}, {}, groups, d);
  } else if (op == "iter_norm") {
    launch_forward(run, x, element, groups, how, reduction(1), {},
                   reduction_room(device, element, d, 1, FORWARD_MATRICES), nullptr, {}, {}, {});
    launch_mix(run, x, nullptr, nullptr, nullptr, x, element, {}, {}, {}, groups, d);
  } else if (op == "iter_norm_backward") {
    launch_backward(run, x, x, element, groups, how, reduction(2), {},
                    reduction_room(device, element, d, 2, BACKWARD_MATRICES), nullptr, {}, {}, {});
    launch_mix(run, x, nullptr, &x, nullptr, x, element, {}, {}, {}, groups, d);
  } else {
    expect(false, "expected an op with CUDA kernels");
  }
  return plans;
}

// --- errors of Python
// ----------------------------------------------------------------------------------------------------

static thread_local std::string pending_error;

void set_error(std::string text) {
  pending_error = std::move(text);
}

std::string take_error(const char* op) {
  std::string text = std::move(pending_error);
  pending_error.clear();
  return text.empty() ? std::string(op) + ": the next backend raised an error, which it has printed" : text;
}

// --- devices
// -------------------------------------------------------------------------------------------------------------

Device device_of(int index) {
#ifdef NORMKERNELS_SIMT
  (void)index;
  const char* shared = std::getenv("NORMKERNELS_SIMT_SHARED_BYTES");
  return {80, 3, shared ? std::atoi(shared) : 232448};  // few blocks, but several
#else
  static std::mutex mutex;
  static std::vector<Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
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
