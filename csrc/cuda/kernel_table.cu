#include <sstream>
#include <string>

#include "kernel_table.cuh"

namespace fcos_ext {

std::vector<KernelEntry>& kernel_table() {
  static std::vector<KernelEntry> table;
  return table;
}

}  // namespace fcos_ext

#ifndef FCOS_SIMT
// Called by fcos_ext._host.cuda_kernels. The text stays valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* fcos_ext_describe_kernels() {
  static std::string text;
  std::ostringstream json;
  json << "[";
  const char* separator = "";
  for (const auto& entry : fcos_ext::kernel_table()) {
    cudaFuncAttributes attributes{};
    int blocks = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, entry.function);
    if (error == cudaSuccess)
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry.function, entry.threads, 0);
    json << separator << "{\"kernel\": \"" << entry.name << "\", \"threads\": " << entry.threads;
    if (error != cudaSuccess) {
      cudaGetLastError();  // asked for, not left behind for the next caller
      json << ", \"error\": \"" << cudaGetErrorString(error) << "\"}";
    } else {
      json << ", \"registers\": " << attributes.numRegs
           << ", \"shared_bytes\": " << attributes.sharedSizeBytes
           << ", \"local_bytes\": " << attributes.localSizeBytes
           << ", \"blocks_per_sm\": " << blocks << "}";
    }
    separator = ", ";
  }
  json << "]";
  text = json.str();
  return text.c_str();
}
#endif
