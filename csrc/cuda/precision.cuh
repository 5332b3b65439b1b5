// Products on tensor cores with float32's accuracy, from operands split into two parts of fewer bits each.
//
//   a b = (a_hi + a_lo)(b_hi + b_lo) = a_hi b_hi + (a_hi b_lo + a_lo b_hi) + a_lo b_lo
//
// TF32 has 11 significant bits; without the last term float32 data come out as from float32 products: 2^-22. bfloat16
// has 8, at twice the speed, for data which themselves have 8 (bfloat16) or 11 (float16), and little more when they are
// centred: then only the last term, 2^-18, is missing. Results in half types do not show that, but statistics do.
// Rejected: one product of half-type data as they are. They must be centred first, and differences are no half numbers.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "half.h"

namespace nk {

// The bits of a float16 or bfloat16; which of them is a parameter of the kernel, so that both share its code.
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value, bool) {
  return value;
}
__device__ __forceinline__ float to_float(Half value, bool bfloat) {
  return bfloat ? __uint_as_float(uint32_t(value.bits) << 16) : half_to_float(value.bits);
}

__device__ __forceinline__ void from_float(float& to, float value, bool) {
  to = value;
}
__device__ __forceinline__ void from_float(Half& to, float value, bool bfloat) {
  if (bfloat) {  // to the nearest, ties to even
    const uint32_t bits = __float_as_uint(value);
    to.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    to.bits = float_to_half(value);
  }
}

__device__ __forceinline__ int lane() {
  return int(threadIdx.x) % WARP;
}
__device__ __forceinline__ int warp() {
  return int(threadIdx.x) / WARP;
}

// An operand of N registers in each part.
template <int N>
struct Operand {
  uint32_t hi[N], lo[N];
};

// Operands of a product, in both parts. f(row, column) gives the entries of a (16 x K) or b (K x 8); device.cuh says
// which of them a thread has.
struct TF32x3 {
  static constexpr int K = 8;
  static constexpr bool ALL = false;  // whether there are all four products

  template <class F>
  static __device__ __forceinline__ Operand<4> left(F f) {
    const int row = lane() / 4, column = lane() % 4;
    Operand<4> a;
    split(a.hi[0], a.lo[0], f(row, column));
    split(a.hi[1], a.lo[1], f(row + 8, column));
    split(a.hi[2], a.lo[2], f(row, column + 4));
    split(a.hi[3], a.lo[3], f(row + 8, column + 4));
    return a;
  }

  // Returns the sum of this thread's entries of a in a row.
  template <class F>
  static __device__ __forceinline__ float sum(F f, int row) {
    const int column = lane() % 4;
    return f(row, column) + f(row, column + 4);
  }

  template <class F>
  static __device__ __forceinline__ Operand<2> right(F f) {
    const int row = lane() / 4, column = lane() % 4;
    Operand<2> b;
    split(b.hi[0], b.lo[0], f(column, row));
    split(b.hi[1], b.lo[1], f(column + 4, row));
    return b;
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(c, a, b);
  }

 private:
  // hi is rounded; the hardware reads the upper bits of lo. A NaN may be lost in hi, never in lo.
  static __device__ __forceinline__ void split(uint32_t& hi, uint32_t& lo, float value) {
    hi = (__float_as_uint(value) + 0x1000) & 0xffffe000;
    lo = __float_as_uint(value - __uint_as_float(hi));
  }
};

struct BF16x3 {
  static constexpr int K = 16;
  static constexpr bool ALL = false;

  template <class F>
  static __device__ __forceinline__ Operand<4> left(F f) {
    const int row = lane() / 4, column = 2 * (lane() % 4);
    Operand<4> a;
    split(a.hi[0], a.lo[0], f(row, column), f(row, column + 1));
    split(a.hi[1], a.lo[1], f(row + 8, column), f(row + 8, column + 1));
    split(a.hi[2], a.lo[2], f(row, column + 8), f(row, column + 9));
    split(a.hi[3], a.lo[3], f(row + 8, column + 8), f(row + 8, column + 9));
    return a;
  }

  template <class F>
  static __device__ __forceinline__ float sum(F f, int row) {
    const int column = 2 * (lane() % 4);
    return (f(row, column) + f(row, column + 1)) + (f(row, column + 8) + f(row, column + 9));
  }

