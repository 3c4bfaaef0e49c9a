// cp.async as TVM 0.27 calls it. A copy happens when its group is waited for, and not before: until
// then its destination is NaN, so that a wait or a barrier too few changes the answer.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <vector>

namespace emulator {

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
  int bytes;
};

struct Copies {  // of one thread, oldest group first; the last group is still open
  std::vector<std::vector<Copy>> groups{{}};
};

static std::map<std::tuple<unsigned, unsigned, unsigned>, Copies> copies;
static std::tuple<unsigned, unsigned, unsigned> copies_block;

inline Copies& thread_copies() {
  auto block = std::make_tuple(blockIdx.x, blockIdx.y, blockIdx.z);
  if (block != copies_block) copies.clear(), copies_block = block;
  return copies[std::make_tuple(threadIdx.x, threadIdx.y, threadIdx.z)];
}

inline void copy_later(void* to, const void* from, int bytes, bool inside) {
  for (auto end : {static_cast<const void*>(to), inside ? from : nullptr})
    if (reinterpret_cast<uintptr_t>(end) % bytes) {
      fail("cp.async of %d bytes from %p to %p, which are not aligned to that", bytes, from, to);
      abandon();
    }
  memset(to, 0xff, bytes);
  const char* source = inside ? static_cast<const char*>(from) : nullptr;
  thread_copies().groups.back().push_back({static_cast<char*>(to), source, bytes});
}

inline void commit() { thread_copies().groups.emplace_back(); }

inline void wait(size_t newest) {  // for all closed groups but so many
  auto& groups = thread_copies().groups;
  while (groups.size() > newest + 1) {
    for (const Copy& c : groups.front())
      if (c.from) memcpy(c.to, c.from, c.bytes);
      else memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

#define EMULATED_COPY(name, bytes, to_bytes, from_bytes)                                           \
  inline void ptx_cp_async_legacy_##name##_##bytes##_##to_bytes##_##from_bytes(                    \
      void* to, int i, const void* from, int j) {                                                  \
    emulator::copy_later((char*)to + i * to_bytes, (const char*)from + j * from_bytes, bytes, true); \
  }                                                                                                \
  inline void ptx_cp_async_legacy_pred_##name##_##bytes##_##to_bytes##_##from_bytes(               \
      void* to, int i, const void* from, int j, int inside) {                                      \
    emulator::copy_later((char*)to + i * to_bytes, inside ? (const char*)from + j * from_bytes : nullptr, \
                         bytes, inside);                                                           \
  }
EMULATED_COPY(ca, 4, 4, 4)
EMULATED_COPY(cg, 16, 4, 4)
#undef EMULATED_COPY

inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() { emulator::commit(); }
#define EMULATED_WAIT(n) \
  inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##n() { emulator::wait(n); }
EMULATED_WAIT(0)
EMULATED_WAIT(1)
EMULATED_WAIT(2)
#undef EMULATED_WAIT
