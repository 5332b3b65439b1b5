// How passes are cut into blocks, and the memory that they need: what an op must know before it launches anything. Host
// code, whose results kernels take as they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "common/columns.h"
#include "run.h"

namespace nk {

// The cut of a pass over the columns: `parts` blocks for each group with `chunk` columns each, the last with fewer.
struct Split {
  int parts;
  int64_t chunk;
};

// Returns how many blocks are on the device at once, by shared memory and by 168 registers a thread. Most kernels of up
// to 192 threads take so many; wider ones have one block on a multiprocessor either way.
inline int64_t resident(const Device& device, int threads, int64_t shared_bytes) {
  const int64_t by_registers = 65536 / (threads * 168),
                by_shared = (device.shared_bytes + 1024) / (shared_bytes + 1024);
  return device.processors * std::max<int64_t>(std::min(by_registers, by_shared), 1);
}

// Cuts the columns for about `blocks` blocks: one wave, in which no block waits for others to end.
inline Split split(int64_t total, int64_t groups, int tile, int64_t blocks, int most) {
  const int64_t tiles = (total + tile - 1) / tile;
  const int64_t wanted = std::clamp<int64_t>(blocks / groups, 1, std::min<int64_t>(tiles, most));
  const int64_t chunk = (tiles + wanted - 1) / wanted * tile;
  return {int((total + chunk - 1) / chunk), chunk};
}

// --- small matrices ------------------------------------------------------------------------------------------------

constexpr int FORWARD_MATRICES = 3, BACKWARD_MATRICES = 5;

// The options of the small matrix function.
struct Newton {
  int d, iterations;
  bool frobenius;
  float eps;
};

// Shared memory of a block, the matrices that it has room for, and the floats of the others for each group.
struct Room {
  int fit = 0;
  int64_t bytes = 0, outside = 0;
};

Room small_matrix_room(const Device& device, int64_t d, int matrices);

// --- reductions over groups ----------------------------------------------------------------------------------------

constexpr int MOST_MERGED = 24;  // partial results that a block merges

// Parts of a group in sets of `fan`, which are merged first.
struct Merging {
  int fan, sets;

  explicit Merging(int parts) : fan(1) {
    while (fan * fan < parts) ++fan;
    sets = (parts + fan - 1) / fan;
  }
};

// The workspace of a reduction in global memory, for each group: its parts, the sets of parts, and a counter for each
// set and one for the sets, which must be zero.
struct Workspace {
  float* partials;
  unsigned* tickets;
};

// The cut of a reduction of `sources` tensors, and the memory that it needs, also for the matrices of the next step.
struct Reduction {
  Room room;
  Split cut{};
  Merging merging{1};
  int64_t floats = 0, counters = 0;  // the size of the workspace

  Reduction(const Device& device, const Columns& x, int element, int64_t groups, int64_t d, int sources, int matrices);
};

// --- reductions and maps of channels on their own, see diagonal.cuh -------------------------------------------------

constexpr int SWEEP_THREADS = 256;
constexpr int MOST_ACROSS = 8;   // accesses of 16 bytes side by side: 128 bytes, a line of the cache
constexpr int SWEEP_BLOCKS = 3;  // blocks of a multiprocessor: up to 80 registers for a thread

// How blocks and threads go over the channels and columns of one or more tensors.
struct Sweep {
  int channels;
  int vector;   // values of an access, along what is next to each other
  bool inner;   // the channels are next to each other, otherwise the positions
  int across;   // threads of a block side by side along the channels: a power of two
  int tiles;    // tiles of channels
  int row;      // columns that all threads together take at a time
  bool bfloat;  // as in Columns, for all tensors
  int64_t total, positions;
  int64_t step;  // positions from one access of a thread to the next, beyond whole samples
  Split cut;     // how the columns of a tile are cut

  // The first tensor decides the order; it is the one that is written, if there is one.
  Sweep(const Device& device, int64_t channels, int element, std::initializer_list<const Columns*> tensors)
      : channels(int(channels)), vector(16 / element), across(1) {
    const Columns& main = **tensors.begin();
    inner = main.inner, bfloat = main.bfloat, total = positions = main.total;
    for (const Columns* x : tensors) {
      vector = x->inner == inner ? std::min(vector, std::max(x->width / element, 1)) : 1;
      positions = std::min(positions, x->positions);
    }
    const int64_t accesses = (channels + vector - 1) / vector;  // for a column
    while (inner && across < MOST_ACROSS && across < accesses) across *= 2;
    tiles = int(inner ? (accesses + across - 1) / across : channels);
    row = SWEEP_THREADS / across * (inner ? 1 : vector);
    step = row % positions;
    cut = split(total, tiles, row, tiles * parts(int64_t(device.processors) * SWEEP_BLOCKS), INT32_MAX);
  }

  int64_t blocks() const { return int64_t(tiles) * cut.parts; }

 private:
  // Parts of a tile: one wave of blocks, or up to four where the last one would be far from full. 256 channels of one
  // part each would leave a third of 396 places empty; three parts are 768 blocks, nearly two full waves.
  int64_t parts(int64_t places) const {
    const int64_t first = std::max<int64_t>(places / tiles, 1);
    const auto use = [&](int64_t parts) {
      const int64_t blocks = tiles * parts, waves = (blocks + places - 1) / places;
      return double(blocks) / double(waves * places);
    };
    int64_t best = first;
    for (int64_t more = first + 1; use(best) < .85 && tiles * more <= 4 * places; ++more) {
      if (use(more) > use(best)) best = more;
    }
    return best;
  }
};

// A reduction in a sweep, and the workspace that it needs.
struct ChannelReduction {
  Sweep sweep;
  int64_t floats, counters;  // the size of the workspace

  ChannelReduction(const Device& device, int64_t channels, int element, std::initializer_list<const Columns*> tensors)
      : sweep(device, channels, element, tensors),
        floats(int64_t(sweep.cut.parts) * 3 * channels),
        counters(sweep.tiles) {}

  // Blocks are not counted where there is only one part.
  void zero(const Run& run, const Workspace& workspace) const {
    if (sweep.cut.parts > 1) run.zero(workspace.tickets, counters);
  }
};

}  // namespace nk
