/* What a compiled library tells the runtime: one exported symbol, `tvm_sepconv_description`. */
#ifndef TVM_SEPCONV_LIBRARY_H_
#define TVM_SEPCONV_LIBRARY_H_

#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

#if defined(__arm__)
/* Named by the unwind tables of 32-bit ARM code; no exception ever passes through ours. */
__attribute__((weak, visibility("hidden"))) void __aeabi_unwind_cpp_pr0(void) {}
__attribute__((weak, visibility("hidden"))) void __aeabi_unwind_cpp_pr1(void) {}
#endif

/* One kernel: computes any number of steps, `step_tile` at a time, serially; in channels_first any number of
 * whole vectors of steps. Its interior form, if any, reads the input where it lies: for whole tiles no tap of
 * which leaves the input. */
typedef struct {
  int32_t step_tile;
  double cost; /* of one tile, in cycles as the schedule estimates them; only ratios count */
  TVMFFISafeCallType kernel, interior;
} tvm_sepconv_variant;

typedef struct {
  int32_t abi;
  int32_t channels, filters, kernel_size, strides, dilation_rate, depth_multiplier;
  int32_t channels_first, use_bias;
  int32_t float_bits;       /* of x and y: 16, 32, 64 */
  int32_t bfloat;           /* 1 if the 16 bits are a bfloat16 */
  int32_t accumulator_bits; /* of the packed weights: 32, 64 */
  int32_t lanes;            /* of the weight packing */
  int32_t variant_count;
  const tvm_sepconv_variant* variants; /* longest tile first; in channels_first the last is of `lanes` steps */
  TVMFFISafeCallType ragged; /* in channels_first: less than a vector of steps */
} tvm_sepconv_library;

#endif /* TVM_SEPCONV_LIBRARY_H_ */
