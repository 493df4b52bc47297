// The whole interface between the core and libhalfbyte_cuda.so, plain C on both sides.
//
// The library exports one symbol, hb_cuda_api_get, which returns a table of functions. It is opened
// with dlopen when the first CUDA tensor comes (cuda_load.c), so that halfbyte imports on a machine
// without driver or GPU. Every launcher works on the device and stream of its hb_cuda_queue, never
// synchronises, allocates no device memory, and may be captured into a CUDA graph. All pointers in
// the argument structs are device pointers, arrays are contiguous and aligned to their elements.
// Launchers trust their arguments: validation is done in the core, once.
#ifndef HB_CORE_CUDA_API_H
#define HB_CORE_CUDA_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a struct or the meaning of a function here does.
enum { HB_CUDA_ABI = 1 };

typedef struct {
    int32_t device; // index, as CUDA counts the visible devices
    void *stream;   // cudaStream_t; NULL is the legacy default stream
} hb_cuda_queue;

typedef struct {
    char name[64];
    int32_t major, minor; // compute capability
    int32_t multiprocessors;
    int64_t memory; // bytes in all
} hb_cuda_device;

// Scales of a 4-bit tensor as hb_tensor4 (ops.h) has them: float32 `absmax`, or nested.
typedef struct {
    const float *absmax; // NULL when nested
    const uint8_t *absmax_codes;
    const float *nested_absmax;
    const float *nested_map;    // [256]
    const float *nested_offset; // [1]; may be NULL when nested_offset_value is to be used
    float nested_offset_value;
    int64_t nested_blocksize;
} hb_cuda_scales4;

// hb_quantize_4bit with HB_SCALES_ABSMAX: x [n] -> packed [(n + 1) / 2], absmax [ceil(n /
// blocksize)].
typedef struct {
    const void *x;
    int32_t x_dtype; // hb_dtype: float32, bfloat16 or float16
    int32_t format;  // hb_format4
    int64_t blocksize, n;
    uint8_t *packed;
    float *absmax;
} hb_cuda_quantize4;

// hb_dequantize_4bit: elements [start, start + n) -> out [n].
typedef struct {
    const uint8_t *packed;
    hb_cuda_scales4 scales;
    int32_t format, out_dtype;
    int64_t blocksize, start, n;
    void *out;
} hb_cuda_dequantize4;

// hb_linear_4bit: y [m, rows] = x [m, depth] W^T + bias. float32 x: exact float32 products.
// bfloat16 and float16 x: codebook entries rounded to that dtype, float32 sums and scales.
enum { HB_CUDA_AUTO = 0, HB_CUDA_SIMT = 1, HB_CUDA_MMA = 2 };
typedef struct {
    const void *x;
    const uint8_t *packed;
    hb_cuda_scales4 scales;
    const void *bias; // [rows] or NULL
    void *y;
    int32_t io_dtype, bias_dtype, format;
    int32_t
        path; // HB_CUDA_AUTO, or which kernel; cudaErrorInvalidValue where it cannot do the shape
    int64_t blocksize, m, rows, depth;
} hb_cuda_linear4;

// hb_quantize_8bit. tree [256]: the thresholds of hb_search8 (kernels_codec.h), in device memory.
typedef struct {
    const void *x;
    const float *tree;
    int32_t x_dtype;
    int64_t blocksize, n;
    uint8_t *codes;
    float *absmax;
} hb_cuda_quantize8;

// hb_dequantize_8bit.
typedef struct {
    const uint8_t *codes;
    const float *absmax, *map; // map [256]
    int32_t out_dtype;
    int64_t blocksize, n;
    void *out;
} hb_cuda_dequantize8;

// Functions return 0, or a positive cudaError_t whose sentence error_text gives.
typedef struct {
    uint32_t abi;            // HB_CUDA_ABI of the library
    uint32_t size;           // sizeof(hb_cuda_api) there
    int32_t runtime_version; // of the CUDA runtime inside, as 1000 * major + 10 * minor
    const char *(*error_text)(int status);
    // Driver version as 1000 * major + 10 * minor; 0 when there is no driver.
    int (*driver_version)(int *version);
    int (*device_count)(int *count);
    int (*device_get)(int32_t index, hb_cuda_device *device);
    int (*quantize4)(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args);
    int (*dequantize4)(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args);
    int (*linear4)(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
    int (*quantize8)(const hb_cuda_queue *queue, const hb_cuda_quantize8 *args);
    int (*dequantize8)(const hb_cuda_queue *queue, const hb_cuda_dequantize8 *args);
} hb_cuda_api;

typedef const hb_cuda_api *hb_cuda_api_get_fn(void);
#define HB_CUDA_SYMBOL "hb_cuda_api_get"

#ifdef __cplusplus
}
#endif

#endif
