// Memory between pages that nobody may touch: a library to preload. A tensor of torch then ends (or
// begins) at the last (first) byte of a page, so that any instruction that reads or writes one byte
// beyond it ends the process; what a sanitizer sees in code that it has compiled is seen here in
// the library that is installed, whatever it was written in. Freed memory is never used again.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" void* __libc_memalign(std::size_t alignment, std::size_t bytes);
extern "C" void __libc_free(void* data);

namespace {

constexpr std::size_t kPage = 4096, kArena = std::size_t{1} << 37;  // of addresses, not of memory
constexpr std::size_t kTorch = 64;                                  // the alignment it asks for

enum Mode : int { kOff, kEnd, kBegin };

std::atomic<int> mode{kOff};
std::atomic<std::size_t> used{0};

std::uint8_t* arena() {
  static std::uint8_t* const found = static_cast<std::uint8_t*>(
      mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return found;
}

// A block is its pages, the first of which holds its number of pages in front of a guard:
//   [count] [no access] [data ...] [no access]
void* guarded(std::size_t bytes) {
  bytes = bytes > 0 ? bytes : 1;
  const std::size_t pages = (bytes + kPage - 1) / kPage, all = (pages + 3) * kPage;
  const std::size_t offset = used.fetch_add(all);
  if (arena() == MAP_FAILED || offset + all > kArena) return nullptr;
  std::uint8_t* const first = arena() + offset;
  std::uint8_t* const data = first + 2 * kPage;
  if (mprotect(first, kPage, PROT_READ | PROT_WRITE) != 0 ||
      mprotect(data, pages * kPage, PROT_READ | PROT_WRITE) != 0)
    return nullptr;
  *reinterpret_cast<std::size_t*>(first) = pages;
  return mode == kEnd ? data + pages * kPage - bytes : data;
}

}  // namespace

extern "C" {

void guarded_pages(int new_mode) { mode = new_mode; }

std::size_t guarded_blocks_bytes() { return used; }

int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  void* const data =
      mode != kOff && alignment == kTorch ? guarded(bytes) : __libc_memalign(alignment, bytes);
  if (data == nullptr) return ENOMEM;
  *out = data;
  return 0;
}

// Of C++: of whole units, so that the alignment is kept.
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  if (mode == kOff || alignment != kTorch || bytes % alignment != 0)
    return __libc_memalign(alignment, bytes);
  return guarded(bytes);
}

void free(void* data) {
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = used == 0 ? 0 : reinterpret_cast<std::uintptr_t>(arena());
  if (begin == 0 || at < begin || at >= begin + kArena) return __libc_free(data);
  std::uint8_t* const first = reinterpret_cast<std::uint8_t*>(at / kPage * kPage) - 2 * kPage;
  const std::size_t bytes = (*reinterpret_cast<std::size_t*>(first) + 2) * kPage;
  mmap(first, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

}  // extern "C"
