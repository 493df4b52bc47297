// The few functions of the CUDA runtime that api.cu calls, for three pretended devices: 0 is large
// (so that small problems are split over its multiprocessors), 1 small, 2 old.
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
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
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

enum { HB_HOST_DEVICES = 3 };
static const struct {
    int major, minor, multiprocessors;
} hb_host_devices[HB_HOST_DEVICES] = {{9, 0, 132}, {8, 0, 2}, {7, 5, 16}};

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
    *count = HB_HOST_DEVICES;
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
    return status != cudaSuccess           ? status
           : device >= 0 && device < count ? cudaSuccess
                                           : cudaErrorInvalidDevice;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    const auto &known = hb_host_devices[device];
    *properties = {"emulated on the host", known.major, known.minor, known.multiprocessors,
                   (size_t)1 << 30};
    return cudaSuccess;
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrConcurrentManagedAccess = 89
};
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    const auto &known = hb_host_devices[device];
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = known.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = known.major; break;
    case cudaDevAttrConcurrentManagedAccess: *value = 1; break;
    }
    return cudaSuccess;
}

// Managed memory is host memory that the emulator's kernels may write (emulator.cpp); what the
// tests register with the emulator is device memory, and all else the host's.
namespace hb_host
{
enum class place { host, device, managed };
void *managed_new(size_t bytes);
bool managed_free(void *memory); // false: it is none
place place_of(const void *memory);
} // namespace hb_host

typedef void *cudaStream_t;
enum { cudaMemAttachGlobal = 1 };
enum cudaMemoryType {
    cudaMemoryTypeUnregistered,
    cudaMemoryTypeHost,
    cudaMemoryTypeDevice,
    cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
struct cudaMemLocation {
    cudaMemLocationType type;
    int id;
};

static inline cudaError_t cudaMallocManaged(void **memory, size_t bytes, unsigned)
{
    *memory = hb_fake("no-memory") ? nullptr : hb_host::managed_new(bytes);
    return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
static inline cudaError_t cudaFree(void *memory)
{
    return memory == nullptr || hb_host::managed_free(memory) ? cudaSuccess : cudaErrorInvalidValue;
}
static inline cudaError_t cudaMemPrefetchAsync(const void *memory, size_t, cudaMemLocation location,
                                               unsigned, cudaStream_t)
{
    if (hb_host::place_of(memory) != hb_host::place::managed) return cudaErrorInvalidValue;
    return cudaSetDevice(location.id);
}
static inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found, const void *memory)
{
    const hb_host::place place = hb_host::place_of(memory);
    const bool mine = place != hb_host::place::host;
    *found = {mine ? place == hb_host::place::device ? cudaMemoryTypeDevice : cudaMemoryTypeManaged
                   : cudaMemoryTypeUnregistered,
              0, mine ? (void *)memory : nullptr, nullptr};
    return cudaSuccess;
}
static inline const char *cudaGetErrorString(cudaError_t status)
{
    switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "unknown error";
    }
}

#endif
