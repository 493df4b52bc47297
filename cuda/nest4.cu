// Nesting of the scales of a 4-bit tensor ("double quantization"), the bits of the CPU's:
//
//   offset = mean of absmax, rounded once from float64
//   absmax[i] - offset ~ map[code[i]] * nested_absmax[i / blocksize]     8-bit codes of a map
//
// Two launches. The first gives the float64 sum of each chunk of 2048 scales to the workspace, a
// warp a chunk. In the second every thread block folds these sums to the offset for itself (a few
// kilobytes from the L2 cache; another launch would cost more), builds the search tree of the map
// once, and then its warps quantize one nested block after the other as codec8.cu does. The order
// of all additions is that of core/sums.h, so that the offset does not depend on the machine.
//
// Source: QLoRA (arXiv:2305.14314) §3. Floor: 9 bytes a scale, 5 of them the second time from L2;
// at 64 weights a scale nothing beside the weights' own 2.5 bytes each.
#include "absmax.cuh"
#include "fold.cuh"
#include "kernels.cuh"
#include "search8.cuh"

#include "core/sums.h"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    MOST_BLOCKS = 1024 // of the second launch: they read all sums each
};
static_assert((int)HB_MEAN_LANES == (int)HB_LANES, "a chunk is folded by a warp");

struct nest_args {
    hb_cuda_nest4 a;
    int64_t chunks, grid;
};

HB_KERNEL(THREADS) sum_chunks_kernel(HB_ARGS nest_args args)
{
    const hb_cuda_nest4 &a = args.a;
    const int64_t chunk = block_index() * WARPS + warp_index();
    if (chunk >= args.chunks) return; // the whole warp
    const int64_t begin = chunk * HB_MEAN_CHUNK;
    const int64_t end = a.n - begin < HB_MEAN_CHUNK ? a.n : begin + HB_MEAN_CHUNK;
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = begin + lane_index(); i < end; i += HB_LANES)
        sum = add_rn(sum, (double)load(a.absmax + i));
    // Every lane adds its partner half a warp away; lane 0 gets the sums that the CPU's lane 0 gets
    // (an addition does not mind the order of its two operands).
#pragma unroll
    for (int half = HB_LANES / 2; half > 0; half /= 2) sum = add_rn(sum, shuffle_xor(sum, half));
    if (lane_index() == 0) store((double *)a.workspace + chunk, sum);
}

// The mean, in every thread. fold: FOLD_BYTES of shared memory.
HB_DEVICE float mean_of_chunks(const nest_args &args, double *fold)
{
    const double *sums = (const double *)args.a.workspace;
    double sum = 0.0;
    for (int64_t c = thread_index(); c < args.chunks; c += THREADS)
        sum = add_rn(sum, load(sums + c));
    sum = fold_block(sum, fold);
    if (args.a.n == 0) return 0.0f;
    const float mean = round_to_float(div_rn(sum, (double)args.a.n));
    return mean != mean ? bits_float(NAN_BITS) : mean;
}

HB_KERNEL(THREADS) nest4_kernel(HB_ARGS nest_args args)
{
    const hb_cuda_nest4 &a = args.a;
    double *fold = (double *)shared_memory();
    float *tree = (float *)(fold + FOLD_BYTES / 8);
    search8_fill(a.map, tree);
    const float offset = mean_of_chunks(args, fold);
    if (block_index() == 0 && thread_index() == 0) store(a.offset, offset);

    const int64_t blocks = (a.n + a.blocksize - 1) / a.blocksize;
    for (int64_t block = block_index() * WARPS + warp_index(); block < blocks;
         block += args.grid * WARPS) {
        const int64_t begin = block * a.blocksize, first = begin + lane_index();
        const int64_t end = a.n - begin < a.blocksize ? a.n : begin + a.blocksize;
        uint32_t largest = 0;
        for (int64_t i = first; i < end; i += HB_LANES) {
            const float centred = add_rn(load(a.absmax + i), -offset);
            largest = larger_magnitude<1>(&centred, largest);
        }
        const float absmax = absmax_of_lanes(largest, HB_LANES);
        if (lane_index() == 0) store(a.nested_absmax + block, absmax);
        const float inverse = inverse_scale(absmax);
        for (int64_t i = first; i < end; i += HB_LANES) {
            const float v = mul_rn(add_rn(load(a.absmax + i), -offset), inverse);
            store(a.codes + i, (uint8_t)search8(tree, v));
        }
    }
}

} // namespace

int64_t hb_cuda_nest4_workspace(const hb_cuda_queue *, const hb_cuda_nest4 *args)
{
    return hb_ceil_div(args->n, HB_MEAN_CHUNK) * (int64_t)sizeof(double);
}

int hb_cuda_launch_nest4(const hb_cuda_queue *queue, const hb_cuda_nest4 *args)
{
    const int64_t blocks = hb_ceil_div(hb_ceil_div(args->n, args->blocksize), (int64_t)WARPS);
    nest_args a = {*args, hb_ceil_div(args->n, HB_MEAN_CHUNK), blocks};
    if (a.grid > MOST_BLOCKS) a.grid = MOST_BLOCKS;
    if (a.grid < 1) a.grid = 1; // without scales there is still an offset, 0
    if (a.chunks > 0) {
        const int status = HB_LAUNCH(sum_chunks_kernel, hb_ceil_div(a.chunks, (int64_t)WARPS),
                                     THREADS, 0, queue->stream, a);
        if (status != 0) return status;
    }
    return HB_LAUNCH(nest4_kernel, a.grid, THREADS, FOLD_BYTES + SEARCH8_BYTES, queue->stream, a);
}
