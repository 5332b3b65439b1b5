// The GPU that a call runs on, for host code, and where the ops are registered. The file of the same name in tests/simt
// takes its place there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <mutex>
#include <vector>

#include "common/plans.h"

#define NORMKERNELS_NAMESPACE normkernels
#define NORMKERNELS_KEY CUDA

namespace nk {

inline bool on_gpu(const torch::stable::Tensor& x) {
  return x.is_cuda();
}

// Returns the GPU of a tensor on one; it is asked once.
inline Device device_of(const torch::stable::Tensor& x) {
  static std::mutex mutex;
  static std::vector<Device> known;
  const auto index = size_t(x.get_device_index());
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= index) known.resize(index + 1, Device{});
  Device& device = known[index];
  if (device.architecture == 0) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int answer;
      const cudaError_t status = cudaDeviceGetAttribute(&answer, attribute, int(index));
      STD_TORCH_CHECK(status == cudaSuccess, "expected the properties of GPU ", index, ", got ",
                      cudaGetErrorString(status));
      return answer;
    };
    device = {10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
              ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }
  return device;
}

// Makes a tensor's device the current one as long as it lives, and has that device's current stream.
class Current {
 public:
  explicit Current(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }

  void* stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace nk
