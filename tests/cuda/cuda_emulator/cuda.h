// Enough of CUDA to run one kernel's CUDA C on a CPU, found by its `#include <cuda.h>`.
//
// Every CUDA thread is a fiber. The threads of a block run one after another, each up to its next
// barrier, in an order the caller chooses: what one thread leaves for another without a barrier in
// between comes too early or too late in some order. Blocks run one after another. Shared memory is
// NaN at the start of each block. A warp's functions (cuda_functions.h) wait for its 32 lanes.
// Reported: barriers that only part of a block reaches, indices outside shared and local arrays
// (compile with -fsanitize=bounds), limits of the device.
// Not seen: accesses outside global arrays, races of blocks, timing.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

// GNU attributes may stand anywhere among the specifiers, where TVM puts alignas; alignas may not.
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __global__
#define __device__
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))
#define __syncthreads() emulator::barrier(__LINE__)

struct dim3 {
  unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define VECTORS(type, name)                                                                  \
  struct __attribute__((aligned(2 * sizeof(type)))) name##2 { type x, y; };                   \
  struct __attribute__((aligned(4 * sizeof(type)))) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
#undef VECTORS

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x < y ? y : x; }

extern "C" {  // the linker's names for the ends of the section
extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 48 << 10;
constexpr unsigned kThreads = 1024, kGridYZ = 65535;
constexpr size_t kDynamicBytes = 227 << 10;  // the most a block of any GPU may have
constexpr int kRunning = 0, kDone = -1, kWarp = -2;  // a positive state is the line of a barrier

using Words = unsigned[6];

struct Fiber {
  ucontext_t context;
  int state;
  const char* function;  // at whose rendezvous it waits
  unsigned turn;         // of its warp's exchanges
};

static std::function<void()> kernel;
static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static ucontext_t scheduler;
static Fiber* current;
static char report[256];
// What `extern __shared__` becomes; see `prepared` in __init__.py.
static unsigned char dynamic_shared[kDynamicBytes] __attribute__((aligned(1024)));
static size_t dynamic_bytes = kDynamicBytes;
// A lane may be one exchange ahead of the slowest, so there are two of each.
static Words exchanged[2][kThreads];

inline void barrier(int line) {
  current->state = line;
  swapcontext(&current->context, &scheduler);
}

template <class... Values>
bool fail(const char* format, Values... values) {
  if (!report[0]) snprintf(report, sizeof report, format, values...);  // the first is the cause
  return false;
}

// Never comes back: what would follow a broken rule must not run in this process.
inline void abandon() { swapcontext(&current->context, &scheduler); }

// Gives this lane's words to its warp, waits for the others and returns those of all 32.
inline const Words* exchange(const char* function, const unsigned* words, int count) {
  const size_t thread = current - fibers.data(), turn = current->turn++ % 2;
  std::copy(words, words + count, exchanged[turn][thread]);
  current->state = kWarp, current->function = function;
  swapcontext(&current->context, &scheduler);
  return exchanged[turn] + thread / 32 * 32;
}

inline void enter() {
  kernel();
  current->state = kDone;  // uc_link leads back to the scheduler
}

// Whether a warp's lanes all wait at one function, and then lets them go on.
inline bool release(size_t first, size_t end) {
  const Fiber& one = fibers[first];
  for (size_t i = first; i < end; i++) {
    const Fiber& other = fibers[i];
    if (one.state != kWarp && other.state != kWarp) continue;
    if (one.state != other.state || one.function != other.function || end - first < 32)
      return fail("divergent warp in block (%u, %u, %u): thread %zu is at %s, %zu at %s",
                  blockIdx.x, blockIdx.y, blockIdx.z, first,
                  one.state == kWarp ? one.function : "a barrier or its end", i,
                  other.state == kWarp ? other.function : "a barrier or its end");
  }
  if (one.state != kWarp) return false;
  for (size_t i = first; i < end; i++) fibers[i].state = kRunning;
  return true;
}

// Runs a warp up to the next barrier of the block, its lanes in their order among all threads: no
// warp waits for another without one.
inline bool run_warp(size_t warp, const std::vector<unsigned>& order) {
  const size_t first = warp * 32, end = std::min(first + 32, fibers.size());
  do {
    for (unsigned i : order) {
      if (i < first || i >= end || fibers[i].state != kRunning) continue;
      current = &fibers[i];
      threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      swapcontext(&scheduler, &current->context);
      if (report[0]) return false;
    }
  } while (release(first, end));
  return !report[0];
}

namespace functions {
inline void start_block();   // nothing is under way
inline bool finish_block();  // nor may anything be left
}  // namespace functions

inline bool run_block(std::vector<unsigned>& order, bool shuffle, std::mt19937& random) {
  if (__start_shared_memory)
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  memset(dynamic_shared, 0xff, dynamic_bytes);
  functions::start_block();
  for (size_t i = 0; i < fibers.size(); i++) {
    fibers[i].state = kRunning, fibers[i].turn = 0;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = &stacks[i * kStackBytes];
    fibers[i].context.uc_stack.ss_size = kStackBytes;
    fibers[i].context.uc_link = &scheduler;
    makecontext(&fibers[i].context, enter, 0);
  }
  for (;;) {
    if (shuffle) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order)
      if (fibers[i].state == kRunning && !run_warp(i / 32, order)) return false;
    int state = fibers[0].state;
    for (size_t i = 0; i < fibers.size(); i++)
      if (fibers[i].state != state)
        return fail("divergent barrier in block (%u, %u, %u): thread 0 is at line %d, %zu at %d (-1: done)",
                    blockIdx.x, blockIdx.y, blockIdx.z, state, i, fibers[i].state);
    if (state == kDone) return functions::finish_block();
    for (Fiber& fiber : fibers) fiber.state = kRunning;
  }
}

