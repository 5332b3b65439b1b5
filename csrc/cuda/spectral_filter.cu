// spectral_filter: the circular filter of planes by a real spectrum, in shared memory from the load to the store.
//
// The real DFT is computed by products (primitives/spectral_filter/DERIVATION.md): along each side a line is folded
// about its middle into a sum, which has only cosines, and a difference, which has only sines. So four blocks of a
// quarter of the plane are multiplied by K x K matrices, K = (n + 1) / 2: cc, ss, cs and sc, cosines or sines of rows,
// then of columns. Products are in float32 without tensor cores: their tiles of 16 would double the work at the sizes
// that are normal here (34: K is 17), and so nothing is rounded twice. Rejected: an FFT, whose radices would be 17 and
// 29 here.
#include "launch.cuh"
#include "launches.h"
#include "precision.cuh"

namespace nk {

constexpr int SPECTRAL_THREADS = 256, SPECTRAL_BYTES = 80 * 1024;
constexpr int MICRO = 4;  // entries of a thread's tile of a product, along each side

// Blocks 0..3 are cc, ss, cs, sc.
__host__ __device__ __forceinline__ bool row_sine(int block) {
  return block == 1 || block == 3;
}
__host__ __device__ __forceinline__ bool column_sine(int block) {
  return block == 1 || block == 2;
}

// One side of a plane: n positions, of which `half` are left after folding, and as many frequencies; `size` is padded.
struct Side {
  int n, half, size;

  __host__ __device__ __forceinline__ explicit Side(int n)
      : n(n), half((n + 1) / 2), size((half + MICRO - 1) / MICRO * MICRO) {}
};

// A block's shared memory, in floats: twice the planes' blocks, then the waves of both sides.
struct SpectralLayout {
  Side h, w;
  int planes, block;  // planes at a time; floats of one of their four blocks

  __host__ __device__ __forceinline__ SpectralLayout(int H, int W, int planes)
      : h(H), w(W), planes(planes), block(h.size * w.size) {}
  __host__ __device__ __forceinline__ int buffer() const { return planes * 4 * block; }
  __host__ __device__ __forceinline__ int h_waves() const { return 2 * buffer(); }
  __host__ __device__ __forceinline__ int w_waves() const { return h_waves() + 4 * h.size * h.size; }
  __host__ __device__ __forceinline__ int floats() const { return w_waves() + 4 * w.size * w.size; }
};

// Returns the frequency of a slot's cosine, or sine. The sine of frequency 0 is no wave: its slot has that of n / 2.
__device__ __forceinline__ int frequency(int slot, bool sine, int n) {
  return sine && slot == 0 ? n / 2 : slot;
}

// Makes the waves of a side, in rows of `size`: cosines (frequency, position), sines, and both transposed. They are
// zero beyond half.
__device__ __forceinline__ void make_waves(float* waves, const Side& side) {
  const int n = side.n, size = side.size;
  for (int at = threadIdx.x; at < 2 * size * size; at += SPECTRAL_THREADS) {
    const bool sine = at >= size * size;
    const int slot = at % (size * size) / size, position = at % size;
    float wave = 0;
    if (slot < side.half && position < side.half && !(sine && slot == 0 && n % 2 == 1)) {
      // The remainder, of integers, keeps the argument small.
      const double angle = double(frequency(slot, sine, n) * (2 * position + 1) % (2 * n)) / n;
      wave = float((sine ? sinpi(angle) : cospi(angle)) * sqrt((slot == 0 ? 1. : 2.) / n));
    }
    waves[at] = wave;
    waves[(2 + sine) * size * size + position * size + slot] = wave;
  }
}

// For every plane and block: out = waves^T in, m x n, summed over `terms` rows of both; TRANSPOSED, out is n x m. The
// waves (terms, m) are cosines or, m squared behind them, sines.
template <bool TRANSPOSED, class Sine>
__device__ __forceinline__ void transform(const float* in, float* out, const float* waves, int terms, int m, int n,
                                          int planes, Sine sine) {
  const int across = n / MICRO, tiles = m / MICRO * across;
  for (int at = threadIdx.x; at < planes * 4 * tiles; at += SPECTRAL_THREADS) {
    const int block = at / tiles, i = at % tiles / across * MICRO, j = at % across * MICRO;
    const float* a = waves + (sine(block % 4) ? m * m : 0) + i;
    const float* b = in + block * m * n + j;
    float sum[MICRO][MICRO] = {};
#pragma unroll 2
    for (int k = 0; k < terms; ++k, a += m, b += n) {
      const float4 left = *reinterpret_cast<const float4*>(a), right = *reinterpret_cast<const float4*>(b);
      const float of_left[MICRO] = {left.x, left.y, left.z, left.w};
      const float of_right[MICRO] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int p = 0; p < MICRO; ++p) {
#pragma unroll
        for (int q = 0; q < MICRO; ++q) sum[p][q] += of_left[p] * of_right[q];
      }
    }
    float* const to = out + block * m * n;
#pragma unroll
    for (int p = 0; p < MICRO; ++p) {
      *reinterpret_cast<float4*>(TRANSPOSED ? to + (j + p) * m + i : to + (i + p) * n + j) =
          TRANSPOSED ? make_float4(sum[0][p], sum[1][p], sum[2][p], sum[3][p])
                     : make_float4(sum[p][0], sum[p][1], sum[p][2], sum[p][3]);
    }
  }
}

