// The emulator's threads: who runs, who waits for whom, and what a thread that cannot go on says.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fq::emulated {

Machine& machine() {
  static Machine the_one;
  return the_one;
}

unsigned random_below(unsigned bound) {
  uint64_t& x = machine().random;  // xorshift
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<unsigned>((x >> 32) * bound >> 32);
}

namespace {

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

// ---- switching ---------------------------------------------------------------------------------

void set_state(Thread& thread, State state) {
  int& ready = machine().warps[thread.warp].ready;
  ready += (state == State::kReady) - (thread.state == State::kReady);
  thread.state = state;
}

void resume(Thread& thread) {
  Machine& m = machine();
  m.current = &thread;
  enter_block(thread.block);
  threadIdx = thread.index;
  blockIdx = m.blocks[thread.block].index;
  switch_to_fiber(thread.fiber);
  m.current = nullptr;
}

// The current thread lets others run.
void pause() { switch_to_scheduler(machine().current->fiber); }

// What every fiber does for ever: one thread of a block, then the same of the next block.
void thread_main() {
  Machine& m = machine();
  for (;;) {
    m.body(m.closure);
    Thread& me = *m.current;
    if (!me.copies.empty()) fail("a thread ended without waiting for its copy_async");
    if (me.arrival >= 0) fail("a thread ended between cluster_arrive and cluster_wait");
    set_state(me, State::kEnded);
    ++m.blocks[me.block].ended;
    --m.live;
    pause();
  }
}

[[noreturn]] void fail_deadlock() {
  Machine& m = machine();
  std::map<std::string, int> groups;
  for (int i = 0; i < m.threads_per_block * static_cast<int>(m.blocks.size()); ++i) {
    const Thread& thread = m.threads[i];
    const std::string place =
        std::string(" at ") + thread.site.file + ":" + std::to_string(thread.site.line);
    switch (thread.state) {
      case State::kEnded:
        ++groups["have ended"];
        break;
      case State::kInMeeting:
        ++groups[std::string("wait for their warp in ") + m.warps[thread.warp].operation + place];
        break;
      case State::kAtBlockBarrier:
        ++groups["wait for their block" + place];
        break;
      default:
        ++groups["wait for their cluster" + place];
    }
  }
  std::string text;
  for (const auto& [what, count] : groups)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + what;
  fail("deadlock: %s", text.c_str());
}

void run_warp(Warp& warp, Thread* lanes) {
  Machine& m = machine();
  if (m.order == Order::kShuffled) {
    const unsigned start = random_below(kLanes), stride = 2 * random_below(kLanes / 2) + 1;
    const unsigned count = 1 + random_below(kLanes);
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = lanes[(start + i * stride) % kLanes];
      if (thread.state == State::kReady) resume(thread);
      if (!m.failure.empty()) return;
    }
    return;
  }
  while (warp.ready > 0) {
    for (int i = 0; i < kLanes; ++i) {
      Thread& thread = lanes[m.order == Order::kForward ? i : kLanes - 1 - i];
      if (thread.state == State::kReady) resume(thread);
      if (!m.failure.empty()) return;
    }
  }
}

void run_blocks() {
  Machine& m = machine();
  const int warps = static_cast<int>(m.warps.size());
  while (m.live > 0) {
    int chosen = -1;
    const int start = m.order == Order::kShuffled ? random_below(warps) : 0;
    for (int i = 0; i < warps && chosen < 0; ++i) {
      const int warp = (m.order == Order::kReverse ? warps - 1 - i : start + i) % warps;
      if (m.warps[warp].ready > 0) chosen = warp;
    }
    if (chosen < 0) fail_deadlock();
    run_warp(m.warps[chosen], &m.threads[chosen * kLanes]);
    if (!m.failure.empty()) fail("%s", std::exchange(m.failure, {}).c_str());
  }
  check_guards();
}

}  // namespace

void fail(const char* format, ...) {
  Machine& m = machine();
  char text[1024];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  if (!m.current) throw std::runtime_error(text);
  const Thread& me = *m.current;
  const uint3 block = m.blocks[me.block].index;
  char where[256];
  std::snprintf(where, sizeof where, "emulated %s, block %u,%u,%u, thread %u: ", m.launch.kernel,
                block.x, block.y, block.z, me.index.x);
  m.failure = std::string(where) + text;
  pause();  // and the scheduler throws
  std::abort();
}

