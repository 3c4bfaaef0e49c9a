/* The call from Python: tensors in tvm-ffi's calling convention, checked, a status out. */
#include <tvm/ffi/c_api.h>

#include "runtime.h"

static const DLTensor* tensor_of(const TVMFFIAny* value) {
  if (value->type_index == kTVMFFIDLTensorPtr) return (const DLTensor*)value->v_ptr;
  if (value->type_index == kTVMFFITensor) return (const DLTensor*)((const char*)value->v_obj + sizeof(TVMFFIObject));
  return 0;
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

/* (layer handle, x, output) -> status. */
int __tvm_ffi_run(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self;
  result->type_index = kTVMFFIInt;
  result->v_int64 = TVM_SEPCONV_ERROR_TENSOR;
  if (count != 3 || args[0].type_index != kTVMFFIInt) return 0;
  const tvm_sepconv_layer* layer = (const tvm_sepconv_layer*)(intptr_t)args[0].v_int64;
  const tvm_sepconv_library* l = layer->library;
  const DLTensor *x = tensor_of(&args[1]), *y = tensor_of(&args[2]);
  const tvm_sepconv_view from = view_of(l, x), to = view_of(l, y);
  if (!x || !y || !from.data || !to.data) return 0;
  const int time = l->channels_first ? 2 : 1, depth = 3 - time;
  if (x->shape[depth] != l->channels || y->shape[depth] != l->filters || x->shape[0] != y->shape[0] ||
      y->shape[time] != tvm_sepconv_out_steps(layer, x->shape[time]))
    return 0;
  const int bytes = l->float_bits / 8;
  if (y->shape[0] > 0 && y->shape[time] > 0 && first_byte(from) < end_byte(to, y->shape, bytes) &&
      first_byte(to) < end_byte(from, x->shape, bytes)) {
    result->v_int64 = TVM_SEPCONV_ERROR_OVERLAP;
    return 0;
  }
  result->v_int64 = tvm_sepconv_run(layer, x->shape[0], x->shape[time], from, to);
  return 0;
}
