// The 4-bit codebooks of core/formats.def as constant tables, and the encoder's search tree.
//
// tree[1..15] holds the 15 thresholds in breadth-first order: from node k, v > tree[k] leads to
// 2k + 1 and v <= tree[k] to 2k; after four steps k - 16 is the number of thresholds below v. Four
// compares, exact for every v, the same for every codebook.
#ifndef HB_CUDA_CODEBOOKS_CUH
#define HB_CUDA_CODEBOOKS_CUH

#include "dev.cuh"

#include "core/formats.h"

// As in core/formats.c, for constant expressions of C++.
#define HB_BELOW(t)  ((t) == 0.0f ? -0x1p-149f : (float)((double)(t) * (1.0 + 0x1.4p-24)))
#define HB_LIST(...) {__VA_ARGS__}

struct codebook_tables {
    float value[16];
    float threshold[15];
    uint8_t code_of_rank[16];
    uint32_t nan_code;
};

HB_CONSTANT codebook_tables codebooks[HB_CODEBOOK_COUNT] = {
#define HB_CODEBOOK(id, label, values, ranks, thresholds, nan) {values, thresholds, ranks, nan},
#include "core/formats.def"
#undef HB_CODEBOOK
};

// The 16 values into shared memory, where 16 words lie in 16 banks: any mix of codes is one access.
// To be followed by block_sync.
HB_DEVICE void codebook_fill(float *value, int format)
{
    int t = thread_index();
    if (t < 16) shared_store(value + t, codebooks[format].value[t]);
}

// Rank of the threshold at node k (1..15) of the tree: the in-order position of a perfect tree.
HB_DEVICE int tree_rank(int k)
{
    int depth = 31 - count_leading_zeros((uint32_t)k);
    int position = k - (1 << depth);
    return (2 * position + 1) * (8 >> depth) - 1;
}

// Shared-memory copy that the lanes of a warp can index freely: 16 words lie in 16 banks.
struct encoder4 {
    float tree[16];
    uint32_t code_of_rank[16];
};

HB_DEVICE void encoder4_fill(encoder4 *shared, int format)
{
    int t = thread_index();
    if (t < 16) {
        float node = t == 0 ? 0.0f : codebooks[format].threshold[tree_rank(t)];
        shared_store(&shared->tree[t], node);
        shared_store(&shared->code_of_rank[t], (uint32_t)codebooks[format].code_of_rank[t]);
    }
}

HB_DEVICE uint32_t encode4(const encoder4 *shared, uint32_t nan_code, float v)
{
    int k = 1;
#pragma unroll
    for (int step = 0; step < 4; step++) k = 2 * k + (v > shared_load(&shared->tree[k]));
    uint32_t code = shared_load(&shared->code_of_rank[k - 16]);
    return v != v ? nan_code : code;
}

#endif
