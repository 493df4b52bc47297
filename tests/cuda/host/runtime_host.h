// The few functions of the CUDA runtime that api.cu calls, for one pretended device.
//
// HALFBYTE_FAKE_CUDA in the environment makes them fail: "no-driver", "no-device", "old-driver".
#ifndef HB_TESTS_CUDA_RUNTIME_HOST_H
#define HB_TESTS_CUDA_RUNTIME_HOST_H

#include <cstdlib>
#include <cstring>

#define CUDART_VERSION 13000

typedef int cudaError_t;
enum {
    cudaSuccess = 0,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719
};

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem;
};

static inline bool hb_fake(const char *what)
{
    const char *wish = getenv("HALFBYTE_FAKE_CUDA");
    return wish != nullptr && strcmp(wish, what) == 0;
}
static inline cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}
static inline cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    if (hb_fake("no-driver") || hb_fake("old-driver")) return cudaErrorInsufficientDriver;
    if (hb_fake("no-device")) return cudaErrorNoDevice;
    *count = 1;
    return cudaSuccess;
}
static inline cudaError_t cudaDriverGetVersion(int *version)
{
    *version = hb_fake("no-driver") ? 0 : hb_fake("old-driver") ? 12020 : 13000;
    return cudaSuccess;
}
static inline cudaError_t cudaGetDevice(int *device)
{
    int count;
    *device = 0;
    return cudaGetDeviceCount(&count);
}
static inline cudaError_t cudaSetDevice(int device)
{
    int count;
    cudaError_t status = cudaGetDeviceCount(&count);
    return status != cudaSuccess ? status : device < count ? cudaSuccess : cudaErrorInvalidDevice;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    *properties = {"emulated on the host", 9, 0, 1, (size_t)1 << 30};
    return cudaSuccess;
}
enum { cudaDevAttrComputeCapabilityMajor = 75 };
static inline cudaError_t cudaDeviceGetAttribute(int *value, int, int device)
{
    *value = hb_fake("sm_75") ? 7 : 9;
    return cudaSetDevice(device);
}
static inline const char *cudaGetErrorString(cudaError_t status)
{
    switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "unknown error";
    }
}

#endif
