// One call of an op on its way to the GPU: the device, the stream, and every launch. In a recording the launches are
// written down instead, so that a plan shows the launches that are run.
#pragma once

#include <vector>

#include "common/plans.h"

namespace nk {

struct Run {
  const char* op;
  Device device = {};
  void* stream = nullptr;  // a cudaStream_t, which is not for host code here
  std::vector<KernelPlan>* plan = nullptr;

  // read, written: bytes of activations and matrices that the kernel has to read and to write.
  struct Traffic {
    int64_t read, written;
  };

  // Launches a kernel; launch.cuh has it.
  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Traffic traffic, const Arguments&... arguments) const;

  void zero(unsigned* counters, int64_t count) const;
};

}  // namespace nk
