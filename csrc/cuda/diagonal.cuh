// The diagonal case: each channel on its own. Reductions over the columns and maps of them, without tensor cores, each
// value read once, in place. Algebra: primitives/pop_norm/DERIVATION.md.
//
// Where the positions are next to each other, a block has one channel and a part of its columns. Where the channels
// are, it has a tile of them, whose rows are whole lines of the cache. In a reduction the block that comes last merges
// the results of all parts in a fixed order, in the same launch (merge.cuh).
#pragma once

#include "merge.cuh"

namespace nk {

constexpr int SWEEP_WARPS = SWEEP_THREADS / WARP;
constexpr int MOST_WIDTH = 8;  // values of a thread along the channels
// Shared memory: a float for each warp and channel of a tile, or a double for each thread.
constexpr int SWEEP_BYTES = SWEEP_THREADS * int(sizeof(double));
static_assert(SWEEP_WARPS * MOST_ACROSS * MOST_WIDTH * int(sizeof(float)) <= SWEEP_BYTES);

// A tensor in a sweep. A thread finds its next access by additions: with a division for each, a plane of 7 x 7 would
// take longer than the memory.
struct Source {
  unsigned char* data = nullptr;
  int64_t sample_stride, channel_stride, position_stride;
  int64_t ahead, wrap;  // elements to the next access, and more of them at the end of a sample

  Source(const Columns& x, const Sweep& sweep)
      : data(x.data),
        // Where x's samples follow each other as its positions do, x.positions are all of them.
        sample_stride(x.positions == sweep.positions ? x.sample_stride : sweep.positions * x.position_stride),
        channel_stride(x.channel_stride),
        position_stride(x.position_stride),
        ahead(sweep.row / sweep.positions * sample_stride + sweep.step * position_stride),
        wrap(sample_stride - sweep.positions * position_stride) {}
};

// The place of a thread: its first channel, and its first column, which is `ahead` of the block's.
template <int V, bool INNER>
struct Seat {
  static constexpr int WIDTH = INNER ? V : 1;  // channels
  int tile, part, ahead;
  int64_t channel, start, stop;
  bool real;  // there is such a channel

  __device__ __forceinline__ explicit Seat(const Sweep& sweep)
      : tile(int(blockIdx.x % unsigned(sweep.tiles))), part(int(blockIdx.x / unsigned(sweep.tiles))) {
    const int side = int(threadIdx.x) % sweep.across;
    channel = int64_t(tile * sweep.across + side) * WIDTH;
    start = part * sweep.cut.chunk;
    stop = min(start + sweep.cut.chunk, sweep.total);
    ahead = int(threadIdx.x) / sweep.across * (INNER ? 1 : V);
    real = channel < sweep.channels;
  }

  // Returns how many columns there are from the thread's access at `first` on, up to those of `count` accesses that are
  // `row` apart.
  __device__ __forceinline__ int left(int64_t first, int row, int count) const {
    return real ? int(min(stop - first, int64_t(row) * count)) - ahead : 0;
  }
};

// V values that are read or written at once. They are kept as words, so that a register has two halves instead of one.
template <class T, int V>
struct alignas(V * sizeof(T)) Access {
  using Word = std::conditional_t<V * sizeof(T) == 2, uint16_t, uint32_t>;
  Word words[V * sizeof(T) / sizeof(Word)];

  __device__ __forceinline__ float get(int i, bool bfloat) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    return to_float(Half{uint16_t(words[i / 2] >> i % 2 * 16)}, bfloat);
  }

  __device__ __forceinline__ void set(int i, float value, bool bfloat) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(value);
    } else {
      Half half;
      from_float(half, value, bfloat);
      words[i / 2] = Word(i % 2 ? words[i / 2] | uint32_t(half.bits) << 16 : half.bits);
    }
  }
};

// The place of a thread's access in all tensors of a sweep.
struct Cursor {
  int64_t sample = 0, position;

  __device__ __forceinline__ Cursor(const Sweep& sweep, int64_t column) : position(column) {
    if (sweep.positions == sweep.total) return;
    if (sweep.total <= INT32_MAX) {
      sample = uint32_t(column) / uint32_t(sweep.positions), position = uint32_t(column) % uint32_t(sweep.positions);
    } else {
      sample = column / sweep.positions, position = column % sweep.positions;
    }
  }

  // Goes to the next access, and returns whether that is beyond the end of the sample.
  __device__ __forceinline__ bool advance(const Sweep& sweep) {
    position += sweep.step;
    const bool wraps = position >= sweep.positions;
    if (wraps) position -= sweep.positions;
    return wraps;
  }
};

// A thread's accesses to a tensor, one after the other.
template <class T, int V>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Source& source, const Cursor& cursor, int64_t channel)
      : here_(reinterpret_cast<T*>(source.data) + cursor.sample * source.sample_stride +
              cursor.position * source.position_stride + channel * source.channel_stride) {}

  __device__ __forceinline__ Access<T, V>& here() const { return *reinterpret_cast<Access<T, V>*>(here_); }
  __device__ __forceinline__ void advance(const Source& source, bool wraps) {
    here_ += source.ahead + (wraps ? source.wrap : 0);
  }

 private:
  T* here_;
};

