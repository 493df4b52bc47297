// Products with row-wise int8 weights: x quantized on the way, which kernel, how much workspace.
//
// In the dynamic mode the workspace holds x quantized, its scales, the marks of outlier columns and
// their list. How many there are the host never learns: kernels read it.
#include "linear8.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    EACH = 8,
    FEW_ROWS = 16 // of x up to which weights are read straight into registers
};

struct list_args {
    const uint8_t *marks; // [depth], 8-byte aligned
    int64_t depth;
    int32_t *columns, *n_columns;
};

// The marked columns in ascending order, by one block: each thread counts its marks, a running sum
// over the block says where they go.
HB_KERNEL(THREADS) list_columns_kernel(HB_ARGS list_args a)
{
    uint32_t *totals = (uint32_t *)shared_memory(); // [2][WARPS]
    uint32_t before = 0;                            // marks of earlier rounds
    int parity = 0;
    for (int64_t base = 0; base < a.depth; base += THREADS * EACH, parity ^= 1) {
        const int64_t k = base + thread_index() * EACH;
        uint2 marks = {0, 0};
        if (k + EACH <= a.depth)
            marks = load((const uint2 *)(a.marks + k));
        else
            for (int j = 0; j < EACH && k + j < a.depth; j++)
                (j < 4 ? marks.x : marks.y) |= (uint32_t)load(a.marks + k + j) << (8 * (j % 4));
        const uint32_t count = ((marks.x + marks.y) * 0x01010101u) >> 24;
        uint32_t sum = count; // of the lanes up to this one
        for (int step = 1; step < HB_LANES; step *= 2) {
            const int lane = lane_index();
            const uint32_t other = shuffle(sum, lane >= step ? lane - step : lane);
            if (lane >= step) sum += other;
        }
        if (lane_index() == HB_LANES - 1) shared_store(totals + parity * WARPS + warp_index(), sum);
        block_sync();
        uint32_t all = 0, place = before + sum - count;
        for (int w = 0; w < WARPS; w++) {
            const uint32_t total = shared_load(totals + parity * WARPS + w);
            all += total;
            if (w < warp_index()) place += total;
        }
        for (int j = 0; j < EACH && count > 0; j++)
            if ((j < 4 ? marks.x : marks.y) >> (8 * (j % 4)) & 1)
                store(a.columns + place++, (int32_t)(k + j));
        before += all;
    }
    if (thread_index() == 0) store(a.n_columns, (int32_t)before);
}

// Where things lie in the workspace.
struct layout {
    int64_t codes, scale, marks, columns, n_columns, bytes;
};

layout layout_of(const hb_cuda_linear8 &a)
{
    enum { ALIGN = 256 };
    layout at = {};
    auto take = [&at](int64_t bytes) {
        const int64_t begin = at.bytes;
        at.bytes += hb_ceil_div(bytes, (int64_t)ALIGN) * ALIGN;
        return begin;
    };
    at.codes = take(a.m * a.depth);
    at.scale = take(a.m * 4);
    if (a.threshold > 0.0f) {
        at.marks = take(a.depth);
        at.columns = take(a.depth * 4);
        at.n_columns = take(4);
    }
    return at;
}

bool is_dynamic(const hb_cuda_linear8 &a)
{
    return a.mode == HB_INT8_DYNAMIC && !a.transposed;
}

bool is_empty(const hb_cuda_linear8 &a)
{
    return a.m == 0 || (a.transposed ? a.depth : a.rows) == 0;
}

// x into the workspace, and the list of its outlier columns.
int quantize(const hb_cuda_queue *queue, linear8_job *job)
{
    const hb_cuda_linear8 &a = job->a;
    const layout at = layout_of(a);
    unsigned char *memory = (unsigned char *)a.workspace;
    hb_cuda_quantize_rows8 rows = {};
    rows.x = a.x;
    rows.x_dtype = a.io_dtype;
    rows.threshold = a.threshold;
    rows.rows = a.m;
    rows.depth = a.depth;
    rows.codes = (int8_t *)(memory + at.codes);
    rows.scale = (float *)(memory + at.scale);
    if (a.threshold > 0.0f) rows.outlier_columns = memory + at.marks;
    const int status = hb_cuda_launch_quantize_rows8(queue, &rows);
    job->x_codes = rows.codes;
    job->x_scale = rows.scale;
    if (status != 0 || !(a.threshold > 0.0f)) return status;
    int32_t *columns = (int32_t *)(memory + at.columns);
    int32_t *n_columns = (int32_t *)(memory + at.n_columns);
    job->columns = columns;
    job->n_columns = n_columns;
    const list_args list = {rows.outlier_columns, a.depth, columns, n_columns};
    return HB_LAUNCH(list_columns_kernel, 1, THREADS, 2 * WARPS * 4, queue->stream, list);
}