void make_threads() {
  Machine& m = machine();
  const dim3 b = m.launch.block;
  m.threads_per_block = static_cast<int>(b.x * b.y * b.z);
  if (m.threads_per_block % kLanes != 0)
    fail("blocks of %d threads: only whole warps are emulated", m.threads_per_block);
  const size_t count = m.threads_per_block * size_t{m.launch.cluster};
  m.warps.assign(count / kLanes, {});
  m.blocks.assign(m.launch.cluster, {});
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = m.threads[i];
    const unsigned in_block = static_cast<unsigned>(i % m.threads_per_block);
    if (!thread.fiber.stack) make_fiber(thread.fiber, thread_main);
    thread.block = static_cast<int>(i) / m.threads_per_block;
    thread.warp = static_cast<int>(i) / kLanes;
    thread.lane = static_cast<int>(i) % kLanes;
    thread.index = {in_block % b.x, in_block / b.x % b.y, in_block / (b.x * b.y)};
  }
}

void reset_threads() {
  for (Thread& thread : machine().threads)
    if (thread.fiber.stack) make_fiber(thread.fiber, thread_main);
}

void run_cluster(uint64_t first_block) {
  Machine& m = machine();
  const dim3 g = m.launch.grid;
  poison_shared();
  for (size_t i = 0; i < m.blocks.size(); ++i) {
    const uint64_t block = first_block + i;
    m.blocks[i].index = {static_cast<unsigned>(block % g.x),
                         static_cast<unsigned>(block / g.x % g.y),
                         static_cast<unsigned>(block / g.x / g.y)};
    m.blocks[i].waiting = m.blocks[i].ended = 0;
  }
  m.cluster_arrivals = m.cluster_phase = 0;
  m.live = m.threads_per_block * static_cast<int>(m.blocks.size());
  for (Warp& warp : m.warps) warp.come = warp.ready = 0;
  for (int i = 0; i < m.live; ++i) {
    Thread& thread = m.threads[i];
    thread.state = State::kEnded;
    set_state(thread, State::kReady);
    thread.meeting = 0;
    thread.arrival = -1;
    thread.copies.clear();
    thread.group_ends.clear();
  }
  run_blocks();
}

// ---- barriers ----------------------------------------------------------------------------------

void sync_block(Site site) {
  Machine& m = machine();
  Thread& me = *m.current;
  Block& block = m.blocks[me.block];
  if (block.waiting == 0) block.site = site;
  if (!same(block.site, site))
    fail("deadlock: threads of a block wait at different barriers, %s:%d and %s:%d",
         block.site.file, block.site.line, site.file, site.line);
  me.site = site;
  set_state(me, State::kAtBlockBarrier);
  if (++block.waiting == m.threads_per_block) {
    block.waiting = 0;
    Thread* const first = &m.threads[me.block * m.threads_per_block];
    for (int i = 0; i < m.threads_per_block; ++i) set_state(first[i], State::kReady);
  }
  pause();
}

void cluster_arrive() {
  Machine& m = machine();
  Thread& me = *m.current;
  if (me.arrival >= 0) fail("deadlock: cluster_arrive twice without cluster_wait");
  me.arrival = m.cluster_phase;
  const int all = m.threads_per_block * static_cast<int>(m.blocks.size());
  if (++m.cluster_arrivals < all) return;
  m.cluster_arrivals = 0;
  ++m.cluster_phase;
  for (int i = 0; i < all; ++i)
    if (m.threads[i].state == State::kAtClusterBarrier) set_state(m.threads[i], State::kReady);
}

void cluster_wait(Site site) {
  Thread& me = *machine().current;
  if (me.arrival < 0) fail("deadlock: cluster_wait without cluster_arrive");
  if (me.arrival == machine().cluster_phase) {  // not all have arrived
    me.site = site;
    set_state(me, State::kAtClusterBarrier);
    pause();
  }
  me.arrival = -1;
}

int lane() { return machine().current->lane; }

Meeting& join_meeting(const char* operation, Site site) {
  Machine& m = machine();
  Thread& me = *m.current;
  Warp& warp = m.warps[me.warp];
  if (warp.come == 0) {
    warp.operation = operation;
    warp.site = site;
  } else if (std::strcmp(warp.operation, operation) != 0 || !same(warp.site, site)) {
    fail("deadlock: lanes of a warp are in different operations, %s at %s:%d and %s at %s:%d",
         warp.operation, warp.site.file, warp.site.line, operation, site.file, site.line);
  }
  ++warp.come;
  me.site = site;
  me.meeting ^= 1;
  return warp.meetings[me.meeting];
}

bool last_to_come() {
  Machine& m = machine();
  return m.warps[m.current->warp].come == kLanes;
}

void end_meeting() {
  Machine& m = machine();
  const int warp = m.current->warp;
  m.warps[warp].come = 0;
  for (int i = 0; i < kLanes; ++i) {
    Thread& thread = m.threads[warp * kLanes + i];
    if (thread.state == State::kInMeeting) set_state(thread, State::kReady);
  }
}

void wait_for_meeting() {
  set_state(*machine().current, State::kInMeeting);
  pause();
}

}  // namespace fq::emulated
