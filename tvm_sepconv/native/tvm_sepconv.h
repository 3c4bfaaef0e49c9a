/* tvm_sepconv: run compiled separable 1-D convolutions from C or any language that calls C.
 *
 *   tvm_sepconv_bundle* bundle;
 *   tvm_sepconv_layer* layer;
 *   if (tvm_sepconv_bundle_open("net.sepconv", NULL, &bundle) ||
 *       tvm_sepconv_bundle_layer(bundle, "conv1", &layer))
 *     return fprintf(stderr, "%s\n", tvm_sepconv_last_error()), 1;
 *   tvm_sepconv_view x = {input, steps * channels, channels};
 *   tvm_sepconv_view y = {output, tvm_sepconv_out_steps(layer, steps) * filters, filters};
 *   tvm_sepconv_run(layer, 1, steps, x, y);
 *
 * One runtime library serves a process: it owns the threads and the scratch memory. A layer is
 * immutable once created, so any number of threads may run one layer at the same time; the run
 * call does not allocate once a thread's scratch has grown to what its layers need, which
 * tvm_sepconv_prepare does beforehand. Functions that return a status give TVM_SEPCONV_OK or one of
 * the codes below, and tvm_sepconv_last_error() then says in words what was expected and what came.
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
  TVM_SEPCONV_ERROR_OVERLAP = 6,  /* the output shares memory with the input */
  TVM_SEPCONV_ERROR_BUNDLE = 7,   /* a bundle that is missing, damaged, of a newer format, or without such a layer */
  TVM_SEPCONV_ERROR_MACHINE = 8   /* a bundle that has nothing this machine can run */
} tvm_sepconv_status;

typedef enum {
  TVM_SEPCONV_VALID = 0,
  TVM_SEPCONV_SAME = 1,
  TVM_SEPCONV_EXPLICIT = 2 /* `left` and `right` zeros */
} tvm_sepconv_padding;

typedef enum {
  TVM_SEPCONV_FLOAT16 = 0,
  TVM_SEPCONV_BFLOAT16 = 1,
  TVM_SEPCONV_FLOAT32 = 2,
  TVM_SEPCONV_FLOAT64 = 3
} tvm_sepconv_dtype;

typedef struct tvm_sepconv_bundle tvm_sepconv_bundle;
typedef struct tvm_sepconv_layer tvm_sepconv_layer;

/* What went wrong in this thread's last failing call; valid until its next one. */
const char* tvm_sepconv_last_error(void);

/* Threads one call may use, the calling one included, at most 256. The default is
 * $TVM_SEPCONV_NUM_THREADS, else the smaller of the CPUs this process may use and its cgroup's quota.
 * Less than 1 restores it. More than there are CPUs take turns. */
void tvm_sepconv_set_num_threads(int threads);
int tvm_sepconv_num_threads(void);

/* Open the bundle in the folder `path`, which tvm_sepconv.save wrote in Python, and choose the best
 * libraries that this machine can run, or those of `target`, such as "aarch64-neon", if it is not
 * NULL. Every file that will be used is checked against the manifest; nothing of the bundle runs yet.
 * A relative `path` has to stay valid until the last layer is made. */
int tvm_sepconv_bundle_open(const char* path, const char* target, tvm_sepconv_bundle** bundle);
void tvm_sepconv_bundle_close(tvm_sepconv_bundle* bundle); /* its layers and threads stay */

/* The target chosen; the number of layers; the name of each, in UTF-8, NULL beyond the last. They are
 * valid until the bundle is closed. */
const char* tvm_sepconv_bundle_target(const tvm_sepconv_bundle* bundle);
int tvm_sepconv_bundle_layer_count(const tvm_sepconv_bundle* bundle);
const char* tvm_sepconv_bundle_layer_name(const tvm_sepconv_bundle* bundle, int index);

/* Make the layer of that name with its weights; NULL names the only one. It may outlive the bundle.
 * Refused: softmax, log_softmax, sparsemax, glu and activations with parameters of their own, which
 * Python computes after the kernel. */
int tvm_sepconv_bundle_layer(const tvm_sepconv_bundle* bundle, const char* name,
                             tvm_sepconv_layer** layer);

/* Open a compiled library and give it weights, in Keras's layouts and C order: depthwise (kernel_size,
 * channels, depth_multiplier), pointwise (channels * depth_multiplier, filters), bias (filters) or
 * NULL for a layer without one; float, or double for a float64 layer. They are copied. */
int tvm_sepconv_layer_create(const char* library_path, const void* depthwise, const void* pointwise,
                             const void* bias, tvm_sepconv_padding padding, int64_t left,
                             int64_t right, tvm_sepconv_layer** layer);
void tvm_sepconv_layer_destroy(tvm_sepconv_layer* layer);

/* What the layer takes and gives. */
typedef struct {
  int64_t channels, filters, kernel_size, strides, dilation_rate, depth_multiplier;
  tvm_sepconv_padding padding;
  int64_t left, right; /* zeros, if `padding` is TVM_SEPCONV_EXPLICIT */
  int channels_first, use_bias;
  tvm_sepconv_dtype dtype; /* of input and output */
  int element_bytes;
} tvm_sepconv_layer_info;
void tvm_sepconv_layer_describe(const tvm_sepconv_layer* layer, tvm_sepconv_layer_info* info);

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

/* Start the threads and give each its scratch, so that no run of this layer by the calling thread
 * allocates from now on, whatever its size, as long as the number of threads is not raised and the
 * process does not fork. Without it the first runs allocate. */
int tvm_sepconv_prepare(const tvm_sepconv_layer* layer);

#ifdef __cplusplus
}
#endif
#endif /* TVM_SEPCONV_H_ */
