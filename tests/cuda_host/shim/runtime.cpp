// Compiled without sanitizers, so that what it does for a kernel does not hide what a kernel does.

#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace shim {
namespace {

constexpr size_t kMostOffered = 48;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Copy {
  void* destination;
  const void* source;
  unsigned bytes, valid;
  int group;
  Where at;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  bool alive = false;
  const char* waits_in = nullptr;  // null while it can run
  Where waits_at{"", 0};
  std::vector<Copy> copies;
  int copy_group = 0;

  // of the collective under way
  alignas(16) unsigned char offered[kMostOffered];
  alignas(16) unsigned char received[kMostOffered];
  int source = -1;
};

// Lanes of a warp that meet.  Disjoint masks may wait at once.
struct Meeting {
  unsigned mask, arrived;
  Collective kind;
  size_t bytes;
  Where at;
  char* tag;  // for happens_before(), its own: lanes may meet again before all have gone on
  Combine combine;
};

struct SharedBlock {
  const void* site;
  char* memory;
  size_t bytes;
};

struct State {  // of the one launch that is under way
  std::mutex one_launch_at_a_time;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  int count = 0, current = 0, alive = 0, at_barrier = 0;
  Where barrier_at{"", 0};

  Work work{};
  std::string error;  // why the launch has been given up; empty while it has not

  std::vector<SharedBlock> shared;
  size_t static_bytes = 0, dynamic_bytes = 0;
  char* dynamic = nullptr;
  std::vector<char*> to_free;

  int order = 0;
  size_t first_block = 0, end_block = SIZE_MAX;
  std::mt19937 random;
  long switches = 0;
  std::map<const void*, size_t> allowed_dynamic;
  cudaError_t last_error = cudaSuccess;
  int device = 0;

  // tags for happens_before()
  char launch_tag, end_tag;
  char barrier_tags[2];  // in turn: who leaves one barrier may come to the next before others leave
  unsigned barriers_passed = 0;
  std::vector<char> meeting_tags = std::vector<char>(4096);
  size_t meetings_begun = 0;
};

State& state = *new State;  // outlives what runs when the program ends

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::sync: return "__syncwarp";
    case Collective::shuffle: return "a shuffle";
    case Collective::matrix: return "a function of matrices";
    default: return "a vote";
  }
}

std::string text(Where at) { return std::string(at.file) + ":" + std::to_string(at.line); }

std::string text(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

Thread& current() { return *state.threads[state.current]; }

bool same(Where a, Where b) { return a.line == b.line && !strcmp(a.file, b.file); }

void note_error(const std::string& what, Where at) {
  state.error = text(at) + ": " + what + " [" + state.work.name + ", block " +
                text(dim3(blockIdx.x, blockIdx.y, blockIdx.z)) + ", thread " +
                std::to_string(state.current) + "]";
}

// Returns when somebody has cleared `waits_in`.
void wait(const char* in, Where at) {
  Thread& self = current();
  self.waits_in = in;
  self.waits_at = at;
  self.fiber.suspend();
}

// Copies without calling memcpy, which a sanitizer would watch.
void copy_bytes(void* to, const void* from, size_t bytes) {
  auto destination = static_cast<volatile unsigned char*>(to);
  auto source = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) destination[i] = source[i];
}

void fill(void* at, size_t bytes) {
  auto destination = static_cast<volatile unsigned char*>(at);
  for (size_t i = 0; i < bytes; ++i) destination[i] = 0xFF;
}

Thread& thread_of(int warp, int lane) { return *state.threads[warp * kWarp + lane]; }

unsigned alive_lanes(int warp) {
  unsigned lanes = 0;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < state.count; ++lane)
    lanes |= unsigned(thread_of(warp, lane).alive) << lane;
  return lanes;
}

// What all lanes offer, changed by all of it.
void combine_lanes(int warp, const Meeting& meeting) {
  if (meeting.arrived != kAllLanes)
    return note_error("a function of matrices needs all lanes of the warp, and some have ended",
                      meeting.at);
  unsigned char* values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& thread = thread_of(warp, lane);
    copy_bytes(thread.received, thread.offered, meeting.bytes);
    values[lane] = thread.received;
  }
  meeting.combine(values);
}

