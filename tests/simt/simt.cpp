// The scheduler of blocks, warps and threads, and what threads do together.
#include "simt.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace nk::simt {

unsigned char* shared;

namespace {

using std::to_string;

constexpr unsigned MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP, ALL_LANES = ~0u;
constexpr size_t LARGEST_SHARED = 232448;  // sm_90; less elsewhere

// One asynchronous copy of a thread, in the group that the thread's next commit closes.
struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
  unsigned bytes, group;
};

// The call that a thread waits in, or none.
struct Wait {
  const char* what = nullptr;
  Where where{};

  bool operator==(const Wait& other) const {  // inlining makes several places of one in the source, hence no addresses
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           (where.file_name() == other.where.file_name() || !std::strcmp(where.file_name(), other.where.file_name()));
  }
  std::string text() const {
    const std::string_view path = where.file_name();
    return std::string(what) + " at " + std::string(path.substr(path.rfind('/') + 1)) + ":" + to_string(where.line());
  }
};

struct Thread {
  explicit Thread(unsigned index) : fiber(index), index(index) {}

  Fiber fiber;
  unsigned index;
  bool returned = false;
  Wait wait;
  std::deque<Copy> copies;  // issued and not done
  unsigned groups = 0;      // committed
};

struct Warp {
  unsigned lanes = 0;     // that exist
  unsigned runnable = 0;  // bits
  unsigned arrived = 0;   // at a collective, count
  Wait wait;              // the wait of the lane that arrived first
  void* operands[WARP];
};

// The block that runs; there is one at a time.
struct Block {
  const char* op = nullptr;
  const std::function<void()>* body = nullptr;
  bool descending = false;
  size_t shared_bytes = 0;
  unsigned threads = 0, returned = 0;
  unsigned runnable = 0;  // warps, bits
  unsigned arrived = 0;   // at the barrier, count
  Wait wait;              // the wait of the thread that arrived first
  Warp warps[MOST_WARPS];
  std::exception_ptr error;
};

Block block;
Thread* running;
std::vector<std::unique_ptr<Thread>> pool;  // threads keep their stacks from block to block

[[noreturn]] void fail(const std::string& message, bool of_a_thread = true) {
  std::string place = std::string(block.op) + ": ";
  if (of_a_thread) {
    place += "block (" + to_string(blockIdx.x) + ", " + to_string(blockIdx.y) + "), thread " +
             to_string(running->index) + ": ";
  }
  throw std::runtime_error(place + message);
}

// --- who runs --------------------------------------------------------------------------------------------------------

void make_runnable(unsigned warp) {
  block.warps[warp].runnable = block.warps[warp].lanes;
  block.runnable |= 1u << warp;
}

void stop_running() {
  Warp& warp = block.warps[running->index / WARP];
  warp.runnable &= ~(1u << running->index % WARP);
  if (!warp.runnable) block.runnable &= ~(1u << running->index / WARP);
}

unsigned first(unsigned bits) {
  return block.descending ? 31 - std::countl_zero(bits) : std::countr_zero(bits);
}

// Returns the first in order of the threads that can go on: nobody else goes on while it can.
Thread* next() {
  if (!block.runnable) return nullptr;
  const unsigned warp = first(block.runnable);
  return pool[warp * WARP + first(block.warps[warp].runnable)].get();
}

void pause() {
  Thread& self = *running;
  self.fiber.suspend();
  self.wait = {};
}

// Comes to a wait of a whole warp or block. Returns whether this thread is the last, which then lets all go on.
bool arrive(Wait own, Wait& first_one, unsigned& arrived, unsigned expected) {
  if (arrived == 0) first_one = own;
  if (!(own == first_one)) fail("waits in " + own.text() + " while others wait in " + first_one.text());
  running->wait = own;
  if (++arrived == expected) {
    arrived = 0;
    return true;
  }
  stop_running();
  return false;
}

// Reports that nobody can go on, although not everybody has returned.
[[noreturn]] void report_deadlock() {
  std::map<std::string, std::pair<unsigned, unsigned>> groups;  // an action -> how many threads, the first of them
  for (unsigned i = 0; i < block.threads; ++i) {
    const Thread& thread = *pool[i];
    const std::string what = thread.returned ? "returned" : "waiting in " + thread.wait.text();
    ++groups.try_emplace(what, 0, i).first->second.first;
  }
  std::string message = "block (" + to_string(blockIdx.x) + ", " + to_string(blockIdx.y) +
                        "): not every thread reached what others wait in:";
  for (const auto& [what, who] : groups) {
    message += (message.back() == ':' ? " " : ", ") + to_string(who.first) + " " + what + " (first: thread " +
               to_string(who.second) + ")";
  }
  fail(message, false);
}

