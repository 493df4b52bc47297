// Products with 4-bit weights: which kernel, how much workspace, and the sum over blocks that
// shared the steps of a product.
#include "linear4.cuh"

namespace
{

enum { THREADS = 256 };

// y[i] = partial[0][i] + partial[1][i] + ... + bias, in this order.
template <int IO> HB_KERNEL(THREADS) linear4_sum_kernel(HB_ARGS linear4_job job)
{
    const int64_t n = job.a.m * job.outputs;
    const int64_t i = block_index() * THREADS + thread_index();
    if (i >= n) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t split = 0; split < job.splits; split++) sum += load(job.partial + split * n + i);
    if (job.a.bias != nullptr) {
        const int64_t j = i / job.outputs;
        int64_t expert = 0;
        if (job.a.offsets != nullptr)
            while (expert < job.a.experts && linear4_offset(job.a, expert) <= j) expert++;
        if (job.a.offsets == nullptr || expert < job.a.experts)
            sum += bias_of(job.a, expert * job.outputs + i % job.outputs);
    }
    store_float<IO>(job.a.y, i, sum);
}

int launch_sum(const hb_cuda_queue *queue, const linear4_job &job)
{
    const int64_t blocks = hb_ceil_div(job.a.m * job.outputs, (int64_t)THREADS);
    switch (job.a.io_dtype) {
    case HB_F32:
        return HB_LAUNCH((linear4_sum_kernel<HB_F32>), blocks, THREADS, 0, queue->stream, job);
    case HB_BF16:
        return HB_LAUNCH((linear4_sum_kernel<HB_BF16>), blocks, THREADS, 0, queue->stream, job);
    default: return HB_LAUNCH((linear4_sum_kernel<HB_F16>), blocks, THREADS, 0, queue->stream, job);
    }
}

// A kernel: whether it can do the product, how many blocks it would have share the steps, and its
// launch.
struct kernel {
    int32_t path;
    bool (*fits)(const hb_cuda_queue *, const hb_cuda_linear4 *);
    int64_t (*splits)(const hb_cuda_queue *, const hb_cuda_linear4 *);
    int (*launch)(const hb_cuda_queue *, const hb_cuda_linear4 *);
};

const kernel kernels[] = {
    {HB_CUDA_MMA, hb_cuda_linear4_mma_fits, hb_cuda_linear4_mma_splits, hb_cuda_launch_linear4_mma},
    {HB_CUDA_SIMT, hb_cuda_linear4_simt_fits, hb_cuda_linear4_simt_splits,
     hb_cuda_launch_linear4_simt},
};

// The kernel for a product; NULL when the one that was asked for cannot do it.
const kernel *kernel_of(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    for (const kernel &k : kernels)
        if ((a->path == HB_CUDA_AUTO || a->path == k.path) && k.fits(queue, a)) return &k;
    return nullptr;
}

int64_t workspace_bytes(const hb_cuda_linear4 *a, int64_t splits)
{
    return splits > 1 ? splits * a->m * linear4_outputs(*a) * (int64_t)sizeof(float) : 0;
}

bool nothing(const hb_cuda_linear4 *a)
{
    return a->m == 0 || linear4_outputs(*a) == 0;
}

} // namespace

int64_t hb_cuda_linear4_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    if (nothing(args)) return 0;
    const kernel *k = kernel_of(queue, args);
    return k == nullptr ? 0 : workspace_bytes(args, k->splits(queue, args));
}

int hb_cuda_launch_linear4(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    if (nothing(args)) return 0;
    const kernel *k = kernel_of(queue, args);
    if (k == nullptr) return HB_CUDA_INVALID;
    const int64_t splits = k->splits(queue, args);
    if (splits > 1 && args->workspace == nullptr) return HB_CUDA_INVALID;
    const int status = k->launch(queue, args);
    if (status != 0 || splits == 1) return status;
    return launch_sum(queue, linear4_job_of(*args, 1, 1, splits));
}
