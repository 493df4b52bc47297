// The launchers, one per entry of hb_cuda_api; api.cu puts them into its table. Each starts kernels
// on queue->stream of the current device and returns 0 or a cudaError_t.
#ifndef HB_CUDA_KERNELS_CUH
#define HB_CUDA_KERNELS_CUH

#include "core/cuda_api.h"
#include "core/formats.h"

enum { HB_CUDA_INVALID = 1 }; // cudaErrorInvalidValue: arguments that no kernel here can do

int hb_cuda_launch_copy(const hb_cuda_queue *queue, const hb_cuda_copy *args);
int hb_cuda_launch_upload(const hb_cuda_queue *queue, const hb_cuda_upload *args);
int hb_cuda_launch_expand4(const hb_cuda_queue *queue, const hb_cuda_expand4 *args);
// quantize4 with searched scales, and dequantize4 to the transpose.
int hb_cuda_launch_search4(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args);
int hb_cuda_launch_transpose4(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args);
int hb_cuda_launch_quantize4(const hb_cuda_queue *queue, const hb_cuda_quantize4 *args);
int64_t hb_cuda_nest4_workspace(const hb_cuda_queue *queue, const hb_cuda_nest4 *args);
int hb_cuda_launch_nest4(const hb_cuda_queue *queue, const hb_cuda_nest4 *args);
int hb_cuda_launch_dequantize4(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args);
// linear4 (linear4.cu) chooses among the four kernels below it. Of each: whether it can do the
// product; the bytes of workspace with which several blocks share the steps of an output, 0 where
// that would not help; its launch, which without workspace leaves an output to one block.
int hb_cuda_launch_linear4(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int64_t hb_cuda_linear4_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
bool hb_cuda_linear4_simt_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int64_t hb_cuda_linear4_simt_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int hb_cuda_launch_linear4_simt(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
bool hb_cuda_linear4_mma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int64_t hb_cuda_linear4_mma_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int hb_cuda_launch_linear4_mma(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
bool hb_cuda_linear4_tile_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int64_t hb_cuda_linear4_tile_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int hb_cuda_launch_linear4_tile(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
bool hb_cuda_linear4_wgmma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int64_t hb_cuda_linear4_wgmma_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int hb_cuda_launch_linear4_wgmma(const hb_cuda_queue *queue, const hb_cuda_linear4 *args);
int hb_cuda_launch_quantize8(const hb_cuda_queue *queue, const hb_cuda_quantize8 *args);
int hb_cuda_launch_dequantize8(const hb_cuda_queue *queue, const hb_cuda_dequantize8 *args);
int hb_cuda_launch_gather4(const hb_cuda_queue *queue, const hb_cuda_gather4 *args);
int hb_cuda_launch_quantize_rows8(const hb_cuda_queue *queue, const hb_cuda_quantize_rows8 *args);
int hb_cuda_launch_dequantize_rows8(const hb_cuda_queue *queue,
                                    const hb_cuda_dequantize_rows8 *args);
int hb_cuda_launch_matmul8(const hb_cuda_queue *queue, const hb_cuda_matmul8 *args);
int64_t hb_cuda_linear8_workspace(const hb_cuda_queue *queue, const hb_cuda_linear8 *args);
int hb_cuda_launch_linear8(const hb_cuda_queue *queue, const hb_cuda_linear8 *args);
int64_t hb_cuda_optimizer_workspace(const hb_cuda_queue *queue, const hb_cuda_optimizer *args);
int hb_cuda_launch_optimizer(const hb_cuda_queue *queue, const hb_cuda_optimizer *args);

// Compute capability (major) and number of multiprocessors of a device, cached; 0 when it cannot be
// asked.
int hb_cuda_device_major(int32_t device);
int hb_cuda_device_multiprocessors(int32_t device);

#endif
