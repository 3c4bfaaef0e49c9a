// Enough of CUDA's runtime for a whole library on a CPU: device memory is malloc's, a launch runs in `cuda.h`'s
// emulator before it returns, streams are names in a log. Faults and machines are set from outside, see `fake_cuda_set`.
// While the driver of `build_driver` captures, a launch becomes part of its graph; a replay reports memory that was freed.
// Not seen: what runs at the same time as what, and who waits for whom: tests read that from the log.
#pragma once
#include <dlfcn.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>

#include <cuda.h>  // last, for its macros: the standard library's headers mean another `alignas`

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorCudartUnloading = 4,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
#define CUDART_VERSION 13000
constexpr unsigned cudaHostAllocDefault = 0, cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1;

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int binaryVersion, ptxVersion, numRegs;
  size_t sharedSizeBytes, localSizeBytes;
};

namespace fake_cuda {

static const std::map<std::string, int64_t> usual = {{"devices", 2}, {"capability", 80}, {"driver", 13000},
    {"free_bytes", 1 << 30}, {"capturing", 0}, {"invalidated", 0}, {"launch_error", 0}, {"driver_error", 0}, {"no_image", 0}};
static std::map<std::string, int64_t> settings = usual;
struct Block {
  int owner;  // a device; -1 is the host
  size_t bytes;
  unsigned number;  // of all that were ever allocated, from 1
};
static std::map<char*, Block> memory;
constexpr int kDynamicBytes = 163 << 10;  // shared memory of a block of sm_80, for those who ask for it
static std::map<std::pair<void*, int>, int> allowed;  // who asked, on which device
static std::string log, failure;
static std::recursive_mutex mutex;
static thread_local int device;
static thread_local cudaError_t last;
static thread_local cudaStreamCaptureMode capture_mode;

inline cudaError_t result(cudaError_t error) {
  if (error) last = error;
  return error;
}

inline cudaError_t ready() {  // what every call first finds out about the driver
  if (settings["driver"] < CUDART_VERSION / 1000 * 1000) return cudaErrorInsufficientDriver;
  return settings["devices"] ? cudaSuccess : cudaErrorNoDevice;
}

template <class... Values>
void note(const char* format, Values... values) {
  char line[256];
  snprintf(line, sizeof line, format, values...);
  log += line;
  log += '\n';
}

using Graph = std::vector<std::function<cudaError_t()>>;

// Of the driver's library, which other libraries of the process find by its name: what is being captured, if anything.
inline Graph* graph() {
  void* driver = dlopen("libfake_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  auto find = driver ? reinterpret_cast<Graph* (*)()>(dlsym(driver, "fake_cuda_graph")) : nullptr;
  return find ? find() : nullptr;
}

// The block that an address lies in; 0 if it is not one of this library's.
inline unsigned block_of(const char* address) {
  auto next = memory.upper_bound(const_cast<char*>(address));
  if (next == memory.begin() || address >= (--next)->first + next->second.bytes) return 0;
  return next->second.number;
}
template <class Type>
unsigned block_of(Type value) {
  if constexpr (std::is_pointer_v<Type>) return block_of(reinterpret_cast<const char*>(value));
  else return 0;
}

inline cudaError_t unsafe_while_capturing() {
  if ((!settings["capturing"] && !graph()) || capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  settings["invalidated"] = 1;
  return cudaErrorStreamCaptureUnsupported;
}

inline cudaError_t allocate(void** pointer, size_t bytes, int owner) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (cudaError_t error = ready()) return result(error);
  if (cudaError_t error = unsafe_while_capturing()) return result(error);
  if (int64_t(bytes) > settings["free_bytes"]) return result(cudaErrorMemoryAllocation);
  *pointer = bytes ? aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr;
  if (bytes) {
    memset(*pointer, 0xff, bytes);  // NaN, until something is written
    static unsigned number;
    memory[static_cast<char*>(*pointer)] = {owner, bytes, ++number};
    settings["free_bytes"] -= bytes;
  }
  note("%s %d %zu", owner < 0 ? "pin" : "allocate", owner, bytes);
  return cudaSuccess;
}

inline cudaError_t release(void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (!pointer) return cudaSuccess;
  if (cudaError_t error = unsafe_while_capturing()) return result(error);
  auto found = memory.find(static_cast<char*>(pointer));
  if (found == memory.end()) return result(cudaErrorInvalidValue);
  const Block block = found->second;
  settings["free_bytes"] += block.bytes;
  note("%s %d %zu", block.owner < 0 ? "unpin" : "free", block.owner, block.bytes);
  memory.erase(found);
  free(pointer);
  return cudaSuccess;
}

inline cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, std::function<void()> body) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  if (cudaError_t error = ready()) return result(error);
  if (settings["capturing"] && settings["invalidated"]) return result(cudaErrorStreamCaptureInvalidated);
  if (settings["launch_error"]) return result(cudaError_t(settings["launch_error"]));
  note("launch %d stream %zu grid %u %u %u block %u %u %u", device, size_t(stream), grid.x, grid.y, grid.z, block.x, block.y, block.z);
  emulator::dynamic_bytes = shared;
  const char* report = emulator::launch(grid, block, 0, body);
  if (!report[0]) return cudaSuccess;
  failure = report;
  return result(cudaErrorLaunchFailure);
}

}  // namespace fake_cuda

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "cudaErrorOther";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure && !fake_cuda::failure.empty() ? fake_cuda::failure.c_str() : cudaGetErrorName(error);
}
inline cudaError_t cudaGetLastError() { return std::exchange(fake_cuda::last, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return fake_cuda::last; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = int(fake_cuda::settings["driver"]);
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// ---- devices ----------------------------------------------------------------------------------

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(fake_cuda::settings["devices"]);
  return fake_cuda::result(fake_cuda::ready());
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake_cuda::device;
  return fake_cuda::result(fake_cuda::ready());
}
inline cudaError_t cudaSetDevice(int device) {
  if (cudaError_t error = fake_cuda::ready()) return fake_cuda::result(error);
  if (device < 0 || device >= fake_cuda::settings["devices"]) return fake_cuda::result(cudaErrorInvalidDevice);
  fake_cuda::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (cudaError_t error = fake_cuda::ready()) return fake_cuda::result(error);
  if (device < 0 || device >= fake_cuda::settings["devices"]) return fake_cuda::result(cudaErrorInvalidDevice);
  const int capability = int(fake_cuda::settings["capability"]);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 108; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = fake_cuda::kDynamicBytes; break;
  }
  return cudaSuccess;
}

