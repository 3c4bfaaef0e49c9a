// The host side of a CUDA library, written behind its kernels and TVM's functions that launch them:
// checks, the choice of a variant, large batches in parts, memory for those who have no framework.
//
// What follows this text defines `layer` and `rows`. Errors are tvm-ffi's, of Python's kinds. Only
// the runtime API is used, and no function allocates or waits that does not say so.
#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace sepconv {

using tvm::ffi::Shape;
using tvm::ffi::Tensor;
using tvm::ffi::Optional;

constexpr int64_t kMostBatch = 65535;  // of a grid's z
constexpr int64_t kMostElements = INT32_MAX;  // kernels index with 32 bits
constexpr uintptr_t kAlignment = 16;  // bytes of the widest move

struct Layer {
  const char* description;  // JSON
  DLDataType dtype, pointwise_dtype;
  int64_t channels, filters, strides, effective_kernel;
  int64_t depthwise_shape[3], pointwise_shape[3], bias_shape[1];
  bool channels_first, use_bias, can_align;

  int time() const { return channels_first ? 2 : 1; }
};

// One call, or one part of it, with everything checked; 0 strides of tensors mean compact.
struct Call {
  DLTensor x, depthwise, pointwise, bias, out;
  int32_t left;
  void* workspace;
};

using Run = void (*)(const Call&);

struct Variant {
  int64_t step_tile, filter_blocks;
  Run plain, aligned;  // both may be the same
  int64_t (*workspace_bytes)(int64_t batch, int64_t out_steps);
};

// What an architecture has: its variants, largest first, and all their kernels.
struct Row {
  int arch;
  const Variant* variants;
  int count;
  const void* const* kernels;
  int kernel_count;
};

struct Rows {
  const Row* first;
  int count;
};

extern const Layer& layer();
extern Rows rows();

// ---- CUDA's answers ------------------------------------------------------------------------------

inline void check(cudaError_t status, const std::string& doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else is told of it
  std::string text = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) TVM_FFI_THROW(MemoryError) << doing << ": " << text;
  TVM_FFI_THROW(RuntimeError) << doing << ": " << text;
}

// The device of a scope; the former one comes back.
class On {
 public:
  explicit On(int device) : device_(device) {
    check(cudaGetDevice(&former_), "Asking for the current device");
    if (device_ != former_) check(cudaSetDevice(device_), "Choosing cuda:" + std::to_string(device_));
  }
  ~On() {
    if (device_ != former_) cudaSetDevice(former_);
  }
  On(const On&) = delete;
  On& operator=(const On&) = delete;

 private:
  int device_, former_ = 0;
};

inline cudaStream_t stream_of(int device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device));
}

struct Device {
  const Row* row;
  int multiprocessors;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "Asking cuda:" + std::to_string(device));
  return value;
}

// Jetsons' code and that of the cards of the same generation exclude each other.
inline bool on_chip(int arch) { return arch == 72 || arch == 87; }

// The row whose machine code CUDA loads on a device: its own, the highest lower one of the same
// generation, or what the driver makes of the PTX of the newest.
inline const Row* row_of(int capability) {
  const Rows all = rows();
  const Row* best = nullptr;
  for (const Row* row = all.first; row != all.first + all.count; ++row) {
    if (row->arch == capability) return row;
    if (row->arch / 10 == capability / 10 && row->arch < capability && !on_chip(row->arch) &&
        !on_chip(capability) && (!best || row->arch > best->arch))
      best = row;
  }
  if (best) return best;
  const Row* last = all.first + all.count - 1;
  return last->arch <= capability ? last : nullptr;
}

inline const Device& device(int index) {
  static std::mutex lock;
  static std::map<int, Device> known;
  std::lock_guard<std::mutex> guard(lock);
  auto found = known.find(index);
  if (found != known.end()) return found->second;
  int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                   attribute(cudaDevAttrComputeCapabilityMinor, index);
  const Row* row = row_of(capability);
  if (!row)
    TVM_FFI_THROW(RuntimeError) << "This library has no code for cuda:" << index << ", an sm_"
                                << capability << "; build it for the target cuda-sm_" << capability;
  int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  return known.emplace(index, Device{row, multiprocessors}).first->second;
}

// ---- arguments -----------------------------------------------------------------------------------

inline std::string shape_text(const DLTensor& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + ")";
}

