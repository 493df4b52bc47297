// Row-wise int8 (LLM.int8()): quantize and dequantize one row. The reference.
//
//   encode:  code = rint(x * (127 / absmax)), half to even;  decode:  x' = (code * absmax) *
//   (1/127)
//
// codes int8 [rows, depth] row-major, scale float32 [rows] (the row's absmax, not absmax / 127).
// Source: LLM.int8() (arXiv:2208.07339) §2.1 and §3.2; formula of bitsandbytes' CUDA kernel with an
// IEEE division. |x * (127 / absmax)| exceeds 127 by roundings only, which rint removes; it is
// saturated for absmax so small (< 127/FLT_MAX) that the quotient is infinite.
// Accuracy: exact; every other ISA gives the same bits.
#include "core/kernels.h"

#include <math.h>

static float absmax_row(const void *x, int64_t n, float threshold, hb_dtype io)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float magnitude = fabsf(hb_load_f32(x, i, io));
        uint32_t bits = magnitude >= threshold ? 0 : hb_f32_bits(magnitude);
        if (bits > largest) largest = bits;
    }
    return largest > 0x7f800000u ? hb_f32_from_bits(HB_NAN_BITS) : hb_f32_from_bits(largest);
}

static void mark_outliers(const void *x, int64_t n, float threshold, uint8_t *mark, hb_dtype io)
{
    for (int64_t i = 0; i < n; i++)
        if (fabsf(hb_load_f32(x, i, io)) >= threshold) mark[i] = 1;
}

static void encode_row(const void *x, int64_t n, float absmax, float threshold, const uint8_t *zero,
                       int8_t *codes, hb_dtype io)
{
    float factor = 127.0f / absmax;
    for (int64_t i = 0; i < n; i++) {
        float value = hb_load_f32(x, i, io);
        float v = value * factor;
        if (v > 127.0f) v = 127.0f;
        if (v < -127.0f) v = -127.0f;
        bool is_zero = v != v || fabsf(value) >= threshold || (zero && zero[i]);
        // Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to an integer, half to
        // even.
        codes[i] = is_zero ? 0 : (int8_t)((v + 0x1.8p23f) - 0x1.8p23f);
    }
}

static void decode_row(const int8_t *codes, int64_t n, float scale, void *out, hb_dtype io)
{
    for (int64_t i = 0; i < n; i++)
        hb_store_f32(out, i, io, ((float)codes[i] * scale) * HB_INT8_UNIT);
}

#define INT8(io, dtype)                                                                            \
    float hb_int8_absmax_##io##_ref(const void *x, int64_t n, float threshold)                     \
    {                                                                                              \
        return absmax_row(x, n, threshold, dtype);                                                 \
    }                                                                                              \
    void hb_int8_outliers_##io##_ref(const void *x, int64_t n, float threshold, uint8_t *mark)     \
    {                                                                                              \
        mark_outliers(x, n, threshold, mark, dtype);                                               \
    }                                                                                              \
    void hb_int8_encode_##io##_ref(const void *x, int64_t n, float absmax, float threshold,        \
                                   const uint8_t *zero, int8_t *codes)                             \
    {                                                                                              \
        encode_row(x, n, absmax, threshold, zero, codes, dtype);                                   \
    }                                                                                              \
    void hb_int8_decode_##io##_ref(const int8_t *codes, int64_t n, float scale, void *out)         \
    {                                                                                              \
        decode_row(codes, n, scale, out, dtype);                                                   \
    }
INT8(f32, HB_F32)
INT8(bf16, HB_BF16)
INT8(f16, HB_F16)
