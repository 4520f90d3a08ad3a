// fcos_ext._host: what is not an operator. Depends on neither torch nor CUDA, so that it can be
// asked what was built even where the other libraries do not load.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/simd.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The figures of every kernel of the CUDA library on the present device, as JSON: see
// cuda/kernel_table.cuh. `path` is the loaded _C_cuda.
std::string cuda_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  using Describe = const char* (*)();
  auto describe = reinterpret_cast<Describe>(dlsym(library, "fcos_ext_describe_kernels"));
  if (!describe) throw std::runtime_error(path + " has no kernel table");
  return describe();
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What was compiled, and what of it this machine uses.";
  m.attr("compiler") = compiler();
  m.def(
      "cpu_isa", [] { return fcos_ext::isa_name(fcos_ext::cpu_isa()); },
      "Instruction set that the CPU kernels run with: baseline, avx2 or avx512.");
  m.def("cuda_kernels", &cuda_kernels, pybind11::arg("path"),
        "JSON list with registers, shared memory and occupancy of each kernel on this GPU.");
}