// Rows of x that meet a weight, on the average.
int64_t rows_each(const hb_cuda_linear8 &a)
{
    return a.offsets != nullptr ? a.m / a.experts : a.m;
}

bool is_few(const hb_cuda_queue *queue, const hb_cuda_linear8 &a)
{
    if (a.path != HB_CUDA_MMA && (a.path != HB_CUDA_AUTO || rows_each(a) > FEW_ROWS)) return false;
    return hb_cuda_linear8_few_fits(queue, a);
}

// One launch does everything.
bool is_fused(const hb_cuda_queue *queue, const hb_cuda_linear8 &a)
{
    return is_dynamic(a) && is_few(queue, a) && hb_cuda_linear8_few_fuses(a);
}

// The exact mode or a gradient on tensor cores.
bool is_wide(const hb_cuda_queue *queue, const hb_cuda_linear8 &a)
{
    return (a.path == HB_CUDA_AUTO || a.path == HB_CUDA_MMA) && hb_cuda_linear8_wide_fits(queue, a);
}

// The product of integers.
int product(const hb_cuda_queue *queue, const linear8_job &job)
{
    const int32_t path = job.a.path;
    if (((uintptr_t)job.x_codes & 15) == 0 && is_few(queue, job.a))
        return hb_cuda_launch_linear8_few(queue, job);
    if (path != HB_CUDA_SIMT && path != HB_CUDA_MMA && hb_cuda_linear8_tile_fits(queue, job))
        return hb_cuda_launch_linear8_tile(queue, job, path);
    if (path != HB_CUDA_AUTO && path != HB_CUDA_SIMT) return HB_CUDA_INVALID;
    return hb_cuda_launch_linear8_simt(queue, job);
}

} // namespace

int64_t hb_cuda_linear8_workspace(const hb_cuda_queue *queue, const hb_cuda_linear8 *args)
{
    if (is_empty(*args)) return 0;
    if (!is_dynamic(*args))
        return is_wide(queue, *args) ? hb_cuda_linear8_wide_workspace(*args) : 0;
    return is_fused(queue, *args) ? 0 : layout_of(*args).bytes;
}

int hb_cuda_launch_linear8(const hb_cuda_queue *queue, const hb_cuda_linear8 *args)
{
    if (is_empty(*args)) return 0;
    linear8_job job = {};
    job.a = *args;
    if (!is_dynamic(*args)) {
        if (is_wide(queue, *args)) {
            if (hb_cuda_linear8_wide_workspace(*args) > 0 && args->workspace == nullptr)
                return HB_CUDA_INVALID;
            return hb_cuda_launch_linear8_wide(queue, job);
        }
        if (args->path != HB_CUDA_AUTO && args->path != HB_CUDA_SIMT) return HB_CUDA_INVALID;
        return hb_cuda_launch_linear8_simt(queue, job);
    }
    if (is_fused(queue, *args)) return hb_cuda_launch_linear8_few(queue, job);
    if (args->workspace == nullptr) return HB_CUDA_INVALID;
    const int status = quantize(queue, &job);
    return status != 0 ? status : product(queue, job);
}

int hb_cuda_launch_matmul8(const hb_cuda_queue *queue, const hb_cuda_matmul8 *args)
{
    if (args->m == 0 || args->n == 0) return 0;
    linear8_job job = {};
    job.a.codes = args->b;
    job.a.m = args->m;
    job.a.rows = args->n;
    job.a.depth = args->depth;
    job.a.path = args->path;
    job.x_codes = args->a;
    job.c = args->c;
    return product(queue, job);
}
