// half, for CUDA C that a CPU runs.
#pragma once
#include "cuda.h"

using half = _Float16;
using __half = _Float16;
struct __attribute__((aligned(4))) half2 {
  half x, y;
};
using __half2 = half2;

inline float __half2float(half x) { return float(x); }
inline half __float2half(float x) { return half(x); }
inline half __float2half_rn(float x) { return half(x); }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline bool __hgt(half x, half y) { return x > y; }
inline bool __hlt(half x, half y) { return x < y; }
