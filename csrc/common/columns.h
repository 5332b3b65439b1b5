// Activations (N, C, *) as columns: C values for each of N * prod(*) samples, read in place whatever their layout.
#pragma once

#include <cstdint>

// Before functions that kernels call, too.
#ifdef __CUDACC__
#define NK_INLINE __host__ __device__ __forceinline__
#else
#define NK_INLINE inline
#endif

namespace nk {

// Column c is sample c / positions at position c % positions.
struct Columns {
  unsigned char* data = nullptr;
  int64_t total = 0, positions = 1;
  int64_t sample_stride = 0, channel_stride = 0, position_stride = 0;
  int width = 0;        // bytes of the widest access along what is contiguous: 16, 8, 4 or 2
  bool inner = false;   // the channels are next to each other, as in channels_last; otherwise the positions are
  bool bfloat = false;  // the half type is bfloat16

  NK_INLINE int64_t offset(int64_t column) const {
    if (positions == total) return column * position_stride;
    if (total <= INT32_MAX) {
      const uint32_t sample = uint32_t(column) / uint32_t(positions), at = uint32_t(column) % uint32_t(positions);
      return sample * sample_stride + at * position_stride;
    }
    return column / positions * sample_stride + column % positions * position_stride;
  }
};

// A vector (C,) of parameters, in float32 or in the data's type, or nothing.
struct Parameter {
  const void* data = nullptr;
  bool half = false, bfloat = false;
};

}  // namespace nk
