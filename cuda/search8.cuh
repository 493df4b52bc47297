// The thresholds of a 256-entry map as a search tree, made and used by a block of 256 threads.
//
// The same thresholds, bit for bit, as hb_search8_init (core/maps8.c says why they are so): between
// entries i and i + 1 their float32 midpoint, one float less from an odd i unless both are equal,
// and never less than an earlier one. Node k of the tree: v > tree[k] leads to 2k + 1, else to 2k.
#ifndef HB_CUDA_SEARCH8_CUH
#define HB_CUDA_SEARCH8_CUH

#include "dev.cuh"

enum { SEARCH8_BYTES = 2 * 256 * 4 }; // shared memory: the tree, and room to build it

HB_DEVICE float float_below(float value)
{
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) == 0) return bits_float(0x80000001u);
    return bits_float(bits & 0x80000000u ? bits + 1 : bits - 1);
}

HB_DEVICE float search8_threshold(float low, float high, bool odd)
{
    const float sum = add_rn(low, high);
    float middle =
        sum - sum == 0.0f ? mul_rn(sum, 0.5f) : add_rn(mul_rn(low, 0.5f), mul_rn(high, 0.5f));
    return odd && low != high ? float_below(middle) : middle;
}

// Where threshold i (0..254) lies in the tree: it separates codes i and i + 1, and its level is
// that of the lowest bit of i + 1, from the root (128) down.
HB_DEVICE int search8_node(int i)
{
    const int code = i + 1, low = code & -code;
    return 128 / low + (code / low - 1) / 2;
}

// map [256] in global memory; tree and line [256] of shared memory, of which line is only room to
// work in. Ends with a barrier.
HB_DEVICE void search8_fill(const float *map, float *tree, float *line)
{
    const int i = thread_index();
    float threshold = i < 255 ? search8_threshold(load(map + i), load(map + i + 1), i % 2 == 1)
                              : bits_float(0x7f800000u);
    // The largest of the thresholds up to each: after the step of width w, of the last 2w.
    for (int width = 1; width < 256; width *= 2) {
        shared_store(line + i, threshold);
        block_sync();
        if (i >= width) {
            const float earlier = shared_load(line + i - width);
            if (earlier > threshold) threshold = earlier;
        }
        block_sync();
    }
    if (i < 255) shared_store(tree + search8_node(i), threshold);
    block_sync();
}

// The same with the line behind the tree: SEARCH8_BYTES.
HB_DEVICE void search8_fill(const float *map, float *tree)
{
    search8_fill(map, tree, tree + 256);
}

// #{t in threshold: v > t}; NaN gives 0.
HB_DEVICE uint32_t search8(const float *tree, float v)
{
    int k = 1;
#pragma unroll
    for (int step = 0; step < 8; step++) k = 2 * k + (v > shared_load(tree + k));
    return (uint32_t)k - 256;
}

#endif
