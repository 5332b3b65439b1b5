// whiten: y = diag(weight) W (x - mean) + bias, and with two stacked sources the last pass of the backward.
//
// A block keeps its rows of the matrix in shared memory and passes over a part of the columns: for each tile of them a
// product with 32 channels after the other, which are on their way while the ones before are multiplied.
#include "launches.h"
#include "tensors.h"

namespace nk {

template <int D, int SOURCES>
struct MixShape {
  static constexpr int ROWS = D < 64 ? D : 64;      // of the result, of one block
  static constexpr int CHANNELS = D < 32 ? D : 32;  // of a source, at a time
  static constexpr int COLUMNS = 64, STAGES = 3, WARPS = 4, THREADS = WARPS * WARP;
  static constexpr int HEIGHT = ROWS < 32 ? ROWS : 32, WARPS_DOWN = ROWS / HEIGHT, WIDTH = COLUMNS * WARPS_DOWN / WARPS;
  static constexpr int MT = HEIGHT / 16, NT = WIDTH / 8;
  static constexpr int STRIDE = SOURCES * D + 4;  // of the matrix in shared memory: no bank conflicts
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
          weight(channel + row, 1.f);
    }
    A[i * Shape::STRIDE + column] = entry;
  }
  for (int at = threadIdx.x; at < SOURCES * D; at += Shape::THREADS) {
    const float* from = SOURCES == 1 || at < D ? a_shift : b_shift;
    shift[at] = from != nullptr && at % D < d ? from[channel + at % D] : 0.f;
  }
  for (int i = threadIdx.x; i < Shape::ROWS; i += Shape::THREADS) {
    constant[i] = first_row + i < d ? bias(channel + first_row + i, 0.f) : 0.f;
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

// --- op ------------------------------------------------------------------------------------------------------------

Tensor whiten(const Tensor& data, const Tensor& mean, const Tensor& W, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(W.dim() == 3 && W.size(1) == W.size(2), "whiten: W: expected shape (G, d, d), got ",
                  text(shape_of(W)));
  const int64_t groups = W.size(0), d = W.size(1);
  check_data("whiten", "x", data, d);
  if (const auto reason = not_served("whiten", data, d)) {
    return std::get<0>(next<Tensor>("whiten", *reason, data, mean, W, weight, bias));
  }
  check_like("whiten", "W", W, {data.size(1) / d, d, d}, ScalarType::Float, data);
  check_like("whiten", "mean", mean, {data.size(1)}, ScalarType::Float, data);
  const OnDevice on("whiten", data);
  const Tensor x = collapsible(data), center = packed(mean);
  const auto gamma = packed(weight), beta = packed(bias);
  Tensor y = empty_output(data);
  launch_mix(on.run, columns_of(x, d), floats(center), nullptr, nullptr, columns_of(y, d), int(x.element_size()),
             {floats(W), W.stride(0), W.stride(1), W.stride(2)}, parameter("whiten", "weight", gamma, x),
             parameter("whiten", "bias", beta, x), groups, d);
  return y;
}

}  // namespace nk

NORMKERNELS_IMPL(library) {
  library.impl("whiten", TORCH_BOX(&nk::whiten));
}
