// See scratch.h.
#include "scratch.h"

#include <cstddef>
#include <new>

namespace fq::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;

  ~Buffer() { ::operator delete(data, kAlignment); }
};

thread_local Buffer buffer;

}  // namespace

void* scratch(int64_t bytes) {
  if (buffer.bytes < bytes) {
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    void* const larger = ::operator new(static_cast<std::size_t>(rounded), kAlignment);
    ::operator delete(buffer.data, kAlignment);
    buffer.data = larger;
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace fq::cpu
