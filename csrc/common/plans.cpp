// The calls that the kernels serve, the devices that they run on, and recordings of launches.
#include "plans.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <utility>

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

std::string refusal(const std::string& op, const std::string& dtype, int64_t group_size,
                    const std::vector<int64_t>& plane, int architecture) {
  const auto found = limits_of_ops().find(op);
  if (found == limits_of_ops().end()) return "expected an op with CUDA kernels, got " + op;
  const Limits& limits = found->second;
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

// --- recorded launches ---------------------------------------------------------------------------------------------

static thread_local std::optional<Recording> current;

void record(const Device& device) {
  current = Recording{device, {}};
}

std::vector<KernelPlan> recorded() {
  const auto ended = std::exchange(current, std::nullopt);
  return ended ? ended->launches : std::vector<KernelPlan>();
}

Recording* recording() {
  return current ? &*current : nullptr;
}

}  // namespace nk
