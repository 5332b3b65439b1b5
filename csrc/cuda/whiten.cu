// whiten: y = diag(weight) W (x - mean) + bias, and with two stacked sources the last pass of the backward.
//
// A block keeps its rows of the matrix in shared memory and passes over a part of the columns. For each tile of columns
// it multiplies 32 channels after the other; the next ones are on their way while the ones before are multiplied.
// Channels on their own, d = 1, are scaled one by one (diagonal.cuh).
#include "diagonal.cuh"
#include "launch.cuh"
#include "launches.h"
#include "reduce.cuh"

namespace nk {

template <int D, int SOURCES>
struct MixShape {
  static constexpr int ROWS = D < 64 ? D : 64;      // rows of the result of one block
  static constexpr int CHANNELS = D < 32 ? D : 32;  // channels of a source at a time
  static constexpr int COLUMNS = 64, STAGES = 3, WARPS = 4, THREADS = WARPS * WARP;
  static constexpr int HEIGHT = ROWS < 32 ? ROWS : 32, WARPS_DOWN = ROWS / HEIGHT, WIDTH = COLUMNS * WARPS_DOWN / WARPS;
  static constexpr int MT = HEIGHT / 16, NT = WIDTH / 8;
  static constexpr int STRIDE = SOURCES * D + 4;  // a row of the matrix in shared memory: no bank conflicts
  static constexpr int MATRIX_BYTES = (ROWS * STRIDE + SOURCES * D + ROWS) * int(sizeof(float));
};

template <class T>
__device__ __forceinline__ void store_pair(T* to, const T (&values)[2]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
  } else {
    *reinterpret_cast<uint32_t*>(to) = values[0].bits | uint32_t(values[1].bits) << 16;
  }
}

