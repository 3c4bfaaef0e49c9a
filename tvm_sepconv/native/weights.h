/* Weights from a file in the safetensors format. */
#ifndef TVM_SEPCONV_WEIGHTS_H_
#define TVM_SEPCONV_WEIGHTS_H_

#include "json.h"
#include "tvm_sepconv.h"

#pragma GCC visibility push(hidden)

typedef struct {
  const char* data; /* of the tensors, one after the other */
  size_t bytes;
  json* header;
} weights;

/* Read the header of a file in memory, which has to outlive `w`; free `w->header` in the end. Returns 0 for a file
 * that is none. */
int weights_read(weights* w, const char* file, size_t bytes);

/* The tensor `<layer>/<name>` for free(), in C order: rounded to `dtype`, then kept as double if that is float64, else
 * as float. NULL if there is none of `rank` and `shape` (*found is 0 then), or no memory. */
void* weights_tensor(const weights* w, const char* layer, const char* name, int rank, const int64_t* shape,
                     tvm_sepconv_dtype dtype, int* found);

#pragma GCC visibility pop

#endif /* TVM_SEPCONV_WEIGHTS_H_ */