// The number of a thread's accesses under way: 64 bytes over all tensors, but no more than 8 accesses.
template <class T, int V, int SOURCES>
constexpr int ACCESSES = std::min(64 / (SOURCES * V * int(sizeof(T))), 8);

// Calls f<V, INNER>() for the accesses of a sweep: V values, of as many channels (INNER) or of one.
template <class T, class F>
__device__ __forceinline__ void with_access(const Sweep& sweep, F f) {
  const auto of = [&]<int V>() { sweep.inner ? f.template operator()<V, true>() : f.template operator()<V, false>(); };
  if constexpr (sizeof(T) == 2) {
    if (sweep.vector == 8) return of.template operator()<8>();
  }
  switch (sweep.vector) {
    case 4:
      return of.template operator()<4>();
    case 2:
      return of.template operator()<2>();
    default:  // the same along the channels
      return f.template operator()<1, true>();
  }
}

// Replaces values by their sums over the threads with the same channels; the order is fixed.
template <int WIDTH>
__device__ __forceinline__ void sum_over_block(float (&values)[WIDTH], int across) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  for (int other = across; other < WARP; other *= 2) {
#pragma unroll
    for (float& value : values) value += __shfl_xor_sync(~0u, value, other);
  }
  const int side = int(threadIdx.x) % across;
  if (lane() < across) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) slots[(i * SWEEP_WARPS + warp()) * MOST_ACROSS + side] = values[i];
  }
  __syncthreads();  // every warp's sums are there
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    values[i] = 0;
#pragma unroll
    for (int k = 0; k < SWEEP_WARPS; ++k) values[i] += slots[(i * SWEEP_WARPS + k) * MOST_ACROSS + side];
  }
  __syncthreads();  // and read, before others take their place
}

// Three numbers for each channel and part, next to each other along the channels.
struct Partials {
  float* data;
  int64_t channels;

  __device__ __forceinline__ float* operator()(int part, int number, int64_t channel) const {
    return data + (int64_t(part) * 3 + number) * channels + channel;
  }
  __device__ __forceinline__ double read(int part, int number, int64_t channel) const {
    return double(__ldcg((*this)(part, number, channel)));  // other blocks' results are in the second-level cache
  }
};

// Merges the parts of a tile in the block that comes last of them; the threads share out the parts of each channel.
struct Merger {
  int lanes;  // channels of the tile: a power of two
  int64_t channel;
  int share, shares;

  __device__ __forceinline__ Merger(const Sweep& sweep, int tile)
      : lanes(sweep.inner ? sweep.across * sweep.vector : 1),
        channel(int64_t(tile) * lanes + int(threadIdx.x) % lanes),
        share(int(threadIdx.x) / lanes),
        shares(SWEEP_THREADS / lanes) {}

  // The sum of f(k) over `count` parts, in all threads of the channel; the order is fixed.
  template <class F>
  __device__ __forceinline__ double sum(bool real, int count, F f) const {
    double* const slots = reinterpret_cast<double*>(shared_memory());
    double sum = 0;
    if (real) {
      for (int k = share; k < count; k += shares) sum += f(k);
    }
    slots[threadIdx.x] = sum;
    __syncthreads();
    for (int half = SWEEP_THREADS / 2; half >= lanes; half /= 2) {
      if (int(threadIdx.x) < half) slots[threadIdx.x] += slots[threadIdx.x + half];
      __syncthreads();
    }
    sum = slots[threadIdx.x % lanes];
    __syncthreads();
    return sum;
  }
};

// Returns whether this block goes on with its tile: it is the last one of the tile, and sees the other blocks' results.
__device__ __forceinline__ bool goes_on(const Sweep& sweep, const Workspace& workspace, int tile) {
  if (sweep.cut.parts > 1) {
    return comes_last(workspace.tickets + tile, sweep.cut.parts, reinterpret_cast<float*>(shared_memory()));
  }
  __syncthreads();
  return true;
}

