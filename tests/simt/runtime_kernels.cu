// Small kernels for test_runtime.py: what the runtime must do, and mistakes that it must catch.
#include <cstdint>
#include <exception>
#include <string>

#include "device.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using nk::WARP;

// Calls run(), and returns the error's message, or an empty one.
template <class Run>
const char* message_of(Run run) {
  static std::string message;
  try {
    run();
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

float* shared_floats() {
  return reinterpret_cast<float*>(nk::shared_memory());
}

// --- what must work ------------------------------------------------------------------------------------------------

// Adds up `per_block` numbers in each block: by warps, then the warps' sums. The last block adds up all sums.
__global__ void sum_kernel(const float* x, int n, int per_block, float* sums, float* total, unsigned* done) {
  float* const of_warps = shared_floats();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float sum = 0;
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) {
    const int at = blockIdx.x * per_block + i;
    if (at < n) sum += x[at];
  }
  for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) of_warps[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (unsigned i = 0; i < blockDim.x / WARP; ++i) sum += of_warps[i];
  sums[blockIdx.x] = sum;
  __threadfence();
  if (atomicAdd(done, 1) + 1 < gridDim.x) return;
  *total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *total += __ldcg(sums + i);
}

// Writes what each of the three shuffles brings to every lane, within segments of `width`.
__global__ void shuffle_kernel(const int* x, int argument, int width, int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(~0u, x[lane], argument, width);
  out[lane + WARP] = __shfl_xor_sync(~0u, x[lane], argument, width);
  out[lane + 2 * WARP] = __shfl_down_sync(~0u, x[lane], argument, width);
}

// c += a b with a (16, K) and b (K, 8), the fragments as device.cuh describes them.
__global__ void tf32_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t left[4] = {a[row * 8 + column], a[(row + 8) * 8 + column], a[row * 8 + column + 4],
                            a[(row + 8) * 8 + column + 4]};
  const uint32_t right[2] = {b[column * 8 + row], b[(column + 4) * 8 + row]};
  float* const upper = c + row * 8 + 2 * column;
  float sum[4] = {upper[0], upper[1], upper[64], upper[65]};
  nk::mma_tf32(sum, left, right);
  upper[0] = sum[0], upper[1] = sum[1], upper[64] = sum[2], upper[65] = sum[3];
}

__global__ void bf16_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const auto left_at = [&](int i, int k) { return a[i * 16 + k] | uint32_t(a[i * 16 + k + 1]) << 16; };
  const auto right_at = [&](int k, int j) { return b[k * 8 + j] | uint32_t(b[(k + 1) * 8 + j]) << 16; };
  const uint32_t left[4] = {left_at(row, 2 * column), left_at(row + 8, 2 * column), left_at(row, 2 * column + 8),
                            left_at(row + 8, 2 * column + 8)};
  const uint32_t right[2] = {right_at(2 * column, row), right_at(2 * column + 8, row)};
  float* const upper = c + row * 8 + 2 * column;
  float sum[4] = {upper[0], upper[1], upper[64], upper[65]};
  nk::mma_bf16(sum, left, right);
  upper[0] = sum[0], upper[1] = sum[1], upper[64] = sum[2], upper[65] = sum[3];
}

// y = 2 x in tiles of 4 numbers a thread, two tiles under way; every thread reads what its neighbour has copied.
// PENDING = 1 is right: with 2, tiles are read that are still under way.
template <int PENDING>
__global__ void pipeline_kernel(const float* x, int n, float* y) {
  const int tile = 4 * blockDim.x, tiles = (n + tile - 1) / tile, own = 4 * threadIdx.x;
  const int neighbour = 4 * ((threadIdx.x + 1) % blockDim.x);
  float* const stages = shared_floats();
  const auto fetch = [&](int i) {
    const bool real = i * tile + own < n;
    if (i < tiles) nk::copy_async<16>(stages + i % 2 * tile + own, real ? x + i * tile + own : x, real);
    nk::commit_copies();
  };
  fetch(0);
  for (int i = 0; i < tiles; ++i) {
    fetch(i + 1);
    nk::wait_for_copies<PENDING>();
    __syncthreads();
    const auto value = *reinterpret_cast<const float4*>(stages + i % 2 * tile + neighbour);
    const int to = i * tile + neighbour;
    if (to < n) *reinterpret_cast<float4*>(y + to) = {2 * value.x, 2 * value.y, 2 * value.z, 2 * value.w};
    __syncthreads();
  }
  nk::wait_for_copies<0>();
}

