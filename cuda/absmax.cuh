// The largest magnitude of a block of elements and its inverse, as every quantizer needs them.
//
// Magnitudes are compared as bit patterns, which order like them; every NaN lies above infinity.
#ifndef HB_CUDA_ABSMAX_CUH
#define HB_CUDA_ABSMAX_CUH

#include "dev.cuh"

enum : uint32_t { NAN_BITS = 0x7fc00000u }; // the NaN that the CPU writes

template <int COUNT> HB_DEVICE uint32_t larger_magnitude(const float *value, uint32_t largest)
{
#pragma unroll
    for (int j = 0; j < COUNT; j++) largest = max_u32(largest, float_bits(value[j]) & 0x7fffffffu);
    return largest;
}

// Over groups of `lanes` neighbouring lanes (a power of two up to 32; the whole warp calls). NaN is
// NAN_BITS.
HB_DEVICE float absmax_of_lanes(uint32_t largest, int lanes)
{
    for (int mask = 1; mask < lanes; mask *= 2)
        largest = max_u32(largest, shuffle_xor(largest, mask));
    return bits_float(largest > 0x7f800000u ? NAN_BITS : largest);
}

// hb_inverse_scale (core/formats.h) with the rounding of the CPU.
HB_DEVICE float inverse_scale(float scale)
{
    const float inverse = div_rn(1.0f, scale);
    return scale == 0.0f ? 0.0f : inverse == 0.0f ? bits_float(1) : inverse;
}

#endif