// --- a block ---------------------------------------------------------------------------------------------------------

void run_thread() {
  try {
    (*block.body)();
    if (!running->copies.empty()) {
      fail("returned with " + to_string(running->copies.size()) + " asynchronous copies that it did not wait for");
    }
  } catch (...) {
    block.error = std::current_exception();
  }
  running->returned = true;
  ++block.returned;
  stop_running();
}

// The bottom of every fiber. No objects here: nothing would end their lifetime.
void enter() {
  running->fiber.begun();
  run_thread();
  running->fiber.finish();
}

void run_block() {
  // The memory has exactly the size that was asked for, so that AddressSanitizer sees an access beyond.
  constexpr std::align_val_t alignment{16};
  const auto release = [](unsigned char* memory) { ::operator delete(memory, alignment); };
  const std::unique_ptr<unsigned char, decltype(release)> memory(
      static_cast<unsigned char*>(::operator new(block.shared_bytes, alignment)), release);
  shared = memory.get();
  std::memset(shared, 0xFF, block.shared_bytes);

  block.returned = block.arrived = block.runnable = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& thread = *pool[i];
    thread.returned = false;
    thread.wait = {};
    thread.copies.clear();
    thread.groups = 0;
    thread.fiber.prepare(enter);
    Warp& warp = block.warps[i / WARP];
    if (i % WARP == 0) warp = {};
    warp.lanes |= 1u << i % WARP;
    make_runnable(i / WARP);
  }
  while ((running = next())) {
    threadIdx = {running->index, 0, 0};
    running->fiber.resume();
    if (block.error) std::rethrow_exception(std::exchange(block.error, {}));
  }
  if (block.returned != block.threads) report_deadlock();
}

bool descending(const char* variable) {
  const char* value = std::getenv(variable);
  const std::string_view order = value ? value : "ascending";
  if (order != "ascending" && order != "descending") {
    fail(std::string(variable) + ": expected ascending or descending, got " + std::string(order), false);
  }
  return order == "descending";
}

void check(const Launch& how) {
  const auto [x, y, z] = how.grid;
  if (x - 1 >= 0x7FFFFFFFu || y - 1 >= 65535 || z - 1 >= 65535) {
    fail("expected a grid of 1..2147483647 x 1..65535 x 1..65535 blocks, got " + to_string(x) + " x " + to_string(y) +
             " x " + to_string(z),
         false);
  }
  if (how.threads - 1 >= MOST_THREADS) {
    fail("expected 1 to 1024 threads in a block, got " + to_string(how.threads), false);
  }
  const char* limit = std::getenv("NORMKERNELS_SIMT_SHARED_BYTES");
  const size_t most = limit ? std::strtoull(limit, nullptr, 10) : LARGEST_SHARED;
  if (how.shared_bytes > most) {
    fail("expected at most " + to_string(most) + " bytes of shared memory, got " + to_string(how.shared_bytes), false);
  }
}

}  // namespace

void run(const char* op, const Launch& how, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  block.op = op;
  block.body = &body;
  check(how);
  const char* const wanted = std::getenv("NORMKERNELS_SIMT_RUN");
  if (wanted != nullptr && *wanted == '0') return;
  block.threads = how.threads;
  block.shared_bytes = how.shared_bytes;
  block.descending = descending("NORMKERNELS_SIMT_THREADS");
  const bool last_block_first = descending("NORMKERNELS_SIMT_BLOCKS");
  while (pool.size() < how.threads) pool.push_back(std::make_unique<Thread>(static_cast<unsigned>(pool.size())));
  gridDim = how.grid;
  blockDim = dim3(how.threads);

  const size_t blocks = size_t{how.grid.x} * how.grid.y * how.grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t n = last_block_first ? blocks - 1 - i : i, row = n / how.grid.x;
    blockIdx = {static_cast<unsigned>(n % how.grid.x), static_cast<unsigned>(row % how.grid.y),
                static_cast<unsigned>(row / how.grid.y)};
    run_block();
  }
}

// --- waiting for each other ------------------------------------------------------------------------------------------

void barrier(const Where& where) {
  if (arrive({"__syncthreads", where}, block.wait, block.arrived, block.threads)) {
    for (unsigned warp = 0; warp * WARP < block.threads; ++warp) make_runnable(warp);
  }
  pause();  // the last to come, too: the first in order goes on first
}

void meet(const char* what, void* operands, void (*complete)(void* const*), unsigned mask, const Where& where) {
  const Wait own{what, where};
  if (mask != ALL_LANES) fail(own.text() + ": expected the mask of all 32 lanes, got " + to_string(mask));
  Warp& warp = block.warps[running->index / WARP];
  warp.operands[running->index % WARP] = operands;
  if (arrive(own, warp.wait, warp.arrived, WARP)) {
    complete(warp.operands);
    make_runnable(running->index / WARP);
  }
  pause();
}

