// The operations of ops.h on CUDA memory: each fills its structure of cuda_api.h and starts the
// library's kernels on the stream of the view (or device) that it is given. Called by ops_*.c with
// arguments that they have checked; HB_ERR_CUDA when there is no library, driver, device or kernel,
// or when the launch fails.
//
// Some need scratch memory for the time that their kernels run: hb_*_workspace says how many bytes
// (0: none, which is what they say of the CPU), and the caller gives that much device memory,
// aligned to 256 bytes, as `workspace` of the operation. It may be released right after the call
// where the allocator reuses memory in the order of the stream.
#ifndef HB_CORE_OPS_CUDA_H
#define HB_CORE_OPS_CUDA_H

#include "core/ops.h"

int64_t hb_linear_4bit_workspace(const hb_view *x, const hb_tensor4 *w, bool backward);
int64_t hb_linear_8bit_workspace(const hb_view *x, const int8_t *codes, const float *scale,
                                 int64_t rows, int64_t depth, hb_int8_mode mode, float threshold,
                                 bool backward);
int64_t hb_nest_absmax_workspace(const hb_device *device, int64_t n, int64_t nested_blocksize);
int64_t hb_optimizer_workspace(const hb_device *device, hb_optimizer optimizer,
                               const hb_optim_tensor *tensors, int64_t count,
                               const hb_optim_settings *settings);

// ---- for the bindings: moving data -------------------------------------------------------------

// target[i] = source[i]: the same dtype and shape, any strides, on target's device and stream.
hb_status hb_copy_cuda(const char *function, const hb_view *source, const hb_view *target,
                       hb_error *error);
// A table of the host's (count <= 256) to device memory; `values` may change right afterwards.
hb_status hb_upload_cuda(const char *function, const hb_device *device, const float *values,
                         int count, float *target, hb_error *error);
// hb_expand_absmax with float32 device memory for the result.
hb_status hb_expand_absmax_cuda(const char *function, const hb_device *device, const hb_tensor4 *w,
                                int64_t first, int64_t n, float *absmax, hb_error *error);
// *readable: the device's kernels can use `memory` where it lies (managed or mapped host memory).
hb_status hb_memory_on_cuda(const char *function, const hb_device *device, const void *memory,
                            bool *readable, hb_error *error);

// ---- only on CUDA -------------------------------------------------------------------------------

// y [m, rows] = x [m, depth] W[e]^T, transposed: y [m, depth] = x [m, rows] W[e], e the expert that
// the row belongs to: `offsets` [experts], int32 or int64, is where each expert's rows end. w is
// the whole stack, rows and depth those of one matrix.
int64_t hb_grouped_linear_4bit_workspace(const hb_view *x, const hb_view *offsets,
                                         const hb_tensor4 *w, bool transposed);
hb_status hb_grouped_linear_4bit_cuda(const hb_view *x, const hb_view *offsets, const hb_tensor4 *w,
                                      bool transposed, const hb_view *y, void *workspace,
                                      hb_error *error);
// The same with codes [experts, rows, depth] and scale [experts, rows].
typedef struct {
    const int8_t *codes;
    const float *scale;
    int64_t experts, rows, depth;
    hb_int8_mode mode;
    float threshold;
} hb_stack8;
int64_t hb_grouped_linear_8bit_workspace(const hb_view *x, const hb_view *offsets,
                                         const hb_stack8 *w, bool transposed);
hb_status hb_grouped_linear_8bit_cuda(const hb_view *x, const hb_view *offsets, const hb_stack8 *w,
                                      bool transposed, const hb_view *y, void *workspace,
                                      hb_error *error);
// out [n, depth] = the rows index [n] of w [rows, depth].
hb_status hb_gather_4bit_cuda(const int64_t *index, const hb_tensor4 *w, const hb_view *out,
                              hb_error *error);
// Managed memory; freed by hb_managed_free, which needs no error: there is nothing to do about one.
hb_status hb_managed_new(const char *function, int32_t device, int64_t bytes, void **memory,
                         hb_error *error);
void hb_managed_free(void *memory);
hb_status hb_managed_prefetch(const char *function, const hb_device *device, void *memory,
                              int64_t bytes, hb_error *error);

// ---- for ops_*.c: the branch that they take ----------------------------------------------------

hb_status hb_quantize_4bit_cuda(const hb_view *x, hb_format4 format, int64_t blocksize,
                                hb_scales scales, uint8_t *packed, float *absmax, hb_error *error);
hb_status hb_dequantize_4bit_cuda(const hb_tensor4 *w, int64_t start, const hb_view *out,
                                  hb_error *error);
// offset: [1], device memory. map: [256], device memory, the dynamic map.
hb_status hb_nest_absmax_cuda(const hb_device *device, const float *absmax, int64_t n,
                              int64_t nested_blocksize, const float *map, uint8_t *codes,
                              float *nested_absmax, float *offset, void *workspace,
                              hb_error *error);
hb_status hb_linear_4bit_cuda(const char *function, const hb_view *x, const hb_tensor4 *w,
                              const hb_view *bias, bool backward, const hb_view *y, void *workspace,
                              hb_error *error);
hb_status hb_quantize_8bit_cuda(const hb_view *x, const float *map, int64_t blocksize,
                                uint8_t *codes, float *absmax, hb_error *error);
hb_status hb_dequantize_8bit_cuda(const uint8_t *codes, const float *absmax, const float *map,
                                  int64_t blocksize, const hb_view *out, hb_error *error);
hb_status hb_quantize_rows_int8_cuda(const hb_view *x, int64_t rows, int64_t depth, float threshold,
                                     int8_t *codes, float *scale, uint8_t *outlier_columns,
                                     hb_error *error);
hb_status hb_dequantize_rows_int8_cuda(const int8_t *codes, const float *scale, int64_t rows,
                                       int64_t depth, const hb_view *out, hb_error *error);
hb_status hb_matmul_int8_cuda(const hb_device *device, const int8_t *a, const int8_t *b, int64_t m,
                              int64_t n, int64_t depth, int32_t *c, hb_error *error);
hb_status hb_linear_8bit_cuda(const char *function, const hb_view *x, const int8_t *codes,
                              const float *scale, int64_t rows, int64_t depth, const hb_view *bias,
                              hb_int8_mode mode, float threshold, bool backward, const hb_view *y,
                              void *workspace, hb_error *error);
hb_status hb_optimizer_step_cuda(const hb_device *device, hb_optimizer optimizer,
                                 const hb_optim_tensor *tensors, int64_t count,
                                 const hb_optim_settings *settings, const float *map1,
                                 const float *map2, void *workspace, hb_error *error);

#endif