// y = diag(weight) matrix [a - a_shift; b - b_shift] + bias. Shifts (C,) may be nullptr; b is not read for one source.
template <class T, int D, int SOURCES>
__global__ __launch_bounds__(MixShape<D, SOURCES>::THREADS,
                             1) void mix_kernel(Columns a, const float* a_shift, Columns b, const float* b_shift,
                                                Columns y, MatrixView matrix, Parameter weight, Parameter bias, int d,
                                                Split cut) {
  using Precision = MapPrecision<T>;
  using Shape = MixShape<D, SOURCES>;
  using Activations = Tile<T, Shape::CHANNELS, Shape::COLUMNS, false>;
  constexpr int BLOCKS = D / Shape::ROWS;  // neighbours read the same columns
  const int first_row = int(blockIdx.x % BLOCKS) * Shape::ROWS;
  const int64_t part = blockIdx.x / BLOCKS % cut.parts, group = blockIdx.x / BLOCKS / cut.parts, channel = group * d;
  const int64_t start = part * cut.chunk, stop = min(start + cut.chunk, y.total);

  float* const A = reinterpret_cast<float*>(shared_memory());
  float* const shift = A + Shape::ROWS * Shape::STRIDE;
  float* const constant = shift + SOURCES * D;
  unsigned char* const tiles = shared_memory() + Shape::MATRIX_BYTES;

  const auto tile_at = [&](int number) { return Activations(tiles + number % Shape::STAGES * Activations::BYTES); };
  // Products for a tile of columns, one for each piece of up to CHANNELS channels of a source.
  const int of_a = (d + Shape::CHANNELS - 1) / Shape::CHANNELS, pieces = SOURCES * of_a;
  const int numbers = int((stop - start + Shape::COLUMNS - 1) / Shape::COLUMNS) * pieces;
  const auto load = [&](int number) {
    if (number < numbers) {
      const int64_t first = start + int64_t(number / pieces) * Shape::COLUMNS;
      const int piece = number % pieces;
      if (SOURCES == 1 || piece < of_a) {
        const int term = piece * Shape::CHANNELS;
        tile_at(number).template load<Shape::THREADS>(a, channel + term, d - term, first, stop);
      } else {
        const int term = (piece - of_a) * Shape::CHANNELS;
        tile_at(number).template load<Shape::THREADS>(b, channel + term, d - term, first, stop);
      }
    }
    commit_copies();
  };
  for (int at = threadIdx.x; at < Shape::ROWS * SOURCES * D; at += Shape::THREADS) {
    const int i = at / (SOURCES * D), column = at % (SOURCES * D), source = column / D, j = column % D;
    const int row = first_row + i;
    float entry = 0;
    if (row < d && j < d) {
      entry =
          matrix.data[group * matrix.group_stride + row * matrix.row_stride + (source * d + j) * matrix.column_stride] *
          value_of(weight, channel + row, 1.f);
    }
    A[i * Shape::STRIDE + column] = entry;
  }
  for (int at = threadIdx.x; at < SOURCES * D; at += Shape::THREADS) {
    const float* from = SOURCES == 1 || at < D ? a_shift : b_shift;
    shift[at] = from != nullptr && at % D < d ? from[channel + at % D] : 0.f;
  }
  for (int i = threadIdx.x; i < Shape::ROWS; i += Shape::THREADS) {
    constant[i] = first_row + i < d ? value_of(bias, channel + first_row + i, 0.f) : 0.f;
  }

  const int row = warp() % Shape::WARPS_DOWN * Shape::HEIGHT, column = warp() / Shape::WARPS_DOWN * Shape::WIDTH;
  const bool pairs = !y.inner && y.width >= 2 * int(sizeof(T));
  Fragment<Precision, Shape::MT, Shape::NT> sum;
  for (int number = 1 - Shape::STAGES; number < numbers; ++number) {  // see reduce.cuh
    if (number >= 0) {
      wait_for_copies<Shape::STAGES - 2>();
      __syncthreads();  // this tile is here, and all have left the one that the next load overwrites
    }
    load(number + Shape::STAGES - 1);
    if (number < 0) continue;
    const Activations tile = tile_at(number);
    const int piece = number % pieces;
    const bool second = SOURCES == 2 && piece >= of_a;
    const int term = second ? D + (piece - of_a) * Shape::CHANNELS : piece * Shape::CHANNELS;  // column of A
    with_constant(second ? b.inner : a.inner, [&](auto inner) {
#pragma unroll 1
      for (int k = 0; k < Shape::CHANNELS; k += Precision::K) {
        sum.add(
            k, [&](int i, int j) { return A[(row + i) * Shape::STRIDE + term + j]; },
            [&](int i, int j) {
              return to_float(tile.template at<inner.value>(i, column + j), a.bfloat) - shift[term + i];
            });
      }
    });
    if (piece + 1 < pieces) continue;

    const int64_t first = start + int64_t(number / pieces) * Shape::COLUMNS + column + 2 * (lane() % 4);
#pragma unroll
    for (int n = 0; n < Shape::NT; ++n) {
      const int64_t at = first + 8 * n;
      if (at >= stop) continue;
      const int64_t offset = y.offset(at), next_offset = at + 1 < stop ? y.offset(at + 1) : -1;
#pragma unroll
      for (int m = 0; m < Shape::MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = row + 16 * m + 8 * half + lane() / 4;
          if (first_row + i >= d) continue;
          T* const to = reinterpret_cast<T*>(y.data) + (channel + first_row + i) * y.channel_stride;
          T values[2];
          from_float(values[0], sum.value[m][n][2 * half] + constant[i], y.bfloat);
          from_float(values[1], sum.value[m][n][2 * half + 1] + constant[i], y.bfloat);
          if (pairs) {
            store_pair(to + offset, values);
          } else {
            to[offset] = values[0];
            if (next_offset >= 0) to[next_offset] = values[1];
          }
        }
      }
    }
    sum = {};
  }
  wait_for_copies<0>();
}

