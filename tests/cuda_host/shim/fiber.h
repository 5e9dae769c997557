// Stacks that run in turn within one operating-system thread, known to the sanitizers.
#pragma once

#include <cstddef>

namespace shim {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes the next resume() call `entry`, which must never return but end in finish().
  void prepare(void (*entry)());

  // Runs the fiber until it calls suspend() or finish().
  void resume();

  // Called inside the fiber: goes back to resume().  A finished fiber is not resumed again until
  // it is prepared anew.
  void suspend() { leave(false); }
  [[noreturn]] void finish();

  // First thing in `entry`.
  static void entered();

 private:
  void leave(bool for_good);

  void* context_ = nullptr;
  char* stack_ = nullptr;
  void* tsan_ = nullptr;
};

// What one fiber has done, another sees; TSan learns of it through a pair of calls with one tag.
void happens_before(void* tag);
void happens_after(void* tag);

// For as long as it lives, in one fiber, TSan takes no notice of memory: what the runtime allocates
// in one fiber and frees in another is no race of the kernel's.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// Whether memory and fibers must be kept apart from block to block for TSan.
bool under_tsan();

}  // namespace shim
