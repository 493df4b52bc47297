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
            while (expert < job.a.experts && expert_offset(job.a, expert) <= j) expert++;
        if (job.a.offsets == nullptr || expert < job.a.experts)
            sum += bias_of(job.a, expert * job.outputs + i % job.outputs);
    }
    store_float<IO>(job.a.y, i, sum);
}

// A kernel: its name in `path`, and what kernels.cuh says of it.
struct kernel {
    int32_t path;
    bool (*fits)(const hb_cuda_queue *, const hb_cuda_linear4 *);
    int64_t (*workspace)(const hb_cuda_queue *, const hb_cuda_linear4 *);
    int (*launch)(const hb_cuda_queue *, const hb_cuda_linear4 *);
};

#define KERNEL(path, name)                                                                         \
    const kernel name = {path, hb_cuda_linear4_##name##_fits, hb_cuda_linear4_##name##_workspace,  \
                         hb_cuda_launch_linear4_##name}
KERNEL(HB_CUDA_SIMT, simt);
KERNEL(HB_CUDA_MMA, mma);
KERNEL(HB_CUDA_TILE, tile);
KERNEL(HB_CUDA_WGMMA, wgmma);

// The kernel for a product, the first of its list that can do it; NULL when the one that was asked
// for cannot.
//
//   1 to 8 rows of x (of an expert, on average): mma takes them at the cost of one, tile makes 16
//   at
//     least and wgmma 64
//   9 to 16: tile decodes every weight once, mma once for every 8 rows
//   17 and more: wgmma has twice the products a clock of mma.sync; where it is not (other GPUs,
//     experts) tile decodes once for 64 rows
// mma remains where codes begin at 8 bytes only, simt for all else: float32, GPUs before sm_80,
// depths that are no multiple of 32 (wgmma: of 8).
const kernel *kernel_of(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    static const kernel *const few[] = {&mma, &tile, &simt, &wgmma};
    static const kernel *const some[] = {&tile, &mma, &wgmma, &simt};
    static const kernel *const many[] = {&wgmma, &tile, &mma, &simt};
    const bool grouped = a->offsets != nullptr && a->experts > 0;
    const int64_t m = grouped ? hb_ceil_div(a->m, a->experts) : a->m;
    const kernel *const *list = m <= 8 ? few : m <= 16 ? some : many;
    for (int i = 0; i < 4; i++) {
        const kernel *k = list[i];
        if ((a->path == HB_CUDA_AUTO || a->path == k->path) && k->fits(queue, a)) return k;
    }
    return nullptr;
}

bool nothing(const hb_cuda_linear4 *a)
{
    return a->m == 0 || linear4_outputs(*a) == 0;
}

} // namespace

int linear4_add_partial(const hb_cuda_queue *queue, const linear4_job &job)
{
    if (job.partial == nullptr) return 0;
    const int64_t blocks = hb_ceil_div(job.a.m * job.outputs, (int64_t)THREADS);
    switch (job.a.io_dtype) {
    case HB_F32:
        return HB_LAUNCH((linear4_sum_kernel<HB_F32>), blocks, THREADS, 0, queue->stream, job);
    case HB_BF16:
        return HB_LAUNCH((linear4_sum_kernel<HB_BF16>), blocks, THREADS, 0, queue->stream, job);
    default: return HB_LAUNCH((linear4_sum_kernel<HB_F16>), blocks, THREADS, 0, queue->stream, job);
    }
}

int64_t hb_cuda_linear4_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    const kernel *k = nothing(args) ? nullptr : kernel_of(queue, args);
    return k == nullptr ? 0 : k->workspace(queue, args);
}

int hb_cuda_launch_linear4(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    if (nothing(args)) return 0;
    const kernel *k = kernel_of(queue, args);
    return k == nullptr ? (int)HB_CUDA_INVALID : k->launch(queue, args);
}
