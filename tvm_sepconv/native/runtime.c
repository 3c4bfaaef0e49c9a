/* The process side of compiled layers: opens libraries, packs weights, cuts calls into kernel calls.
 *
 * A kernel computes a run of steps of one sample. Because it takes its left padding at run time, any
 * part of a sample is a call of its own: a shifted input, a shifted output, another left padding. So
 * threads share batch and steps alike, and the tail of a sequence goes to the variants with shorter
 * tiles instead of being rounded up to the longest.
 */
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

static int fail(int status, const char* format, ...) {
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
static int pack(tvm_sepconv_layer* y, const void* depthwise, const void* pointwise, const void* bias) {
  const tvm_sepconv_library* l = y->library;
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

/* The section headers come last in a library. Opening one that was cut off ends in SIGBUS, not in an error. */
static int is_cut_off(const char* path) {
  ElfW(Ehdr) header;
  FILE* file = fopen(path, "re");
  if (!file) return 0; /* dlopen says why, or finds it elsewhere */
  const int read = fread(&header, sizeof header, 1, file) == 1 && fseek(file, 0, SEEK_END) == 0;
  const uint64_t size = read ? (uint64_t)ftell(file) : 0;
  fclose(file);
  return !read || size < header.e_shoff + (uint64_t)header.e_shnum * header.e_shentsize;
}

static int open_library(const char* path, tvm_sepconv_layer* layer) {
  if (is_cut_off(path))
    return fail(TVM_SEPCONV_ERROR_LIBRARY, "The library cannot be opened: %s is truncated.", path);
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

int tvm_sepconv_layer_create(const char* library_path, const void* depthwise, const void* pointwise,
                             const void* bias, tvm_sepconv_padding padding, int64_t left,
                             int64_t right, tvm_sepconv_layer** out) {
  *out = NULL;
  if (!library_path || !depthwise || !pointwise)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`library_path`, `depthwise` and `pointwise` must not be NULL.");
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
  int status = open_library(library_path, layer);
  if (!status && layer->library->use_bias != (bias != NULL))
    status = fail(TVM_SEPCONV_ERROR_ARGUMENT, "`bias` must be given if the layer has one, else NULL: it %s.",
                  layer->library->use_bias ? "has one" : "has none");
  if (!status) status = pack(layer, depthwise, pointwise, bias);
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

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t effective_kernel(const tvm_sepconv_library* l) {
  return (int64_t)(l->kernel_size - 1) * l->dilation_rate + 1;
}

int64_t tvm_sepconv_out_steps(const tvm_sepconv_layer* layer, int64_t steps) {
  const tvm_sepconv_library* l = layer->library;
  if (layer->padding == TVM_SEPCONV_SAME) return (steps + l->strides - 1) / l->strides;
  int64_t room = steps + layer->left + layer->right - effective_kernel(l);
  return room < 0 ? 0 : room / l->strides + 1;
}

static int64_t left_padding(const tvm_sepconv_layer* layer, int64_t steps) {
  const tvm_sepconv_library* l = layer->library;
  if (layer->padding != TVM_SEPCONV_SAME) return layer->left;
  int64_t last = (tvm_sepconv_out_steps(layer, steps) - 1) * l->strides;
  int64_t total = last + effective_kernel(l) - steps;
  return total > 0 ? total / 2 : 0;
}

/* ---- running -------------------------------------------------------------------------------- */

typedef struct {
  const tvm_sepconv_layer* layer;
  int64_t batch, steps, out_steps, left;
  tvm_sepconv_view x, y;
  int64_t grain, grains; /* steps in a unit of work; units in a sample */
  int tasks;
  int failed;
} call;

static DLTensor tensor(void* data, int rank, int64_t* shape, int64_t* strides, DLDataType type) {
  DLTensor t = {data, {kDLCPU, 0}, rank, type, shape, strides, 0};
  return t;
}

/* Consecutive samples of a batch: what a kernel call computes the same steps of. */
typedef struct {
  int64_t first, count;
} samples;

/* One kernel call: `count` steps from step `first` on. */
static int run_kernel(const call* c, TVMFFISafeCallType kernel, samples n, int64_t first, int64_t count) {
  const tvm_sepconv_layer* y = c->layer;
  const tvm_sepconv_library* l = y->library;
  const int64_t time_x = l->channels_first ? 1 : c->x.row_stride;
  const int64_t time_y = l->channels_first ? 1 : c->y.row_stride;
  const int bytes = l->float_bits / 8;
  int64_t begin = first * l->strides - c->left, left = begin < 0 ? -begin : 0;
  if (begin < 0) begin = 0;
  if (begin > c->steps) begin = c->steps;
  int64_t needed = (count - 1) * l->strides + effective_kernel(l) - left;
  int64_t steps = c->steps - begin < needed ? c->steps - begin : needed;
  if (steps < 0) steps = 0;
  char* x = (char*)c->x.data + (n.first * c->x.batch_stride + begin * time_x) * bytes;
  char* out = (char*)c->y.data + (n.first * c->y.batch_stride + first * time_y) * bytes;
  int64_t shape_x[3] = {n.count, steps, l->channels}, shape_y[3] = {n.count, count, l->filters};
  if (l->channels_first)
    shape_x[1] = l->channels, shape_x[2] = steps, shape_y[1] = l->filters, shape_y[2] = count;
  int64_t strides_x[3] = {c->x.batch_stride, c->x.row_stride, 1};
  int64_t strides_y[3] = {c->y.batch_stride, c->y.row_stride, 1};
  const int vectors = l->channels_first && kernel != l->ragged; /* its output is (…, vectors, lanes) */
  int64_t shape_v[4] = {n.count, l->filters, count / l->lanes, l->lanes};
  int64_t strides_v[4] = {c->y.batch_stride, c->y.row_stride, l->lanes, 1};
  const DLDataType type = {l->bfloat ? kDLBfloat : kDLFloat, (uint8_t)l->float_bits, 1};
  const DLDataType packed = {kDLFloat, (uint8_t)l->accumulator_bits, 1};
  DLTensor tensors[5] = {
      tensor(x, 3, shape_x, strides_x, type),
      tensor(y->depthwise, 3, (int64_t*)y->depthwise_shape, NULL, packed),
      tensor(y->pointwise, 3, (int64_t*)y->pointwise_shape, NULL, packed),
      tensor(y->bias, 1, (int64_t*)y->bias_shape, NULL, packed),
      vectors ? tensor(out, 4, shape_v, strides_v, type) : tensor(out, 3, shape_y, strides_y, type),
  };
  TVMFFIAny arguments[6] = {{0}}, result = {0};
  int count_arguments = 0;
  for (int i = 0; i < 5; ++i) {
    if (i == 3 && !l->use_bias) continue;
    if (i == 4) { /* the left padding comes before the output */
      arguments[count_arguments].type_index = kTVMFFIInt;
      arguments[count_arguments++].v_int64 = left;
    }
    arguments[count_arguments].type_index = kTVMFFIDLTensorPtr;
    arguments[count_arguments++].v_ptr = &tensors[i];
  }
  const int status = kernel(NULL, arguments, count_arguments, &result);
  if (status) pool_drop_workspace();
  return status;
}

/* Whether a variant can read this input where it lies. */
static int reads_in_place(const call* c, const tvm_sepconv_variant* variant) {
  const tvm_sepconv_library* l = c->layer->library;
  /* One row for all steps has no rows after it that its last vector may reach into. */
  const int repeated = !l->channels_first && !c->x.row_stride && l->channels % l->lanes;
  return variant->interior && !repeated;
}

/* Steps [first, end) with one variant: the tiles whose taps all lie in the input with its
 * interior form, those before and after with the other. */
static int run_variant(const call* c, const tvm_sepconv_variant* variant, samples n, int64_t first,
                       int64_t end) {
  const tvm_sepconv_library* l = c->layer->library;
  const int64_t tile = variant->step_tile;
  int64_t from = end, to = end;
  if (reads_in_place(c, variant)) {
    /* A row's last vector may reach into the rows that follow, phases of a stride into steps that no tap
     * reads: then those have to be there. */
    const int64_t beyond = (l->lanes - l->channels % l->lanes) % l->lanes;
    int64_t guard = beyond ? beyond / (c->x.row_stride > 0 ? c->x.row_stride : 1) + 1 : 0;
    if (l->channels_first) guard = l->strides - 1;
    const int64_t inside = (c->left + l->strides - 1) / l->strides;
    const int64_t room = c->steps + c->left - guard - effective_kernel(l);
    const int64_t last = room < 0 ? 0 : room / l->strides + 1; /* the first step whose taps leave */
    from = first < inside ? first + (inside - first + tile - 1) / tile * tile : first;
    from = smaller(from, end);
    to = smaller(last, end) > from ? from + (smaller(last, end) - from) / tile * tile : from;
  }
  int status = first < from ? run_kernel(c, variant->kernel, n, first, from - first) : 0;
  if (!status && from < to) status = run_kernel(c, variant->interior, n, from, to - from);
  if (!status && to < end) status = run_kernel(c, variant->kernel, n, to, end - to);
  return status;
}

enum { CALL_CYCLES = 250 }; /* of a kernel call, beside its tiles */

/* Cost of `steps` of one sample with the variants from `i` on: the last tile of the longest is ragged, or what
 * is left goes to the shorter ones. `call` is the sample's share of a kernel call. */
static double tail_cost(const tvm_sepconv_library* l, int i, int64_t steps, double call) {
  const tvm_sepconv_variant* v = &l->variants[i];
  const int64_t tiles = steps / v->step_tile, tail = steps % v->step_tile;
  const double whole = (double)tiles * v->cost;
  if (!tail) return call + whole;
  const double ragged = call + whole + v->cost;
  if (i + 1 == l->variant_count) return ragged;
  const double shorter = (tiles ? call : 0) + whole + tail_cost(l, i + 1, tail, call);
  return shorter < ragged ? shorter : ragged;
}

/* Steps [first, end): whole tiles of each variant, longest first. */
static int run_tiles(const call* c, samples n, int64_t first, int64_t end) {
  const tvm_sepconv_library* l = c->layer->library;
  const int64_t widest = c->x.row_stride > c->y.row_stride ? c->x.row_stride : c->y.row_stride;
  const int64_t longest = (l->channels_first ? INT_MAX / 8 : INT_MAX / 2 / (widest + 1)) / l->strides;
  int status = 0;
  for (int i = 0; i < l->variant_count && first < end && !status; ++i) {
    const tvm_sepconv_variant* variant = &l->variants[i];
    const int64_t tile = variant->step_tile;
    int64_t count = (end - first) / tile * tile, tail = end - first - count;
    const double call = CALL_CYCLES / (double)n.count, ragged = variant->cost + (count ? 0 : call);
    if (i + 1 == l->variant_count || (tail && tail_cost(l, i + 1, tail, call) >= ragged))
      count = end - first;
    const int64_t most = longest / tile > 1 ? longest / tile * tile : tile; /* int32 indices */
    for (const int64_t stop = first + count; first < stop && !status;) {
      const int64_t part = stop - first < most ? stop - first : most;
      status = run_variant(c, variant, n, first, first + part);
      first += part;
    }
  }
  return status;
}

/* Steps [first, end) of samples `n`. */
static int run_steps(const call* c, samples n, int64_t first, int64_t end) {
  const tvm_sepconv_library* l = c->layer->library;
  if (!l->channels_first) return run_tiles(c, n, first, end);
  if (end - first < l->lanes) return run_kernel(c, l->ragged, n, first, end - first);
  /* Kernels store whole vectors: the last one overlaps the one before it, with the same values. */
  const int64_t rest = (end - first) % l->lanes;
  const int status = run_tiles(c, n, first, end - rest);
  return status || !rest ? status : run_tiles(c, n, end - l->lanes, end);
}

/* Whole samples that one kernel call can take: it indexes with 32 bits. */
static int64_t samples_a_call(const call* c) {
  const int64_t x = c->x.batch_stride, y = c->y.batch_stride, widest = x > y ? x : y;
  if (x < 0 || y < 0) return 1;
  return widest ? 1 + INT_MAX / 4 / widest : INT_MAX / 4;
}

static void run_task(void* context, int index) {
  call* c = context;
  const int64_t total = c->batch * c->grains, most = samples_a_call(c);
  int64_t grain = total * index / c->tasks;
  const int64_t end = total * (index + 1) / c->tasks;
  while (grain < end) { /* at most to the end of a sample at a time, or whole samples */
    samples n = {grain / c->grains, 1};
    const int64_t base = n.first * c->grains;
    int64_t stop = end < base + c->grains ? end : base + c->grains;
    const int64_t last = (stop - base) * c->grain;
    if (c->grains == 1) {
      n.count = smaller(end - grain, most);
      stop = grain + n.count;
    }
    if (run_steps(c, n, (grain - base) * c->grain, smaller(last, c->out_steps)))
      __atomic_store_n(&c->failed, 1, __ATOMIC_RELAXED);
    grain = stop;
  }
}

/* Cut the call into tasks: none shorter than some microseconds, in units of a variant's tile that give
 * every thread several. */
static void divide(call* c) {
  enum { FLOPS_PER_TASK = 500 * 1000, UNITS_PER_TASK = 4 };
  const tvm_sepconv_library* l = c->layer->library;
  const double flops = 2.0 * (double)c->batch * (double)c->out_steps * l->channels *
                       l->depth_multiplier * (l->kernel_size + l->filters);
  c->tasks = tvm_sepconv_num_threads();
  if (flops / FLOPS_PER_TASK < c->tasks) c->tasks = (int)(flops / FLOPS_PER_TASK);
  if (c->tasks < 1) c->tasks = 1;
  for (int i = 0; i < l->variant_count; ++i) {
    c->grain = l->variants[i].step_tile;
    c->grains = (c->out_steps + c->grain - 1) / c->grain;
    if (c->batch * c->grains >= (int64_t)c->tasks * UNITS_PER_TASK) break;
  }
  if (c->batch * c->grains < c->tasks) c->tasks = (int)(c->batch * c->grains);
  if (c->tasks == 1) c->grain = c->out_steps, c->grains = 1;
}

static int run(const tvm_sepconv_layer* layer, int64_t batch, int64_t steps, int64_t out_steps,
               tvm_sepconv_view x, tvm_sepconv_view y) {
  const tvm_sepconv_library* l = layer->library;
  if (batch <= 0 || out_steps <= 0) return TVM_SEPCONV_OK;
  /* A kernel indexes with 32 bits: what one call of the longest variant touches must span less than 2**30. */
  const int64_t longest_tile = l->variants[0].step_tile * (int64_t)l->strides + effective_kernel(l);
  const int64_t rows_x = l->channels_first ? l->channels : smaller(longest_tile, steps);
  const int64_t rows_y = l->channels_first ? l->filters : smaller(l->variants[0].step_tile, out_steps);
  if (x.row_stride < 0 || y.row_stride < 0)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`row_stride` must not be negative. Received: x %lld, y %lld",
                (long long)x.row_stride, (long long)y.row_stride);
  if ((rows_x > 1 && x.row_stride > INT_MAX / 2 / rows_x) ||
      (rows_y > 1 && y.row_stride > INT_MAX / 2 / rows_y))
    return fail(TVM_SEPCONV_ERROR_ARGUMENT,
                "A tile must span less than 2**30 elements. Received: %lld rows of x %lld elements apart, %lld "
                "of y %lld apart; copy a part of the steps into an array of its own.",
                (long long)rows_x, (long long)x.row_stride, (long long)rows_y, (long long)y.row_stride);
  call c = {layer, batch, steps, out_steps, left_padding(layer, steps), x, y, 0, 0, 0, 0};
  divide(&c);
  pool_run(run_task, &c, c.tasks);
  return c.failed ? fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory for a kernel's scratch.") : 0;
}

int tvm_sepconv_run(const tvm_sepconv_layer* layer, int64_t batch, int64_t steps,
                    tvm_sepconv_view x, tvm_sepconv_view y) {
  return run(layer, batch, steps, tvm_sepconv_out_steps(layer, steps), x, y);
}
