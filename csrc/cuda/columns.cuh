// Activations as columns, in a kernel: parameters, and tiles in shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/columns.h"
#include "precision.cuh"

namespace nk {

__device__ __forceinline__ float value_of(const Parameter& parameter, int64_t i, float otherwise) {
  if (parameter.data == nullptr) return otherwise;
  return parameter.half ? to_float(static_cast<const Half*>(parameter.data)[i], parameter.bfloat)
                        : static_cast<const float*>(parameter.data)[i];
}

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

}  // namespace nk
