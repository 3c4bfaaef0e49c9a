/* Running a layer: a call cut into kernel calls, and those into tasks for the threads.
 *
 * A kernel computes a run of steps of one sample. Because it takes its left padding at run time, any
 * part of a sample is a call of its own: a shifted input, a shifted output, another left padding. So
 * threads share batch and steps alike, and the tail of a sequence goes to the variants with shorter
 * tiles instead of being rounded up to the longest.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <stdlib.h>

#include "pool.h"
#include "runtime.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t left_padding(const tvm_sepconv_layer* layer, int64_t steps) {
  const tvm_sepconv_library* l = layer->library;
  if (layer->padding != TVM_SEPCONV_SAME) return layer->left;
  int64_t last = (tvm_sepconv_out_steps(layer, steps) - 1) * l->strides;
  int64_t total = last + effective_kernel(l) - steps;
  return total > 0 ? total / 2 : 0;
}

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

/* Rows that one call of the longest variant touches. */
static int64_t rows_of_x(const tvm_sepconv_library* l, int64_t steps) {
  const int64_t longest_tile = l->variants[0].step_tile * (int64_t)l->strides + effective_kernel(l);
  return l->channels_first ? l->channels : smaller(longest_tile, steps);
}
static int64_t rows_of_y(const tvm_sepconv_library* l, int64_t out_steps) {
  return l->channels_first ? l->filters : smaller(l->variants[0].step_tile, out_steps);
}

/* A kernel indexes with 32 bits: what such a call touches must span less than 2**30 elements. */
static int spans_too_much(int64_t rows, int64_t stride) {
  return rows > 1 && (double)rows * (double)stride > INT_MAX / 2;
}

/* Samples that lie one behind the other, and whose windows share no step, are one long sample: only that has a
 * ragged end. */
static void join_samples(call* c) {
  const tvm_sepconv_library* l = c->layer->library;
  if (c->left || l->channels_first || effective_kernel(l) > l->strides || c->steps != c->out_steps * l->strides ||
      c->x.batch_stride != c->steps * c->x.row_stride || c->y.batch_stride != c->out_steps * c->y.row_stride ||
      spans_too_much(rows_of_x(l, c->steps * c->batch), c->x.row_stride) ||
      spans_too_much(rows_of_y(l, c->out_steps * c->batch), c->y.row_stride))
    return;
  c->steps *= c->batch;
  c->out_steps *= c->batch;
  c->batch = 1;
}

/* Cut the call into tasks: none shorter than some microseconds, in units of a variant's tile that give
 * every thread several. */
static void divide(call* c) {
  enum { FLOPS_PER_TASK = 500 * 1000, UNITS_PER_TASK = 4 };
  const tvm_sepconv_library* l = c->layer->library;
  const double flops = 2.0 * (double)c->batch * (double)c->out_steps * l->channels *
                       l->depth_multiplier * (l->kernel_size + l->filters);
  const double most = flops / FLOPS_PER_TASK;
  c->tasks = tvm_sepconv_num_threads();
  if (most < c->tasks) c->tasks = most < 1 ? 1 : (int)most;
  c->grain = c->out_steps;
  c->grains = 1;
  for (int i = 0; i < l->variant_count && c->tasks > 1; ++i) {
    c->grain = l->variants[i].step_tile;
    c->grains = (c->out_steps + c->grain - 1) / c->grain;
    if (c->batch * c->grains >= (int64_t)c->tasks * UNITS_PER_TASK) break;
  }
  if (c->batch * c->grains < c->tasks) c->tasks = (int)(c->batch * c->grains);
}

static int run(const tvm_sepconv_layer* layer, int64_t batch, int64_t steps, int64_t out_steps,
               tvm_sepconv_view x, tvm_sepconv_view y) {
  const tvm_sepconv_library* l = layer->library;
  if (batch <= 0 || out_steps <= 0) return TVM_SEPCONV_OK;
  if (x.row_stride < 0 || y.row_stride < 0)
    return fail(TVM_SEPCONV_ERROR_ARGUMENT, "`row_stride` must not be negative. Received: x %lld, y %lld",
                (long long)x.row_stride, (long long)y.row_stride);
  call c = {layer, batch, steps, out_steps, left_padding(layer, steps), x, y, 0, 0, 0, 0};
  if (spans_too_much(rows_of_x(l, steps), x.row_stride) || spans_too_much(rows_of_y(l, out_steps), y.row_stride))
    return fail(TVM_SEPCONV_ERROR_ARGUMENT,
                "A tile must span less than 2**30 elements. Received: %lld rows of x %lld elements apart, %lld "
                "of y %lld apart; copy a part of the steps into an array of its own.",
                (long long)rows_of_x(l, steps), (long long)x.row_stride, (long long)rows_of_y(l, out_steps),
                (long long)y.row_stride);
  join_samples(&c);
  divide(&c);
  pool_run(run_task, &c, c.tasks);
  return c.failed ? fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory for a kernel's scratch.") : 0;
}

int tvm_sepconv_run(const tvm_sepconv_layer* layer, int64_t batch, int64_t steps,
                    tvm_sepconv_view x, tvm_sepconv_view y) {
  return run(layer, batch, steps, tvm_sepconv_out_steps(layer, steps), x, y);
}

int tvm_sepconv_prepare(const tvm_sepconv_layer* layer) {
  /* How much scratch a kernel takes only its code knows: each runs once, on zeros. */
  const tvm_sepconv_library* l = layer->library;
  const int64_t out_steps = l->variants[0].step_tile, bytes = l->float_bits / 8;
  const int64_t reach = (out_steps - 1) * l->strides + effective_kernel(l);
  const int64_t steps = reach + l->strides + l->lanes; /* what an interior form reads beyond its taps */
  char* x = calloc((size_t)(steps * l->channels + l->lanes), (size_t)bytes);
  char* y = malloc((size_t)(out_steps * l->filters * bytes));
  int status = x && y ? TVM_SEPCONV_OK : TVM_SEPCONV_ERROR_MEMORY;
  const tvm_sepconv_view from = {x, 0, l->channels_first ? steps : l->channels};
  const tvm_sepconv_view to = {y, 0, l->channels_first ? out_steps : l->filters};
  const call c = {layer, 1, steps, out_steps, 0, from, to, 0, 0, 1, 0};
  const samples one = {0, 1};
  for (int i = 0; i < l->variant_count && !status; ++i) {
    const tvm_sepconv_variant* variant = &l->variants[i];
    status = run_kernel(&c, variant->kernel, one, 0, variant->step_tile);
    if (!status && variant->interior) status = run_kernel(&c, variant->interior, one, 0, variant->step_tile);
  }
  if (!status && l->ragged) status = run_kernel(&c, l->ragged, one, 0, 1);
  free(x);
  free(y);
  if (!status && pool_prepare(tvm_sepconv_num_threads())) return TVM_SEPCONV_OK;
  return fail(TVM_SEPCONV_ERROR_MEMORY, "Out of memory for the kernels' scratch.");
}