// Exchanges values and lets the lanes go on.
void conclude(int warp, const Meeting& meeting) {
  if (meeting.kind == Collective::matrix) combine_lanes(warp, meeting);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(meeting.arrived >> lane & 1)) continue;
    int value = 0;
    copy_bytes(&value, thread_of(warp, lane).offered, sizeof value);
    votes |= unsigned(value != 0) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(meeting.arrived >> lane & 1)) continue;
    Thread& thread = thread_of(warp, lane);
    thread.waits_in = nullptr;
    if (meeting.kind == Collective::vote) copy_bytes(thread.received, &votes, sizeof votes);
    if (meeting.kind != Collective::shuffle) continue;
    const int source = thread.source < 0 ? lane : thread.source;
    if (!(meeting.arrived >> source & 1))
      return note_error("a shuffle reads lane " + std::to_string(source) +
                            ", which does not take part", meeting.at);
    copy_bytes(thread.received, thread_of(warp, source).offered, meeting.bytes);
  }
}

// Ends the meetings of a warp for which every lane that is still there has come.
void conclude_complete(int warp) {
  const Unwatched unwatched;
  auto& meetings = state.meetings[warp];
  for (size_t i = meetings.size(); i-- > 0;) {
    if (meetings[i].arrived != (meetings[i].mask & alive_lanes(warp))) continue;
    const Meeting meeting = meetings[i];
    meetings.erase(meetings.begin() + i);
    conclude(warp, meeting);
  }
}

// The meeting under way that a lane joins, or a new one.
Meeting& meeting_of(int warp, const Meeting& wanted) {
  const unsigned self = 1u << lane();
  for (Meeting& other : state.meetings[warp]) {
    if (other.mask == wanted.mask) {
      if (other.kind != wanted.kind || other.bytes != wanted.bytes || !same(other.at, wanted.at))
        fail("lanes of a warp meet in different functions, others at ", wanted.at, &other.at);
      return other;
    }
    // each side waits for a lane that waits on the other
    if ((other.mask & self) && (other.arrived & wanted.mask))
      fail("lanes of a warp disagree on the mask, others at ", wanted.at, &other.at);
  }
  const Unwatched unwatched;
  state.meetings[warp].push_back(wanted);
  Meeting& meeting = state.meetings[warp].back();
  meeting.tag = &state.meeting_tags[++state.meetings_begun % state.meeting_tags.size()];
  return meeting;
}

void thread_main() {
  Fiber::entered();
  happens_after(&state.launch_tag);
  state.work.body(state.work.argument);
  Thread& self = current();
  if (!self.copies.empty())
    fail("the thread ended before it had waited for this copy", self.copies[0].at);
  if (state.at_barrier)
    fail("a thread of the block ended while others wait in __syncthreads", state.barrier_at);
  self.alive = false;
  --state.alive;
  happens_before(&state.end_tag);
  conclude_complete(state.current / kWarp);
  self.fiber.finish();
}

void resume(int index) {
  state.current = index;
  threadIdx = current().index;
  ++state.switches;
  current().fiber.resume();
}

void note_deadlock() {
  for (int i = 0; i < state.count; ++i) {
    const Thread& thread = *state.threads[i];
    if (!thread.alive) continue;
    state.current = i;
    return note_error(std::string("deadlock: no thread of the block can go on; this one waits in ") +
                          thread.waits_in, thread.waits_at);
  }
}

std::vector<size_t> ordered(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (state.order == 1) std::reverse(order.begin(), order.end());
  if (state.order == 2) std::shuffle(order.begin(), order.end(), state.random);
  return order;
}

char* poisoned(size_t bytes) {
  const Unwatched unwatched;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
  fill(memory, bytes);
  return static_cast<char*>(memory);
}

// Under TSan memory may not come back within a launch: blocks are unordered, and it would take the
// next owner's accesses for races.
void drop_shared() {
  const Unwatched unwatched;
  for (const SharedBlock& block : state.shared) state.to_free.push_back(block.memory);
  state.shared.clear();
  state.static_bytes = 0;
  if (state.dynamic) state.to_free.push_back(state.dynamic);
  state.dynamic = nullptr;
}

void free_shared() {
  const Unwatched unwatched;
  for (char* memory : state.to_free) free(memory);
  state.to_free.clear();
}

