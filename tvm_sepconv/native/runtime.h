/* A layer as the runtime's own files see it. */
#ifndef TVM_SEPCONV_RUNTIME_H_
#define TVM_SEPCONV_RUNTIME_H_

#include "library.h"
#include "tvm_sepconv.h"

struct tvm_sepconv_layer {
  void* handle;
  const tvm_sepconv_library* library;
  tvm_sepconv_padding padding;
  int64_t left, right;
  void *depthwise, *pointwise, *bias; /* packed */
  int64_t depthwise_shape[3], pointwise_shape[3], bias_shape[1];
};

static inline int64_t effective_kernel(const tvm_sepconv_library* l) {
  return (int64_t)(l->kernel_size - 1) * l->dilation_rate + 1;
}

#pragma GCC visibility push(hidden)

/* Keep the text for tvm_sepconv_last_error and return `status`. */
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

/* The halves of tvm_sepconv_layer_create: a layer without weights, whose library says what they are; its weights. */
int layer_open(const char* library_path, tvm_sepconv_padding padding, int64_t left, int64_t right,
               tvm_sepconv_layer** layer);
int layer_pack(tvm_sepconv_layer* layer, const void* depthwise, const void* pointwise, const void* bias);

#pragma GCC visibility pop

#endif /* TVM_SEPCONV_RUNTIME_H_ */
