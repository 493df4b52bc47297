// What the kernels of the products with 4-bit weights share: the job that a launch gets, scales
// loaded in two steps, and where sums go.
//
// A product is y[j, o] = sum over s of x[j, s] weight(o, s): outputs o are the rows of W and steps
// s its columns, or the reverse when transposed. A job with splits > 1 shares the steps out among
// blocks, each of which writes float32 sums to partial[split][j][o]; a second kernel (linear4.cu)
// adds them in the order of the splits: the same bits every time.
#ifndef HB_CUDA_LINEAR4_CUH
#define HB_CUDA_LINEAR4_CUH

#include "codebooks.cuh"
#include "experts.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

struct linear4_job {
    hb_cuda_linear4 a;
    float *partial; // [splits][m][outputs]; NULL when splits is 1
    int64_t outputs, steps;
    int64_t tiles;                     // of outputs
    int64_t columns;                   // tiles of rows of x, an upper bound with experts
    int64_t splits;                    // blocks that share the steps of one tile
    int32_t block_shift, nested_shift; // log2 of the block sizes; nested_shift -1: no power of two
};

static inline int64_t linear4_outputs(const hb_cuda_linear4 &a)
{
    return a.transposed ? a.depth : a.rows;
}
static inline int64_t linear4_steps(const hb_cuda_linear4 &a)
{
    return a.transposed ? a.rows : a.depth;
}

// The job for kernels that make `tile` outputs and `column` rows of x in a block. `splits` as from
// linear4_splits; 1 without a workspace.
static inline linear4_job linear4_job_of(const hb_cuda_linear4 &a, int64_t tile, int64_t column,
                                         int64_t splits)
{
    const int64_t nested = a.scales.nested_blocksize;
    linear4_job job = {};
    if (a.workspace == nullptr) splits = 1;
    job.a = a;
    if (a.transposed) job.a.bias = nullptr;
    job.partial = splits > 1 ? (float *)a.workspace : nullptr;
    job.outputs = linear4_outputs(a);
    job.steps = linear4_steps(a);
    job.tiles = hb_ceil_div(job.outputs, tile);
    job.columns = expert_tiles(a, column);
    job.splits = splits;
    while ((int64_t)1 << (job.block_shift + 1) <= a.blocksize) job.block_shift++;
    while (nested >> (job.nested_shift + 1) != 0) job.nested_shift++;
    if (nested != (int64_t)1 << job.nested_shift) job.nested_shift = -1;
    return job;
}

// How many blocks share the steps of a tile: enough to occupy the multiprocessors `resident` times,
// but none with less than `least` units of work, of which a tile has `units`.
static inline int64_t linear4_splits(const hb_cuda_queue *queue, int64_t blocks, int64_t units,
                                     int64_t resident, int64_t least)
{
    const int64_t wanted = resident * hb_cuda_device_multiprocessors(queue->device) / blocks;
    const int64_t most = units / least;
    const int64_t splits = wanted < most ? wanted : most;
    return splits > 1 ? splits : 1;
}

// Bytes of the partial sums.
static inline int64_t linear4_partial_bytes(const hb_cuda_linear4 &a, int64_t splits)
{
    return splits > 1 ? splits * a.m * linear4_outputs(a) * (int64_t)sizeof(float) : 0;
}

// Adds the partial sums of a job into y, if there are any; the launch's status (linear4.cu).
int linear4_add_partial(const hb_cuda_queue *queue, const linear4_job &job);

// ---- on the device ------------------------------------------------------------------------------

// A scale between its load and its use: with nested scales the product waits for the latter.
struct linear4_scale {
    float value;   // absmax, or that of absmax_codes
    uint32_t code; // nested only
};

template <bool NESTED> HB_DEVICE linear4_scale scale_load(const linear4_job &job, int64_t block)
{
    const hb_cuda_scales4 &s = job.a.scales;
    if (!NESTED) return {load(s.absmax + block), 0};
    const int64_t outer =
        job.nested_shift >= 0 ? block >> job.nested_shift : block / s.nested_blocksize;
    return {load(s.nested_absmax + outer), load(s.absmax_codes + block)};
}

template <bool NESTED>
HB_DEVICE float scale_finish(const linear4_scale &scale, const float *map, float offset)
{
    if (!NESTED) return scale.value;
    return add_rn(mul_rn(shared_load(map + scale.code), scale.value), offset);
}

// Sum of one output of row j of x: into y with the bias, or beside the other splits' sums.
template <int IO>
HB_DEVICE void linear4_store(const linear4_job &job, int64_t split, const expert_rows &rows,
                             int64_t j, int64_t output, float sum)
{
    const int64_t at = j * job.outputs + output;
    if (job.partial != nullptr) {
        store(job.partial + split * job.a.m * job.outputs + at, sum);
        return;
    }
    if (rows.expert >= 0) sum += bias_of(job.a, rows.expert * job.outputs + output);
    store_float<IO>(job.a.y, at, sum);
}

#endif
