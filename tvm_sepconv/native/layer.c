/* Compiled layers: libraries opened and checked, weights packed, sizes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "runtime.h"

static __thread char error_text[512];

const char* tvm_sepconv_last_error(void) { return error_text; }

int fail(int status, const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(error_text, sizeof error_text, format, list);
  va_end(list);
  return status;
}

/* ---- weights -------------------------------------------------------------------------------- */

static void put(const tvm_sepconv_library* l, void* to, int64_t at, const void* from, int64_t index) {
  if (l->accumulator_bits == 64) ((double*)to)[at] = ((const double*)from)[index];
  else ((float*)to)[at] = ((const float*)from)[index];
}

static void* zeros(const int64_t* shape, int rank, int bits) {
  size_t bytes = (size_t)bits / 8;
  for (int i = 0; i < rank; ++i) bytes *= (size_t)shape[i];
  void* memory = NULL;
  if (posix_memalign(&memory, 64, bytes ? bytes : 64)) return NULL;
  return memset(memory, 0, bytes);
}

/* Keras's (k, c, m) to (k, m, c'), (c·m, f) to (f'/lanes, m·c, lanes), (f) to (f'); see compute.py. */
int layer_pack(tvm_sepconv_layer* y, const void* depthwise, const void* pointwise, const void* bias) {
  const tvm_sepconv_library* l = y->library;
  if (l->use_bias != (bias != NULL))
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`bias` must be given if the layer has one, else NULL: it %s.",
                l->use_bias ? "has one" : "has none");
  const int64_t k = l->kernel_size, c = l->channels, m = l->depth_multiplier, f = l->filters;
  const int64_t v = l->lanes, lined = l->channels_first ? c : (c + v - 1) / v * v;
  const int64_t shapes[] = {k, m, lined, (f + v - 1) / v, m * c, v};
  memcpy(y->depthwise_shape, shapes, sizeof y->depthwise_shape);
  memcpy(y->pointwise_shape, shapes + 3, sizeof y->pointwise_shape);
  y->bias_shape[0] = shapes[3] * v;
  y->depthwise = zeros(y->depthwise_shape, 3, l->accumulator_bits);
  y->pointwise = zeros(y->pointwise_shape, 3, l->accumulator_bits);
  y->bias = zeros(y->bias_shape, 1, l->accumulator_bits);
  if (!y->depthwise || !y->pointwise || !y->bias)
    return fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory for the packed weights.");
  for (int64_t tap = 0; tap < k; ++tap)
    for (int64_t ch = 0; ch < c; ++ch)
      for (int64_t j = 0; j < m; ++j)
        put(l, y->depthwise, (tap * m + j) * lined + ch, depthwise, (tap * c + ch) * m + j);
  for (int64_t ch = 0; ch < c; ++ch)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = 0; i < f; ++i)
        put(l, y->pointwise, (i / v * m * c + j * c + ch) * v + i % v, pointwise, (ch * m + j) * f + i);
  for (int64_t i = 0; bias && i < f; ++i) put(l, y->bias, i, bias, i);
  return TVM_SEPCONV_OK;
}

/* ---- layers --------------------------------------------------------------------------------- */

static void fill_slot(void* handle, const char* name, void* function) {
  void** slot = dlsym(handle, name);
  if (slot) *slot = function; /* absent: this library's kernels need no scratch */
}

#if defined(__x86_64__)
enum { MACHINE = EM_X86_64 };
#elif defined(__aarch64__)
enum { MACHINE = EM_AARCH64 };
#else
enum { MACHINE = EM_ARM };
#endif

/* Why a file cannot be opened as a library, as far as dlopen ends in SIGBUS or says nothing helpful; else NULL. */
static const char* unfit(const char* path) {
  ElfW(Ehdr) header;
  FILE* file = fopen(path, "re");
  if (!file) return NULL; /* dlopen says why, or finds it elsewhere */
  const size_t read = fread(&header, 1, sizeof header, file);
  const uint64_t size = fseek(file, 0, SEEK_END) ? 0 : (uint64_t)ftell(file);
  fclose(file);
  if (read < sizeof header) return "is truncated";
  if (memcmp(header.e_ident, ELFMAG, SELFMAG)) return "is no shared library";
  if (header.e_ident[EI_CLASS] != (sizeof(void*) == 8 ? ELFCLASS64 : ELFCLASS32) || header.e_machine != MACHINE)
    return "is for another instruction set or word size than this process";
  /* The section headers come last. */
  return size < header.e_shoff + (uint64_t)header.e_shnum * header.e_shentsize ? "is truncated" : NULL;
}