void start_threads() {
  for (int i = 0; i < state.count; ++i) {
    Thread& thread = *state.threads[i];
    const unsigned at = i;
    thread.index = {at % blockDim.x, at / blockDim.x % blockDim.y, at / blockDim.x / blockDim.y};
    thread.alive = true;
    thread.waits_in = nullptr;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.prepare(thread_main);
  }
  state.alive = state.count;
  state.at_barrier = 0;
  for (auto& meetings : state.meetings) meetings.clear();
  happens_before(&state.launch_tag);
}

void run_block() {
  if (state.dynamic_bytes) state.dynamic = poisoned(state.dynamic_bytes);
  start_threads();
  const std::vector<size_t> order = ordered(state.count);
  while (state.alive && state.error.empty()) {
    bool advanced = false;
    for (size_t i : order) {
      const Thread& thread = *state.threads[i];
      if (!thread.alive || thread.waits_in) continue;
      advanced = true;
      resume(int(i));
      if (!state.error.empty()) break;
    }
    if (!advanced) note_deadlock();
  }
  drop_shared();
  if (!under_tsan()) free_shared();
}

bool within_limits(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 &&
                         grid.z <= 65535;
  const bool block_fits =
      threads && threads <= 1024 && block.x <= 1024 && block.y <= 1024 && block.z <= 64;
  if (!grid_fits || !block_fits) {
    state.last_error = cudaErrorInvalidConfiguration;
    return false;
  }
  const auto asked = state.allowed_dynamic.find(kernel);
  const size_t allowed = asked == state.allowed_dynamic.end() ? kStaticShared : asked->second;
  if (shared_bytes > allowed) {
    state.last_error = cudaErrorInvalidValue;
    return false;
  }
  return true;
}

}  // namespace

// `others` is where the threads are that this one misses.
void fail(const char* what, Where at, const Where* others) {
  {
    const Unwatched unwatched;
    note_error(others ? what + text(*others) : what, at);
  }
  current().fiber.finish();
}

void launch(const Work& work, dim3 grid, dim3 block, size_t shared_bytes) {
  std::lock_guard<std::mutex> guard(state.one_launch_at_a_time);
  if (!within_limits(work.kernel, grid, block, shared_bytes)) return;
  gridDim = grid;
  blockDim = block;
  state.count = int(block.x * block.y * block.z);
  while (int(state.threads.size()) < state.count)
    state.threads.push_back(std::make_unique<Thread>());
  state.meetings.resize((state.count + kWarp - 1) / kWarp);
  state.work = work;
  state.dynamic_bytes = shared_bytes;
  state.error.clear();
  const size_t end = std::min(state.end_block, size_t(grid.x) * grid.y * grid.z);
  const size_t first = std::min(state.first_block, end);
  for (size_t index : ordered(end - first)) {
    const size_t number = first + index;
    blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                unsigned(number / grid.x / grid.y)};
    run_block();
    if (!state.error.empty()) break;
  }
  // once, after the whole grid: block by block it would order blocks, and hide their races
  happens_after(&state.end_tag);
  free_shared();
  if (!state.error.empty()) throw KernelError(state.error);
}

int lane() { return state.current % kWarp; }

void block_barrier(Where at) {
  if (state.alive != state.count)
    fail("__syncthreads after some threads of the block have ended", at);
  if (state.at_barrier && !same(state.barrier_at, at))
    fail("divergent __syncthreads: other threads of the block wait at ", at,
         &state.barrier_at);
  state.barrier_at = at;
  char* tag = &state.barrier_tags[state.barriers_passed % 2];
  happens_before(tag);
  if (++state.at_barrier < state.count) {
    wait("__syncthreads", at);
  } else {
    state.at_barrier = 0;
    ++state.barriers_passed;
    for (int i = 0; i < state.count; ++i) state.threads[i]->waits_in = nullptr;
  }
  happens_after(tag);
}

