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

#endif /* TVM_SEPCONV_RUNTIME_H_ */
