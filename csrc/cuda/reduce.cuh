// The reductions over all columns in one launch: moments of x, or cross moments of y and x.
//
// A block reduces its part of the columns, tile by tile; the blocks' results are merged (merge.cuh), and a group's last
// block goes on to the next step, as to the small matrix function. Algebra: primitives/moments/DERIVATION.md.
#pragma once

#include "merge.cuh"

namespace nk {

// The warps' shares of a D x D product: blocks of HEIGHT x WIDTH, all or those on and above the diagonal. Where these
// are few, SPLITS warps have one block, and sum different columns of a tile.
template <int D, bool SYMMETRIC>
struct Warps {
  static constexpr int WIDTH = D < 32 ? D : 32, HEIGHT = D == 128 && !SYMMETRIC ? 64 : WIDTH;
  static constexpr int ACROSS = D / WIDTH, DOWN = D / HEIGHT;
  static constexpr int BLOCKS = SYMMETRIC ? DOWN * (DOWN + 1) / 2 : DOWN * ACROSS;
  static constexpr int SPLITS = BLOCKS == 1 ? 4 : BLOCKS < 8 ? 2 : 1, COUNT = BLOCKS * SPLITS, THREADS = COUNT * WARP;
  static constexpr int MT = HEIGHT / 16, NT = WIDTH / 8;

  static __device__ __forceinline__ int share() { return warp() / BLOCKS; }
  static __device__ __forceinline__ int row() { return HEIGHT * (SYMMETRIC ? upper() >> 8 : warp() % BLOCKS / ACROSS); }
  static __device__ __forceinline__ int column() {
    return WIDTH * (SYMMETRIC ? upper() & 255 : warp() % BLOCKS % ACROSS);
  }

