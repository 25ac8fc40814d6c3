// The GPU that planners and launches see: a row of the table in csrc/cuda/gpu.h, chosen by name.
// "A100-80G/2" is one with two multiprocessors: a few tokens get the plans of thousands there.
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda/gpu.h"

namespace fq::cuda {
namespace {

Gpu chosen = kGpus[0];

}  // namespace

const Gpu& current_gpu() { return chosen; }

}  // namespace fq::cuda

// For tests, by ctypes. Returns 0 for an unknown name.
extern "C" __attribute__((visibility("default"))) int flatquant_emulated_gpu(const char* name) {
  const char* const slash = std::strchr(name, '/');
  const size_t length = slash ? static_cast<size_t>(slash - name) : std::strlen(name);
  for (const fq::cuda::Gpu& gpu : fq::cuda::kGpus)
    if (std::strlen(gpu.name) == length && std::strncmp(gpu.name, name, length) == 0) {
      fq::cuda::chosen = gpu;
      if (slash) fq::cuda::chosen.sms = std::atoi(slash + 1);
      return 1;
    }
  return 0;
}
