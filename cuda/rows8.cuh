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

// The largest magnitude of EACH elements, as bits, without outliers, which become 0 and mark their
// column. One comparison where there is no outlier (and no NaN).
template <int EACH> HB_DEVICE uint32_t take_outliers(float *value, float threshold, uint8_t *marks)
{
    uint32_t largest = larger_magnitude<EACH>(value, 0);
    if (largest < float_bits(threshold)) return largest;
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (is_outlier(value[j], threshold)) {
            store_mark(marks + j);
            value[j] = 0.0f;
        }
    return larger_magnitude<EACH>(value, 0);
}

// A factor (127 / absmax, rounded) for which no code needs saturation: absmax is finite and not so
// small that the quotient overflows.
HB_DEVICE bool is_plain_factor(float factor)
{
    return factor > 0.0f && factor <= 0x1.fffffep127f;
}

// The code as a byte; bits above it are anything when PLAIN. Adding 1.5 * 2^23 rounds to an integer
// and leaves it in the low bits; |x * factor| exceeds 127 by roundings only, which this removes.
template <bool PLAIN> HB_DEVICE uint32_t encode_int8(float x, float factor)
{
    float v = mul_rn(x, factor);
    if (PLAIN) return float_bits(add_rn(v, 0x1.8p23f));
    const bool is_nan = v != v;
    v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
    return is_nan ? 0 : float_bits(add_rn(v, 0x1.8p23f));
}

// The codes of four elements in the bytes of a word.
template <bool PLAIN> HB_DEVICE uint32_t encode4_int8(const float *value, float factor)
{
    const uint32_t low = merge_bytes(encode_int8<PLAIN>(value[0], factor),
                                     encode_int8<PLAIN>(value[1], factor), 0x0040);
    const uint32_t high = merge_bytes(encode_int8<PLAIN>(value[2], factor),
                                      encode_int8<PLAIN>(value[3], factor), 0x0040);
    return merge_bytes(low, high, 0x5410);
}

// x as the sum of three bfloat16: exact but for bits below 2^-133. Not truncated to infinity, and
// an infinity or NaN has no remainder.
HB_DEVICE void split_bf16(float x, uint16_t *terms)
{
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
    terms[0] = (uint16_t)((magnitude > 0x7f800000u ? 0x7fc00000u : bits) >> 16);
    const bool is_finite = magnitude < 0x7f800000u;
    const float rest = is_finite ? x - bits_float(bits & 0xffff0000u) : 0.0f;
    terms[1] = (uint16_t)(float_bits(rest) >> 16);
    terms[2] = (uint16_t)(float_bits(rest - bits_float(float_bits(rest) & 0xffff0000u)) >> 16);
}

#endif
