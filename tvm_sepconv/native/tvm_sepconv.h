/* tvm_sepconv: run compiled separable 1-D convolutions from C or any language that calls C.
 *
 * One runtime library serves a process: it owns the threads and the scratch memory. A layer is
 * immutable once created, so any number of threads may run one layer at the same time; the run
 * call does not allocate once a thread's scratch has grown to what its layers need. Functions that
 * return a status give TVM_SEPCONV_OK or one of the codes below, and tvm_sepconv_last_error() then
 * says in words what was expected and what came.
 *
 * The runtime library names no C library, so that one build serves old and new systems: a host program on a
 * system with a glibc before 2.34 links with -ldl -lpthread.
 */
#ifndef TVM_SEPCONV_H_
#define TVM_SEPCONV_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows whenever a library built before could no longer be run; checked when one is opened. */
#define TVM_SEPCONV_ABI 2

typedef enum {
  TVM_SEPCONV_OK = 0,
  TVM_SEPCONV_ERROR_LIBRARY = 1,  /* the file cannot be opened or is not one of ours */
  TVM_SEPCONV_ERROR_ABI = 2,      /* built for another version of this runtime */
  TVM_SEPCONV_ERROR_MEMORY = 3,   /* out of memory */
  TVM_SEPCONV_ERROR_ARGUMENT = 4, /* a size, stride or pointer that cannot be served */
  TVM_SEPCONV_ERROR_TENSOR = 5,   /* a tensor of another rank, dtype, device or layout */
  TVM_SEPCONV_ERROR_OVERLAP = 6   /* the output shares memory with the input */
} tvm_sepconv_status;

typedef enum {
  TVM_SEPCONV_VALID = 0,
  TVM_SEPCONV_SAME = 1,
  TVM_SEPCONV_EXPLICIT = 2 /* `left` and `right` zeros */
} tvm_sepconv_padding;

typedef struct tvm_sepconv_layer tvm_sepconv_layer;

/* What went wrong in this thread's last failing call; valid until its next one. */
const char* tvm_sepconv_last_error(void);

/* Threads one call may use, the calling one included. The default is $TVM_SEPCONV_NUM_THREADS, else
 * the smaller of the CPUs this process may use and its cgroup's quota. Less than 1 restores it. */
void tvm_sepconv_set_num_threads(int threads);
int tvm_sepconv_num_threads(void);

/* Open a compiled library and give it weights, in Keras's layouts and C order: depthwise (kernel_size,
 * channels, depth_multiplier), pointwise (channels * depth_multiplier, filters), bias (filters) or
 * NULL for a layer without one; float, or double for a float64 layer. They are copied. */
int tvm_sepconv_layer_create(const char* library_path, const void* depthwise, const void* pointwise,
                             const void* bias, tvm_sepconv_padding padding, int64_t left,
                             int64_t right, tvm_sepconv_layer** layer);
void tvm_sepconv_layer_destroy(tvm_sepconv_layer* layer);

/* Output steps for so many input steps; 0 when the kernel does not fit into them. */
int64_t tvm_sepconv_out_steps(const tvm_sepconv_layer* layer, int64_t steps);

/* Run on `batch` samples. Rows are steps (channels_last, one row = all channels or filters) or
 * channels and filters (channels_first, one row = all steps); elements of a row are contiguous,
 * strides are in elements; row strides are not negative and no two outputs may overlap. */
typedef struct {
  void* data;
  int64_t batch_stride, row_stride;
} tvm_sepconv_view;
int tvm_sepconv_run(const tvm_sepconv_layer* layer, int64_t batch, int64_t steps,
                    tvm_sepconv_view x, tvm_sepconv_view y);

#ifdef __cplusplus
}
#endif
#endif /* TVM_SEPCONV_H_ */
