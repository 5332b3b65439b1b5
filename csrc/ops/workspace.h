// A call on its way to the launches: the GPU that it runs on, and memory beside its results.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/tensors.h"
#include "cuda/cuts.h"
#include "current.h"

namespace nk {

// A call of an op on the GPU that has x; or in the recording, if x has no memory.
struct OnDevice {
  Run run;

  OnDevice(const char* op, const Tensor& x) : run{op} {
    if (is_meta(x)) {
      STD_TORCH_CHECK(recording() != nullptr, op, ": expected launches to be recorded, got a call on the device meta");
      run.device = recording()->device;
      run.plan = &recording()->launches;
    } else {
      STD_TORCH_CHECK(on_gpu(x), op, ": expected data on a CUDA device, got data on a CPU");
      run.device = device_of(x);
      run.stream = current_.emplace(x).stream;
    }
  }

 private:
  std::optional<Current> current_;
};

// Memory for a reduction's partial results and counters.
struct Memory {
  Tensor partials, counters;
  Workspace workspace;

  template <class How>  // Reduction or ChannelReduction
  Memory(const How& how, const Tensor& x)
      : partials(empty({how.floats}, ScalarType::Float, x)),
        counters(empty({how.counters}, ScalarType::Int, x)),
        workspace{floats(partials), static_cast<unsigned*>(counters.data_ptr())} {}
};

inline Newton newton_of(const char* op, int64_t d, int64_t iterations, bool frobenius, double eps) {
  STD_TORCH_CHECK(iterations >= 0, op, ": num_iterations: expected at least 0, got ", iterations);
  return {int(d), int(std::min<int64_t>(iterations, INT32_MAX)), frobenius, float(eps)};
}

// Returns memory for the groups' matrices that shared memory has no room for.
inline Tensor scratch_for(const Room& room, const Tensor& x, int64_t groups) {
  return empty({groups * room.outside}, ScalarType::Float, x);
}

}  // namespace nk
