// The device functions of tvm_sepconv/compiler/cuda_functions.cuh for a CPU, under its guard.
//
// A warp's functions exchange their arguments at a rendezvous of its 32 lanes. Reported besides what
// cuda.h reports: lanes of a warp that call different functions, addresses that are not aligned as
// the instruction demands, offsets outside shared memory, and data of an asynchronous copy that is
// read or overwritten before its thread has waited for it. A copy is made when it is waited for;
// until then its destination is NaN. Sums are exact products added in float32, one by one.
#pragma once
#define TVM_SEPCONV_CUDA_FUNCTIONS

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator::functions {

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
  check(name, shared, offset, all, all);
  if (bytes && reinterpret_cast<uintptr_t>(from) % all)
    fail("%s: the source is not aligned to %d", name, all);
  if (bytes < 0 || bytes > all) fail("%s: %d bytes of %d", name, bytes, all);
  if (report[0]) abandon();
  memset(shared + offset, 0xff, all);
  memset(pending + (shared + offset - dynamic_shared), 1, all);
  copies().push_back({shared + offset, from, bytes, all});
}

inline float widen(float x) { return x; }
inline float widen(half x) { return __half2float(x); }
inline float widen(nv_bfloat16 x) { return __bfloat162float(x); }
inline void narrow(float* to, float x) { *to = x; }
inline void narrow(half* to, float x) { *to = __float2half_rn(x); }
inline void narrow(nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

inline unsigned bits(float x) {
  unsigned result;
  memcpy(&result, &x, 4);
  return result;
}

inline unsigned round_tf32(float x) {
  const unsigned exponent = bits(x) & 0x7f800000;
  return exponent == 0x7f800000 ? bits(x) : (bits(x) + 0x1000) & ~0x1fffu;
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
    to[0] = widen(pair[0]), to[1] = widen(pair[1]);
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

template <class Element>
void sepconv_copy_async_16(unsigned char* shared, int offset, const Element* from, bool inside) {
  emulator::functions::copy_later("sepconv_copy_async_16", shared, offset, from, inside ? 16 : 0, 16);
}

template <class Element>
void sepconv_copy_async_4(unsigned char* shared, int offset, const Element* from, int bytes) {
  emulator::functions::copy_later("sepconv_copy_async_4", shared, offset, from, bytes, 4);
}

template <class Element>
void sepconv_copy(unsigned char* shared, int offset, const Element* from, bool inside) {
  emulator::functions::check("sepconv_copy", shared, offset, sizeof(Element), sizeof(Element));
  memset(shared + offset, 0, sizeof(Element));
  if (inside) memcpy(shared + offset, from, sizeof(Element));
}

inline void sepconv_wait() {
  for (const auto& copy : emulator::functions::copies()) {
    memset(copy.to, 0, copy.all);
    memcpy(copy.to, copy.from, copy.bytes);
    memset(emulator::functions::pending + (copy.to - emulator::dynamic_shared), 0, copy.all);
  }
  emulator::functions::copies().clear();
}

template <class Element, int count>
void sepconv_read(float* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::check("sepconv_read", shared, offset, count * sizeof(Element), count * sizeof(Element));
  Element values[count];
  memcpy(values, shared + offset, sizeof values);
  for (int i = 0; i < count; i++) to[at + i] = emulator::functions::widen(values[i]);
}

template <class Element>
float sepconv_fetch(const Element* from, bool inside) {
  return inside ? emulator::functions::widen(*from) : 0.0f;
}

template <int count>
void sepconv_weights(float* to, const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % (4 * count)) {
    emulator::fail("sepconv_weights: the source is not aligned to %d", 4 * count);
    emulator::abandon();
  }
  memcpy(to, from, 4 * count);
}

template <class Element, int count>
void sepconv_leave(unsigned char* shared, int offset, const float* sums, int at) {
  emulator::functions::check("sepconv_leave", shared, offset, count * sizeof(Element), count * sizeof(Element));
  Element values[count];
  for (int i = 0; i < count; i++) {
    if constexpr (sizeof(Element) == 4) {
      const unsigned word = emulator::functions::round_tf32(sums[at + i]);
      memcpy(&values[i], &word, 4);
    } else {
      emulator::functions::narrow(&values[i], sums[at + i]);
    }
  }
  memcpy(shared + offset, values, sizeof values);
}

inline void sepconv_matrices(unsigned* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::matrices("sepconv_matrices", to + at, shared, offset, false);
}

inline void sepconv_matrices_transposed(unsigned* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::matrices("sepconv_matrices_transposed", to + at, shared, offset, true);
}

inline void sepconv_element_tf32(unsigned* to, int at, const unsigned char* shared, int offset) {
  emulator::functions::check("sepconv_element_tf32", shared, offset, 4, 4);
  float value;
  memcpy(&value, shared + offset, 4);
  to[at] = emulator::functions::round_tf32(value);
}

template <class Element>
void sepconv_multiply(float* sums, int first, const unsigned* a, int first_a, const unsigned* b, int first_b) {
  constexpr int per = 4 / sizeof(Element);  // elements of a register
  unsigned words[6];
  memcpy(words, a + first_a, 16), memcpy(words + 4, b + first_b, 8);
  const auto all = emulator::exchange("sepconv_multiply", words, 6);
  const unsigned lane = (emulator::current - emulator::fibers.data()) % 32;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      float& sum = sums[first + 2 * i + j];
      const unsigned row = lane / 4, column = lane % 4 * 2 + j;
      for (int h = 0; h < 2; h++)
        for (int place = 0; place < 4; place++) {
          float x[2], y[2];
          emulator::functions::elements<Element>(x, all[4 * row + place][2 * h + i]);
          emulator::functions::elements<Element>(y, all[4 * column + place][4 + h]);
          for (int e = 0; e < per; e++) sum += x[e] * y[e];
        }
    }
}

template <class Element>
void sepconv_put(Element* to, float value) {
  emulator::functions::narrow(to, value);
}

template <class Element>
void sepconv_put_pair(Element* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % (2 * sizeof(Element))) {
    emulator::fail("sepconv_put_pair: the target is not aligned to %d", int(2 * sizeof(Element)));
    emulator::abandon();
  }
  emulator::functions::narrow(to, first), emulator::functions::narrow(to + 1, second);
}
