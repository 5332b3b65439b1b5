// Activations (N, C, *) as columns: C values for each of N * prod(*) samples, read in place whatever their layout.
#pragma once

#include <algorithm>
#include <type_traits>

#include "plans.h"
#include "precision.cuh"

namespace nk {

// Column c is sample c / positions at position c % positions.
struct Columns {
  unsigned char* data = nullptr;
  int64_t total = 0, positions = 1;
  int64_t sample_stride = 0, channel_stride = 0, position_stride = 0;
  int width = 0;        // bytes of the widest access along what is contiguous: 16, 8, 4 or 2
  bool inner = false;   // the channels are next to each other, as in channels_last; otherwise the positions are
  bool bfloat = false;  // the half type is bfloat16

  __device__ __forceinline__ int64_t offset(int64_t column) const {
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

  __device__ __forceinline__ float operator()(int64_t i, float otherwise) const {
    if (data == nullptr) return otherwise;
    return half ? to_float(static_cast<const Half*>(data)[i], bfloat) : static_cast<const float*>(data)[i];
  }
};

// ROWS channels of COLUMNS columns in shared memory, in the layout of the activations. A row, or a column, is padded so
// that the fragments of a product are read from 32 banks. The padding depends on the side of the product: left
// (row, column), or right (column, row).
template <class T, int ROWS, int COLUMNS, bool LEFT>
struct Tile {
  static constexpr int NARROW = 16 / sizeof(T), WIDE = 8;
  static constexpr int ROW_STEP = COLUMNS + (LEFT ? NARROW : WIDE), COLUMN_STEP = ROWS + (LEFT ? WIDE : NARROW);
  static constexpr int SIZE = std::max(ROWS * ROW_STEP, COLUMNS* COLUMN_STEP);
  static constexpr int BYTES = (SIZE * int(sizeof(T)) + 15) / 16 * 16;

  T* data;

  __device__ __forceinline__ explicit Tile(unsigned char* memory) : data(reinterpret_cast<T*>(memory)) {}

  // INNER as in the columns that it was loaded from; the compiler knows it: addresses are one register and constants.
  template <bool INNER>
  __device__ __forceinline__ T at(int row, int column) const {
    return data[INNER ? column * COLUMN_STEP + row : row * ROW_STEP + column];
  }

  // Begins to copy `rows` channels from `channel` on and the columns first..stop - 1, with zeros beyond both.
  template <int THREADS>
  __device__ __forceinline__ void load(const Columns& x, int64_t channel, int rows, int64_t first, int64_t stop) {
    switch (x.width) {
      case 16:
        return load_vectors<THREADS, 16>(x, channel, rows, first, stop);
      case 8:
        return load_vectors<THREADS, 8>(x, channel, rows, first, stop);
      case 4:
        return load_vectors<THREADS, 4>(x, channel, rows, first, stop);
      default:
        return load_vectors<THREADS, sizeof(T)>(x, channel, rows, first, stop);
    }
  }

 private:
  template <int THREADS, int BYTES_AT_ONCE>
  __device__ __forceinline__ void load_vectors(const Columns& x, int64_t channel, int rows, int64_t first,
                                               int64_t stop) {
    constexpr int AT_ONCE = BYTES_AT_ONCE / int(sizeof(T));
    const T* from = reinterpret_cast<const T*>(x.data) + channel * x.channel_stride;
    if (x.inner) {
      constexpr int IN_COLUMN = ROWS / AT_ONCE;
#pragma unroll 1
      for (int at = threadIdx.x; at < IN_COLUMN * COLUMNS; at += THREADS) {
        const int row = at % IN_COLUMN * AT_ONCE, column = at / IN_COLUMN;
        const bool real = row < rows && first + column < stop;
        copy<BYTES_AT_ONCE>(data + column * COLUMN_STEP + row, from + (real ? x.offset(first + column) + row : 0),
                            real);
      }
    } else {
      constexpr int IN_ROW = COLUMNS / AT_ONCE, ROWS_AT_ONCE = THREADS / IN_ROW;
      static_assert(THREADS % IN_ROW == 0, "a thread stays with its columns");
      const int column = threadIdx.x % IN_ROW * AT_ONCE;
      const bool within = first + column < stop;
      const int64_t offset = within ? x.offset(first + column) : 0;
#pragma unroll 1
      for (int row = threadIdx.x / IN_ROW; row < ROWS; row += ROWS_AT_ONCE) {
        const bool real = within && row < rows;
        copy<BYTES_AT_ONCE>(data + row * ROW_STEP + column, from + (real ? offset + row * x.channel_stride : 0), real);
      }
    }
  }

  // Asynchronous copies have at least four bytes.
  template <int BYTES_AT_ONCE>
  static __device__ __forceinline__ void copy(T* to, const T* from, bool real) {
    if constexpr (BYTES_AT_ONCE >= 4) {
      copy_async<BYTES_AT_ONCE>(to, from, real);
    } else {
      *to = real ? *from : T{};
    }
  }
};

// Calls f(std::true_type()) or f(std::false_type()).
template <class F>
__device__ __forceinline__ void with_constant(bool value, F f) {
  value ? f(std::true_type()) : f(std::false_type());
}

// The cut of a pass over the columns: `parts` blocks for each group with `chunk` columns each, the last with fewer.
struct Split {
  int parts;
  int64_t chunk;
};

// Returns how many blocks are on the device at once, by shared memory and by 168 registers a thread. Most kernels of up
// to 192 threads take so many; wider ones have one block on a multiprocessor either way.
inline int64_t resident(const Device& device, int threads, int64_t shared_bytes) {
  const int64_t by_registers = 65536 / (threads * 168),
                by_shared = (device.shared_bytes + 1024) / (shared_bytes + 1024);
  return device.processors * std::max<int64_t>(std::min(by_registers, by_shared), 1);
}

// Cuts the columns for about `blocks` blocks: one wave, in which no block waits for others to end.
inline Split split(int64_t total, int64_t groups, int tile, int64_t blocks, int most) {
  const int64_t tiles = (total + tile - 1) / tile;
  const int64_t wanted = std::clamp<int64_t>(blocks / groups, 1, std::min<int64_t>(tiles, most));
  const int64_t chunk = (tiles + wanted - 1) / wanted * tile;
  return {int((total + chunk - 1) / chunk), chunk};
}

}  // namespace nk
