/* A board's GPU, for measuring there through TVM's RPC: its own TVM knows no CUDA, so arrays are the processor's, and
 * what the GPU does goes through the driver's library. A session has a process of its own, and takes the first GPU it
 * sees: nothing is given back that the process's end gives back. No function fails in the convention's sense: one that
 * cannot answer returns less than 0, and `last_error` says why. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

enum { CC_MAJOR = 75, CC_MINOR = 76, L2_BYTES = 38 };  /* of CUdevice_attribute */
enum { OUT_OF_MEMORY = 2, NOT_READY = 600, THREAD_LOCAL = 1 };
enum { WEIGHTS = 3, AXES = 3 };

typedef uintptr_t address;
typedef int (*function)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

#define DRIVER(_)                                                                               \
  _(cuInit, (unsigned))                                                                         \
  _(cuDeviceGetCount, (int*))                                                                   \
  _(cuDeviceGet, (int*, int))                                                                   \
  _(cuDeviceGetName, (char*, int, int))                                                         \
  _(cuDeviceGetAttribute, (int*, int, int))                                                     \
  _(cuDriverGetVersion, (int*))                                                                 \
  _(cuDevicePrimaryCtxRetain, (void**, int))                                                    \
  _(cuCtxSetCurrent, (void*))                                                                   \
  _(cuMemAlloc_v2, (address*, size_t))                                                          \
  _(cuMemFree_v2, (address))                                                                    \
  _(cuMemGetInfo_v2, (size_t*, size_t*))                                                        \
  _(cuMemcpyHtoD_v2, (address, const void*, size_t))                                            \
  _(cuMemcpyDtoH_v2, (void*, address, size_t))                                                  \
  _(cuStreamCreate, (void**, unsigned))                                                         \
  _(cuStreamQuery, (void*))                                                                     \
  _(cuStreamBeginCapture_v2, (void*, int))                                                      \
  _(cuStreamEndCapture, (void*, void**))                                                        \
  _(cuGraphInstantiateWithFlags, (void**, void*, unsigned long long))                           \
  _(cuGraphDestroy, (void*))                                                                    \
  _(cuGraphExecDestroy, (void*))                                                                \
  _(cuGraphLaunch, (void*, void*))                                                              \
  _(cuEventCreate, (void**, unsigned))                                                          \
  _(cuEventRecord, (void*, void*))                                                              \
  _(cuEventElapsedTime, (float*, void*, void*))                                                 \
  _(cuGetErrorString, (int, const char**))

#define DECLARED(name, arguments) static int(*name) arguments;
DRIVER(DECLARED)

/* Everything of one call, on the GPU. */
typedef struct {
  DLTensor x, out, room;
  int64_t x_shape[AXES], out_shape[AXES], room_shape[1], left;
} operands;

typedef struct {
  function run, workspace;
  DLTensor weights[WEIGHTS]; /* without data where there is none */
  int64_t shapes[WEIGHTS][AXES], steps_axis;
  operands* turns; /* of a graph, so that each call finds its input out of the cache */
  int64_t count;
  void* graph;
} kernel;

static void *stream, *start, *end;
static char problem[4096];

/* ---- what went wrong ---------------------------------------------------------------------------- */

static int64_t fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(problem, sizeof problem, format, values);
  va_end(values);
  return -1;
}

static int64_t check(int status, const char* doing) {
  if (!status) return 0;
  const char* words = 0;
  cuGetErrorString(status, &words);
  return fail("%s: %s (error %d of the CUDA driver)", doing, words ? words : "unknown", status);
}

/* What a library's function raised. */
static int64_t raised(void) {
  TVMFFIObjectHandle error = 0;
  TVMFFIErrorMoveFromRaised(&error);
  if (!error) return fail("the library gives no reason");
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((const char*)error + sizeof(TVMFFIObject));
  fail("%.*s: %.*s", (int)cell->kind.size, cell->kind.data, (int)cell->message.size, cell->message.data);
  TVMFFIObjectDecRef(error);
  return -1;
}

/* ---- the GPU ------------------------------------------------------------------------------------ */

