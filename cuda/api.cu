// The one exported symbol of libhalfbyte_cuda.so, and what it says about driver and devices.
#include "kernels.cuh"

#ifndef HB_CUDA_HOST
#include <cuda_runtime.h>
#else
#include "runtime_host.h"
#endif

namespace
{

// Makes the queue's device current for the length of one call, and the caller's again afterwards.
// An error that an earlier, unrelated call left behind is not ours to report.
template <typename Args>
int on_device(const hb_cuda_queue *queue, const Args *args,
              int (*launch)(const hb_cuda_queue *, const Args *))
{
    int current = 0;
    cudaError_t status = cudaGetDevice(&current);
    if (status != cudaSuccess) return status;
    if (current != queue->device) {
        status = cudaSetDevice(queue->device);
        if (status != cudaSuccess) return status;
    }
    (void)cudaGetLastError();
    int result = launch(queue, args);
    if (result != 0) (void)cudaGetLastError();
    if (current != queue->device) {
        status = cudaSetDevice(current);
        if (result == 0) result = status;
    }
    return result;
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

#define ON_DEVICE(name, args_type)                                                                 \
    int name(const hb_cuda_queue *queue, const args_type *args)                                    \
    {                                                                                              \
        return on_device(queue, args, hb_cuda_launch_##name);                                      \
    }
ON_DEVICE(upload, hb_cuda_upload)
ON_DEVICE(expand4, hb_cuda_expand4)
ON_DEVICE(quantize4, hb_cuda_quantize4)
ON_DEVICE(dequantize4, hb_cuda_dequantize4)
ON_DEVICE(linear4, hb_cuda_linear4)
ON_DEVICE(quantize8, hb_cuda_quantize8)
ON_DEVICE(dequantize8, hb_cuda_dequantize8)

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
    nullptr, // managed_new
    nullptr, // managed_free
    nullptr, // managed_prefetch
    nullptr, // memory_on_device
    nullptr, // copy
    upload,
    expand4,
    quantize4,
    nullptr, // nest4_workspace
    nullptr, // nest4
    dequantize4,
    nullptr, // linear4_workspace
    linear4,
    nullptr, // gather4
    quantize8,
    dequantize8,
    nullptr, // quantize_rows8
    nullptr, // dequantize_rows8
    nullptr, // matmul8
    nullptr, // linear8_workspace
    nullptr, // linear8
    nullptr, // optimizer_workspace
    nullptr, // optimizer
};
// clang-format on

} // namespace

int hb_cuda_device_major(int32_t device)
{
    enum { KNOWN = 64 };
    static volatile int majors[KNOWN]; // 0: not asked yet; two threads would write the same
    if (device >= 0 && device < KNOWN && majors[device] != 0) return majors[device];
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
        return 0;
    if (device >= 0 && device < KNOWN) majors[device] = major;
    return major;
}

extern "C" __attribute__((visibility("default"))) hb_cuda_api_get_fn hb_cuda_api_get;
extern "C" const hb_cuda_api *hb_cuda_api_get(void)
{
    return &api;
}
