// The kernels' interface to a GPU, in one place: shared memory, asynchronous copies, tensor-core products, launching.
//
// tests/simt compiles the same kernels as C++ for a CPU, with its own folder in the place of this one. A kernel
// therefore uses only this folder and threadIdx, blockIdx, gridDim, __syncthreads, __shfl_xor_sync, __threadfence,
// atomicAdd(unsigned*), __ldcg, float2, float4, and C's mathematics.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace nk {

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": expected to launch a kernel, got " + cudaGetErrorString(status));
}

constexpr int WARP = 32;

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// --- asynchronous copies (sm_80): global to shared memory, BYTES = 4, 8 or 16, both aligned to BYTES ---------------

// Copies BYTES, or writes BYTES of zeros where not `real`; `global` is then not read, but must be a valid address.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = real ? BYTES : 0;
  if constexpr (BYTES == 16) {  // .cg: past the first-level cache, which has no use for data that is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(size)
                 : "memory");
  }
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING groups of this thread are under way. Other threads' copies need a barrier besides.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- tensor cores (sm_80) ------------------------------------------------------------------------------------------
//
// c += a b for a 16 x 8 tile of c in float32. With lane = 4 row + column, row in 0..7 and column in 0..3, a thread has
//   c[0], c[1]: (row, 2 column), (row, 2 column + 1)      c[2], c[3]: the same of row + 8
// and of a (16 x K) and b (K x 8), as 32-bit registers,
//   tf32, K = 8:   a[0..3]: (row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4)
//                  b[0..1]: (column, row), (column + 4, row)
//   bf16, K = 16, two in a register, the first in the low half:
//                  a[0..3]: (row, 2 column..), (row + 8, 2 column..), (row, 2 column + 8..), (row + 8, 2 column + 8..)
//                  b[0..1]: (2 column.., row), (2 column + 8.., row)
// The hardware truncates where it adds to c: long sums belong into more than one accumulator. (volatile: the compiler
// must not move a product into a branch that some lanes do not take.)

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- launching -----------------------------------------------------------------------------------------------------

// One launch: blocks, threads of a block, bytes of dynamic shared memory, the stream, and the most shared memory that a
// block may have on the device.
struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;
  size_t most_shared;
};

// Runs a kernel; every launch of the extension goes through here. An error names `op`. Nothing waits for the GPU.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
  if (how.shared_bytes > 48 * 1024) {
    // Not shared_bytes: the limit is the kernel's, and another thread may be about to launch it with more.
    check_cuda(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.most_shared)));
  }
  kernel<<<how.grid, how.threads, how.shared_bytes, how.stream>>>(Parameters(arguments)...);
  check_cuda(op, cudaGetLastError());
}

// Zeroes counters on a stream.
inline void zero(const char* op, unsigned* counters, int64_t count, cudaStream_t stream) {
  check_cuda(op, cudaMemsetAsync(counters, 0, size_t(count) * sizeof(unsigned), stream));
}

}  // namespace nk