unsigned lane() {
  return running->index % WARP;
}

void shuffle(void* const* shuffles) {
  const auto at = [&](unsigned lane) { return static_cast<Shuffle*>(shuffles[lane]); };
  uint32_t bits[WARP];
  for (unsigned i = 0; i < WARP; ++i) bits[i] = at(i)->bits;
  for (unsigned i = 0; i < WARP; ++i) at(i)->bits = bits[at(i)->source];
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

void copy(void* to, const void* from, unsigned bytes, bool real, const Where& where) {
  const auto refuse = [&](const std::string& reason) { fail(Wait{"copy_async", where}.text() + ": " + reason); };
  const auto beyond = [&](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes; };
  for (const auto& [name, address] : {std::pair{"shared", static_cast<const void*>(to)}, {"global", from}}) {
    if (beyond(address)) {
      refuse(std::string("expected a ") + name + " address aligned to " + to_string(bytes) + " bytes, got one " +
             to_string(beyond(address)) + " beyond");
    }
  }
  auto* const destination = static_cast<unsigned char*>(to);
  if (destination < shared || destination + bytes > shared + block.shared_bytes) {
    refuse("expected " + to_string(bytes) + " bytes within the " + to_string(block.shared_bytes) +
           " of shared memory, got offset " + to_string(destination - shared));
  }
  std::memset(to, 0xFF, bytes);
  const auto* const source = real ? static_cast<const unsigned char*>(from) : nullptr;
  running->copies.push_back({destination, source, bytes, running->groups});
}

void commit() {
  ++running->groups;
}

void wait(unsigned pending) {
  std::deque<Copy>& copies = running->copies;
  for (; !copies.empty() && copies.front().group + pending < running->groups; copies.pop_front()) {
    const Copy& one = copies.front();
    if (one.from) {
      std::memcpy(one.to, one.from, one.bytes);
    } else {
      std::memset(one.to, 0, one.bytes);
    }
  }
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

namespace {

constexpr unsigned M = 16, N = 8;

// Tensor cores cut a sum off where they add to c; overflow is infinity all the same.
float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (std::isinf(nearest) || !(std::abs(static_cast<double>(nearest)) > std::abs(value))) return nearest;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1);
}

// c += a b; float64 holds the products of such short operands exactly.
template <unsigned K>
void multiply(void* const* products, const double (&a)[M][K], const double (&b)[K][N]) {
  for (unsigned i = 0; i < M; ++i) {
    double sums[N] = {};
    for (unsigned k = 0; k < K; ++k) {
      for (unsigned j = 0; j < N; ++j) sums[j] += a[i][k] * b[k][j];
    }
    for (unsigned j = 0; j < N; ++j) {
      float& c = static_cast<Product*>(products[i % 8 * 4 + j / 2])->c[i / 8 * 2 + j % 2];
      c = toward_zero(sums[j] + c);
    }
  }
}

// Sign, 8 bits of exponent and 10 of mantissa: the hardware does not look at the other 13.
double tf32(uint32_t bits) {
  return std::bit_cast<float>(bits & 0xFFFFE000u);
}

double bf16(uint32_t bits, unsigned half) {
  return std::bit_cast<float>(half ? bits & 0xFFFF0000u : bits << 16);
}

}  // namespace

void multiply_tf32(void* const* products) {
  double a[M][8], b[8][N];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const unsigned row = lane / 4, column = lane % 4;
    const auto& own = *static_cast<const Product*>(products[lane]);
    for (unsigned i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 4] = tf32(own.a[i]);
    for (unsigned i = 0; i < 2; ++i) b[column + i * 4][row] = tf32(own.b[i]);
  }
  multiply(products, a, b);
}

void multiply_bf16(void* const* products) {
  double a[M][16], b[16][N];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const unsigned row = lane / 4, column = lane % 4;
    const auto& own = *static_cast<const Product*>(products[lane]);
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned i = 0; i < 4; ++i) a[row + i % 2 * 8][2 * column + i / 2 * 8 + half] = bf16(own.a[i], half);
      for (unsigned i = 0; i < 2; ++i) b[2 * column + i * 8 + half][row] = bf16(own.b[i], half);
    }
  }
  multiply(products, a, b);
}

}  // namespace nk::simt

// --- CUDA's functions ------------------------------------------------------------------------------------------------

double sinpi(double x) {
  const double part = std::remainder(x, 2.0);  // -1..1, exactly
  return part == 0 || std::abs(part) == 1 ? 0 : std::sin(M_PI * part);
}

double cospi(double x) {
  const double part = std::abs(std::remainder(x, 2.0));
  return part == 0.5 ? 0 : std::cos(M_PI * part);
}
