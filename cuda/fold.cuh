// Sums of float64 lanes in the order of core/sums.h: lane l += lane l + half, half = lanes / 2
// .. 1.
#ifndef HB_CUDA_FOLD_CUH
#define HB_CUDA_FOLD_CUH

#include "dev.cuh"

#include "core/sums.h"

enum { FOLD_BYTES = (HB_SUM_LANES + 1) * 8 }; // shared memory of fold_block

// Over the 32 lanes of a warp, which all call. Every lane adds its partner half a group away: an
// addition does not mind the order of its operands, so that all lanes have the CPU's sum of lane 0.
HB_DEVICE double fold_warp(double sum)
{
#pragma unroll
    for (int half = HB_LANES / 2; half > 0; half /= 2) sum = add_rn(sum, shuffle_xor(sum, half));
    return sum;
}

// Over the HB_SUM_LANES = 256 threads of a block, in every thread. room: FOLD_BYTES, free again
// when it returns.
HB_DEVICE double fold_block(double sum, double *room)
{
    const int t = thread_index();
    shared_store(room + t, sum);
    block_sync();
    if (t < HB_LANES) { // halves of 128, 64 and 32 lanes, then the warp
        double part[8];
#pragma unroll
        for (int k = 0; k < 8; k++) part[k] = shared_load(room + t + HB_LANES * k);
#pragma unroll
        for (int half = 4; half > 0; half /= 2)
#pragma unroll
            for (int k = 0; k < half; k++) part[k] = add_rn(part[k], part[k + half]);
        sum = fold_warp(part[0]);
        if (t == 0) shared_store(room + HB_SUM_LANES, sum);
    }
    block_sync();
    sum = shared_load(room + HB_SUM_LANES);
    block_sync();
    return sum;
}

#endif