template <class T>
__device__ __forceinline__ float load(const Planes& z, int64_t plane, int row, int column) {
  row = z.rows.index(row), column = z.columns.index(column);
  if (row < 0 || column < 0) return 0;
  return to_float(reinterpret_cast<const T*>(z.data)[plane + row * z.row_stride + column * z.column_stride], z.bfloat);
}

template <class T>
__device__ __forceinline__ void store(const Planes& y, int64_t plane, int row, int column, float value) {
  row = y.rows.index(row), column = y.columns.index(column);
  if (row < 0 || column < 0) return;
  from_float(reinterpret_cast<T*>(y.data)[plane + row * y.row_stride + column * y.column_stride], value, y.bfloat);
}

// Calls f(plane, row, column) over a quarter of the planes, in the order in which they are in memory.
template <class F>
__device__ __forceinline__ void for_quarter(bool inner, int planes, int rows, int columns, F f) {
  for (int at = threadIdx.x; at < planes * rows * columns; at += SPECTRAL_THREADS) {
    if (inner) {
      f(at % planes, at / planes / columns, at / planes % columns);
    } else {
      f(at / columns / rows, at / columns % rows, at % columns);
    }
  }
}

// Filters the planes z into y. The coefficients of a channel are A of each block, then B: (C, 5, w.size, h.size).
template <class T>
__global__ __launch_bounds__(SPECTRAL_THREADS) void filter_kernel(Planes z, Planes y, const float* coefficients, int H,
                                                                  int W, int channels, int64_t total, int at_once) {
  const SpectralLayout layout(H, W, at_once);
  const Side h = layout.h, w = layout.w;
  float* const first = reinterpret_cast<float*>(shared_memory());
  float* const second = first + layout.buffer();
  float *const h_waves = first + layout.h_waves(), *const w_waves = first + layout.w_waves();
  const int h_square = h.size * h.size, w_square = w.size * w.size, block = layout.block;
  make_waves(h_waves, h);
  make_waves(w_waves, w);

  for (int64_t start = int64_t(blockIdx.x) * at_once; start < total; start += int64_t(gridDim.x) * at_once) {
    const int planes = int(min(int64_t(at_once), total - start));
    __syncthreads();  // the waves are there, and the planes before have left
    for_quarter(z.inner, planes, h.size, w.size, [&](int plane, int row, int column) {
      float* const to = first + plane * 4 * block + row * w.size + column;
      float a = 0, b = 0, c = 0, d = 0;
      if (row < h.half && column < w.half) {
        const int64_t from = z.plane(start + plane, channels);
        const int down = H - 1 - row, right = W - 1 - column;
        a = load<T>(z, from, row, column);  // a value that is its own mirror image counts once
        if (right != column) b = load<T>(z, from, row, right);
        if (down != row) c = load<T>(z, from, down, column);
        if (down != row && right != column) d = load<T>(z, from, down, right);
      }
      to[0] = (a + b) + (c + d);
      to[block] = (a - b) - (c - d);
      to[2 * block] = (a - b) + (c - d);
      to[3 * block] = (a + b) - (c + d);
    });
    __syncthreads();
    transform<true>(first, second, h_waves + 2 * h_square, h.half, h.size, w.size, planes, row_sine);
    __syncthreads();
    transform<false>(second, first, w_waves + 2 * w_square, w.half, w.size, h.size, planes, column_sine);
    __syncthreads();
    for (int at = threadIdx.x; at < planes * block; at += SPECTRAL_THREADS) {
      const int plane = at / block, here = at % block;
      const float* const A = coefficients + (start + plane) % channels * 5 * block + here;
      float* const blocks = first + plane * 4 * block + here;
      const float cc = blocks[0], ss = blocks[block], cs = blocks[2 * block], sc = blocks[3 * block], B = A[4 * block];
      blocks[0] = A[0] * cc + B * ss;
      blocks[block] = A[block] * ss + B * cc;
      blocks[2 * block] = A[2 * block] * cs - B * sc;
      blocks[3 * block] = A[3 * block] * sc - B * cs;
    }
    __syncthreads();
    transform<true>(first, second, w_waves, w.half, w.size, h.size, planes, column_sine);
    __syncthreads();
    transform<false>(second, first, h_waves, h.half, h.size, w.size, planes, row_sine);
    __syncthreads();
    for_quarter(y.inner, planes, h.half, w.half, [&](int plane, int row, int column) {
      const float* const blocks = first + plane * 4 * block + row * w.size + column;
      const float cc = blocks[0], ss = blocks[block], cs = blocks[2 * block], sc = blocks[3 * block];
      const int64_t to = y.plane(start + plane, channels);
      const int down = H - 1 - row, right = W - 1 - column;
      store<T>(y, to, row, column, (cc + ss) + (cs + sc));
      if (right != column) store<T>(y, to, row, right, (cc - ss) - (cs - sc));
      if (down != row) store<T>(y, to, down, column, (cc - ss) + (cs - sc));
      if (down != row && right != column) store<T>(y, to, down, right, (cc + ss) - (cs + sc));
    });
  }
}

