// Steps of a computation that threads walk through together, in pieces.
//
// A step is a number of units of which the threads take pieces; it is over when the last piece is
// done, and then the next may begin:
//
//   step 0: taken 30 + 30 of 60, done 60    step 1: taken 6 + 6 of 12, done 8    step 2: taken 0,
//   ..
//
// Every other thread begins with the second half, and helps with the other half when its own is
// gone: so it can tell what it will read in later steps, and fetch that while it waits.
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
  std::atomic<int64_t> taken[2], done;  // units: of each half, of both
};

struct Stopped {};  // thrown where another thread has failed

// Where the second half of a step begins.
inline int64_t second_half(int64_t units, int64_t piece) {
  const int64_t pieces = (units + piece - 1) / piece;
  return (pieces + 1) / 2 * piece < units ? (pieces + 1) / 2 * piece : units;
}

// One thread's way through the steps. half: 0 or 1, where it begins.
class Steps {
 public:
  Steps(Step* first, const std::atomic<bool>& failed, int half)
      : next_(first), failed_(failed), half_(half) {}

  // Takes pieces of the next step as long as there are any; all of them are done on return.
  // idle: something useful to do for a moment, while others finish theirs; whether it was.
  template <class Work, class Idle>
  void share(int64_t units, int64_t piece, Work work, Idle idle) {
    Step& step = *next_++;
    const int64_t middle = second_half(units, piece);
    int64_t mine = 0;
    for (int i = 0; i < 2; ++i) {
      const int half = half_ ^ i;
      const int64_t first = half == 0 ? 0 : middle, last = half == 0 ? middle : units;
      for (;;) {
        const int64_t begin = first + step.taken[half].fetch_add(piece, std::memory_order_relaxed);
        if (begin >= last) break;
        const int64_t end = begin + piece < last ? begin + piece : last;
        work(begin, end);
        mine += end - begin;
      }
    }
    if (mine > 0) step.done.fetch_add(mine, std::memory_order_release);
    for (int64_t looks = 0; step.done.load(std::memory_order_acquire) < units; ++looks) {
      if (failed_.load(std::memory_order_relaxed)) throw Stopped();
      if (idle()) continue;
      if (looks >= kPatience) std::this_thread::yield();
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  Step* next_;
  const std::atomic<bool>& failed_;
  const int half_;
};

}  // namespace
}  // namespace fq::cpu
