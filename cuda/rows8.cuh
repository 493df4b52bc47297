// Row-wise int8 of LLM.int8(), as the kernels that quantize x need it. The bits of cpu/ref/int8.c.
//
//   code = rint(x * (127 / absmax)), half to even, saturated, NaN and outliers to 0
#ifndef HB_CUDA_ROWS8_CUH
#define HB_CUDA_ROWS8_CUH

#include "absmax.cuh"

#define HB_INT8_STEP 0x1.020408p-7f // float32 nearest to 1/127: HB_INT8_UNIT of the CPU

// The threshold as the comparisons have it: NaN, which nothing reaches, when it is off.
HB_DEVICE float outlier_threshold(float threshold)
{
    return threshold > 0.0f ? threshold : bits_float(0x7fc00000u);
}

HB_DEVICE bool is_outlier(float x, float threshold)
{
    return bits_float(float_bits(x) & 0x7fffffffu) >= threshold;
}

// Magnitude of x for absmax: its bits, 0 for outliers.
HB_DEVICE uint32_t inlier_magnitude(float x, float threshold)
{
    return is_outlier(x, threshold) ? 0 : float_bits(x) & 0x7fffffffu;
}

// The code as a byte. factor = 127 / absmax, rounded; infinite or NaN for an absmax that is tiny, 0
// or NaN. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
HB_DEVICE uint32_t encode_int8(float x, float factor, float threshold)
{
    float v = mul_rn(x, factor);
    const bool zero = v != v || is_outlier(x, threshold);
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    return zero ? 0 : float_bits(add_rn(v, 0x1.8p23f)) & 255;
}

#endif
