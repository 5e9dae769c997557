// Compiled without sanitizers: they are told of each switch, and must not see its inside.

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#define WEAK __attribute__((weak))  // null in a build without that sanitizer
extern "C" {
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned flags);
WEAK void AnnotateIgnoreReadsBegin(const char* file, int line);
WEAK void AnnotateIgnoreReadsEnd(const char* file, int line);
WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
// Pushes what a call preserves, swaps stacks, pops the same from the other: 80 ns, where
// swapcontext() takes 600 for two system calls that no fiber needs.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.globl shim_switch
.type shim_switch, @function
shim_switch:
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
.size shim_switch, .-shim_switch
)");
#else
#include <ucontext.h>
#endif

namespace shim {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;
constexpr unsigned kNoSync = 1;  // a switch is not a synchronisation: barriers alone are

void* scheduler_context = nullptr;
void* scheduler_tsan = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void map_stack(void* at, size_t size, int flags) {
  flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (mmap(at, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) throw std::bad_alloc();
}

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
void start_at(void** context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // the return address of entry, which keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  *context = top;
}

void exchange(void** from, void* to) { shim_switch(from, to); }
#else
void start_at(void** context, char* stack, void (*entry)()) {
  if (!*context) *context = new ucontext_t;
  auto it = static_cast<ucontext_t*>(*context);
  getcontext(it);
  it->uc_stack.ss_sp = stack;
  it->uc_stack.ss_size = kStack;
  it->uc_link = nullptr;
  makecontext(it, entry, 0);
}

void exchange(void** from, void* to) {
  if (!*from) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#endif

}  // namespace

Fiber::~Fiber() {
  if (tsan_) __tsan_destroy_fiber(tsan_);
  if (stack_) munmap(stack_ - kGuard, kStack + kGuard);
}

void Fiber::prepare(void (*entry)()) {
  if (!stack_) {
    void* base = mmap(nullptr, kStack + kGuard, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(base) + kGuard;
    map_stack(stack_, kStack, MAP_FIXED);
  }
  if (under_tsan()) {
    if (tsan_) __tsan_destroy_fiber(tsan_);
    tsan_ = __tsan_create_fiber(0);
    // mapped anew, or TSan takes locals of this block for a race with those of the last one
    map_stack(stack_, kStack, MAP_FIXED);
  }
  // what a fiber that was given up has left there
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStack);
  start_at(&context_, stack_, entry);
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  if (under_tsan()) {
    scheduler_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, kNoSync);
  }
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
  exchange(&scheduler_context, context_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::entered() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
}

void Fiber::leave(bool for_good) {
  void* fake_stack = nullptr;
  if (under_tsan()) __tsan_switch_to_fiber(scheduler_tsan, kNoSync);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack,
                                   scheduler_stack_size);
  exchange(&context_, scheduler_context);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void Fiber::finish() {
  leave(true);
  abort();  // a finished fiber was resumed
}

void happens_before(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}

void happens_after(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

Unwatched::Unwatched() {
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unwatched::~Unwatched() {
  if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

bool under_tsan() { return __tsan_create_fiber != nullptr; }

}  // namespace shim
