// The whole interface between the core and libhalfbyte_cuda.so, plain C on both sides.
//
// The library exports one symbol, hb_cuda_api_get, which returns a table of functions. It is opened
// with dlopen when the first CUDA tensor comes (cuda_load.c), so that halfbyte imports on a machine
// without driver or GPU. Every launcher works on the device and stream of its hb_cuda_queue, never
// synchronises, allocates no memory, and may be captured into a CUDA graph. Unless said otherwise
// all pointers in the argument structs are device pointers, arrays are contiguous and aligned to
// their elements, and offsets into them take 64 bits. Launchers trust their arguments: validation
// is done in the core, once.
#ifndef HB_CORE_CUDA_API_H
#define HB_CORE_CUDA_API_H

#include "core/optim.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a struct or the meaning of a function here does.
enum { HB_CUDA_ABI = 4, HB_CUDA_MAX_NDIM = 8 };

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

// Some launchers need memory for a moment: the function of the same name with _workspace says how
// many bytes (256-byte aligned; 0: none) the same arguments need, and the caller gives them in
// `workspace`. Its contents mean nothing before and after.

// ---- any dtype ----------------------------------------------------------------------------------

// target[i] = source[i] for every index i of `shape`; strides in elements, of any sign, 0 in
// source.
typedef struct {
    const void *source;
    void *target;
    int32_t item_bytes; // 1, 2, 4 or 8
    int32_t ndim;
    int64_t shape[8], source_stride[8], target_stride[8];
} hb_cuda_copy;

// target[i] = values[i], i < count <= 256: a table of the host's, which travels inside the launch's
// arguments, so that nobody waits for a copy and a graph keeps its numbers.
typedef struct {
    float *target;
    int32_t count;
    float values[256];
} hb_cuda_upload;

// ---- 4-bit codebook formats ---------------------------------------------------------------------

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

// hb_expand_absmax: scales of blocks [first, first + n) as float32.
typedef struct {
    hb_cuda_scales4 scales;
    int64_t first, n;
    float *absmax;
} hb_cuda_expand4;

// hb_quantize_4bit: x [n] -> packed [(n + 1) / 2], absmax [ceil(n / blocksize)].
typedef struct {
    const void *x;
    int32_t x_dtype; // hb_dtype: float32, bfloat16 or float16
    int32_t format;  // hb_format4
    int32_t search;  // hb_scales
    int64_t blocksize, n;
    uint8_t *packed;
    float *absmax;
} hb_cuda_quantize4;

// hb_nest_absmax: absmax [n] -> codes [n], nested_absmax [ceil(n / blocksize)], offset [1].
typedef struct {
    const float *absmax;
    int64_t n, blocksize;
    const float *map; // [256], the dynamic map
    uint8_t *codes;
    float *nested_absmax, *offset;
    void *workspace;
} hb_cuda_nest4;

// hb_dequantize_4bit: elements [start, start + n) -> out [n]. With columns > 0 they are a matrix
// [n / columns, columns], and out is its transpose.
typedef struct {
    const uint8_t *packed;
    hb_cuda_scales4 scales;
    int32_t format, out_dtype;
    int64_t blocksize, start, n, columns;
    void *out;
} hb_cuda_dequantize4;

// hb_linear_4bit: y [m, rows] = x [m, depth] W^T + bias; transposed (hb_linear_4bit_grad_input):
// y [m, depth] = x [m, rows] W, no bias. float32 x: exact float32 products. bfloat16 and float16 x:
// where tensor cores take them, codebook entries (MMA, TILE; scales in float32) or weights (WGMMA,
// transposed) are rounded once to that dtype; all else is float32. Without the workspace that was
// asked for the product is the same but for the order of its sums, and slower.
//
// With `offsets` the weight is a stack [experts, rows, depth], quantized as one tensor, the bias
// [experts, rows], and row r of x meets the expert e with offsets[e - 1] <= r < offsets[e],
// offsets[-1] = 0; rows from the last offset on become 0. Offsets ascend from 0 to at most m;
// others are taken as if they did.
enum {
    HB_CUDA_AUTO = 0,
    HB_CUDA_SIMT = 1,
    HB_CUDA_MMA = 2,
    HB_CUDA_TILE = 3,
    HB_CUDA_WGMMA = 4,
    HB_CUDA_TILE_SMALL = 5
};
typedef struct {
    const void *x;
    const uint8_t *packed;
    hb_cuda_scales4 scales;
    const void *bias; // [rows] or NULL
    void *y;
    const void *offsets; // [experts] or NULL
    void *workspace;
    int32_t io_dtype, bias_dtype, format;
    int32_t offsets_dtype; // HB_I32 or HB_I64
    int32_t transposed;
    int32_t path; // HB_CUDA_AUTO, or which kernel: cudaErrorInvalidValue where it cannot do it
    int64_t blocksize, m, rows, depth, experts;
} hb_cuda_linear4;

// Rows of a table [rows, depth]: out [n, depth], out[i] = row index[i], which counts from the end
// where negative as in Python; an index outside gives a row of NaN.
typedef struct {
    const int64_t *index; // [n]
    const uint8_t *packed;
    hb_cuda_scales4 scales;
    void *out;
    int32_t format, out_dtype;
    int64_t blocksize, n, rows, depth;
} hb_cuda_gather4;