static int open_library(const char* path, tvm_sepconv_layer* layer) {
  const char* reason = unfit(path);
  if (reason) return fail(TVM_SEPCONV_ERROR_LIBRARY, "The library cannot be opened: %s %s.", path, reason);
  layer->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!layer->handle)
    return fail(TVM_SEPCONV_ERROR_LIBRARY, "The library cannot be opened: %s", dlerror());
  layer->library = dlsym(layer->handle, "tvm_sepconv_description");
  if (!layer->library)
    return fail(TVM_SEPCONV_ERROR_LIBRARY, "%s is not a compiled tvm_sepconv library.", path);
  if (layer->library->abi != TVM_SEPCONV_ABI)
    return fail(TVM_SEPCONV_ERROR_ABI, "%s has ABI %d; the runtime library in this process has ABI %d.",
                path, layer->library->abi, TVM_SEPCONV_ABI);
  fill_slot(layer->handle, "__TVMBackendAllocWorkspace", (void*)pool_alloc_workspace);
  fill_slot(layer->handle, "__TVMBackendFreeWorkspace", (void*)pool_free_workspace);
  return TVM_SEPCONV_OK;
}

int layer_open(const char* library_path, tvm_sepconv_padding padding, int64_t left, int64_t right,
               tvm_sepconv_layer** out) {
  *out = NULL;
  if (padding != TVM_SEPCONV_EXPLICIT) left = right = 0;
  if ((unsigned)padding > TVM_SEPCONV_EXPLICIT)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`padding` must be one of tvm_sepconv_padding. Received: %d",
                (int)padding);
  if (left < 0 || right < 0 || left > INT_MAX / 2 || right > INT_MAX / 2)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`padding` must lie in [0, 2**30). Received: (%lld, %lld)",
                (long long)left, (long long)right);
  tvm_sepconv_layer* layer = calloc(1, sizeof *layer);
  if (!layer) return fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory.");
  layer->padding = padding;
  layer->left = left;
  layer->right = right;
  const int status = open_library(library_path, layer);
  if (status) tvm_sepconv_layer_destroy(layer);
  else *out = layer;
  return status;
}

int tvm_sepconv_layer_create(const char* library_path, const void* depthwise, const void* pointwise,
                             const void* bias, tvm_sepconv_padding padding, int64_t left,
                             int64_t right, tvm_sepconv_layer** out) {
  *out = NULL;
  if (!library_path || !depthwise || !pointwise)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`library_path`, `depthwise` and `pointwise` must not be NULL.");
  tvm_sepconv_layer* layer;
  int status = layer_open(library_path, padding, left, right, &layer);
  if (!status) status = layer_pack(layer, depthwise, pointwise, bias);
  if (status) tvm_sepconv_layer_destroy(layer);
  else *out = layer;
  return status;
}

void tvm_sepconv_layer_destroy(tvm_sepconv_layer* layer) {
  if (!layer) return;
  free(layer->depthwise);
  free(layer->pointwise);
  free(layer->bias);
  if (layer->handle) dlclose(layer->handle);
  free(layer);
}

void tvm_sepconv_layer_describe(const tvm_sepconv_layer* layer, tvm_sepconv_layer_info* info) {
  const tvm_sepconv_library* l = layer->library;
  const tvm_sepconv_dtype halves = l->bfloat ? TVM_SEPCONV_BFLOAT16 : TVM_SEPCONV_FLOAT16;
  const tvm_sepconv_dtype wide = l->float_bits == 64 ? TVM_SEPCONV_FLOAT64 : TVM_SEPCONV_FLOAT32;
  const tvm_sepconv_layer_info found = {
      l->channels, l->filters, l->kernel_size, l->strides, l->dilation_rate, l->depth_multiplier,
      layer->padding, layer->left, layer->right, l->channels_first, l->use_bias,
      l->float_bits == 16 ? halves : wide, l->float_bits / 8};
  *info = found;
}

int64_t tvm_sepconv_out_steps(const tvm_sepconv_layer* layer, int64_t steps) {
  const tvm_sepconv_library* l = layer->library;
  if (layer->padding == TVM_SEPCONV_SAME) return (steps + l->strides - 1) / l->strides;
  int64_t room = steps + layer->left + layer->right - effective_kernel(l);
  return room < 0 ? 0 : room / l->strides + 1;
}
