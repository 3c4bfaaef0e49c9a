// bfloat16, for CUDA C that a CPU runs.
#pragma once
#include "cuda.h"

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(int) : bits(0) {}  // TVM's zeros
};
struct __attribute__((aligned(4))) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};

inline float __bfloat162float(nv_bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  nv_bfloat16 value;
  // To nearest, ties to even; a NaN stays one.
  value.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return value;
}
inline nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline bool __hgt(nv_bfloat16 x, nv_bfloat16 y) { return __bfloat162float(x) > __bfloat162float(y); }
inline bool __hlt(nv_bfloat16 x, nv_bfloat16 y) { return __bfloat162float(x) < __bfloat162float(y); }
