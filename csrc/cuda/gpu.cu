// current_gpu: the attributes of the devices at hand. No kernel.
#include "gpu.h"

#include <cuda_runtime.h>

namespace fq::cuda {
namespace {

constexpr int kMostDevices = 64;
constexpr Gpu kNone = {"none", 0, 0, 0, 0, 0, 0, 0};

int32_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

Gpu ask(int device) {
  const int32_t major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int32_t minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
#ifdef FQ_TEST_S4_EVERYWHERE
  const int32_t arch = 80;  // the plans of sm_80, so that its kernels are what runs
  static_cast<void>(major), static_cast<void>(minor);
#else
  const int32_t arch = 10 * major + minor;
#endif
  // Two transfers per clock (kHz) of the whole bus (bits), on every memory in use.
  const int64_t bits = attribute(cudaDevAttrGlobalMemoryBusWidth, device);
  const int64_t bytes_per_ms = 2 * attribute(cudaDevAttrMemoryClockRate, device) * (bits / 8);
  return {"current",
          arch,
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrMaxRegistersPerMultiprocessor, device),
          attribute(cudaDevAttrL2CacheSize, device),
          static_cast<int32_t>(bytes_per_ms / 1000000)};
}

// All devices at once: asking for attributes creates no context, and a table that is never written
// again needs no lock.
struct Devices {
  Gpu gpus[kMostDevices];
  int count;

  Devices() noexcept : count(0) {
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    if (count > kMostDevices) count = kMostDevices;
    for (int device = 0; device < count; ++device) gpus[device] = ask(device);
    static_cast<void>(cudaGetLastError());  // a failure here is told by arch 0, not by the next op
  }
};

}  // namespace

const Gpu& current_gpu() {
  static const Devices devices;
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return kNone;
  }
  return device >= 0 && device < devices.count ? devices.gpus[device] : kNone;
}

}  // namespace fq::cuda
