// CUDA for kernels that run on a CPU: what csrc/device/device.cuh promises a kernel, under the same names.
//
// A thread of a block is a fiber, and runs until it must wait: the skew between threads is as large as it can be, so
// that a missing barrier shows. What a GPU may do in more than one way is done here in the worst: shared memory is NaN
// before it is written, an asynchronous copy happens only when it is waited for, tensor cores cut operands and sums.
// Blocks run one after another. A barrier that not all reach is an error with the line of the kernel, never a hang; a
// thread that spins until another writes would hang.
//
// Environment variables, read at every launch:
//   NORMKERNELS_SIMT_THREADS, NORMKERNELS_SIMT_BLOCKS   ascending (default) or descending, the order in which they run;
//                                                       some missing barriers show in one of them only
//   NORMKERNELS_SIMT_RUN                                0: launches are checked and not run, to time the way there
//   NORMKERNELS_SIMT_SHARED_BYTES                       the largest shared memory of a block, if not 227 KiB
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// --- types -----------------------------------------------------------------------------------------------------------
// Aligned as CUDA's are, so that UndefinedBehaviorSanitizer finds a misaligned vector access.

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// --- the runtime, in simt.cpp ----------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace nk {

struct Launch;

namespace simt {

using Where = std::source_location;

extern unsigned char* shared;  // shared memory of the block that runs

void barrier(const Where& where);

// Waits for the whole warp. The last lane to come calls `complete` with what every lane has handed in, by lane, and
// complete writes the results there.
void meet(const char* what, void* operands, void (*complete)(void* const*), unsigned mask, const Where& where);

void copy(void* shared, const void* global, unsigned bytes, bool real, const Where& where);
void commit();
void wait(unsigned pending);

unsigned lane();

void run(const char* op, const Launch& how, const std::function<void()>& thread);

struct Shuffle {
  uint32_t bits;
  unsigned source;
};
void shuffle(void* const* shuffles);

template <class T>
T shuffled(const char* what, T value, unsigned source, unsigned mask, const Where& where) {
  static_assert(sizeof(T) == 4, "shuffles here move float, int and unsigned");
  Shuffle own{std::bit_cast<uint32_t>(value), source};
  meet(what, &own, shuffle, mask, where);
  return std::bit_cast<T>(own.bits);
}

struct Product {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};
void multiply_tf32(void* const* products);
void multiply_bf16(void* const* products);

}  // namespace simt

// --- device.cuh's own ------------------------------------------------------------------------------------------------

constexpr int WARP = 32;

inline unsigned char* shared_memory() {
  return simt::shared;
}

template <int BYTES>
void copy_async(void* shared, const void* global, bool real, const simt::Where& where = simt::Where::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  simt::copy(shared, global, BYTES, real, where);
}

inline void commit_copies() {
  simt::commit();
}

template <int PENDING>
void wait_for_copies() {
  simt::wait(PENDING);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const simt::Where& where = simt::Where::current()) {
  simt::Product own{c, a, b};
  simt::meet("mma_tf32", &own, simt::multiply_tf32, ~0u, where);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const simt::Where& where = simt::Where::current()) {
  simt::Product own{c, a, b};
  simt::meet("mma_bf16", &own, simt::multiply_bf16, ~0u, where);
}

}  // namespace nk

using cudaStream_t = struct CUstream_st*;

namespace nk {

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;
  size_t most_shared = 0;
};

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  const std::tuple<Parameters...> parameters{Parameters(arguments)...};
  simt::run(op, how, [&] { std::apply(kernel, parameters); });
}

inline void zero(const char*, unsigned* counters, int64_t count, cudaStream_t) {
  std::fill_n(counters, count, 0u);
}

}  // namespace nk

// --- CUDA's functions ------------------------------------------------------------------------------------------------

inline void __syncthreads(const nk::simt::Where& where = nk::simt::Where::current()) {
  nk::simt::barrier(where);
}

inline void __syncwarp(unsigned mask = ~0u, const nk::simt::Where& where = nk::simt::Where::current()) {
  nk::simt::meet("__syncwarp", nullptr, [](void* const*) {}, mask, where);
}

// Lanes exchange within segments of `width`; one whose source is beyond its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = nk::WARP,
              const nk::simt::Where& where = nk::simt::Where::current()) {
  const unsigned first = nk::simt::lane() & ~(width - 1u);
  return nk::simt::shuffled("__shfl_sync", value, first | (source & (width - 1u)), mask, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = nk::WARP,
                  const nk::simt::Where& where = nk::simt::Where::current()) {
  const unsigned own = nk::simt::lane(), source = own ^ static_cast<unsigned>(lanes);
  return nk::simt::shuffled("__shfl_xor_sync", value, source > (own | (width - 1u)) ? own : source, mask, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = nk::WARP,
                   const nk::simt::Where& where = nk::simt::Where::current()) {
  const unsigned own = nk::simt::lane(), source = own + lanes;
  return nk::simt::shuffled("__shfl_down_sync", value, source > (own | (width - 1u)) ? own : source, mask, where);
}

inline void __threadfence() {}

// There is none for float: no kernel wants sums in whatever order the blocks come.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}

inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}

// Exact where the result is, as CUDA's are: the argument is reduced before it is multiplied by pi.
double sinpi(double x);
double cospi(double x);

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
