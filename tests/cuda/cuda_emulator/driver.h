// As much of libcuda.so.1 as times launches: streams are numbers, a graph is what the libraries' launches left in it.
#pragma once
#include <cuda_runtime.h>

namespace fake_cuda {

static Graph* capturing;
static cudaError_t broken;  // once a kernel has failed, everything does

using Time = std::chrono::steady_clock::time_point;

}  // namespace fake_cuda

FOR_TESTS void fake_cuda_break(int error) { fake_cuda::broken = cudaError_t(error); }
FOR_TESTS fake_cuda::Graph* fake_cuda_graph() { return fake_cuda::capturing; }

FOR_TESTS int cuDeviceGet(int* device, int index) { return *device = index, 0; }
FOR_TESTS int cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "an emulated GPU"), 0; }
FOR_TESTS int cuDevicePrimaryCtxRetain(void** context, int) { return *context = new int, 0; }
FOR_TESTS int cuCtxSetCurrent(void*) { return 0; }
FOR_TESTS int cuStreamCreate(void** stream, unsigned) { return *stream = new int, 0; }
FOR_TESTS int cuMemAlloc_v2(void** memory, size_t bytes) { return fake_cuda::allocate(memory, bytes, 0); }
FOR_TESTS int cuMemFree_v2(void* memory) { return fake_cuda::release(memory); }
FOR_TESTS int cuMemGetInfo_v2(size_t* available, size_t* total) { return cudaMemGetInfo(available, total); }
FOR_TESTS int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) { return memcpy(to, from, bytes), fake_cuda::broken; }
FOR_TESTS int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) { return memcpy(to, from, bytes), fake_cuda::broken; }
FOR_TESTS int cuStreamQuery(void*) { return fake_cuda::broken; }
FOR_TESTS int cuStreamSynchronize(void*) { return fake_cuda::broken; }
FOR_TESTS int cuEventCreate(void** event, unsigned) { return *event = new fake_cuda::Time, 0; }
FOR_TESTS int cuEventSynchronize(void*) { return fake_cuda::broken; }
FOR_TESTS int cuEventRecord(void* event, void*) {
  *static_cast<fake_cuda::Time*>(event) = std::chrono::steady_clock::now();
  return fake_cuda::broken;
}
FOR_TESTS int cuEventElapsedTime(float* ms, void* start, void* end) {
  auto time = [](void* event) { return *static_cast<fake_cuda::Time*>(event); };
  *ms = std::chrono::duration<float, std::milli>(time(end) - time(start)).count();
  return fake_cuda::broken;
}

FOR_TESTS int cuStreamBeginCapture_v2(void*, int) {
  fake_cuda::capturing = new fake_cuda::Graph;
  return fake_cuda::broken;
}
FOR_TESTS int cuStreamEndCapture(void*, void** graph) {
  *graph = std::exchange(fake_cuda::capturing, nullptr);
  return fake_cuda::broken;
}
FOR_TESTS int cuGraphInstantiateWithFlags(void** instance, void* graph, unsigned long long) {
  *instance = new fake_cuda::Graph(*static_cast<fake_cuda::Graph*>(graph));
  return 0;
}
FOR_TESTS int cuGraphDestroy(void* graph) { return delete static_cast<fake_cuda::Graph*>(graph), 0; }
FOR_TESTS int cuGraphExecDestroy(void* instance) { return cuGraphDestroy(instance); }
FOR_TESTS int cuGraphLaunch(void* instance, void*) {
  for (const auto& launch : *static_cast<fake_cuda::Graph*>(instance))
    if (!fake_cuda::broken) fake_cuda::broken = launch();
  return 0;  // what a kernel does wrong is told later
}
FOR_TESTS int cuGetErrorString(int error, const char** text) {
  *text = error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : cudaGetErrorString(cudaError_t(error));
  return 0;
}
