// The emulator's memory: shared memory with its poison and guards, and asynchronous copies.
#include "machine.h"

// Set by shared_section.ld; null in a program without __shared__ variables.
extern "C" __attribute__((weak)) unsigned char fq_shared_begin[];
extern "C" __attribute__((weak)) unsigned char fq_shared_end[];

namespace fq::emulated {
namespace {

constexpr size_t kGuard = 1024;  // bytes on either side of dynamic shared memory

size_t section_bytes() { return static_cast<size_t>(fq_shared_end - fq_shared_begin); }

// Volatile and unchecked, because with AddressSanitizer there are red zones in the section.
__attribute__((no_sanitize_address)) void copy_unchecked(unsigned char* to,
                                                         const unsigned char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) const_cast<volatile unsigned char*>(to)[i] = from[i];
}

unsigned char poison_at(size_t offset) {
  return static_cast<unsigned char>(kPoison >> offset % 4 * 8);
}

__attribute__((no_sanitize_address)) void poison(unsigned char* data, size_t bytes) {
  const auto words = reinterpret_cast<volatile uint32_t*>(data);
  for (size_t i = 0; i < bytes / 4; ++i) words[i] = kPoison;
  for (size_t i = bytes / 4 * 4; i < bytes; ++i)
    const_cast<volatile unsigned char*>(data)[i] = poison_at(i);
}

// Of dynamic shared memory and its guards.
size_t bytes_of_block() {
  return (kGuard + machine().launch.shared_bytes + kGuard + 127) / 128 * 128;
}

bool inside(const void* p, size_t bytes, const unsigned char* begin, size_t size) {
  const auto at = static_cast<const unsigned char*>(p);
  return at >= begin && at + bytes <= begin + size;
}

void land(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.valid_bytes);
  std::memset(static_cast<unsigned char*>(copy.shared) + copy.valid_bytes, 0,
              copy.bytes - copy.valid_bytes);
}

}  // namespace

void poison_shared() {
  Machine& m = machine();
  release_shared();
  m.dynamic.resize(bytes_of_block() * m.blocks.size() + 128);
  unsigned char* at = m.dynamic.data();
  at += -reinterpret_cast<uintptr_t>(at) & 127;
  for (Block& block : m.blocks) {
    poison(at, bytes_of_block());
    block.dynamic = at + kGuard;
    forbid_access(at, kGuard);
    forbid_access(block.dynamic + m.launch.shared_bytes,
                  bytes_of_block() - kGuard - m.launch.shared_bytes);
    at += bytes_of_block();
  }
  poison(fq_shared_begin, section_bytes());
  m.in_section = 0;
  if (m.blocks.size() == 1) return;
  for (Block& block : m.blocks) {
    block.statics.resize(section_bytes());
    poison(block.statics.data(), section_bytes());
  }
}

void release_shared() { allow_access(machine().dynamic.data(), machine().dynamic.size()); }

__attribute__((no_sanitize_address)) void check_guards() {
  Machine& m = machine();
  const size_t bytes = m.launch.shared_bytes;
  for (const Block& block : m.blocks)
    for (size_t i = 0; i < kGuard; ++i) {
      if (block.dynamic[i - kGuard] != poison_at(i))
        fail("dynamic shared memory was written %zu bytes before its begin", kGuard - i);
      if (block.dynamic[bytes + i] != poison_at(bytes + i))
        fail("dynamic shared memory was written %zu bytes behind its end", i);
    }
}

void enter_block(int block) {
  Machine& m = machine();
  if (m.in_section == block) return;
  copy_unchecked(m.blocks[m.in_section].statics.data(), fq_shared_begin, section_bytes());
  copy_unchecked(fq_shared_begin, m.blocks[block].statics.data(), section_bytes());
  m.in_section = block;
}

// ---- what kernels ask for -----------------------------------------------------------------------

unsigned char* dynamic_shared() {
  Machine& m = machine();
  return m.blocks[m.current->block].dynamic;
}

void check_shared(const char* operation, const void* p, size_t bytes, size_t alignment) {
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0)
    fail("%s at the misaligned address %p: it must be a multiple of %zu", operation, p, alignment);
  const Block& block = m.blocks[m.current->block];
  if (!inside(p, bytes, block.dynamic, m.launch.shared_bytes) &&
      !inside(p, bytes, fq_shared_begin, section_bytes()))
    fail(
        "%s of %zu bytes at %p, which is not shared memory of the block (its dynamic shared "
        "memory begins at %p and has %zu bytes)",
        operation, bytes, p, static_cast<void*>(block.dynamic), m.launch.shared_bytes);
}

unsigned char* in_block_of_cluster(const void* own_shared, size_t bytes, uint32_t rank) {
  Machine& m = machine();
  check_shared("a cluster's access", own_shared, bytes, bytes);
  if (rank >= m.blocks.size()) fail("a cluster's access to block %u of %zu", rank, m.blocks.size());
  if (m.blocks[rank].ended > 0) fail("a cluster's access to block %u, which has ended", rank);
  if (m.cluster_phase == 0)
    fail("a cluster's access before any cluster barrier: block %u may not have begun", rank);
  const Block& own = m.blocks[m.current->block];
  const auto at = static_cast<const unsigned char*>(own_shared);
  if (inside(at, bytes, own.dynamic, m.launch.shared_bytes))
    return m.blocks[rank].dynamic + (at - own.dynamic);
  unsigned char* const statics =
      static_cast<int>(rank) == m.current->block ? fq_shared_begin : m.blocks[rank].statics.data();
  return statics + (at - fq_shared_begin);
}

uint32_t cluster_rank() { return static_cast<uint32_t>(machine().current->block); }
uint32_t cluster_size() { return static_cast<uint32_t>(machine().blocks.size()); }

// The bytes land when the thread waits; what is under them is no longer there from now on.
void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  check_shared("copy_async", shared, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("copy_async of %d bytes from the misaligned address %p", bytes, global);
  if (valid_bytes < 0 || valid_bytes > bytes)
    fail("copy_async of %d bytes has %d valid ones", bytes, valid_bytes);
  for (int i = 0; i < bytes; i += 4)
    std::memcpy(static_cast<unsigned char*>(shared) + i, &kPoison, 4);
  machine().current->copies.push_back({shared, global, bytes, valid_bytes});
}

void copy_async_commit() {
  Thread& me = *machine().current;
  me.group_ends.push_back(me.copies.size());
}

void copy_async_wait(int pending) {
  Thread& me = *machine().current;
  if (me.group_ends.size() <= static_cast<size_t>(pending)) return;
  const size_t groups = me.group_ends.size() - pending, done = me.group_ends[groups - 1];
  for (size_t i = 0; i < done; ++i) land(me.copies[i]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + done);
  me.group_ends.erase(me.group_ends.begin(), me.group_ends.begin() + groups);
  for (size_t& end : me.group_ends) end -= done;
}

}  // namespace fq::emulated
