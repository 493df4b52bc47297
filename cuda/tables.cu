// Small tables in device memory: a table of the host's, and the scales of a 4-bit tensor as
// float32.
//
// upload: the numbers lie in the launch's arguments (constant bank), a thread each. No copy engine,
// no pinned memory, nothing to wait for; a graph that captured the launch repeats the same numbers.
// expand4: absmax[i] = scale of block first + i, the bits of the CPU's hb_expand_absmax. Row slices
// that begin inside a nested block need it, once when they are made: written for brevity.
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, TABLE = 256 };

HB_KERNEL(THREADS) upload_kernel(HB_ARGS hb_cuda_upload a)
{
    const int i = thread_index();
    if (i < a.count) store(a.target + i, a.values[i]);
}

HB_KERNEL(THREADS) expand4_kernel(HB_ARGS hb_cuda_expand4 a)
{
    float *map = (float *)shared_memory();
    scale_map_fill(a.scales, map);
    block_sync();
    const int64_t i = block_index() * THREADS + thread_index();
    if (i >= a.n) return;
    store(a.absmax + i, scale_of(a.scales, map, scale_offset(a.scales), a.first + i));
}

} // namespace

int hb_cuda_launch_upload(const hb_cuda_queue *queue, const hb_cuda_upload *args)
{
    if (args->count == 0) return 0;
    if (args->count < 0 || args->count > TABLE) return HB_CUDA_INVALID;
    return HB_LAUNCH(upload_kernel, 1, THREADS, 0, queue->stream, *args);
}

int hb_cuda_launch_expand4(const hb_cuda_queue *queue, const hb_cuda_expand4 *args)
{
    if (args->n == 0) return 0;
    const int64_t blocks = hb_ceil_div(args->n, (int64_t)THREADS);
    return HB_LAUNCH(expand4_kernel, blocks, THREADS, scale_map_bytes(args->scales), queue->stream,
                     *args);
}