// ---- 8-bit block-wise with a map ----------------------------------------------------------------

// hb_quantize_8bit. map [256]: ascending and finite, which nobody checks.
typedef struct {
    const void *x;
    const float *map;
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

// ---- row-wise int8 ------------------------------------------------------------------------------

// hb_quantize_rows_int8: x [rows, depth] -> codes [rows, depth], scale [rows]. outlier_columns
// [depth] may be NULL when threshold is 0.
typedef struct {
    const void *x;
    int32_t x_dtype;
    float threshold;
    int64_t rows, depth;
    int8_t *codes;
    float *scale;
    uint8_t *outlier_columns;
} hb_cuda_quantize_rows8;

// hb_dequantize_rows_int8.
typedef struct {
    const int8_t *codes;
    const float *scale;
    int32_t out_dtype;
    int64_t rows, depth;
    void *out;
} hb_cuda_dequantize_rows8;

// hb_matmul_int8: c [m, n] = a [m, depth] b [n, depth]^T. path as in hb_cuda_linear8.
typedef struct {
    const int8_t *a, *b;
    int64_t m, n, depth;
    int32_t *c;
    int32_t path;
} hb_cuda_matmul8;

// hb_linear_8bit (mode: hb_int8_mode) and, transposed, hb_linear_8bit_grad_input (mode, threshold
// and bias unused). offsets and experts as in hb_cuda_linear4; codes [experts, rows, depth], scale
// [experts, rows], bias [experts, rows]. Outlier columns are those of all rows of x together. path:
// HB_CUDA_AUTO, or SIMT, MMA (few rows of x), TILE and TILE_SMALL.
typedef struct {
    const void *x;
    const int8_t *codes;
    const float *scale;
    const void *bias;
    void *y;
    const void *offsets;
    void *workspace;
    int32_t io_dtype, bias_dtype, offsets_dtype, mode, transposed, path;
    float threshold;
    int64_t m, rows, depth, experts;
} hb_cuda_linear8;

// ---- optimizers ---------------------------------------------------------------------------------

// hb_optimizer_step. tensors and settings are host memory, what they point to is device memory.
typedef struct {
    const hb_optim_tensor *tensors;
    const hb_optim_settings *settings;
    int32_t optimizer; // hb_optimizer
    int64_t count;
    const float *map1, *map2; // [256]; NULL without 8-bit states
    void *workspace;
} hb_cuda_optimizer;

// ---- the table ----------------------------------------------------------------------------------

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

    // Managed memory (paged optimizer states), the only memory that this library gives out: 0 bytes
    // are NULL. Free may wait for the device; prefetch moves the pages there, in the stream.
    int (*managed_new)(int32_t device, int64_t bytes, void **memory);
    int (*managed_free)(void *memory);
    int (*managed_prefetch)(const hb_cuda_queue *queue, void *memory, int64_t bytes);
    // *readable: kernels of the device may read and write `memory` where it lies, because it is
    // the device's, managed, or pinned host memory.
    int (*memory_on_device)(int32_t device, const void *memory, int32_t *readable);

    int (*copy)(const hb_cuda_queue *queue, const hb_cuda_copy *args);
    int (*upload)(const hb_cuda_queue *queue, const hb_cuda_upload *args);
    int (*expand4)(const hb_cuda_queue *queue, const hb_cuda_expand4 *args);
    int (*quantize4)(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args);
    int64_t (*nest4_workspace)(const hb_cuda_queue *queue, const hb_cuda_nest4 *args);
    int (*nest4)(const hb_cuda_queue *queue, const hb_cuda_nest4 *args);
    int (*dequantize4)(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args);
    int64_t (*linear4_workspace)(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
    int (*linear4)(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
    int (*gather4)(const hb_cuda_queue *queue, const hb_cuda_gather4 *args);
    int (*quantize8)(const hb_cuda_queue *queue, const hb_cuda_quantize8 *args);
    int (*dequantize8)(const hb_cuda_queue *queue, const hb_cuda_dequantize8 *args);
    int (*quantize_rows8)(const hb_cuda_queue *queue, const hb_cuda_quantize_rows8 *args);
    int (*dequantize_rows8)(const hb_cuda_queue *queue, const hb_cuda_dequantize_rows8 *args);
    int (*matmul8)(const hb_cuda_queue *queue, const hb_cuda_matmul8 *args);
    int64_t (*linear8_workspace)(const hb_cuda_queue *queue, const hb_cuda_linear8 *args);
    int (*linear8)(const hb_cuda_queue *queue, const hb_cuda_linear8 *args);
    int64_t (*optimizer_workspace)(const hb_cuda_queue *queue, const hb_cuda_optimizer *args);
    int (*optimizer)(const hb_cuda_queue *queue, const hb_cuda_optimizer *args);
} hb_cuda_api;

typedef const hb_cuda_api *hb_cuda_api_get_fn(void);
#define HB_CUDA_SYMBOL "hb_cuda_api_get"

#ifdef __cplusplus
}
#endif

#endif
