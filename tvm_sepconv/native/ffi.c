/* The calls in tvm-ffi's convention: `run` for Python, and what measuring on a board calls through TVM's RPC. No
 * function fails in the convention's sense, which takes libtvm_ffi: what went wrong is in the result. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "runtime.h"

static const DLTensor* tensor_of(const TVMFFIAny* value) {
  if (value->type_index == kTVMFFIDLTensorPtr) return (const DLTensor*)value->v_ptr;
  if (value->type_index == kTVMFFITensor) return (const DLTensor*)((const char*)value->v_obj + sizeof(TVMFFIObject));
  return 0;
}

/* NumPy's PyArrayObject and the head of its PyArray_Descr: the part of its binary interface that extensions compile
 * in. `reads_arrays` compares it with what there is, before anyone relies on it. */
typedef struct {
  void *references, *type, *element_type;
  char kind, letter, byte_order, flags;
  int number;
} numpy_dtype;

typedef struct {
  void *references, *type;
  char* data;
  int rank;
  intptr_t *shape, *strides; /* strides in bytes */
  void* base;
  const numpy_dtype* dtype;
  int flags;
} numpy_array;

/* A tensor made from an array, and its three extents and strides. */
typedef struct {
  DLTensor tensor;
  int64_t shape[3], strides[3];
} described;

/* Describe a 3-D array of floats in this machine's byte order; any other gives NULL. */
static const DLTensor* describe(const numpy_array* array, int writeable, described* d) {
  enum { WRITEABLE = 0x400, FLOAT = 11, DOUBLE = 12, HALF = 23 };
  if (array->rank != 3 || (writeable && !(array->flags & WRITEABLE)) || array->dtype->byte_order != '=') return 0;
  const int number = array->dtype->number;
  const int bytes = number == FLOAT ? 4 : number == DOUBLE ? 8 : number == HALF ? 2 : 0;
  if (!bytes) return 0;
  for (int i = 0; i < 3; ++i) {
    if (array->strides[i] % bytes) return 0;
    d->shape[i] = array->shape[i];
    d->strides[i] = array->strides[i] / bytes;
  }
  const DLTensor t = {array->data, {kDLCPU, 0}, 3, {kDLFloat, (uint8_t)(8 * bytes), 1}, d->shape, d->strides, 0};
  d->tensor = t;
  return &d->tensor;
}

/* An argument of `run`: a tensor, or a NumPy array by its address, which takes a tenth of the time. */
static const DLTensor* operand_of(const TVMFFIAny* value, int writeable, described* d) {
  if (value->type_index != kTVMFFIInt) return tensor_of(value);
  return describe((const numpy_array*)(intptr_t)value->v_int64, writeable, d);
}

/* A view of a 3-D CPU tensor of the layer's dtype whose rows are contiguous, or no data pointer. */
static tvm_sepconv_view view_of(const tvm_sepconv_library* l, const DLTensor* t) {
  const tvm_sepconv_view none = {0, 0, 0};
  if (!t || t->ndim != 3 || t->device.device_type != kDLCPU || t->dtype.lanes != 1 ||
      t->dtype.code != (l->bfloat ? kDLBfloat : kDLFloat) || t->dtype.bits != l->float_bits)
    return none;
  const int64_t* s = t->shape;
  if (((uintptr_t)t->data + t->byte_offset) % (uintptr_t)(l->float_bits / 8)) return none;
  tvm_sepconv_view view = {(char*)t->data + t->byte_offset, s[1] * s[2], s[2]};
  if (t->strides) {
    if (t->strides[2] != 1 && s[2] > 1) return none;
    if (t->strides[0] < 0 || t->strides[1] < 0) return none; /* `end_byte` counts upwards */
    view.batch_stride = t->strides[0];
    view.row_stride = t->strides[1];
  }
  return view;
}

static uintptr_t first_byte(tvm_sepconv_view v) { return (uintptr_t)v.data; }
static uintptr_t end_byte(tvm_sepconv_view v, const int64_t* shape, int bytes) {
  return first_byte(v) + (uintptr_t)((shape[0] - 1) * v.batch_stride + (shape[1] - 1) * v.row_stride +
                                     shape[2]) * (uintptr_t)bytes;
}

static int run(const TVMFFIAny* args, int32_t count) {
  if (count < 3 || args[0].type_index != kTVMFFIInt) return TVM_SEPCONV_ERROR_TENSOR;
  const tvm_sepconv_layer* layer = (const tvm_sepconv_layer*)(intptr_t)args[0].v_int64;
  const tvm_sepconv_library* l = layer->library;
  described arrays[2];
  const DLTensor *x = operand_of(&args[1], 0, &arrays[0]), *y = operand_of(&args[2], 1, &arrays[1]);
  const tvm_sepconv_view from = view_of(l, x), to = view_of(l, y);
  if (!x || !y || !from.data || !to.data) return TVM_SEPCONV_ERROR_TENSOR;
  const int time = l->channels_first ? 2 : 1, depth = 3 - time;
  if (x->shape[depth] != l->channels || y->shape[depth] != l->filters || x->shape[0] != y->shape[0] ||
      y->shape[time] != tvm_sepconv_out_steps(layer, x->shape[time]))
    return TVM_SEPCONV_ERROR_TENSOR;
  const int bytes = l->float_bits / 8;
  if (y->shape[0] > 0 && y->shape[time] > 0 && first_byte(from) < end_byte(to, y->shape, bytes) &&
      first_byte(to) < end_byte(from, x->shape, bytes))
    return TVM_SEPCONV_ERROR_OVERLAP;
  return tvm_sepconv_run(layer, x->shape[0], x->shape[time], from, to);
}

