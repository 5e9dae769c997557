// What stands behind the CUDA of kernels on a CPU: launches, blocks of fibers, barriers, warps.
//
// Blocks run one after another, the threads of a block in turn, each until it waits.  What a GPU
// leaves undefined is an error here, with file and line.
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <stdexcept>

// Of the thread that runs; kernels read them and the scheduler writes them.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStaticShared = 48 * 1024;  // and dynamic shared memory not asked for by name
constexpr size_t kMostShared = 227 * 1024;   // sm_90 and sm_100

// A line of a kernel; as a default argument, that of the caller.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// A kernel did what a GPU leaves undefined.  The launch that was under way has been given up.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a launch runs: `body(argument)` in each thread of the grid.
struct Work {
  const char* name;    // for messages
  const void* kernel;  // whose attributes apply
  void (*body)(void*);
  void* argument;
};

// Limits are those of CUDA, whose last error is set where they are broken.
void launch(const Work& work, dim3 grid, dim3 block, size_t shared_bytes);

int lane();  // of the calling thread in its warp

void block_barrier(Where at);

enum class Collective { sync, shuffle, vote, matrix };

// Waits for the lanes of `mask`, whose values of `bytes` (16 at most) are then exchanged: a shuffle
// puts that of lane `source` in the place of each lane's own, where source is not negative; a vote
// the bits of the lanes whose int is not zero.
void collective(Collective kind, unsigned mask, void* value, size_t bytes, int source, Where at);

// What a whole warp computes at once: `combine` changes the values of its lanes, `bytes` each (40
// at most), where they are.
using Combine = void (*)(unsigned char* const (&values)[kWarp]);
void whole_warp(void* value, size_t bytes, Combine combine, Where at);

// Ends the launch, from within a thread, with this message.
[[noreturn]] void fail(const char* what, Where at, const Where* others = nullptr);

// Whether these bytes are shared memory of the block that runs.
bool is_shared(const void* at, size_t bytes);

// Shared memory of the block that runs: a heap block of its exact size, filled with 0xFF.
void* shared(const void* site, size_t bytes, Where at);
void* dynamic_shared(Where at);

// cp.async: `destination` is poisoned when the copy is issued and written when it is waited for.
void copy_async(void* destination, const void* source, unsigned bytes, unsigned valid, Where at);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace shim

extern "C" {
// Order of blocks and of the threads of each: 0 forward, 1 reverse, 2 random from the seed.
void shim_set_order(int order, unsigned seed);
// Only blocks [first, end) of a grid run.
void shim_set_blocks(unsigned long first, unsigned long end);
// Threads resumed since the start of the program.
long shim_switches();
}