  template <class F>
  static __device__ __forceinline__ Operand<2> right(F f) {
    const int row = lane() / 4, column = 2 * (lane() % 4);
    Operand<2> b;
    split(b.hi[0], b.lo[0], f(column, row), f(column + 1, row));
    split(b.hi[1], b.lo[1], f(column + 8, row), f(column + 9, row));
    return b;
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(c, a, b);
  }

 private:
  static __device__ __forceinline__ void split(uint32_t& hi, uint32_t& lo, float first, float second) {
    const uint32_t first_hi = (__float_as_uint(first) + 0x8000) & 0xffff0000;
    const uint32_t second_hi = (__float_as_uint(second) + 0x8000) & 0xffff0000;
    hi = first_hi >> 16 | second_hi;
    lo = __float_as_uint(first - __uint_as_float(first_hi)) >> 16 |
         (__float_as_uint(second - __uint_as_float(second_hi)) & 0xffff0000);
  }
};

struct BF16x4 : BF16x3 {
  static constexpr bool ALL = true;
};

// Returns a number near `value` whose difference to data of type T fits into the parts of their products. Half numbers
// minus a bfloat16 have few bits, and most differences are exact; minus any other number all would be rounded.
template <class T>
__device__ __forceinline__ float simple_near(float value) {
  return sizeof(T) == 4 ? value : __uint_as_float(__float_as_uint(value) & 0xffff0000);
}

// Returns the shift for data of this mean and mean square. A mean of less than two standard deviations costs little
// when it is left in, and half numbers without a shift need no more bits than they have.
template <class T>
__device__ __forceinline__ float shift_for(float mean, float square) {
  return sizeof(T) == 4 || 5 * (mean * mean) > 4 * square ? simple_near<T>(mean) : 0.f;
}

// The precisions for statistics of data of type T, and for maps of them to the same type.
template <class T>
using StatisticsPrecision = std::conditional_t<sizeof(T) == 4, TF32x3, BF16x4>;
template <class T>
using MapPrecision = std::conditional_t<sizeof(T) == 4, TF32x3, BF16x3>;

// c += a b. The products have an accumulator of their own, the small ones first: tensor cores truncate where they add,
// which would show after thousands of additions to c.
template <class Precision>
__device__ __forceinline__ void multiply_add(float (&c)[4], const Operand<4>& a, const Operand<2>& b) {
  float product[4] = {};
  if constexpr (Precision::ALL) Precision::multiply(product, a.lo, b.lo);
  Precision::multiply(product, a.lo, b.hi);
  Precision::multiply(product, a.hi, b.lo);
  Precision::multiply(product, a.hi, b.hi);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += product[i];
}

// Calls f(row, column, value) for this thread's entries of a 16 x 8 tile.
template <class F>
__device__ __forceinline__ void for_each(const float (&c)[4], F f) {
  const int row = lane() / 4, column = 2 * (lane() % 4);
  f(row, column, c[0]);
  f(row, column + 1, c[1]);
  f(row + 8, column, c[2]);
  f(row + 8, column + 1, c[3]);
}

// MT x NT tiles of 16 x 8 of a product, in the registers of a warp.
template <class Precision, int MT, int NT>
struct Fragment {
  float value[MT][NT][4] = {};

  // += left right over Precision::K terms from `start` on: left(row, term), right(term, column).
  template <class Left, class Right>
  __device__ __forceinline__ void add(int start, Left left, Right right) {
    Operand<4> a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) a[m] = Precision::left([&](int i, int j) { return left(16 * m + i, start + j); });
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const Operand<2> b = Precision::right([&](int i, int j) { return right(start + i, 8 * n + j); });
#pragma unroll
      for (int m = 0; m < MT; ++m) multiply_add<Precision>(value[m][n], a[m], b);
    }
  }

  // f(row, column, entry) for this thread's entries.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        nk::for_each(value[m][n], [&](int i, int j, float entry) { f(16 * m + i, 8 * n + j, entry); });
      }
    }
  }
};

// Sums of 16 MT rows of a left factor, beside the product. They are exact in float32, where sums of its parts are not.
template <class Precision, int MT>
struct RowSums {
  float value[MT][2] = {};

  template <class Left>
  __device__ __forceinline__ void add(int start, Left left) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        value[m][half] += Precision::sum([&](int i, int j) { return left(16 * m + i, start + j); }, row(half));
      }
    }
  }

  // f(row, sum), once for each row.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = value[m][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane() % 4 == 0) f(16 * m + row(half), sum);
      }
    }
  }

 private:
  static __device__ __forceinline__ int row(int half) { return lane() / 4 + 8 * half; }
};

}  // namespace nk