static int answer(TVMFFIAny* result, int64_t value) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
  return 0;
}

/* (layer handle, x, output) -> status. */
int __tvm_ffi_run(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  return answer(result, count == 3 ? run(args, count) : TVM_SEPCONV_ERROR_TENSOR);
}

static int same(const DLTensor* a, const DLTensor* b) {
  int equal = a->dtype.code == b->dtype.code && a->dtype.bits == b->dtype.bits && a->dtype.lanes == b->dtype.lanes;
  for (int i = 0; i < 3; ++i) equal &= a->shape[i] == b->shape[i] && a->strides[i] == b->strides[i];
  return equal;
}

/* (address of a 3-D NumPy array, address of a read-only view of it, the array as a tensor) -> whether `run` can take
 * arrays by their addresses: it finds in both what the tensor says. */
int __tvm_ffi_reads_arrays(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  described sizes[2];
  const DLTensor* t = count == 3 ? tensor_of(&args[2]) : 0;
  const numpy_array* array = (const numpy_array*)(intptr_t)args[0].v_int64;
  /* Pointers are followed only where the fields beside them are right. */
  if (!t || t->ndim != 3 || !t->strides || array->rank != 3 || array->data != (char*)t->data + t->byte_offset)
    return answer(result, 0);
  const DLTensor *a = operand_of(&args[0], 1, &sizes[0]), *frozen = operand_of(&args[1], 0, &sizes[1]);
  if (!a || !frozen || !same(a, t) || !same(frozen, t)) return answer(result, 0);
  return answer(result, !operand_of(&args[1], 1, &sizes[1]));
}

/* ---- for boards ----------------------------------------------------------------------------- */

static const char* text_of(const TVMFFIAny* value) {
  if (value->type_index == kTVMFFIRawStr) return value->v_c_str;
  if (value->type_index == kTVMFFISmallStr) return value->v_bytes;
  if (value->type_index != kTVMFFIStr) return 0;
  return ((const TVMFFIByteArray*)((const char*)value->v_obj + sizeof(TVMFFIObject)))->data;
}

/* The memory of a CPU tensor, which the caller has made compact, or NULL. */
static char* bytes_of(const TVMFFIAny* value) {
  const DLTensor* t = tensor_of(value);
  return t && t->device.device_type == kDLCPU ? (char*)t->data + t->byte_offset : 0;
}

/* (library path, depthwise, pointwise, bias or None, padding, left, right) -> layer handle, or 0. The weights are
 * compact and of the library's sizes, as for tvm_sepconv_layer_create. */
int __tvm_ffi_create(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  tvm_sepconv_layer* layer = 0;
  if (count == 7)
    tvm_sepconv_layer_create(text_of(&args[0]), bytes_of(&args[1]), bytes_of(&args[2]), bytes_of(&args[3]),
                             (tvm_sepconv_padding)args[4].v_int64, args[5].v_int64, args[6].v_int64, &layer);
  return answer(result, (intptr_t)layer);
}

/* (layer handle) -> 0. */
int __tvm_ffi_destroy(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  if (count == 1) tvm_sepconv_layer_destroy((tvm_sepconv_layer*)(intptr_t)args[0].v_int64);
  return answer(result, 0);
}

/* (threads) -> the threads a call uses from now on. */
int __tvm_ffi_set_num_threads(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  if (count == 1) tvm_sepconv_set_num_threads((int)args[0].v_int64);
  return answer(result, tvm_sepconv_num_threads());
}

/* (layer handle, x, output, seconds) -> status of `run`, or minus the signal that ended it. Runs in a copy of this
 * process: an illegal instruction must not cost the board its server, nor an endless loop. The output is not seen. */
int __tvm_ffi_try_run(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  if (count != 4) return answer(result, TVM_SEPCONV_ERROR_TENSOR);
  const pid_t child = fork();
  if (child < 0) return answer(result, TVM_SEPCONV_ERROR_MEMORY);
  if (!child) {
    static const int crashes[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGALRM};
    for (int i = 0; i < 6; ++i) signal(crashes[i], SIG_DFL); /* TVM's handlers would tell of it at length */
    alarm((unsigned)args[3].v_int64);
    _exit(run(args, count));
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return answer(result, -SIGINT);
  return answer(result, WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
}

/* (path, tensor of bytes) -> bytes read, -1 if the file cannot be opened: what /proc and /sys say of the board. */
int __tvm_ffi_read_file(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  FILE* file = count == 2 && text_of(&args[0]) ? fopen(text_of(&args[0]), "re") : NULL;
  if (!file) return answer(result, -1);
  const DLTensor* t = tensor_of(&args[1]);
  const size_t size = t ? fread(bytes_of(&args[1]), 1, (size_t)t->shape[0], file) : 0;
  fclose(file);
  return answer(result, (int64_t)size);
}

/* (tensor of bytes) -> the length of the last error's text, which it is given. */
int __tvm_ffi_last_error(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  const char* text = tvm_sepconv_last_error();
  const size_t length = strlen(text);
  const DLTensor* t = count == 1 ? tensor_of(args) : NULL;
  if (t && (int64_t)length <= t->shape[0]) memcpy(bytes_of(args), text, length);
  return answer(result, (int64_t)length);
}
