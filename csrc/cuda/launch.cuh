// The launches of a Run.
#pragma once

#include "device.cuh"
#include "run.h"

namespace nk {

template <class... Parameters, class... Arguments>
void Run::launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                 Traffic traffic, const Arguments&... arguments) const {
  if (plan != nullptr) {
    plan->push_back({name, {blocks, 1, 1}, threads, shared_bytes, traffic.read, traffic.written});
  } else {
    nk::launch(op, kernel,
               Launch{dim3(unsigned(blocks)), unsigned(threads), size_t(shared_bytes),
                      static_cast<cudaStream_t>(stream), size_t(device.shared_bytes)},
               arguments...);
  }
}

}  // namespace nk
