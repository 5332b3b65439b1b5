#include "run.h"

#include "device.cuh"

namespace nk {

void Run::zero(unsigned* counters, int64_t count) const {
  if (plan == nullptr) nk::zero(op, counters, count, static_cast<cudaStream_t>(stream));
}

}  // namespace nk