static int64_t open_driver(void) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) return fail("%s", dlerror());
#define FOUND(name, arguments) \
  if (!(name = (int(*) arguments)dlsym(driver, #name))) return fail("%s", dlerror());
  DRIVER(FOUND)
  return 0;
}

static int64_t open_gpu(void) {
  static int opened;
  if (opened) return 0;
  int count = 0, device = 0;
  void* context = 0;
  if (open_driver()) return -1;
  if (check(cuInit(0), "starting the driver") || check(cuDeviceGetCount(&count), "counting GPUs")) return -1;
  if (!count) return fail("the driver finds none");
  if (check(cuDeviceGet(&device, 0), "choosing the first") ||
      check(cuDevicePrimaryCtxRetain(&context, device), "beginning to use it") ||
      check(cuCtxSetCurrent(context), "beginning to use it") || check(cuStreamCreate(&stream, 0), "making a stream") ||
      check(cuEventCreate(&start, 0), "making an event") || check(cuEventCreate(&end, 0), "making an event"))
    return -1;
  if (TVMFFIEnvSetStream(kDLCUDA, 0, stream, NULL)) return raised();
  opened = 1;
  return 0;
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Waits for the stream; a kernel that never ends must not take the session with it. */
static int64_t finish(double limit_secs) {
  const double began = now();
  for (int status; (status = cuStreamQuery(stream)) != 0; sched_yield()) {
    if (status != NOT_READY) return check(status, "the call fails");
    if (now() - began > limit_secs) return fail("no result after %.0f s", limit_secs);
  }
  return 0;
}

/* ---- memory ------------------------------------------------------------------------------------- */

static size_t bytes_of(const DLTensor* t) {
  size_t bytes = (size_t)(t->dtype.bits / 8);
  for (int i = 0; i < t->ndim; ++i) bytes *= (size_t)t->shape[i];
  return bytes;
}

static void* host(const DLTensor* t) { return (char*)t->data + t->byte_offset; }

/* Memory for what `like` describes, whose shape goes to `shape`. */
static int64_t reserve(const DLTensor* like, DLTensor* made, int64_t* shape) {
  const size_t bytes = bytes_of(like);
  size_t available = 0, total = 0;
  address memory = 0;
  memcpy(shape, like->shape, (size_t)like->ndim * sizeof *shape);
  const int status = bytes ? cuMemAlloc_v2(&memory, bytes) : 0;
  if (status == OUT_OF_MEMORY && !cuMemGetInfo_v2(&available, &total))
    return fail("%zu bytes are not to be had on its GPU, of whose %zu %zu are free", bytes, total, available);
  if (check(status, "allocating memory")) return -1;
  *made = (DLTensor){(void*)memory, {kDLCUDA, 0}, like->ndim, like->dtype, shape, NULL, 0};
  return 0;
}

static int64_t copied(const DLTensor* from, DLTensor* made, int64_t* shape) {
  if (reserve(from, made, shape)) return -1;
  const size_t bytes = bytes_of(from);
  return bytes ? check(cuMemcpyHtoD_v2((address)made->data, host(from), bytes), "copying to the GPU") : 0;
}

static void release(operands* made) {
  cuMemFree_v2((address)made->x.data);
  cuMemFree_v2((address)made->out.data);
  cuMemFree_v2((address)made->room.data);
}

/* ---- calls in tvm-ffi's convention ---------------------------------------------------------------- */

static const DLTensor* tensor_of(const TVMFFIAny* value) {
  if (value->type_index == kTVMFFIDLTensorPtr) return (const DLTensor*)value->v_ptr;
  if (value->type_index == kTVMFFITensor) return (const DLTensor*)((const char*)value->v_obj + sizeof(TVMFFIObject));
  return 0;
}

static const char* text_of(const TVMFFIAny* value) {
  if (value->type_index == kTVMFFIRawStr) return value->v_c_str;
  if (value->type_index == kTVMFFISmallStr) return value->v_bytes;
  return ((const TVMFFIByteArray*)((const char*)value->v_obj + sizeof(TVMFFIObject)))->data;
}

/* A tensor, or None where it has no memory. */
static TVMFFIAny given(DLTensor* tensor) {
  TVMFFIAny value = {0};
  value.type_index = tensor->data ? kTVMFFIDLTensorPtr : kTVMFFINone;
  value.v_ptr = tensor->data ? tensor : NULL;
  return value;
}

static TVMFFIAny number(int64_t value) {
  TVMFFIAny made = {0};
  made.type_index = kTVMFFIInt;
  made.v_int64 = value;
  return made;
}

static int64_t call(function called, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  *result = number(0);
  return called(NULL, arguments, count, result) ? raised() : 0;
}

/* ---- kernels -------------------------------------------------------------------------------------- */

static int64_t open_library(const char* path, void** library) {
  *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return *library ? 0 : fail("the library cannot be opened: %s", dlerror());
}

static int64_t find(void* library, const char* name, function* found) {
  *found = (function)dlsym(library, name);
  return *found ? 0 : fail("the library is none for CUDA: %s", dlerror());
}

static int64_t place(const kernel* k, const DLTensor* x, int64_t left, const DLTensor* out, operands* made) {
  const TVMFFIAny size[] = {number(out->shape[0]), number(out->shape[k->steps_axis]), number(0)};
  TVMFFIAny bytes;
  if (call(k->workspace, size, 3, &bytes)) return -1;
  const DLTensor room = {NULL, {kDLCPU, 0}, 1, {kDLUInt, 8, 1}, &bytes.v_int64, NULL, 0};
  made->left = left;
  return copied(x, &made->x, made->x_shape) || copied(out, &made->out, made->out_shape) ||
                 reserve(&room, &made->room, made->room_shape)
             ? -1
             : 0;
}

static int64_t launch(kernel* k, operands* o) {
  const TVMFFIAny arguments[] = {given(&o->x), given(&k->weights[0]), given(&k->weights[1]), given(&k->weights[2]),
                                 number(o->left), given(&o->out), given(&o->room)};
  TVMFFIAny nothing;
  return call(k->run, arguments, 7, &nothing);
}

/* ---- what is exported ----------------------------------------------------------------------------- */

static int answer(TVMFFIAny* result, int64_t value) {
  *result = number(value);
  return 0;
}

static int64_t write_text(const char* text, const DLTensor* to) {
  const size_t length = strlen(text), room = (size_t)to->shape[0];
  memcpy(host(to), text, length < room ? length : room);
  return (int64_t)(length < room ? length : room);
}

#define EXPORTED(name)                                                                        \
  static int64_t name(const TVMFFIAny* args);                                                 \
  int __tvm_ffi_##name(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) { \
    (void)self;                                                                               \
    (void)count;                                                                              \
    return answer(result, name(args));                                                        \
  }                                                                                           \
  static int64_t name(const TVMFFIAny* args)

/* (tensor of bytes) -> the length of the last error's text, which it is given. */
EXPORTED(last_error) { return write_text(problem, tensor_of(args)); }

/* (tensor of bytes) -> the length of the text it is given: compute capability such as 90, the newest CUDA of the driver
 * such as 13000, bytes of the last cache, name. */
EXPORTED(gpu) {
  char name[256] = "", text[512];
  int major = 0, minor = 0, driver = 0, l2_bytes = 0;
  if (open_gpu()) return -1;
  if (check(cuDeviceGetAttribute(&major, CC_MAJOR, 0), "asking it") ||
      check(cuDeviceGetAttribute(&minor, CC_MINOR, 0), "asking it") ||
      check(cuDeviceGetAttribute(&l2_bytes, L2_BYTES, 0), "asking it") ||
      check(cuDriverGetVersion(&driver), "asking its driver") ||
      check(cuDeviceGetName(name, sizeof name, 0), "asking it"))
    return -1;
  snprintf(text, sizeof text, "%d %d %d %s", 10 * major + minor, driver, l2_bytes, name);
  return write_text(text, tensor_of(args));
}

/* (library path, tensor of bytes) -> the length of the library's description, which it is given. */
EXPORTED(description) {
  void* library = 0;
  function describe_itself = 0;
  TVMFFIAny text;
  if (open_library(text_of(args), &library) || find(library, "__tvm_ffi_describe", &describe_itself) ||
      call(describe_itself, NULL, 0, &text))
    return -1;
  return write_text(text_of(&text), tensor_of(&args[1]));
}

/* (library path, depthwise, pointwise, bias or None, axis of the steps) -> kernel handle. */
EXPORTED(create) {
  const TVMFFIAny device = number(0);
  TVMFFIAny nothing;
  void* library = 0;
  function prepare = 0;
  kernel* made = calloc(1, sizeof *made);
  if (!made) return fail("the board has no memory left");
  made->steps_axis = args[4].v_int64;
  if (open_gpu() || open_library(text_of(args), &library) || find(library, "__tvm_ffi_prepare", &prepare) ||
      find(library, "__tvm_ffi_workspace", &made->workspace) || find(library, "__tvm_ffi_run", &made->run) ||
      call(prepare, &device, 1, &nothing))
    return -1;
  for (int i = 0; i < WEIGHTS; ++i) {
    const DLTensor* weight = tensor_of(&args[1 + i]);
    if (weight && copied(weight, &made->weights[i], made->shapes[i])) return -1;
  }
  return (int64_t)(intptr_t)made;
}

/* (kernel handle, x, left padding, output, seconds) -> 0 once the kernel has written the output, of which what is there
 * before goes to the GPU too. */
EXPORTED(run) {
  kernel* k = (kernel*)(intptr_t)args[0].v_int64;
  const DLTensor* out = tensor_of(&args[3]);
  operands o = {0};
  if (place(k, tensor_of(&args[1]), args[2].v_int64, out, &o) || launch(k, &o) || finish(args[4].v_float64) ||
      check(cuMemcpyDtoH_v2(host(out), (address)o.out.data, bytes_of(out)), "copying from the GPU"))
    return -1;
  release(&o);
  return 0;
}

/* (kernel handle, x, left padding, output, copies) -> 0; what `capture` launches takes turns with them. */
EXPORTED(rotate) {
  kernel* k = (kernel*)(intptr_t)args[0].v_int64;
  const int64_t count = args[4].v_int64;
  k->turns = calloc((size_t)count, sizeof *k->turns);
  if (!k->turns) return fail("the board has no memory left");
  for (k->count = 0; k->count < count; ++k->count)
    if (place(k, tensor_of(&args[1]), args[2].v_int64, tensor_of(&args[3]), &k->turns[k->count])) return -1;
  return 0;
}

/* (kernel handle, launches) -> 0; `replay` is a graph of so many from now on. */
EXPORTED(capture) {
  kernel* k = (kernel*)(intptr_t)args[0].v_int64;
  void* graph = 0;
  if (check(k->graph ? cuGraphExecDestroy(k->graph) : 0, "replacing a graph") ||
      check(cuStreamBeginCapture_v2(stream, THREAD_LOCAL), "beginning a graph"))
    return -1;
  for (int64_t i = 0; i < args[1].v_int64; ++i)
    if (launch(k, &k->turns[i % k->count])) return -1;
  if (check(cuStreamEndCapture(stream, &graph), "ending a graph") ||
      check(cuGraphInstantiateWithFlags(&k->graph, graph, 0), "making a graph"))
    return -1;
  return check(cuGraphDestroy(graph), "making a graph");
}

/* (kernel handle, seconds) -> nanoseconds of a replay, the second of two: the first one warms caches and clocks, and
 * keeps the GPU busy until the second is there. */
EXPORTED(replay) {
  kernel* k = (kernel*)(intptr_t)args[0].v_int64;
  float ms = 0;
  if (check(cuGraphLaunch(k->graph, stream), "launching a graph") || check(cuEventRecord(start, stream), "timing") ||
      check(cuGraphLaunch(k->graph, stream), "launching a graph") || check(cuEventRecord(end, stream), "timing") ||
      finish(args[1].v_float64) || check(cuEventElapsedTime(&ms, start, end), "timing"))
    return -1;
  return (int64_t)(ms * 1e6F);
}
