// Steps of a computation that threads walk through together, in pieces.
//
// A step is a number of units of which the threads take pieces; it is over when the last piece is
// done, and then the next may begin:
//
//   step 0: taken 60 of 60, done 60    step 1: taken 12 of 12, done 8    step 2: taken 0, ..
//
// Nobody waits for a thread that has taken nothing, so the walk ends with any number of threads,
// also when some come late or never, and a slower one takes fewer pieces.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

constexpr int64_t kLine = 64;       // bytes of a cache line
constexpr int64_t kPatience = 200;  // looks at a step before a thread offers its core to others

// Made as Step(), all zero, before the walk begins.
struct alignas(kLine) Step {
  std::atomic<int64_t> taken, done;  // units
};

struct Stopped {};  // thrown where another thread has failed

// One thread's way through the steps.
class Steps {
 public:
  Steps(Step* first, const std::atomic<bool>& failed) : next_(first), failed_(failed) {}

  // Takes pieces of the next step as long as there are any; all of them are done on return.
  template <class Work>
  void share(int64_t units, int64_t piece, Work work) {
    Step& step = *next_++;
    int64_t mine = 0;
    for (;;) {
      const int64_t begin = step.taken.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= units) break;
      const int64_t end = begin + piece < units ? begin + piece : units;
      work(begin, end);
      mine += end - begin;
    }
    if (mine > 0) step.done.fetch_add(mine, std::memory_order_release);
    for (int64_t looks = 0; step.done.load(std::memory_order_acquire) < units; ++looks) {
      if (failed_.load(std::memory_order_relaxed)) throw Stopped();
      if (looks >= kPatience) std::this_thread::yield();
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  Step* next_;
  const std::atomic<bool>& failed_;
};

}  // namespace
}  // namespace fq::cpu