inline bool same(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline void check_tensor(const DLTensor& t, const char* name, DLDataType dtype, int ndim, int index) {
  if (!same(t.dtype, dtype))
    TVM_FFI_THROW(TypeError) << "The `" << name << "` argument must have the dtype "
                             << tvm::ffi::DLDataTypeToString(dtype)
                             << ". Received: " << tvm::ffi::DLDataTypeToString(t.dtype);
  if (t.device.device_type != kDLCUDA || (index >= 0 && t.device.device_id != index))
    TVM_FFI_THROW(ValueError) << "The `" << name << "` argument must be on "
                              << (index < 0 ? "a CUDA device" : "cuda:" + std::to_string(index))
                              << (index < 0 ? "" : ", where `x` is")
                              << ". Received: a tensor on DLPack device type " << t.device.device_type
                              << ", index " << t.device.device_id;
  if (t.ndim != ndim)
    TVM_FFI_THROW(ValueError) << "The `" << name << "` argument must have " << ndim
                              << " axes. Received: shape " << shape_text(t);
}

inline char* data(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

inline int64_t stride(const DLTensor& t, int axis) {
  if (t.strides) return t.strides[axis];
  int64_t product = 1;
  for (int i = axis + 1; i < t.ndim; ++i) product *= t.shape[i];
  return product;
}

inline bool is_compact(const DLTensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim; i-- > 0;) {
    if (t.shape[i] == 0) return true;
    if (t.shape[i] != 1 && stride(t, i) != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// What TVM's functions take: they know no byte offsets.
inline void check_weight(DLTensor& t, const char* name, DLDataType dtype, const int64_t* shape,
                         int ndim, int index) {
  check_tensor(t, name, dtype, ndim, index);
  DLTensor expected = t;
  expected.shape = const_cast<int64_t*>(shape);
  if (!std::equal(shape, shape + ndim, t.shape) || !is_compact(t))
    TVM_FFI_THROW(ValueError) << "The `" << name << "` argument must be packed, compact, of shape "
                              << shape_text(expected) << ". Received: shape " << shape_text(t)
                              << (is_compact(t) ? "" : ", not compact");
  if (reinterpret_cast<uintptr_t>(data(t)) % kAlignment)
    TVM_FFI_THROW(ValueError) << "The `" << name << "` argument must be aligned to " << kAlignment
                              << " bytes; copy it to memory of its own";
  t.data = data(t), t.byte_offset = 0;
}

// Elements from the first to the last of `batch` samples, both included; 0 if there are none.
inline int64_t reach(const DLTensor& t, int64_t batch) {
  if (batch < 1 || t.shape[1] < 1 || t.shape[2] < 1) return 0;
  return (batch - 1) * stride(t, 0) + (t.shape[1] - 1) * stride(t, 1) + t.shape[2];
}

inline void check_view(const DLTensor& t, const char* name, bool written) {
  bool ok = t.shape[2] <= 1 || stride(t, 2) == 1;
  for (int axis = 0; axis < 2; ++axis) {
    int64_t least = written ? 1 : 0;  // of inputs, all may be one and the same row
    ok = ok && (t.shape[axis] <= 1 || stride(t, axis) >= least);
  }
  if (!ok)
    TVM_FFI_THROW(ValueError) << "The `" << name << "` argument must be contiguous along its last "
                              << "axis, and no other stride " << (written ? "zero or " : "")
                              << "negative; pass a contiguous copy";
  if (reach(t, 1) > kMostElements)
    TVM_FFI_THROW(ValueError) << "A sample of the `" << name << "` argument must lie within "
                              << kMostElements << " elements. Received: " << reach(t, 1)
                              << "; split the steps";
}

inline bool is_aligned(const DLTensor& t) {
  const int64_t bytes = (t.dtype.bits + 7) / 8;
  return reinterpret_cast<uintptr_t>(data(t)) % kAlignment == 0 &&
         (t.shape[0] <= 1 || stride(t, 0) * bytes % kAlignment == 0) &&
         (t.shape[1] <= 1 || stride(t, 1) * bytes % kAlignment == 0);
}

inline void check_call(const DLTensor& x, const DLTensor& out) {
  const Layer& l = layer();
  const int time = l.time(), depth = 3 - time;
  if (x.shape[depth] != l.channels || out.shape[depth] != l.filters || x.shape[0] != out.shape[0])
    TVM_FFI_THROW(ValueError) << "The `x` and `out` arguments must have " << l.channels
                              << " channels and " << l.filters << " filters on axis " << depth
                              << " and the same batch. Received: " << shape_text(x) << " and "
                              << shape_text(out);
  check_view(x, "x", false);
  check_view(out, "out", true);
  const int64_t last = (out.shape[time] + 1024) * l.strides + l.effective_kernel;
  if (last > kMostElements)
    TVM_FFI_THROW(ValueError) << "The `out` argument has too many steps for 32-bit indices: "
                              << out.shape[time] << "; split the steps";
  const int64_t bytes = (x.dtype.bits + 7) / 8;
  if (data(x) < data(out) + reach(out, out.shape[0]) * bytes &&
      data(out) < data(x) + reach(x, x.shape[0]) * bytes)
    TVM_FFI_THROW(ValueError) << "The `out` argument must not overlap `x` in memory";
}

// A graph reads the weights it was captured with whenever it is replayed: who gives them up asks for them here first.
class Captured {
 public:
  void note(const void* weights, cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
      cudaGetLastError();  // launching will say it
      return;
    }
    if (status != cudaStreamCaptureStatusActive) return;
    std::lock_guard<std::mutex> guard(mutex_);
    weights_.insert(weights);
  }
  bool has(const void* weights) {
    std::lock_guard<std::mutex> guard(mutex_);
    return weights_.count(weights) != 0;
  }
  void forget(const void* memory) {
    std::lock_guard<std::mutex> guard(mutex_);
    weights_.erase(memory);
  }

 private:
  std::mutex mutex_;
  std::set<const void*> weights_;
};

inline Captured& captured() {
  static Captured* one = new Captured;  // outlives every tensor
  return *one;
}

// ---- running -------------------------------------------------------------------------------------

// Large tiles are the efficient ones, once they are enough to give every multiprocessor one.
inline const Variant& choose(const Device& on, int64_t batch, int64_t out_steps) {
  const Variant* last = on.row->variants + on.row->count - 1;
  for (const Variant* v = on.row->variants; v != last; ++v) {
    int64_t tiles = (out_steps + v->step_tile - 1) / v->step_tile;
    if (batch * tiles * v->filter_blocks >= on.multiprocessors) return *v;
  }
  return *last;
}

// Samples that one launch may take: 32-bit offsets, and the limit of the grid.
inline int64_t most_batch(const DLTensor& x, const DLTensor& out) {
  int64_t most = std::min<int64_t>(x.shape[0], kMostBatch);
  for (const DLTensor* t : {&x, &out}) {
    int64_t step = stride(*t, 0), left = kMostElements - reach(*t, 1);
    if (step > 0) most = std::min(most, 1 + left / step);
  }
  return most;
}

// Of these, as many as leave what lies between a variant's kernels within 32-bit offsets.
inline int64_t most_between(const Variant& variant, int64_t most, int64_t out_steps) {
  const int64_t each = variant.workspace_bytes(1, out_steps) / 4;  // it is float32
  if (each > kMostElements)
    TVM_FFI_THROW(ValueError) << "The `out` argument has too many steps for 32-bit indices: "
                              << out_steps << "; split the steps";
  return each ? std::min(most, kMostElements / each) : most;
}

// The samples from `first` on, with strides that fit 32 bits where they matter.
struct Part {
  Part(const DLTensor& whole, int64_t first, int64_t count) : tensor(whole) {
    int64_t bytes = (whole.dtype.bits + 7) / 8;
    std::copy(whole.shape, whole.shape + 3, shape);
    shape[0] = count;
    for (int axis = 0; axis < 3; ++axis)
      strides[axis] = shape[axis] > 1 ? stride(whole, axis) : axis == 2;
    tensor.data = data(whole) + first * stride(whole, 0) * bytes;
    tensor.byte_offset = 0;
    tensor.shape = shape;
    tensor.strides = strides;
  }
  Part(const Part&) = delete;
  DLTensor tensor;
  int64_t shape[3], strides[3];
};

inline void launch(int32_t (*function)(void*, void*, int32_t, void*), TVMFFIAny* arguments, int count) {
  TVMFFIAny nothing = {};
  if (function(nullptr, arguments, count, &nothing) == 0) return;
  tvm::ffi::Error error = tvm::ffi::details::MoveFromSafeCallRaised();
  TVM_FFI_THROW(RuntimeError) << "Launching the layer's kernel: " << error.message();
}

inline TVMFFIAny argument(const DLTensor& tensor) {
  TVMFFIAny any = {};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = const_cast<DLTensor*>(&tensor);
  return any;
}

inline TVMFFIAny argument(int32_t value) {
  TVMFFIAny any = {};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

inline void run(DLTensor* x_given, DLTensor* depthwise, DLTensor* pointwise,
                Optional<DLTensor*> bias, int64_t left, DLTensor* out_given,
                Optional<DLTensor*> workspace) {
  const Layer& l = layer();
  const DLTensor &x = *x_given, &out = *out_given;
  check_tensor(x, "x", l.dtype, 3, -1);
  const int index = x.device.device_id, time = l.time();
  check_tensor(out, "out", l.dtype, 3, index);
  constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
  Call call = {};
  call.depthwise = *depthwise;
  call.pointwise = *pointwise;
  check_weight(call.depthwise, "depthwise", kFloat32, l.depthwise_shape, 3, index);
  check_weight(call.pointwise, "pointwise", l.pointwise_dtype, l.pointwise_shape, 3, index);
  if (bias.has_value() != l.use_bias)
    TVM_FFI_THROW(ValueError) << "The `bias` argument must be "
                              << (l.use_bias ? "a tensor: the layer has one"
                                             : "None: the layer has no bias");
  if (l.use_bias) {
    call.bias = **bias;
    check_weight(call.bias, "bias", kFloat32, l.bias_shape, 1, index);
  }
  if (left < INT32_MIN / 2 || left > INT32_MAX / 2)
    TVM_FFI_THROW(ValueError) << "The `left` argument is beyond 32-bit indices. Received: " << left;
  check_call(x, out);
  const int64_t batch = out.shape[0], out_steps = out.shape[time];
  if (batch == 0 || out_steps == 0) return;

  const Device& on = device(index);
  const Variant& variant = choose(on, std::min(batch, kMostBatch), out_steps);
  const int64_t most = most_between(variant, most_batch(x, out), out_steps);
  if (int64_t needed = variant.workspace_bytes(most, out_steps)) {
    const DLTensor* given = workspace.has_value() ? *workspace : nullptr;
    if (given) check_tensor(*given, "workspace", {kDLUInt, 8, 1}, 1, index);
    if (!given || given->shape[0] < needed || !is_compact(*given) ||
        reinterpret_cast<uintptr_t>(data(*given)) % kAlignment)
      TVM_FFI_THROW(ValueError) << "The `workspace` argument must be " << needed
                                << " contiguous bytes, aligned to " << kAlignment << ". Received: "
                                << (given ? shape_text(*given) : std::string("none"));
    call.workspace = data(*given);
  }
  const bool aligned = l.can_align && is_aligned(x) && is_aligned(out) &&
                       (!l.channels_first || out_steps * l.dtype.bits / 8 % kAlignment == 0);
  call.left = static_cast<int32_t>(left);
  On here(index);  // lest asking for the stream begins a context on another GPU
  captured().note(data(call.pointwise), stream_of(index));
  for (int64_t first = 0; first < batch; first += most) {
    const int64_t count = std::min(most, batch - first);
    Part from(x, first, count), to(out, first, count);
    call.x = from.tensor;
    call.out = to.tensor;
    (aligned ? variant.aligned : variant.plain)(call);
  }
}

// ---- the rest of what is exported ------------------------------------------------------------------

inline int64_t workspace(int64_t batch, int64_t out_steps, int64_t index) {
  if (batch < 1 || out_steps < 1) return 0;
  batch = std::min(batch, kMostBatch);
  const Variant& variant = choose(device(static_cast<int>(index)), batch, out_steps);
  return variant.workspace_bytes(most_between(variant, batch, out_steps), out_steps);
}

// Loads every kernel a call may take: CUDA does it lazily, which a graph's capture may not see.
inline void prepare(int64_t index) {
  On on(static_cast<int>(index));
  const Row* row = device(static_cast<int>(index)).row;
  for (int i = 0; i < row->kernel_count; ++i) {
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, row->kernels[i]),
          "Loading the layer's kernels on cuda:" + std::to_string(index));
  }
}

// Memory is given back whenever Python collects an array, also while somebody captures a CUDA graph, where a plain
// cudaFree fails and takes the capture with it.
class WhileCapturing {
 public:
  WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct DeviceMemory {
  void AllocData(DLTensor* t) {
    const size_t bytes = tvm::ffi::GetDataSize(*t);
    On on(t->device.device_id);
    t->data = nullptr;
    if (!bytes) return;
    cudaError_t status = cudaMalloc(&t->data, bytes);
    size_t free = 0, total = 0;
    if (status == cudaErrorMemoryAllocation && cudaMemGetInfo(&free, &total) == cudaSuccess) {
      cudaGetLastError();
      TVM_FFI_THROW(MemoryError) << bytes << " bytes are not to be had on cuda:"
                                 << t->device.device_id << ", of whose " << total << " " << free
                                 << " are free";
    }
    check(status, "Allocating " + std::to_string(bytes) + " bytes on cuda:" +
                      std::to_string(t->device.device_id));
  }
  void FreeData(DLTensor* t) {
    WhileCapturing relaxed;
    captured().forget(t->data);
    cudaFree(t->data);
  }
};

struct PinnedMemory {
  void AllocData(DLTensor* t) {
    const size_t bytes = tvm::ffi::GetDataSize(*t);
    t->data = nullptr;
    if (bytes)
      check(cudaMallocHost(&t->data, bytes),
            "Allocating " + std::to_string(bytes) + " bytes of pinned memory");
  }
  void FreeData(DLTensor* t) {
    WhileCapturing relaxed;
    cudaFreeHost(t->data);
  }
};

inline void check_shape(const Shape& shape) {
  for (int64_t extent : shape)
    if (extent < 0)
      TVM_FFI_THROW(ValueError) << "The `shape` argument must not be negative. Received: " << extent;
}

inline Tensor empty(Shape shape, DLDataType dtype, int64_t index) {
  check_shape(shape);
  return Tensor::FromNDAlloc(DeviceMemory(), shape, dtype, DLDevice{kDLCUDA, static_cast<int>(index)});
}

inline Tensor pinned(Shape shape, DLDataType dtype) {
  check_shape(shape);
  return Tensor::FromNDAlloc(PinnedMemory(), shape, dtype, DLDevice{kDLCUDAHost, 0});
}

// Returns at once; what follows on the stream comes after it.
inline void copy(DLTensor* from_given, DLTensor* to_given) {
  const DLTensor &from = *from_given, &to = *to_given;
  const size_t bytes = tvm::ffi::GetDataSize(from);
  if (bytes != tvm::ffi::GetDataSize(to) || !is_compact(from) || !is_compact(to))
    TVM_FFI_THROW(ValueError) << "Both tensors of a copy must be contiguous and of the same size. "
                              << "Received: " << bytes << " and " << tvm::ffi::GetDataSize(to)
                              << " bytes, shapes " << shape_text(from) << " and " << shape_text(to);
  const DLTensor& there = to.device.device_type == kDLCUDA ? to : from;
  if (there.device.device_type != kDLCUDA)
    TVM_FFI_THROW(ValueError) << "One of both tensors of a copy must be on a CUDA device";
  if (!bytes) return;
  On on(there.device.device_id);
  check(cudaMemcpyAsync(data(to), data(from), bytes, cudaMemcpyDefault,
                        stream_of(there.device.device_id)),
        "Copying " + std::to_string(bytes) + " bytes");
}

inline void synchronize(int64_t index) {
  On on(static_cast<int>(index));
  check(cudaStreamSynchronize(stream_of(static_cast<int>(index))),
        "Waiting for cuda:" + std::to_string(index));
}

inline bool was_captured(DLTensor* pointwise) { return captured().has(data(*pointwise)); }

inline int64_t driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

inline tvm::ffi::String describe() { return layer().description; }

}  // namespace sepconv

// (x, depthwise, pointwise, bias or None, left, out[, workspace or None])
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_run(void*, const TVMFFIAny* arguments, int32_t count,
                                                TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  TVMFFIAny complete[7] = {};
  std::copy(arguments, arguments + std::min(count, 7), complete);
  static std::string name = "run";
  tvm::ffi::details::unpack_call<void>(std::make_index_sequence<7>{}, &name, sepconv::run,
                                       reinterpret_cast<const tvm::ffi::AnyView*>(complete),
                                       count == 6 ? 7 : count,
                                       reinterpret_cast<tvm::ffi::Any*>(result));
  TVM_FFI_SAFE_CALL_END();
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace, sepconv::workspace)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, sepconv::prepare)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(empty, sepconv::empty)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pinned, sepconv::pinned)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy, sepconv::copy)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(synchronize, sepconv::synchronize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(was_captured, sepconv::was_captured)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(driver_version, sepconv::driver_version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(describe, sepconv::describe)