// Orders: 0 forward, 1 backward, any other a new shuffle after every barrier, with that seed.
inline const char* launch(dim3 grid, dim3 block, unsigned order_number, std::function<void()> body) {
  size_t threads = size_t(block.x) * block.y * block.z;
  size_t shared = __start_shared_memory ? __stop_shared_memory - __start_shared_memory : 0;
  report[0] = 0;
  if (!threads || threads > kThreads) fail("%zu threads a block; the limit is %u", threads, kThreads);
  if (dynamic_bytes > kDynamicBytes) fail("%zu bytes of dynamic shared memory; the limit is %zu", dynamic_bytes, kDynamicBytes);
  if (shared > kSharedBytes) fail("%zu bytes of shared memory; the limit is %zu", shared, kSharedBytes);
  if (!grid.x || !grid.y || !grid.z || grid.y > kGridYZ || grid.z > kGridYZ)
    fail("a grid of (%u, %u, %u); the limit of y and z is %u", grid.x, grid.y, grid.z, kGridYZ);
  if (report[0]) return report;

  gridDim = grid, blockDim = block, kernel = std::move(body);
  fibers.resize(threads);
  stacks.resize(threads * kStackBytes);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (order_number == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(order_number);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        if (!run_block(order, order_number > 1, random)) return report;
      }
  return report;
}

template <class... Types, size_t... I>
void apply(void (*function)(Types...), void** arguments, std::index_sequence<I...>) {
  function(*static_cast<Types*>(arguments[I])...);
}

// `arguments` are the addresses of the values, as in the driver's cuLaunchKernel.
template <class... Types>
const char* launch(void (*function)(Types...), void** arguments, dim3 grid, dim3 block, unsigned order) {
  return launch(grid, block, order,
                [=] { apply(function, arguments, std::index_sequence_for<Types...>()); });
}

}  // namespace emulator

// The sanitizer's call-back, in place of its library. What `place` points at starts with the
// file and the line.
extern "C" void __ubsan_handle_out_of_bounds(void* place, void* index) {
  struct Location {
    const char* file;
    uint32_t line, column;
  };
  emulator::fail("index %zd outside a shared or local array, line %u",
                 reinterpret_cast<intptr_t>(index), static_cast<Location*>(place)->line);
  emulator::abandon();
}

#include "async_copies.h"
#include "cuda_functions.h"
