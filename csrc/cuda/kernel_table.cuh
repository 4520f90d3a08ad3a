// Names the kernels, so that `fcos env` and the tests can ask the driver what became of them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

namespace fcos_ext {

struct KernelEntry {
  const char* name;
  const void* function;
  int threads;  // of a block
};

std::vector<KernelEntry>& kernel_table();

struct ListKernel {
  template <typename... Params>
  ListKernel(const char* name, void (*kernel)(Params...), int threads) {
    kernel_table().push_back({name, reinterpret_cast<const void*>(kernel), threads});
  }
};

}  // namespace fcos_ext