__global__ void order_kernel(int* out, unsigned* count) {
  out[atomicAdd(count, 1)] = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void switches_kernel(int count) {
  for (int i = 0; i < count; ++i) __syncwarp();
}

// --- mistakes ------------------------------------------------------------------------------------------------------

// y[i] = x[i + step], where there is one, through shared memory.
template <bool BARRIER>
__global__ void neighbour_kernel(const float* x, int step, float* y) {
  float* const values = shared_floats();
  const int own = threadIdx.x, other = own + step;
  values[own] = x[own];
  if constexpr (BARRIER) __syncthreads();
  if (0 <= other && other < int(blockDim.x)) y[own] = values[other];
}

enum Divergence { RETURNED, TWO_BARRIERS, BARRIER_AND_SHUFFLE, TWO_SHUFFLES, PART_OF_A_WARP, MASK };

__global__ void divergent_kernel(int kind, int* out) {
  const bool first = threadIdx.x < 8;
  switch (kind) {
    case RETURNED:
      if (first) return;
      __syncthreads();
      break;
    case TWO_BARRIERS:
      if (first) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case BARRIER_AND_SHUFFLE:
      if (first) {
        __syncthreads();
      } else {
        *out = __shfl_sync(~0u, 1, 0);
      }
      break;
    case TWO_SHUFFLES:
      *out = first ? __shfl_sync(~0u, 1, 0) : __shfl_xor_sync(~0u, 1, 1);
      break;
    case PART_OF_A_WARP:
      if (first) __syncwarp();
      break;
    case MASK:
      __syncwarp(0xFF);
      break;
  }
}

enum Copies { MISALIGNED_SHARED, MISALIGNED_GLOBAL, BEYOND_SHARED, NOT_WAITED_FOR };

__global__ void bad_copy_kernel(int kind, const float* x) {
  float* const to = shared_floats();
  switch (kind) {
    case MISALIGNED_SHARED:
      nk::copy_async<16>(to + 1, x, true);
      break;
    case MISALIGNED_GLOBAL:
      nk::copy_async<8>(to, x + 1, true);
      break;
    case BEYOND_SHARED:
      nk::copy_async<16>(to + 4, x, true);
      break;
    case NOT_WAITED_FOR:
      nk::copy_async<4>(to, x, true);
      nk::commit_copies();
      break;
  }
}

enum Access { INSIDE, BEYOND_SHARED_MEMORY, BEYOND_GLOBAL_MEMORY, COPY_BEYOND_GLOBAL_MEMORY, MISALIGNED_VECTOR };

// x and shared memory have blockDim.x floats. For sanitizers.
__global__ void bad_access_kernel(int kind, const float* x, float* y) {
  float* const values = shared_floats();
  const int own = threadIdx.x;
  values[own + (kind == BEYOND_SHARED_MEMORY)] = x[own + (kind == BEYOND_GLOBAL_MEMORY)];
  if (kind == COPY_BEYOND_GLOBAL_MEMORY) {
    nk::copy_async<4>(values + own, x + own + 1, true);
    nk::commit_copies();
    nk::wait_for_copies<0>();
  }
  __syncthreads();
  if (own % 4 == 0 && own + 4 < int(blockDim.x)) {
    const auto four = *reinterpret_cast<const float4*>(values + own + (kind == MISALIGNED_VECTOR));
    y[own] = four.x + four.y + four.z + four.w;
  }
}

}  // namespace

EXPORT const char* sum(const float* x, int n, int per_block, int blocks, float* sums, float* total, unsigned* done) {
  return message_of([&] {
    nk::launch("sum", sum_kernel, {dim3(blocks), 128, 4 * sizeof(float), nullptr}, x, n, per_block, sums, total, done);
  });
}

EXPORT const char* shuffle(const int* x, int argument, int width, int* out) {
  return message_of([&] { nk::launch("shuffle", shuffle_kernel, {1, 32, 0, nullptr}, x, argument, width, out); });
}

EXPORT const char* tf32(const uint32_t* a, const uint32_t* b, float* c) {
  return message_of([&] { nk::launch("tf32", tf32_kernel, {1, 32, 0, nullptr}, a, b, c); });
}

EXPORT const char* bf16(const uint16_t* a, const uint16_t* b, float* c) {
  return message_of([&] { nk::launch("bf16", bf16_kernel, {1, 32, 0, nullptr}, a, b, c); });
}

EXPORT const char* pipeline(const float* x, int n, float* y, bool right) {
  constexpr int threads = 64;
  const nk::Launch how{1, threads, 2 * 4 * threads * sizeof(float), nullptr};
  return message_of([&] { nk::launch("pipeline", right ? pipeline_kernel<1> : pipeline_kernel<2>, how, x, n, y); });
}

EXPORT const char* order(int columns, int rows, int threads, int* out, unsigned* count) {
  return message_of(
      [&] { nk::launch("order", order_kernel, {dim3(columns, rows), unsigned(threads), 0, nullptr}, out, count); });
}

EXPORT const char* switches(int threads, int count) {
  return message_of([&] { nk::launch("switches", switches_kernel, {1, unsigned(threads), 0, nullptr}, count); });
}

EXPORT const char* neighbour(const float* x, int step, float* y, bool barrier) {
  const nk::Launch how{1, 64, 64 * sizeof(float), nullptr};
  return message_of(
      [&] { nk::launch("neighbour", barrier ? neighbour_kernel<true> : neighbour_kernel<false>, how, x, step, y); });
}

EXPORT const char* divergent(int kind, int* out) {
  return message_of([&] { nk::launch("divergent", divergent_kernel, {1, 64, 0, nullptr}, kind, out); });
}

EXPORT const char* bad_copy(int kind, const float* x) {
  return message_of([&] { nk::launch("bad_copy", bad_copy_kernel, {1, 1, 16, nullptr}, kind, x); });
}

EXPORT const char* bad_access(int kind, const float* x, int threads, float* y) {
  const nk::Launch how{1, unsigned(threads), threads * sizeof(float), nullptr};
  return message_of([&] { nk::launch("bad_access", bad_access_kernel, how, kind, x, y); });
}

EXPORT double sine(double x) {
  return sinpi(x);
}
EXPORT double cosine(double x) {
  return cospi(x);
}

EXPORT const char* launch_with(int columns, int rows, unsigned threads, size_t shared_bytes) {
  return message_of(
      [&] { nk::launch("launch_with", switches_kernel, {dim3(columns, rows), threads, shared_bytes, nullptr}, 1); });
}
