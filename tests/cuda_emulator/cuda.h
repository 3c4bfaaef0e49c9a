// Enough of CUDA to run one kernel's CUDA C on a CPU, found by its `#include <cuda.h>`.
//
// Every CUDA thread is a fiber. The threads of a block run one after another, each up to its next
// barrier, in an order the caller chooses: what one thread leaves for another without a barrier in
// between comes too early or too late in some order. Blocks run one after another. Shared memory is
// NaN at the start of each block. Reported: barriers that only part of a block reaches, indices
// outside shared and local arrays (compile with -fsanitize=bounds), limits of the device.
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
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("shared_memory")))
#define __syncthreads() emulator::barrier(__LINE__)

struct dim3 {
  unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" {  // the linker's names for the ends of the section
extern char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 48 << 10;
constexpr unsigned kThreads = 1024, kGridYZ = 65535;
constexpr int kRunning = 0, kDone = -1;  // a positive state is the line of a barrier

struct Fiber {
  ucontext_t context;
  int state;
};

static std::function<void()> kernel;
static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static ucontext_t scheduler;
static Fiber* current;
static char report[256];

inline void barrier(int line) {
  current->state = line;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  kernel();
  current->state = kDone;  // uc_link leads back to the scheduler
}

template <class... Values>
bool fail(const char* format, Values... values) {
  if (!report[0]) snprintf(report, sizeof report, format, values...);  // the first is the cause
  return false;
}

// Never comes back: what would follow a broken rule must not run in this process.
inline void abandon() { swapcontext(&current->context, &scheduler); }

inline bool run_block(std::vector<unsigned>& order, bool shuffle, std::mt19937& random) {
  if (__start_shared_memory)
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  for (size_t i = 0; i < fibers.size(); i++) {
    fibers[i].state = kRunning;
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = &stacks[i * kStackBytes];
    fibers[i].context.uc_stack.ss_size = kStackBytes;
    fibers[i].context.uc_link = &scheduler;
    makecontext(&fibers[i].context, enter, 0);
  }
  for (;;) {
    if (shuffle) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      current = &fibers[i];
      threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      swapcontext(&scheduler, &current->context);
      if (report[0]) return false;
    }
    int state = fibers[0].state;
    for (size_t i = 0; i < fibers.size(); i++)
      if (fibers[i].state != state)
        return fail("divergent barrier in block (%u, %u, %u): thread 0 is at line %d, %zu at %d (-1: done)",
                    blockIdx.x, blockIdx.y, blockIdx.z, state, i, fibers[i].state);
    if (state == kDone) return true;
  }
}

// Orders: 0 forward, 1 backward, any other a new shuffle after every barrier, with that seed.
inline const char* launch(dim3 grid, dim3 block, unsigned order_number, std::function<void()> body) {
  size_t threads = size_t(block.x) * block.y * block.z;
  size_t shared = __start_shared_memory ? __stop_shared_memory - __start_shared_memory : 0;
  report[0] = 0;
  if (!threads || threads > kThreads) fail("%zu threads a block; the limit is %u", threads, kThreads);
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