// Computes moments of each channel: calls finish(channel, mean, variance), with the exact mean, in the block that comes
// last. A part's sums are shifted by the mean of its first columns, so that no large mean cancels.
template <class T, class F>
__device__ __forceinline__ void channel_moments(const Sweep& sweep, const Source& x, const Workspace& workspace,
                                                F finish) {
  with_access<T>(sweep, [&]<int V, bool INNER>() {
    constexpr int AT_ONCE = ACCESSES<T, V, 1>, WIDTH = Seat<V, INNER>::WIDTH;
    const Seat<V, INNER> here(sweep);
    const Partials partials{workspace.partials, sweep.channels};
    const bool bfloat = sweep.bfloat;
    const int64_t count = here.stop - here.start;
    Cursor cursor(sweep, here.start + here.ahead);
    Walk<T, V> walk(x, cursor, here.channel);
    float shift[WIDTH] = {}, sum[WIDTH] = {}, squares[WIDTH] = {};
    float some[V] = {}, some_squares[V] = {};
#pragma unroll 1
    for (int64_t first = here.start; first < here.stop; first += AT_ONCE * sweep.row) {
      const int left = here.left(first, sweep.row, AT_ONCE);
      Access<T, V> values[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row < left) values[k] = walk.here();
        walk.advance(x, cursor.advance(sweep));
      }
      if (first == here.start) {
        const float part = 1.f / float(min(count, int64_t(sweep.row)));  // before the sum, which else could overflow
#pragma unroll
        for (int i = 0; i < V; ++i) shift[i % WIDTH] += left > 0 ? values[0].get(i, bfloat) * part : 0.f;
        sum_over_block(shift, sweep.across);
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row >= left) break;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float value = values[k].get(i, bfloat) - shift[i % WIDTH];
          some[i] += value;
          some_squares[i] += value * value;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i % WIDTH] += some[i], squares[i % WIDTH] += some_squares[i];
    sum_over_block(sum, sweep.across);
    sum_over_block(squares, sweep.across);
    if (int(threadIdx.x) < sweep.across && here.real) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const float away = sum[i] / float(count), rest = squares[i] - sum[i] * away;
        *partials(here.part, 0, here.channel + i) = shift[i];
        *partials(here.part, 1, here.channel + i) = away;
        *partials(here.part, 2, here.channel + i) = rest < 0 ? 0 : rest;  // < 0 only by rounding; NaN stays
      }
    }
  });
  const int tile = int(blockIdx.x % unsigned(sweep.tiles));
  if (!goes_on(sweep, workspace, tile)) return;
  // Chan's formula
  const Partials partials{workspace.partials, sweep.channels};
  const Merger merger(sweep, tile);
  const int64_t channel = merger.channel, total = sweep.total;
  const bool real = channel < sweep.channels;
  const auto columns = [&](int k) { return double(min(sweep.cut.chunk, total - k * sweep.cut.chunk)); };
  const double mean = merger.sum(real, sweep.cut.parts, [&](int k) {
    return columns(k) * (partials.read(k, 0, channel) + partials.read(k, 1, channel));
  }) / double(total);
  const double squares = merger.sum(real, sweep.cut.parts, [&](int k) {
    const double away = partials.read(k, 0, channel) - mean + partials.read(k, 1, channel);
    return partials.read(k, 2, channel) + columns(k) * (away * away);
  });
  if (real && merger.share == 0) finish(channel, mean, squares / double(total));
}

// Computes sums of each channel: calls finish(channel, sum y, sum (x - shift), sum y (x - shift)) in the block that
// comes last; shift (C,) may be nullptr.
template <class T, class F>
__device__ __forceinline__ void channel_sums(const Sweep& sweep, const Source& y, const Source& x, const float* shift,
                                             const Workspace& workspace, F finish) {
  with_access<T>(sweep, [&]<int V, bool INNER>() {
    constexpr int AT_ONCE = ACCESSES<T, V, 2>, WIDTH = Seat<V, INNER>::WIDTH;
    const Seat<V, INNER> here(sweep);
    const Partials partials{workspace.partials, sweep.channels};
    const bool bfloat = sweep.bfloat;
    Cursor cursor(sweep, here.start + here.ahead);
    Walk<T, V> y_walk(y, cursor, here.channel), x_walk(x, cursor, here.channel);
    float shifts[WIDTH], sums[3][V] = {};
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) shifts[i] = here.real && shift != nullptr ? shift[here.channel + i] : 0.f;
#pragma unroll 1
    for (int64_t first = here.start; first < here.stop; first += AT_ONCE * sweep.row) {
      const int left = here.left(first, sweep.row, AT_ONCE);
      Access<T, V> y_values[AT_ONCE], x_values[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row < left) y_values[k] = y_walk.here(), x_values[k] = x_walk.here();
        const bool wraps = cursor.advance(sweep);
        y_walk.advance(y, wraps), x_walk.advance(x, wraps);
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (k * sweep.row >= left) break;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float factor = y_values[k].get(i, bfloat);
          const float value = x_values[k].get(i, bfloat) - shifts[i % WIDTH];
          sums[0][i] += factor;
          sums[1][i] += value;
          sums[2][i] += factor * value;
        }
      }
    }
#pragma unroll
    for (int number = 0; number < 3; ++number) {
      float sum[WIDTH] = {};
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i % WIDTH] += sums[number][i];
      sum_over_block(sum, sweep.across);
      if (int(threadIdx.x) < sweep.across && here.real) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) *partials(here.part, number, here.channel + i) = sum[i];
      }
    }
  });
  const int tile = int(blockIdx.x % unsigned(sweep.tiles));
  if (!goes_on(sweep, workspace, tile)) return;
  const Partials partials{workspace.partials, sweep.channels};
  const Merger merger(sweep, tile);
  const bool real = merger.channel < sweep.channels;
  double sums[3];
#pragma unroll
  for (int number = 0; number < 3; ++number) {
    sums[number] = merger.sum(real, sweep.cut.parts, [&](int k) { return partials.read(k, number, merger.channel); });
  }
  if (real && merger.share == 0) finish(merger.channel, sums[0], sums[1], sums[2]);
}

}  // namespace nk
