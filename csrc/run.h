// One call of an op on its way to the GPU: the device, the stream, and every launch. In a recording the launches are
// written down instead, so that a plan shows the launches that are run.
#pragma once

#include <vector>

#include "device.cuh"
#include "plans.h"

namespace nk {

struct Run {
  const char* op;
  Device device = {};
  cudaStream_t stream = nullptr;
  std::vector<KernelPlan>* plan = nullptr;

  // read, written: bytes of activations and matrices that the kernel has to read and to write.
  struct Traffic {
    int64_t read, written;
  };

  template <class... Parameters, class... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Traffic traffic, const Arguments&... arguments) const {
    if (plan != nullptr) {
      plan->push_back({name, {blocks, 1, 1}, threads, shared_bytes, traffic.read, traffic.written});
    } else {
      nk::launch(
          op, kernel,
          Launch{dim3(unsigned(blocks)), unsigned(threads), size_t(shared_bytes), stream, size_t(device.shared_bytes)},
          arguments...);
    }
  }

  void zero(unsigned* counters, int64_t count) const {
    if (plan == nullptr) nk::zero(op, counters, count, stream);
  }
};

}  // namespace nk
