// The scale of a block of a 4-bit tensor, plain or nested, wherever a kernel needs one.
//
//   absmax[b] = map[q[b]] * absmax2[b / nested_blocksize] + offset          two roundings, as on
//   the CPU
//
// The 256-entry map is copied to shared memory first, by a block of at least 256 threads.
#ifndef HB_CUDA_SCALES4_CUH
#define HB_CUDA_SCALES4_CUH

#include "dev.cuh"

#include "core/cuda_api.h"

static inline int scale_map_bytes(const hb_cuda_scales4 &s)
{
    return s.absmax == nullptr ? 256 * 4 : 0;
}

// element / blocksize for a power of two, as every 4-bit block size is: one shift instead of the
// thirty instructions of a 64-bit division.
HB_DEVICE int64_t block_of(int64_t element, int64_t blocksize)
{
    return element >> (31 - count_leading_zeros((uint32_t)blocksize));
}

// To be followed by block_sync before scale_of.
HB_DEVICE void scale_map_fill(const hb_cuda_scales4 &s, float *map)
{
    int t = thread_index();
    if (s.absmax == nullptr && t < 256) shared_store(map + t, load(s.nested_map + t));
}

HB_DEVICE float scale_offset(const hb_cuda_scales4 &s)
{
    if (s.absmax != nullptr) return 0.0f;
    return s.nested_offset != nullptr ? load(s.nested_offset) : s.nested_offset_value;
}

HB_DEVICE float scale_of(const hb_cuda_scales4 &s, const float *map, float offset, int64_t block)
{
    if (s.absmax != nullptr) return load(s.absmax + block);
    float centred = shared_load(map + load(s.absmax_codes + block));
    const int64_t size = s.nested_blocksize; // nearly always 256
    const bool shift = (size & (size - 1)) == 0 && size <= 1 << 30;
    float outer = load(s.nested_absmax + (shift ? block_of(block, size) : block / size));
    return add_rn(mul_rn(centred, outer), offset);
}

// Element i of a linear layer's bias, or 0.
HB_DEVICE float bias_of(const hb_cuda_linear4 &a, int64_t i)
{
    if (a.bias == nullptr) return 0.0f;
    switch (a.bias_dtype) {
    case 0: return load_float<0>(a.bias, i);
    case 1: return load_float<1>(a.bias, i);
    default: return load_float<2>(a.bias, i);
    }
}

// 16 weights of one scale, from the table of codebook_fill.
HB_DEVICE void decode16(const float *table, uint2 codes, float scale, float *value)
{
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const uint32_t word = j < 8 ? codes.x : codes.y;
        const int shift = 8 * (j % 8 / 2) + (j % 2 ? 0 : 4);
        value[j] = mul_rn(shared_load(table + (word >> shift & 15)), scale);
    }
}

#endif