// Computes A and B of each frequency from the mean of v(f) and v(-f). B is zero where a frequency lacks its cosine or
// its sine.
__global__ __launch_bounds__(SPECTRAL_THREADS) void coefficients_kernel(const float* v, int64_t channel_stride,
                                                                        int64_t row_stride, int64_t column_stride,
                                                                        int H, int W, float* out) {
  const Side h(H), w(W);
  const int block = h.size * w.size;
  v += blockIdx.x * channel_stride;
  out += int64_t(blockIdx.x) * 5 * block;
  for (int at = threadIdx.x; at < block; at += SPECTRAL_THREADS) {
    const int column = at / h.size, row = at % h.size;
    const bool real = row < h.half && column < w.half;
    for (int kind = 0; kind < 4; ++kind) {
      const int f = frequency(row, row_sine(kind), H), g = frequency(column, column_sine(kind), W);
      const int64_t up = f * row_stride, down = (f == 0 ? 0 : H - f) * row_stride;
      const int64_t left = g * column_stride, right = (g == 0 ? 0 : W - g) * column_stride;
      const float same = real ? v[up + left] + v[down + right] : 0.f,
                  opposite = real ? v[up + right] + v[down + left] : 0.f;
      out[kind * block + at] = .25f * (same + opposite);
      if (kind == 0) out[4 * block + at] = row > 0 && column > 0 ? .25f * (opposite - same) : 0.f;
    }
  }
}

// Returns the number of planes at a time: as many as fit and keep the threads of a block busy.
static int planes_at_once(const Device& device, int H, int W) {
  int best = 1;
  double best_use = 0;
  for (int planes = 1; planes <= 16; ++planes) {
    const SpectralLayout layout(H, W, planes);
    const int64_t bytes = layout.floats() * int64_t(sizeof(float));
    if (planes > 1 && bytes > std::min(device.shared_bytes, SPECTRAL_BYTES)) break;
    const int tiles = planes * 4 * layout.block / (MICRO * MICRO);
    const int rounds = (tiles + SPECTRAL_THREADS - 1) / SPECTRAL_THREADS;
    const double use = double(tiles) / (rounds * SPECTRAL_THREADS);
    if (use > best_use) best = planes, best_use = use;
  }
  return best;
}

int64_t coefficient_floats(int64_t H, int64_t W, int64_t channels) {
  return 5 * SpectralLayout(int(H), int(W), 1).block * channels;
}

void launch_filter(const Run& run, const Planes& z, const Planes& y, int element, const float* v,
                   const std::array<int64_t, 3>& v_strides, int64_t H, int64_t W, int64_t samples, int64_t channels,
                   float* coefficients) {
  const int64_t filter_bytes = channels * H * W * 4;
  run.launch("spectral_coefficients", coefficients_kernel, channels, SPECTRAL_THREADS, 0,
             {filter_bytes, coefficient_floats(H, W, channels) * 4}, v, v_strides[0], v_strides[1], v_strides[2],
             int(H), int(W), coefficients);
  const int at_once = planes_at_once(run.device, int(H), int(W));
  const int64_t total = samples * channels, batches = (total + at_once - 1) / at_once;
  const int64_t bytes = SpectralLayout(int(H), int(W), at_once).floats() * int64_t(sizeof(float));
  const int64_t at_a_time = resident(run.device, SPECTRAL_THREADS, bytes);
  const auto size = [&](const Planes& planes) { return total * planes.rows.count * planes.columns.count * element; };
  run.launch("spectral_filter", element == 4 ? filter_kernel<float> : filter_kernel<Half>, std::min(batches, at_a_time),
             SPECTRAL_THREADS, bytes, {size(z) + coefficient_floats(H, W, channels) * 4, size(y)}, z, y, coefficients,
             int(H), int(W), int(channels), total, at_once);
}

}  // namespace nk
