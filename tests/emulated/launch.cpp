// Launches, what the chosen GPU has no room for, and the switches that tests turn.
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "../../csrc/cuda/gpu.h"
#include "machine.h"

namespace fq::emulated {
namespace {

constexpr int kFreeShared = 48 * 1024;  // bytes of dynamic shared memory no kernel has to ask for
constexpr unsigned kMostBlocksYZ = 65535;

// What the CUDA runtime answers to such a launch.
cudaError_t check(const Launch& launch, const void* kernel) {
  Machine& m = machine();
  const cuda::Gpu& gpu = cuda::current_gpu();
  const dim3 g = launch.grid, b = launch.block;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  if (g.x == 0 || g.y == 0 || g.z == 0 || threads == 0 || threads > kMostThreads ||
      g.x > INT32_MAX || g.y > kMostBlocksYZ || g.z > kMostBlocksYZ)
    return cudaErrorInvalidConfiguration;
  const auto allowed = m.allowed_shared.find(kernel);
  const int most = allowed == m.allowed_shared.end() ? kFreeShared : allowed->second;
  if (launch.shared_bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  if (launch.cluster == 1) return cudaSuccess;
  if (gpu.arch < 90) return cudaErrorNotSupported;
  return launch.cluster == 0 || launch.cluster > kMostBlocks || g.x % launch.cluster != 0
             ? cudaErrorInvalidConfiguration
             : cudaSuccess;
}

bool set_order(const std::string& name) {
  Machine& m = machine();
  if (name == "forward") {
    m.order = Order::kForward;
  } else if (name == "reverse") {
    m.order = Order::kReverse;
  } else if (name.rfind("shuffled", 0) == 0) {
    m.order = Order::kShuffled;
    const uint64_t seed = name.size() > 9 ? std::strtoull(name.c_str() + 9, nullptr, 10) : 1;
    m.random = 0x9e3779b97f4a7c15u * (seed + 1);
  } else {
    return false;
  }
  return true;
}

void read_order_from_environment() {
  static bool done = false;
  if (std::exchange(done, true)) return;
  const char* const name = std::getenv("FQ_EMULATED_ORDER");
  if (name && !set_order(name))
    fail("FQ_EMULATED_ORDER is %s: it must be forward, reverse, shuffled or shuffled:SEED", name);
}

}  // namespace

void run(Launch launch, const void* kernel, void (*body)(const void*), const void* closure) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  read_order_from_environment();
  Machine& m = machine();
  if (m.most_blocks > 0 && launch.grid.x > m.most_blocks) launch.grid.x = m.most_blocks;
  const dim3 g = launch.grid, b = launch.block;
  char text[256];
  std::snprintf(text, sizeof text, "%s grid=%u,%u,%u block=%u cluster=%u shared=%zu\n",
                launch.kernel, g.x, g.y, g.z, b.x * b.y * b.z, launch.cluster, launch.shared_bytes);
  m.launches += text;
  if (const cudaError_t error = check(launch, kernel); error != cudaSuccess) {
    m.error = error;
    return;
  }
  m.launch = launch;
  m.body = body;
  m.closure = closure;
  gridDim = g;
  blockDim = b;
  try {
    make_threads();
    const uint64_t clusters = uint64_t{g.x} * g.y * g.z / launch.cluster;
    const uint64_t start = m.order == Order::kShuffled ? random_below(unsigned(clusters)) : 0;
    for (uint64_t i = 0; i < clusters; ++i)
      run_cluster((m.order == Order::kReverse ? clusters - 1 - i : (start + i) % clusters) *
                  launch.cluster);
    release_shared();
  } catch (...) {  // threads are stuck in the middle of the kernel: begin them anew
    reset_threads();
    release_shared();
    throw;
  }
}

int allow_shared(const void* kernel, int bytes) {
  if (bytes > cuda::current_gpu().shared_per_block) return cudaErrorInvalidValue;
  machine().allowed_shared[kernel] = bytes > kFreeShared ? bytes : kFreeShared;
  return cudaSuccess;
}

}  // namespace fq::emulated

cudaError_t cudaGetLastError() { return std::exchange(fq::emulated::machine().error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return fq::emulated::machine().error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "another error";
  }
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// For tests, by ctypes.
extern "C" {

// Returns 0 for an unknown name.
__attribute__((visibility("default"))) int flatquant_emulated_order(const char* name) {
  fq::emulated::read_order_from_environment();
  return fq::emulated::set_order(name);
}

// Launches no more blocks than that, for kernels that take any number of them; 0: what they ask
// for.
__attribute__((visibility("default"))) void flatquant_emulated_most_blocks(unsigned blocks) {
  fq::emulated::machine().most_blocks = blocks;
}

// One line per launch since the last call.
__attribute__((visibility("default"))) const char* flatquant_emulated_launches() {
  static std::string text;
  text = std::exchange(fq::emulated::machine().launches, {});
  return text.c_str();
}
}