void launch_mix(const Run& run, const Columns& a, const float* a_shift, const Columns* b, const float* b_shift,
                const Columns& y, int element, const MatrixView& matrix, const Parameter& weight, const Parameter& bias,
                int64_t groups, int64_t d) {
  with_kernel(element, d, [&]<class T, int D>() {
    const auto launch = [&]<int SOURCES>(const char* name) {
      using Shape = MixShape<D, SOURCES>;
      constexpr int BLOCKS = D / Shape::ROWS;
      constexpr int64_t shared =
          Shape::MATRIX_BYTES + Shape::STAGES * int64_t(Tile<T, Shape::CHANNELS, Shape::COLUMNS, false>::BYTES);
      const Split cut =
          split(y.total, groups * BLOCKS, Shape::COLUMNS, resident(run.device, Shape::THREADS, shared), 1 << 20);
      run.launch(name, mix_kernel<T, D, SOURCES>, groups * BLOCKS * cut.parts, Shape::THREADS, shared,
                 {SOURCES * (y.total * groups * d * element + groups * d * d * 4), y.total * groups * d * element}, a,
                 a_shift, b == nullptr ? a : *b, b_shift, y, matrix, weight, bias, int(d), cut);
    };
    b == nullptr ? launch.template operator()<1>("mix") : launch.template operator()<2>("stacked_mix");
  });
}

// y = weight (of_a (a - a_shift) + of_b b) + bias for channels on their own; a_shift (C,) may be nullptr, and b is not
// read for one source.
template <class T, int SOURCES>
__global__ __launch_bounds__(SWEEP_THREADS, SWEEP_BLOCKS) void scale_kernel(Sweep sweep, Source a, Factor of_a,
                                                                            const float* a_shift, Source b, Factor of_b,
                                                                            Source y, Parameter weight,
                                                                            Parameter bias) {
  with_access<T>(sweep, [&]<int V, bool INNER>() {
    constexpr int AT_ONCE = ACCESSES<T, V, SOURCES>, WIDTH = Seat<V, INNER>::WIDTH;
    const Seat<V, INNER> here(sweep);
    const bool bfloat = sweep.bfloat;
    const Cursor start(sweep, here.start + here.ahead);
    Cursor from = start, to = start;
    Walk<T, V> a_walk(a, start, here.channel), b_walk(b, start, here.channel), y_walk(y, start, here.channel);
    float factor[WIDTH], shift[WIDTH], other[WIDTH], constant[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t channel = here.real ? here.channel + i : 0;
      const float gamma = value_of(weight, channel, 1.f);
      factor[i] = gamma * of_a(channel);
      other[i] = SOURCES == 1 ? 0.f : gamma * of_b(channel);
      shift[i] = a_shift == nullptr ? 0.f : a_shift[channel];
      constant[i] = value_of(bias, channel, 0.f);
    }
#pragma unroll 1
    for (int64_t first = here.start; first < here.stop; first += AT_ONCE * sweep.row) {
      const int left = here.left(first, sweep.row, AT_ONCE);
      Access<T, V> a_values[AT_ONCE], b_values[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row < left) a_values[k] = a_walk.here();
        if (SOURCES == 2 && k * sweep.row < left) b_values[k] = b_walk.here();
        const bool wraps = from.advance(sweep);
        a_walk.advance(a, wraps), b_walk.advance(b, wraps);
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row < left) {
          Access<T, V> result;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = i % WIDTH;
            float value = factor[c] * (a_values[k].get(i, bfloat) - shift[c]) + constant[c];
            if (SOURCES == 2) value += other[c] * b_values[k].get(i, bfloat);
            result.set(i, value, bfloat);
          }
          y_walk.here() = result;
        }
        y_walk.advance(y, to.advance(sweep));
      }
    }
  });
}

void launch_scale(const Run& run, const Columns& a, const Factor& of_a, const float* a_shift, const Columns* b,
                  const Factor& of_b, const Columns& y, int element, int64_t channels, const Parameter& weight,
                  const Parameter& bias) {
  const auto launch = [&]<class T, int SOURCES>(const char* name) {
    const Columns& other = SOURCES == 1 ? a : *b;
    const Sweep sweep(run.device, channels, element, {&y, &a, &other});
    run.launch(name, scale_kernel<T, SOURCES>, sweep.blocks(), SWEEP_THREADS, 0,
               {SOURCES * y.total * channels * element, y.total * channels * element}, sweep, Source(a, sweep), of_a,
               a_shift, Source(other, sweep), of_b, Source(y, sweep), weight, bias);
  };
  const auto with_sources = [&]<class T>() {
    b == nullptr ? launch.template operator()<T, 1>("scale") : launch.template operator()<T, 2>("stacked_scale");
  };
  element == 4 ? with_sources.template operator()<float>() : with_sources.template operator()<Half>();
}

}  // namespace nk
