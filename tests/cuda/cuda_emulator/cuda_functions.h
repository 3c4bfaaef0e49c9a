// "The machine" of tvm_sepconv/compiler/cuda_functions.cuh for a CPU; the rest of it runs as it stands.
//
// A warp's functions exchange their arguments at a rendezvous of its 32 lanes. Reported besides what
// cuda.h reports: lanes of a warp that call different functions, addresses that are not aligned as
// the instruction demands, offsets outside shared memory, instructions that __CUDA_ARCH__ lacks, and
// data of an asynchronous copy that is read or overwritten before its thread has waited for it. A
// copy is made when it is waited for; until then its destination is NaN. Sums are exact products
// added in float32, one by one.
#pragma once
#define SEPCONV_EMULATED

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator::functions {

inline void need_sm_80(const char* name) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  fail("%s: no such instruction before sm_80", name);
  abandon();
#endif
}

// Marks bytes of shared memory that a copy under way will fill.
static bool pending[kDynamicBytes];

inline void check(const char* name, const unsigned char* shared, int offset, int bytes, int alignment) {
  const int64_t at = shared + offset - dynamic_shared;
  if (at < 0 || at + bytes > int64_t(dynamic_bytes))
    fail("%s: bytes %lld to %lld of %zu of shared memory", name, (long long)at,
         (long long)at + bytes, dynamic_bytes);
  else if (at % alignment)
    fail("%s: byte %lld of shared memory is not aligned to %d", name, (long long)at, alignment);
  else if (memchr(pending + at, 1, bytes))
    fail("%s: byte %lld of shared memory waits for an asynchronous copy", name, (long long)at);
  if (report[0]) abandon();
}

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes, all;
};

static std::vector<Copy> of_threads[kThreads];

inline std::vector<Copy>& copies() { return of_threads[current - fibers.data()]; }

inline void start_block() {
  memset(pending, 0, sizeof pending);
  for (auto& copies : of_threads) copies.clear();
}

inline bool finish_block() {
  for (size_t i = 0; i < fibers.size(); i++)
    if (!of_threads[i].empty())
      return fail("thread %zu never waits for its asynchronous copies", i);
  return true;
}

inline void copy_later(const char* name, unsigned char* shared, int offset, const void* from,
                       int bytes, int all) {
  need_sm_80(name);
  check(name, shared, offset, all, all);
  if (bytes && reinterpret_cast<uintptr_t>(from) % all)
    fail("%s: the source is not aligned to %d", name, all);
  if (bytes < 0 || bytes > all) fail("%s: %d bytes of %d", name, bytes, all);
  if (report[0]) abandon();
  memset(shared + offset, 0xff, all);
  memset(pending + (shared + offset - dynamic_shared), 1, all);
  copies().push_back({shared + offset, from, bytes, all});
}

// The elements of one operand register, as the multiplier sees them.
template <class Element>
void elements(float* to, unsigned word) {
  if constexpr (sizeof(Element) == 4) {
    word &= ~0x1fffu;
    memcpy(to, &word, 4);
  } else {
    Element pair[2];
    memcpy(pair, &word, 4);
    for (int i = 0; i < 2; i++)
      if constexpr (std::is_same_v<Element, half>) to[i] = __half2float(pair[i]);
      else to[i] = __bfloat162float(pair[i]);
  }
}

inline void matrices(const char* name, unsigned* to, const unsigned char* shared, int offset, bool transposed) {
  check(name, shared, offset, 16, 16);
  const unsigned char* row = shared + offset;
  unsigned words[2];
  memcpy(words, &row, sizeof row);
  const auto all = exchange(name, words, 2);
  const unsigned lane = (current - fibers.data()) % 32;
  for (int i = 0; i < 4; i++) {
    uint16_t halves[2];
    for (int j = 0; j < 2; j++) {
      const unsigned down = transposed ? lane % 4 * 2 + j : lane / 4;
      const unsigned along = transposed ? lane / 4 : lane % 4 * 2 + j;
      memcpy(&row, all[8 * i + down], sizeof row);
      memcpy(&halves[j], row + 2 * along, 2);
    }
    memcpy(&to[i], halves, 4);
  }
}

}  // namespace emulator::functions

template <class Type, class Given>
Type& sepconv_as(Given* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Type)) {
    emulator::fail("sepconv_as: the address is not aligned to %d", int(sizeof(Type)));
    emulator::abandon();
  }
  return *reinterpret_cast<Type*>(address);
}

template <class Type, class Byte>
Type& sepconv_at(Byte* shared, int offset) {
  emulator::functions::check("sepconv_at", shared, offset, sizeof(Type), sizeof(Type));
  return *reinterpret_cast<Type*>(shared + offset);
}

inline void sepconv_cp_async_16(unsigned char* shared, int offset, const void* from, int bytes) {
  emulator::functions::copy_later("sepconv_cp_async_16", shared, offset, from, bytes, 16);
}

inline void sepconv_cp_async_4(unsigned char* shared, int offset, const void* from, int bytes) {
  emulator::functions::copy_later("sepconv_cp_async_4", shared, offset, from, bytes, 4);
}

inline void sepconv_cp_async_wait() {
  for (const auto& copy : emulator::functions::copies()) {
    memset(copy.to, 0, copy.all);
    memcpy(copy.to, copy.from, copy.bytes);
    memset(emulator::functions::pending + (copy.to - emulator::dynamic_shared), 0, copy.all);
  }
  emulator::functions::copies().clear();
}

inline unsigned sepconv_round_tf32(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

inline void sepconv_matrices(unsigned* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::matrices("sepconv_matrices", to + at, shared, offset, false);
}

inline void sepconv_matrices_transposed(unsigned* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::matrices("sepconv_matrices_transposed", to + at, shared, offset, true);
}

template <class Element, int count>
void sepconv_mma(float* sums, const unsigned* a, const unsigned* b) {
  if (count == 2) emulator::functions::need_sm_80("sepconv_mma");
  constexpr int per = 4 / sizeof(Element);  // elements of a register
  unsigned words[3 * count];
  memcpy(words, a, 8 * count), memcpy(words + 2 * count, b, 4 * count);
  const auto all = emulator::exchange("sepconv_mma", words, 3 * count);
  const unsigned lane = (emulator::current - emulator::fibers.data()) % 32;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      const unsigned row = lane / 4, column = lane % 4 * 2 + j;
      for (int h = 0; h < count; h++)
        for (int place = 0; place < 4; place++) {
          float x[2], y[2];
          emulator::functions::elements<Element>(x, all[4 * row + place][2 * h + i]);
          emulator::functions::elements<Element>(y, all[4 * column + place][2 * count + h]);
          for (int e = 0; e < per; e++) sums[2 * i + j] += x[e] * y[e];
        }
    }
}

// CUDA's own.
template <class Type>
Type __ldg(const Type* address) { return *address; }

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline unsigned __shfl_sync(unsigned, unsigned word, int lane) {
  return emulator::exchange("__shfl_sync", &word, 1)[lane % 32][0];
}
