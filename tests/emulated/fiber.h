// Fibers: stacks of their own that one thread of the operating system runs in turns. On x86-64 the
// switch is ten instructions; swapcontext, used elsewhere, makes a system call every time.
// AddressSanitizer is told about every switch.
#pragma once

#include <cstddef>

namespace fq::emulated {

struct Fiber {
  unsigned char* stack = nullptr;
  void* context = nullptr;     // where it goes on
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Makes a fiber, or makes it anew on the stack it has, that will run `entry`, which never returns.
void make_fiber(Fiber& fiber, void (*entry)());
void switch_to_fiber(Fiber& fiber);      // from the scheduler
void switch_to_scheduler(Fiber& fiber);  // from that fiber

// AddressSanitizer's red zones; nothing without it.
void forbid_access(const void* data, size_t bytes);
void allow_access(const void* data, size_t bytes);

}  // namespace fq::emulated
