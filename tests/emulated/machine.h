// The state of the emulator, for its own files (scheduler.cpp, shared_memory.cpp, launch.cpp). See
// emulator.h.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace fq::emulated {

constexpr int kMostThreads = 1024;  // of a block
constexpr int kMostBlocks = 8;      // of a cluster

enum class State { kReady, kInMeeting, kAtBlockBarrier, kAtClusterBarrier, kEnded };
enum class Order { kForward, kReverse, kShuffled };

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid_bytes;
};

struct Thread {
  Fiber fiber;
  State state = State::kEnded;
  Site site{};           // where it waits
  unsigned meeting = 0;  // which of the warp's two it joined last
  int arrival = -1;      // the cluster barrier's phase in which it arrived; -1: not, or has waited
  int block = 0, warp = 0, lane = 0;
  uint3 index{};
  std::vector<Copy> copies;        // under way, in order
  std::vector<size_t> group_ends;  // how many of them were there at every commit
};

// Two meetings: while slow lanes take from one, fast ones may bring to the next.
struct Warp {
  Meeting meetings[2];
  const char* operation = nullptr;
  Site site{};
  int come = 0, ready = 0;
};

struct Block {
  uint3 index{};
  unsigned char* dynamic = nullptr;
  std::vector<unsigned char> statics;  // of a cluster's block that does not run
  int waiting = 0, ended = 0;
  Site site{};  // of the barrier that threads wait at
};

struct Machine {
  // As many as there can be in a cluster: fibers refer to them, so they must not move.
  std::vector<Thread> threads = std::vector<Thread>(kMostThreads * kMostBlocks);
  std::vector<Warp> warps;  // of the cluster that runs
  std::vector<Block> blocks;
  Thread* current = nullptr;  // null: the scheduler runs
  std::string failure;        // of the current thread

  Launch launch{};
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  int threads_per_block = 0, live = 0;
  int cluster_arrivals = 0, cluster_phase = 0;

  std::vector<unsigned char> dynamic;         // shared memory and its guards, of all blocks
  int in_section = 0;                         // the block whose static shared memory is in place
  std::map<const void*, int> allowed_shared;  // bytes, by kernel

  unsigned most_blocks = 0;  // of a launch; 0: what it asks for
  Order order = Order::kForward;
  uint64_t random = 1;
  cudaError_t error = cudaSuccess;
  std::string launches;  // a log, for tests
};

Machine& machine();  // the one there is
unsigned random_below(unsigned bound);

// scheduler.cpp
void make_threads();   // of a launch
void reset_threads();  // after a failure
void run_cluster(uint64_t first_block);

// shared_memory.cpp
void poison_shared();         // before a cluster runs
void enter_block(int block);  // brings its static shared memory into place
void check_guards();
void release_shared();

}  // namespace fq::emulated
