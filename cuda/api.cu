// The one exported symbol of libhalfbyte_cuda.so, and what it says about driver and devices.
#include "kernels.cuh"

#ifndef HB_CUDA_HOST
#include <cuda_runtime.h>
#else
#include "runtime_host.h"
#endif

namespace
{

// Makes a device current for the length of one call, and the caller's again afterwards. An error
// that an earlier, unrelated call left behind is not ours to report.
template <typename Call> int with_device(int32_t device, Call call)
{
    int current = 0;
    cudaError_t status = cudaGetDevice(&current);
    if (status != cudaSuccess) return status;
    if (current != device) {
        status = cudaSetDevice(device);
        if (status != cudaSuccess) return status;
    }
    (void)cudaGetLastError();
    int result = call();
    if (result != 0) (void)cudaGetLastError();
    if (current != device) {
        status = cudaSetDevice(current);
        if (result == 0) result = status;
    }
    return result;
}

template <typename Args>
int on_device(const hb_cuda_queue *queue, const Args *args,
              int (*launch)(const hb_cuda_queue *, const Args *))
{
    return with_device(queue->device, [=] { return launch(queue, args); });
}

const char *error_text(int status)
{
    return cudaGetErrorString((cudaError_t)status);
}

int driver_version(int *version)
{
    return cudaDriverGetVersion(version);
}

int device_count(int *count)
{
    cudaError_t status = cudaGetDeviceCount(count);
    (void)cudaGetLastError();
    return status;
}

int device_get(int32_t index, hb_cuda_device *device)
{
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDeviceProperties(&properties, index);
    if (status != cudaSuccess) return status;
    size_t i = 0;
    for (; i + 1 < sizeof device->name && properties.name[i] != '\0'; i++)
        device->name[i] = properties.name[i];
    device->name[i] = '\0';
    device->major = properties.major;
    device->minor = properties.minor;
    device->multiprocessors = properties.multiProcessorCount;
    device->memory = (int64_t)properties.totalGlobalMem;
    return 0;
}

// Without advice managed memory moves to where it was touched last and back when room is needed,
// which is what paged states want.
int managed_new(int32_t device, int64_t bytes, void **memory)
{
    *memory = nullptr;
    if (bytes <= 0) return bytes < 0 ? cudaErrorInvalidValue : cudaSuccess;
    return with_device(device, [=]() -> int {
        return cudaMallocManaged(memory, (size_t)bytes, cudaMemAttachGlobal);
    });
}

int managed_free(void *memory)
{
    return cudaFree(memory);
}

// Where pages cannot move while the device works (Windows), they move as a whole at each launch,
// and there is nothing to ask for.
int managed_prefetch(const hb_cuda_queue *queue, void *memory, int64_t bytes)
{
    if (bytes <= 0) return cudaSuccess;
    return with_device(queue->device, [=]() -> int {
        int movable = 0;
        cudaError_t status =
            cudaDeviceGetAttribute(&movable, cudaDevAttrConcurrentManagedAccess, queue->device);
        if (status != cudaSuccess || !movable) return status;
#if CUDART_VERSION >= 13000
        cudaMemLocation location = {};
        location.type = cudaMemLocationTypeDevice;
        location.id = queue->device;
        return cudaMemPrefetchAsync(memory, (size_t)bytes, location, 0,
                                    (cudaStream_t)queue->stream);
#else
        return cudaMemPrefetchAsync(memory, (size_t)bytes, queue->device,
                                    (cudaStream_t)queue->stream);
#endif
    });
}

// Memory of the device, managed memory, and pinned host memory under its own address. Ordinary host
// memory does not count, also where the system would let kernels reach it page by page.
int memory_on_device(int32_t device, const void *memory, int32_t *readable)
{
    *readable = 0;
    return with_device(device, [=]() -> int {
        cudaPointerAttributes found = {};
        cudaError_t status = cudaPointerGetAttributes(&found, memory);
        if (status != cudaSuccess) return status;
        switch (found.type) {
        case cudaMemoryTypeDevice: *readable = found.device == device; break;
        case cudaMemoryTypeManaged: *readable = 1; break;
        case cudaMemoryTypeHost: *readable = found.devicePointer == memory; break;
        default: break;
        }
        return cudaSuccess;
    });
}

#define ON_DEVICE(name, args_type)                                                                 \
    int name(const hb_cuda_queue *queue, const args_type *args)                                    \
    {                                                                                              \
        return on_device(queue, args, hb_cuda_launch_##name);                                      \
    }
ON_DEVICE(copy, hb_cuda_copy)
ON_DEVICE(upload, hb_cuda_upload)
ON_DEVICE(expand4, hb_cuda_expand4)
ON_DEVICE(quantize4, hb_cuda_quantize4)
ON_DEVICE(nest4, hb_cuda_nest4)
ON_DEVICE(dequantize4, hb_cuda_dequantize4)
ON_DEVICE(linear4, hb_cuda_linear4)
ON_DEVICE(gather4, hb_cuda_gather4)
ON_DEVICE(quantize8, hb_cuda_quantize8)
ON_DEVICE(dequantize8, hb_cuda_dequantize8)
ON_DEVICE(quantize_rows8, hb_cuda_quantize_rows8)
ON_DEVICE(dequantize_rows8, hb_cuda_dequantize_rows8)
ON_DEVICE(matmul8, hb_cuda_matmul8)
ON_DEVICE(optimizer, hb_cuda_optimizer)
ON_DEVICE(linear8, hb_cuda_linear8)

// clang-format off: one entry a line, in the order of hb_cuda_api. The entries that are null do not
// exist yet.
const hb_cuda_api api = {
    HB_CUDA_ABI,
    sizeof(hb_cuda_api),
    CUDART_VERSION,
    error_text,
    driver_version,
    device_count,
    device_get,
    managed_new,
    managed_free,
    managed_prefetch,
    memory_on_device,
    copy,
    upload,
    expand4,
    quantize4,
    hb_cuda_nest4_workspace,
    nest4,
    dequantize4,
    hb_cuda_linear4_workspace,
    linear4,
    gather4,
    quantize8,
    dequantize8,
    quantize_rows8,
    dequantize_rows8,
    matmul8,
    hb_cuda_linear8_workspace,
    linear8,
    hb_cuda_optimizer_workspace,
    optimizer,
};
// clang-format on

// An attribute of a device, remembered in known[device]. 0: not asked yet; two threads that ask at
// once write the same.
enum { KNOWN_DEVICES = 64 };
int device_attribute(int32_t device, cudaDeviceAttr attribute, volatile int *known)
{
    const bool cached = device >= 0 && device < KNOWN_DEVICES;
    if (cached && known[device] != 0) return known[device];
    int value = 0;
    if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    if (cached) known[device] = value;
    return value;
}

} // namespace

int hb_cuda_device_major(int32_t device)
{
    static volatile int known[KNOWN_DEVICES];
    return device_attribute(device, cudaDevAttrComputeCapabilityMajor, known);
}

int hb_cuda_device_multiprocessors(int32_t device)
{
    static volatile int known[KNOWN_DEVICES];
    return device_attribute(device, cudaDevAttrMultiProcessorCount, known);
}

extern "C" __attribute__((visibility("default"))) hb_cuda_api_get_fn hb_cuda_api_get;
extern "C" const hb_cuda_api *hb_cuda_api_get(void)
{
    return &api;
}