 private:
  static __device__ __forceinline__ int upper() {
    int at = warp() % BLOCKS, row = 0;
    while (at >= DOWN - row) at -= DOWN - row++;
    return row << 8 | (row + at);
  }
};

// The columns of a tile, and the tiles under way, for 1 (moments) or 2 tensors (cross moments): about 18 KiB a stage.
template <int D, int SOURCES>
struct Stages {
  static constexpr int COLUMNS = D == 16 ? 128 : D == 32 ? 128 / SOURCES : D == 64 ? 64 / SOURCES : 32;
  static constexpr int COUNT = D == 128 && SOURCES == 2 ? 2 : 3;
};

template <class T, int D, int SOURCES>
constexpr int tile_bytes() {
  return SOURCES * Stages<D, SOURCES>::COUNT * Tile<T, D, Stages<D, SOURCES>::COLUMNS, true>::BYTES;
}

// Sums the warps' shares of a product into a matrix in shared memory; the order is fixed.
template <int D, bool SYMMETRIC, class F>
__device__ __forceinline__ void gather(const F& fragment, Matrix<D> to) {
  using Blocks = Warps<D, SYMMETRIC>;
  for (int share = 0; share < Blocks::SPLITS; ++share) {
    if (Blocks::share() == share) {
      fragment.for_each([&](int i, int j, float entry) {
        float& sum = to(Blocks::row() + i, Blocks::column() + j);
        sum = share ? sum + entry : entry;
      });
    }
    __syncthreads();
  }
}

// Does the same for sums of rows, from the warps for which `mine` is true.
template <int SPLITS, class Sums>
__device__ __forceinline__ void gather_sums(const Sums& sums, int share, bool mine, float* to) {
  for (int turn = 0; turn < SPLITS; ++turn) {
    if (mine && share == turn) sums.for_each([&](int i, float sum) { to[i] = turn ? to[i] + sum : sum; });
    __syncthreads();
  }
}

// Computes the moments of columns start..stop - 1 of a group, into `out`.
template <class T, int D>
__device__ __forceinline__ void partial_moments(const Columns& x, int64_t channel, int d, int64_t start, int64_t stop,
                                                const Shared<D>& shared, const Partial<D>& out) {
  using Precision = StatisticsPrecision<T>;
  using Blocks = Warps<D, true>;
  using Pipeline = Stages<D, 1>;
  using Activations = Tile<T, D, Pipeline::COLUMNS, true>;
  constexpr int TERMS = Pipeline::COLUMNS / Blocks::SPLITS;
  const auto tile_at = [&](int stage) { return Activations(shared.rest + stage * Activations::BYTES); };
  const auto load = [&](int number) {
    const int64_t first = start + int64_t(number) * Pipeline::COLUMNS;
    if (first < stop) {
      tile_at(number % Pipeline::COUNT).template load<Blocks::THREADS>(x, channel, d, first, stop);
    }
    commit_copies();
  };
  const int row = Blocks::row(), column = Blocks::column(), first_term = Blocks::share() * TERMS;

  Fragment<Precision, Blocks::MT, Blocks::NT> gram;
  RowSums<Precision, Blocks::MT> sums;
  const int tiles = int((stop - start + Pipeline::COLUMNS - 1) / Pipeline::COLUMNS);
  // Numbers start below 0, where no tile is there yet, so that there is one place that loads.
  for (int number = 1 - Pipeline::COUNT; number < tiles; ++number) {
    if (number >= 0) {
      wait_for_copies<Pipeline::COUNT - 2>();
      __syncthreads();  // this tile is here, and all have left the one that the next load overwrites
    }
    load(number + Pipeline::COUNT - 1);
    if (number < 0) continue;
    const Activations tile = tile_at(number % Pipeline::COUNT);
    const int valid = int(min(stop - start - int64_t(number) * Pipeline::COLUMNS, int64_t(Pipeline::COLUMNS)));
    if (number == 0) {
      // Values are shifted by a mean of a few columns, so that no large mean cancels; the exact shift matters little.
      const int few = min(valid, 32);
      with_constant(x.inner, [&](auto inner) {
        for (int i = threadIdx.x; i < D; i += Blocks::THREADS) {
          float sum = 0, squares = 0;
#pragma unroll 1
          for (int j = 0; j < few; ++j) {
            const float value = to_float(tile.template at<inner.value>(i, j), x.bfloat);
            sum += value;
            squares += value * value;
          }
          shared.first[i] = shift_for<T>(sum / float(few), squares / float(few));
        }
      });
      __syncthreads();
    }
    with_constant(x.inner, [&](auto inner) {
      const auto centred = [&](int i, int j) {
        const float value = to_float(tile.template at<inner.value>(i, j), x.bfloat) - shared.first[i];
        return j < valid ? value : 0.f;
      };
#pragma unroll 1
      for (int term = first_term; term < first_term + TERMS; term += Precision::K) {
        const auto left = [&](int i, int j) { return centred(row + i, j); };
        gram.add(term, left, [&](int i, int j) { return centred(column + j, i); });
        if (row == column) sums.add(term, left);
      }
    });
  }
  wait_for_copies<0>();
  __syncthreads();

  const Matrix<D> total{reinterpret_cast<float*>(shared.rest)};
  gather<D, true>(gram, total);
  gather_sums<Blocks::SPLITS>(sums, Blocks::share(), row == column, shared.second + row);
  const float count = float(stop - start), root = sqrtf(count);
  for (int i = threadIdx.x; i < D; i += Blocks::THREADS) {
    out.first()[i] = shared.first[i];
    out.second()[i] = shared.second[i] / count;
  }
  for_entries<D, Blocks::COUNT>([&](int i, int j) {
    // symmetric bit by bit; without the division by the root, products of the sums would overflow
    out.matrix()[i * D + j] = total(min(i, j), max(i, j)) - shared.second[i] / root * (shared.second[j] / root);
  });
}

// Computes the cross moments of columns start..stop - 1 of a group, into `out`; y has x's layout.
template <class T, int D>
__device__ __forceinline__ void partial_cross(const Columns& y, const Columns& x, const float* mean, int64_t channel,
                                              int d, int64_t start, int64_t stop, const Shared<D>& shared,
                                              const Partial<D>& out) {
  using Precision = StatisticsPrecision<T>;
  using Blocks = Warps<D, false>;
  using Pipeline = Stages<D, 2>;
  using Activations = Tile<T, D, Pipeline::COLUMNS, true>;
  constexpr int TERMS = Pipeline::COLUMNS / Blocks::SPLITS;
  const auto y_tile = [&](int stage) { return Activations(shared.rest + 2 * stage * Activations::BYTES); };
  const auto x_tile = [&](int stage) { return Activations(shared.rest + (2 * stage + 1) * Activations::BYTES); };
  const auto load = [&](int number) {
    const int64_t first = start + int64_t(number) * Pipeline::COLUMNS;
    if (first < stop) {
      y_tile(number % Pipeline::COUNT).template load<Blocks::THREADS>(y, channel, d, first, stop);
      x_tile(number % Pipeline::COUNT).template load<Blocks::THREADS>(x, channel, d, first, stop);
    }
    commit_copies();
  };
  const int row = Blocks::row(), column = Blocks::column(), first_term = Blocks::share() * TERMS;

  for (int i = threadIdx.x; i < D; i += Blocks::THREADS)
    shared.center[i] = i < d ? simple_near<T>(mean[channel + i]) : 0.f;
  Fragment<Precision, Blocks::MT, Blocks::NT> cross;
  // A warp sums both tensors where there is only one column of blocks; otherwise warps of the first column of blocks
  // sum y, warps of the last one x.
  constexpr int LAST = D - Blocks::WIDTH;
  RowSums<Precision, Blocks::MT> y_sums, x_sums;
  const int tiles = int((stop - start + Pipeline::COLUMNS - 1) / Pipeline::COLUMNS);
  for (int number = 1 - Pipeline::COUNT; number < tiles; ++number) {
    if (number >= 0) {
      wait_for_copies<Pipeline::COUNT - 2>();
      __syncthreads();
    }
    load(number + Pipeline::COUNT - 1);
    if (number < 0) continue;
    const Activations left_tile = y_tile(number % Pipeline::COUNT), right_tile = x_tile(number % Pipeline::COUNT);
    const int valid = int(min(stop - start - int64_t(number) * Pipeline::COLUMNS, int64_t(Pipeline::COLUMNS)));
    with_constant(x.inner, [&](auto inner) {
      const auto centred = [&](int i, int j) {
        const float value = to_float(right_tile.template at<inner.value>(i, j), x.bfloat) - shared.center[i];
        return j < valid ? value : 0.f;
      };
#pragma unroll 1
      for (int term = first_term; term < first_term + TERMS; term += Precision::K) {
        const auto left = [&](int i, int j) {
          return to_float(left_tile.template at<inner.value>(row + i, j), y.bfloat);
        };
        const auto right = [&](int i, int j) { return centred(row + i, j); };
        cross.add(term, left, [&](int i, int j) { return centred(column + j, i); });
        if (LAST == 0) {
          y_sums.add(term, left);
          x_sums.add(term, right);
        } else if (column == 0) {
          y_sums.add(term, left);
        } else if (column == LAST) {
          y_sums.add(term, right);
        }
      }
    });
  }
  wait_for_copies<0>();
  __syncthreads();

  const Matrix<D> total{reinterpret_cast<float*>(shared.rest)};
  gather<D, false>(cross, total);
  gather_sums<Blocks::SPLITS>(y_sums, Blocks::share(), column == 0, shared.first + row);
  gather_sums<Blocks::SPLITS>(LAST == 0 ? x_sums : y_sums, Blocks::share(), column == LAST, shared.second + row);
  // Sums about the center become sums about the mean; the two differ for half types.
  for (int i = threadIdx.x; i < D; i += Blocks::THREADS) {
    const float away = i < d ? shared.center[i] - mean[channel + i] : 0.f;
    out.first()[i] = shared.first[i];
    out.second()[i] = float(double(shared.second[i]) + double(stop - start) * away);
    shared.center[i] = away;
  }
  __syncthreads();
  for_entries<D, Blocks::COUNT>(
      [&](int i, int j) { out.matrix()[i * D + j] = total(i, j) + shared.first[i] * shared.center[j]; });
}

// Computes the moments of all columns of a group. It returns true only in the group's last block, which goes on: there
// the exact mean is in shared.exact, and f(i, j, m cov) has been called for all entries.
template <class T, int D, class F>
__device__ __forceinline__ bool reduce_moments(const Columns& x, int d, const Split& cut, const Merging& merging,
                                               const Workspace& workspace, const Shared<D>& shared, F f) {
  constexpr int THREADS = Warps<D, true>::THREADS;
  const Place<D> here(workspace, cut, merging);
  const int64_t start = here.part * cut.chunk, stop = min(start + cut.chunk, x.total);
  partial_moments<T, D>(x, here.group * d, d, start, stop, shared, {here.parts + here.part * Partial<D>::SIZE});
  return merge_levels<D, THREADS>(
      here, cut, merging, x.total, shared.slots,
      [&](const float* partials, int count, int64_t each, int64_t columns, auto g) {
        merge_moments<D, THREADS>(partials, count, each, columns, shared, g);
      },
      [&](int c, float& mean, float& rest) {
        mean = float(shared.exact[c]);
        rest = float(shared.exact[c] - double(mean));
      },
      f);
}

// Does the same for cross moments: sum y is in shared.first, sum (x - mean) in shared.second.
template <class T, int D, class F>
__device__ __forceinline__ bool reduce_cross(const Columns& y, const Columns& x, const float* mean, int d,
                                             const Split& cut, const Merging& merging, const Workspace& workspace,
                                             const Shared<D>& shared, F f) {
  constexpr int THREADS = Warps<D, false>::THREADS;
  const Place<D> here(workspace, cut, merging);
  const int64_t start = here.part * cut.chunk, stop = min(start + cut.chunk, x.total);
  partial_cross<T, D>(y, x, mean, here.group * d, d, start, stop, shared, {here.parts + here.part * Partial<D>::SIZE});
  return merge_levels<D, THREADS>(
      here, cut, merging, x.total, shared.slots,
      [&](const float* partials, int count, int64_t, int64_t, auto g) {
        merge_cross<D, THREADS>(partials, count, shared, g);
      },
      [&](int c, float& of_y, float& of_x) { of_y = shared.first[c], of_x = shared.second[c]; }, f);
}

// --- host: how a reduction is cut and what it needs ----------------------------------------------------------------

// Calls f<T, D>() for data of `element` bytes and the padded group size.
template <class F>
void with_kernel(int element, int64_t d, F f) {
  with_padded(d, [&](auto padded) {
    constexpr int D = decltype(padded)::value;
    element == 4 ? f.template operator()<float, D>() : f.template operator()<Half, D>();
  });
}

}  // namespace nk
