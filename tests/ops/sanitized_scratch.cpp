// Takes the place of csrc/cpu/scratch.cpp under the sanitizers: each call gets memory of its own
// that ends at the byte that was asked for, and takes back the memory of the call before.
#include "scratch.h"

#include <cstdlib>

namespace fq::cpu {
namespace {

struct Buffer {
  void* data = nullptr;

  ~Buffer() { std::free(data); }
};

thread_local Buffer buffer;

}  // namespace

void* scratch(int64_t bytes) {
  std::free(buffer.data);
  if (posix_memalign(&buffer.data, 64, static_cast<std::size_t>(bytes)) != 0) std::abort();
  return buffer.data;
}

}  // namespace fq::cpu