// ---- memory -----------------------------------------------------------------------------------

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return fake_cuda::allocate(reinterpret_cast<void**>(pointer), bytes, fake_cuda::device);
}
template <class T>
cudaError_t cudaHostAlloc(T** pointer, size_t bytes, unsigned) {
  return fake_cuda::allocate(reinterpret_cast<void**>(pointer), bytes, -1);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t bytes) {
  return cudaHostAlloc(pointer, bytes, 0);
}
inline cudaError_t cudaFree(void* pointer) { return fake_cuda::release(pointer); }
inline cudaError_t cudaFreeHost(void* pointer) { return fake_cuda::release(pointer); }
inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = size_t(fake_cuda::settings["free_bytes"]), *total = 1 << 30;
  return fake_cuda::result(fake_cuda::ready());
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  std::lock_guard<std::recursive_mutex> guard(fake_cuda::mutex);
  if (cudaError_t error = fake_cuda::ready()) return fake_cuda::result(error);
  memcpy(to, from, bytes);
  fake_cuda::note("copy %d stream %zu %zu", fake_cuda::device, size_t(stream), bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

// ---- streams and events -----------------------------------------------------------------------

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::lock_guard<std::recursive_mutex> guard(fake_cuda::mutex);
  if (cudaError_t error = fake_cuda::unsafe_while_capturing()) return fake_cuda::result(error);
  fake_cuda::note("synchronize %d stream %zu", fake_cuda::device, size_t(stream));
  return fake_cuda::result(fake_cuda::ready());
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatus(fake_cuda::settings["capturing"]);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake_cuda::capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new size_t(0));
  return fake_cuda::result(fake_cuda::ready());
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *reinterpret_cast<size_t*>(event) = size_t(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard<std::recursive_mutex> guard(fake_cuda::mutex);
  fake_cuda::note("stream %zu waits for %zu", size_t(stream), *reinterpret_cast<size_t*>(event));
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<size_t*>(event);
  return cudaSuccess;
}

// ---- kernels ----------------------------------------------------------------------------------

template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function*) {
  *attributes = {};
  if (fake_cuda::settings["no_image"]) return fake_cuda::result(cudaErrorNoKernelImageForDevice);
  attributes->binaryVersion = int(fake_cuda::settings["capability"]);
  return fake_cuda::result(fake_cuda::ready());
}
template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > fake_cuda::kDynamicBytes) return fake_cuda::result(cudaErrorInvalidValue);
  fake_cuda::allowed[{reinterpret_cast<void*>(kernel), fake_cuda::device}] = bytes;
  return fake_cuda::result(fake_cuda::ready());
}
template <class... Types>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Types...), Types... arguments) {
  const cudaLaunchConfig_t c = *config;
  const auto allowed = fake_cuda::allowed.find({reinterpret_cast<void*>(kernel), fake_cuda::device});
  if (int64_t(c.dynamicSmemBytes) > (allowed == fake_cuda::allowed.end() ? 48 << 10 : allowed->second))
    return fake_cuda::result(cudaErrorInvalidValue);
  auto launch = [=] { return fake_cuda::launch(c.gridDim, c.blockDim, c.dynamicSmemBytes, c.stream, [=] { kernel(arguments...); }); };
  fake_cuda::Graph* const graph = fake_cuda::graph();
  if (!graph) return launch();
  const std::vector<unsigned> blocks{fake_cuda::block_of(arguments)...};
  graph->push_back([=] {
    return blocks == std::vector<unsigned>{fake_cuda::block_of(arguments)...} ? launch() : cudaErrorIllegalAddress;
  });
  return cudaSuccess;
}

// ---- for tests: what the machine is, and what was done ----------------------------------------

#define FOR_TESTS extern "C" __attribute__((visibility("default")))
FOR_TESTS void fake_cuda_set(const char* name, int64_t value) { fake_cuda::settings[name] = value; }
FOR_TESTS void fake_cuda_reset() { fake_cuda::settings = fake_cuda::usual, fake_cuda::log = ""; }

// The driver, as far as the product asks it by itself.
FOR_TESTS int cuInit(unsigned) { return fake_cuda::settings["devices"] ? 0 : cudaErrorNoDevice; }
FOR_TESTS int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count), 0; }
FOR_TESTS int cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
FOR_TESTS int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = int(fake_cuda::settings["capability"]);
  if (attribute == 38) return *value = 1 << 12, 0;  // bytes of the last cache: a call or two pass through it
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return fake_cuda::settings["driver_error"] ? int(fake_cuda::settings["driver_error"]) : 0;
}
FOR_TESTS const char* fake_cuda_log() {
  static std::string taken;
  std::lock_guard<std::recursive_mutex> guard(fake_cuda::mutex);
  taken = std::exchange(fake_cuda::log, "");
  return taken.c_str();
}