namespace {

void meet(const Meeting& wanted, void* value, int source) {
  const int warp = state.current / kWarp;
  const unsigned self = 1u << lane();
  const auto [mask, arrived, kind, bytes, at, no_tag, combine] = wanted;
  if (!(mask & self))
    fail("the mask of a warp's function leaves out the lane that calls it", at);
  Meeting& meeting = meeting_of(warp, wanted);
  Thread& thread = current();
  if (value) copy_bytes(thread.offered, value, bytes);
  thread.source = source;
  meeting.arrived |= self;
  thread.waits_in = name_of(kind);  // until the last lane, perhaps this one, ends the meeting
  thread.waits_at = at;
  char* tag = meeting.tag;
  happens_before(tag);
  conclude_complete(warp);
  if (!state.error.empty()) thread.fiber.finish();
  if (thread.waits_in) thread.fiber.suspend();
  happens_after(tag);
  if (value && kind != Collective::sync) copy_bytes(value, thread.received, bytes);
}

}  // namespace

void collective(Collective kind, unsigned mask, void* value, size_t bytes, int source, Where at) {
  meet({mask, 0, kind, bytes, at, nullptr, nullptr}, value, source);
}

void whole_warp(void* value, size_t bytes, Combine combine, Where at) {
  meet({kAllLanes, 0, Collective::matrix, bytes, at, nullptr, combine}, value, -1);
}

bool is_shared(const void* at, size_t bytes) {
  const auto within = [&](const char* memory, size_t size) {
    const auto first = static_cast<const char*>(at);
    return memory && first >= memory && first + bytes <= memory + size;
  };
  if (within(state.dynamic, state.dynamic_bytes)) return true;
  for (const SharedBlock& block : state.shared)
    if (within(block.memory, block.bytes)) return true;
  return false;
}

void* shared(const void* site, size_t bytes, Where at) {
  for (const SharedBlock& block : state.shared)
    if (block.site == site) return block.memory;
  state.static_bytes += bytes;
  if (state.static_bytes > kStaticShared) fail("more than 48 KiB of static shared memory", at);
  if (state.static_bytes + state.dynamic_bytes > kMostShared)
    fail("more than 227 KiB of shared memory", at);
  char* memory = poisoned(bytes);
  const Unwatched unwatched;
  state.shared.push_back({site, memory, bytes});
  return memory;
}

void* dynamic_shared(Where at) {
  if (!state.dynamic) fail("dynamic shared memory that the launch did not ask for", at);
  return state.dynamic;
}

void copy_async(void* destination, const void* source, unsigned bytes, unsigned valid, Where at) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async copies 4, 8 or 16 bytes", at);
  if (valid > bytes) fail("cp.async reads more bytes than it writes", at);
  if (reinterpret_cast<uintptr_t>(destination) % bytes ||
      reinterpret_cast<uintptr_t>(source) % bytes)
    fail("cp.async at an address that is no multiple of its size", at);
  memset(destination, 0xFF, bytes);  // a function that sanitizers watch, as the two below
  const Unwatched unwatched;
  current().copies.push_back({destination, source, bytes, valid, current().copy_group, at});
}

void commit_copies() { ++current().copy_group; }

void wait_for_copies(int pending) {
  Thread& thread = current();
  const int last = thread.copy_group - pending;
  auto is_due = [&](const Copy& copy) { return copy.group < last; };
  for (const Copy& copy : thread.copies) {
    if (!is_due(copy)) continue;
    memcpy(copy.destination, copy.source, copy.valid);
    memset(static_cast<char*>(copy.destination) + copy.valid, 0, copy.bytes - copy.valid);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), is_due),
                      thread.copies.end());
}

}  // namespace shim

extern "C" {

void shim_set_order(int order, unsigned seed) {
  shim::state.order = order;
  shim::state.random.seed(seed);
}

void shim_set_blocks(unsigned long first, unsigned long end) {
  shim::state.first_block = first;
  shim::state.end_block = end;
}

long shim_switches() { return shim::state.switches; }

// What launchers call of CUDA's runtime.

cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::state.last_error;
  shim::state.last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "unknown error";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = shim::state.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return shim::state.last_error = cudaErrorInvalidDevice;
  shim::state.device = device;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const bool fits = value >= 0 && size_t(value) <= shim::kMostShared;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || !fits)
    return shim::state.last_error = cudaErrorInvalidValue;
  shim::state.allowed_dynamic[kernel] = size_t(value);
  return cudaSuccess;
}
}
