// Stacks that take turns on one OS thread: what a CUDA thread runs on here.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

namespace simt {

// Frames under AddressSanitizer are several times as large. An overflow meets a guard page.
inline constexpr size_t kStackBytes = SIMT_ASAN ? 512 << 10 : 128 << 10;
inline constexpr size_t kGuardBytes = 4 << 10;

#if defined(__x86_64__)
// Saves what a called function must preserve, changes stacks, restores it. MXCSR and the x87
// control word are the same for all.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#endif

// One place to continue at. The scheduler itself has one without a stack of its own.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Makes this one start `entry` on `stack` when first switched to. `entry` never returns.
  void prepare(char* stack, void (*entry)()) {
    bottom_ = stack;
    size_ = kStackBytes;
#if SIMT_ASAN
    __asan_unpoison_memory_region(stack, kStackBytes);  // frames of whoever had it before
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // where a caller's return address would be: 16-byte alignment at entry
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp_ = top;
#else
    getcontext(&state_);
    state_.uc_stack.ss_sp = stack;
    state_.uc_stack.ss_size = kStackBytes;
    state_.uc_link = nullptr;
    makecontext(&state_, entry, 0);
#endif
  }

  // Continues `to`. Returns when somebody switches back here; never if `last`.
  void switch_to(Context& to, bool last = false) {
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.bottom_, to.size_);
#endif
    (void)last;
#if defined(__x86_64__)
    swap_stacks(&sp_, to.sp_);
#else
    swapcontext(&state_, &to.state_);
#endif
    arrived(nullptr);
  }

  // To be called first thing on a new stack; `from` is the context that this OS thread came with,
  // whose stack AddressSanitizer tells us.
  void arrived([[maybe_unused]] Context* from) {
#if SIMT_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (from && !from->bottom_) {
      from->bottom_ = static_cast<const char*>(bottom);
      from->size_ = size;
    }
#endif
  }

 private:
#if defined(__x86_64__)
  void* sp_ = nullptr;
#else
  ucontext_t state_;
#endif
  const char* bottom_ = nullptr;
  size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

// Stacks are kept for the next launch.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) grow();
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) { free_.push_back(stack); }

 private:
  void grow() {
    constexpr size_t kMany = 64, kEach = kGuardBytes + kStackBytes;
    void* memory = mmap(nullptr, kMany * kEach, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("no memory for more threads to simulate");
      std::abort();
    }
    for (size_t i = 0; i < kMany; ++i) {
      char* guard = static_cast<char*>(memory) + i * kEach;
      // Linux allows a process 65,530 mappings.
      if (++count_ < 16'000) mprotect(guard, kGuardBytes, PROT_NONE);
      free_.push_back(guard + kGuardBytes);
    }
  }
  size_t count_ = 0;
  std::vector<char*> free_;
};

}  // namespace simt
