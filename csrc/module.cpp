// The Python module normkernels._C: what was compiled, and what it would launch. It has no tensors; importing it
// registers the ops, which are in ops/ and part of the same library.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "common/plans.h"

namespace py = pybind11;

namespace {

std::string dotted(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

// "sm_80" for machine code, "compute_80" for PTX, as nvcc calls them.
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (int number : nk::compiled_architectures()) names.push_back("sm_" + std::to_string(number));
  if (nk::compiled_ptx() != 0) names.push_back("compute_" + std::to_string(nk::compiled_ptx()));
  return names;
}

py::dict build() {
  py::dict record;
  record["torch"] = TORCH_VERSION;
  record["target"] = dotted(TORCH_TARGET_VERSION >> 56 & 255, TORCH_TARGET_VERSION >> 48 & 255);
  record["cuda"] = dotted(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  record["architectures"] = architectures();
#ifdef __clang__
  record["compiler"] = __VERSION__;
#else
  record["compiler"] = "GCC " __VERSION__;
#endif
  return record;
}

py::list recorded() {
  py::list launches;
  for (const auto& plan : nk::recorded()) {
    py::dict launch;
    launch["kernel"] = plan.kernel;
    launch["grid"] = py::make_tuple(plan.grid[0], plan.grid[1], plan.grid[2]);
    launch["threads"] = plan.threads;
    launch["shared_bytes"] = plan.shared_bytes;
    launch["read_bytes"] = plan.read_bytes;
    launch["written_bytes"] = plan.written_bytes;
    launches.append(launch);
  }
  return launches;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled CUDA kernels of normkernels: what was built, and what it would launch.";
  m.attr("build") = build();
  m.def("architectures", &architectures, "Return them as nvcc calls them: sm_80 for machine code, compute_80 for PTX.");
  m.def("compiled_for", &nk::compiled_for, py::arg("architecture"),
        "Return whether there is code for GPUs of this architecture: 90 for sm_90.");
  m.def("refusal", &nk::refusal, py::arg("op"), py::arg("dtype"), py::arg("group_size"), py::arg("plane"),
        py::arg("architecture"),
        R"(Return why the kernels do not serve a call, "" if they do.

group_size 0 and plane [] are unknown, and left out of the answer. architecture: 90 for sm_90.)");
  m.def(
      "record",
      [](int architecture, int processors, int shared_bytes) { nk::record({architecture, processors, shared_bytes}); },
      py::arg("architecture"), py::arg("processors"), py::arg("shared_bytes"),
      R"(Record the launches of this thread's calls of torch.ops.normkernels_launches, which take tensors on the device meta.

They are those on a GPU of this architecture (90 for sm_90), with so many multiprocessors and bytes of shared memory for
a block.)");
  m.def("recorded", &recorded,
        "End the recording and return its launches: kernel, grid, threads, and bytes of shared memory and to move.");
}
