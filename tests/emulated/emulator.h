// CUDA on the host, for tests: enough of it to run the kernels of csrc/cuda unchanged, with no CUDA
// header and no device. A kernel file includes this through launch.cuh when FQ_EMULATED is defined.
//
// Every CUDA thread is a fiber (fiber.h, scheduler.cpp). One runs at a time, until it waits for
// others: for its warp (shuffles, votes, __syncwarp, ldmatrix, mma), its block (__syncthreads) or
// its cluster. FQ_EMULATED_ORDER chooses who goes on: "forward" and "reverse" run a warp as far as
// it gets before the next one, first or last to be first; "shuffled" or "shuffled:SEED" jumps
// between warps and lanes at every wait. A missing barrier gives a wrong result in at least one of
// them.
//
// Blocks run one after the other, those of a cluster together. All shared memory is poisoned before
// every block: 0x7fff7fff is a NaN as float32, bfloat16 and float16, and large as an integer.
//
// What a GPU would answer with a hang, garbage or a fault throws std::runtime_error out of the
// launch: a barrier that not all threads reach, or that they reach at different lines; lanes of a
// warp in different operations; misaligned vector, copy or ldmatrix addresses; writes just outside
// of dynamic shared memory; copies nobody waited for; launches that the chosen GPU has no room for.
// With AddressSanitizer, accesses outside of shared arrays and tensors are found at once.
//
// Not modelled: time, caches, the memory order between threads without barriers, bank conflicts,
// registers, __launch_bounds__, and that static shared memory counts towards a launch's limit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulated_types.h"

// ---- the language ------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// `noinit` gathers them in a linker section (shared_section.ld), which the emulator poisons.
#define __shared__ static __attribute__((noinit))

constexpr int warpSize = 32;

// Of the thread that runs; set at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fq::emulated {

constexpr int kLanes = 32;
constexpr uint32_t kPoison = 0x7fff7fffu;

// Where in the kernel's source a thread waits.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Ends the launch with an exception.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- waiting for others ------------------------------------------------------------------------

void sync_block(Site site);
void cluster_arrive();
void cluster_wait(Site site);

// What the lanes of a warp lay down for each other in one operation.
struct Meeting {
  alignas(16) unsigned char brought[kLanes][64];
  alignas(16) unsigned char taken[kLanes][64];
};

int lane();
Meeting& join_meeting(const char* operation, Site site);
bool last_to_come();
void end_meeting();       // the last one, when `taken` is filled
void wait_for_meeting();  // the others

// All lanes bring something, the last to come combines it, and each takes its own part.
template <class Brought, class Taken, class Combine>
Taken meet(const char* operation, Site site, const Brought& mine, Combine combine) {
  static_assert(sizeof(Brought) <= 64 && sizeof(Taken) <= 64, "a meeting has no room for that");
  Meeting& meeting = join_meeting(operation, site);
  const int me = lane();
  std::memcpy(meeting.brought[me], &mine, sizeof mine);
  if (last_to_come()) {
    Brought brought[kLanes];
    Taken taken[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&brought[i], meeting.brought[i], sizeof(Brought));
    combine(brought, taken);
    for (int i = 0; i < kLanes; ++i) std::memcpy(meeting.taken[i], &taken[i], sizeof(Taken));
    end_meeting();
  } else {
    wait_for_meeting();
  }
  Taken taken;
  std::memcpy(&taken, meeting.taken[me], sizeof taken);
  return taken;
}

// ---- memory ------------------------------------------------------------------------------------

unsigned char* dynamic_shared();
// Fails unless [p, p + bytes) is shared memory of this block and aligned.
void check_shared(const char* operation, const void* p, size_t bytes, size_t alignment);
// The same place in the shared memory of another block of the cluster.
unsigned char* in_block_of_cluster(const void* own_shared, size_t bytes, uint32_t rank);
uint32_t cluster_rank();
uint32_t cluster_size();

void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// ---- launches ----------------------------------------------------------------------------------

struct Launch {
  const char* kernel;
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
};

int allow_shared(const void* kernel, int bytes);
void run(Launch launch, const void* kernel, void (*body)(const void*), const void* closure);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            unsigned cluster, size_t shared_bytes, void* /*stream*/, Arguments... arguments) {
  const auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  using Thread = decltype(thread);
  run(
      {name, grid, block, cluster, shared_bytes}, reinterpret_cast<const void*>(kernel),
      [](const void* closure) {
        (*static_cast<const std::remove_reference_t<Thread>*>(closure))();
      },
      &thread);
}

}  // namespace fq::emulated

#define FQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::fq::emulated::launch(#kernel, kernel, grid, block, 1, shared_bytes, stream, __VA_ARGS__)
#define FQ_LAUNCH_CLUSTER(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::fq::emulated::launch(#kernel, kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__)
#define FQ_LAUNCH_EARLY(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::fq::emulated::launch(#kernel, kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__)
#define FQ_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::fq::emulated::dynamic_shared())

namespace fq::cuda {

template <class... Parameters>
int allow_shared(void (*kernel)(Parameters...), int bytes) {
  return emulated::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

}  // namespace fq::cuda

#include "emulated_intrinsics.h"
