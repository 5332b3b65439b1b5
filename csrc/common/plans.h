// The GPUs that the extension was compiled for, its launches, and the calls that it leaves to the next backend. There
// are no tensors, no torch, no CUDA here: module.cpp shows this to Python, the launchers ask it, and tests ask it
// without a GPU.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace nk {

// A GPU, as plans see it: compute capability, 90 for sm_90; multiprocessors; the most dynamic shared memory of a block.
struct Device {
  int architecture = 0;
  int processors = 0;
  int shared_bytes = 0;
};

// One launch: the grid and the threads of a block, its dynamic shared memory, and the bytes that it has to move.
struct KernelPlan {
  std::string kernel;
  std::array<int64_t, 3> grid;
  int64_t threads, shared_bytes, read_bytes, written_bytes;
};

// A recording tells what an op would launch on a device. The op runs on tensors of torch's device "meta", which have no
// memory, and its launches are written down. A recording belongs to a thread.
struct Recording {
  Device device;
  std::vector<KernelPlan> launches;
};
void record(const Device& device);
std::vector<KernelPlan> recorded();  // ends the recording
Recording* recording();              // nullptr where there is none

// The limits of an op's kernels, beside what is the same for all ops. They stand where the op is registered.
struct Limits {
  bool half_types = true;
  int64_t smallest_group = 1, largest_group = 128;  // channels whitened together
  int64_t largest_plane = 0;                        // positions along a side, of ops with a plane
};

// The ops with kernels, by name.
std::map<std::string, Limits>& limits_of_ops();

// Returns why the kernels do not serve a call, "" if they do. group_size 0 and plane {} are left out of the answer.
std::string refusal(const std::string& op, const std::string& dtype, int64_t group_size,
                    const std::vector<int64_t>& plane, int architecture);

// Returns whether there is code for GPUs of this architecture.
bool compiled_for(int architecture);

// The architectures with machine code, ascending: 80, 86... It runs on GPUs of the same major version from the minor
// on.
std::vector<int> compiled_architectures();

// The architecture whose PTX is there for the driver to compile, on this one and all later ones; 0 if there is none.
int compiled_ptx();

}  // namespace nk
