// Row-wise int8 (LLM.int8()) with NEON. Formula, layout, source: ref/int8.c.
// Accuracy: bit-equal to the reference.
#include "cpu/neon/io.h"

static inline float absmax_row(const void *x, int64_t n, float threshold, hb_dtype io)
{
    const float32x4_t limit = vdupq_n_f32(threshold);
    uint32x4_t largest = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += 4) {
        uint32x4_t bits = magnitude_bits(load_upto_f32x4(x, i, n, io));
        uint32x4_t outlier = vcgeq_f32(vreinterpretq_f32_u32(bits), limit); // false for NaN
        largest = vmaxq_u32(largest, vbicq_u32(bits, outlier));
    }
    return largest_of_magnitudes(largest);
}

static inline void mark_outliers(const void *x, int64_t n, float threshold, uint8_t *mark,
                                 hb_dtype io)
{
    const float32x4_t limit = vdupq_n_f32(threshold);
    for (int64_t i = 0; i < n; i += 4) {
        uint32x4_t bits = magnitude_bits(load_upto_f32x4(x, i, n, io));
        uint32x4_t outlier = vcgeq_f32(vreinterpretq_f32_u32(bits), limit);
        if (vmaxvq_u32(outlier) == 0) continue;
        uint32_t lane[4];
        vst1q_u32(lane, outlier);
        for (int l = 0; l < 4 && i + l < n; l++)
            if (lane[l]) mark[i + l] = 1;
    }
}

// Four codes in the low bytes of lanes.
static inline int32x4_t encode_four(float32x4_t value, float factor, float threshold)
{
    float32x4_t v = vmulq_n_f32(value, factor);
    uint32x4_t outlier =
        vcgeq_f32(vreinterpretq_f32_u32(magnitude_bits(value)), vdupq_n_f32(threshold));
    uint32x4_t kept = vbicq_u32(vceqq_f32(v, v), outlier);
    v = vmaxq_f32(vminq_f32(v, vdupq_n_f32(127.0f)), vdupq_n_f32(-127.0f));
    return vandq_s32(vcvtnq_s32_f32(v), vreinterpretq_s32_u32(kept));
}

static inline void encode_row(const void *x, int64_t n, float absmax, float threshold,
                              const uint8_t *zero, int8_t *codes, hb_dtype io)
{
    const float factor = 127.0f / absmax;
    for (int64_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? (size_t)(n - i) : 8;
        int32x4_t lo = encode_four(load_upto_f32x4(x, i, n, io), factor, threshold);
        int32x4_t hi = encode_four(load_upto_f32x4(x, i + 4, n, io), factor, threshold);
        int8x8_t code = vmovn_s16(vcombine_s16(vmovn_s32(lo), vmovn_s32(hi)));
        if (zero) {
            uint8_t marks[8] = {0};
            memcpy(marks, zero + i, count);
            uint8x8_t clear = vceq_u8(vld1_u8(marks), vdup_n_u8(0));
            code = vand_s8(code, vreinterpret_s8_u8(clear));
        }
        int8_t eight[8];
        vst1_s8(eight, code);
        memcpy(codes + i, eight, count);
    }
}

static inline void decode_row(const int8_t *codes, int64_t n, float scale, void *out, hb_dtype io)
{
    for (int64_t i = 0; i < n; i += 8) {
        int8_t eight[8] = {0};
        memcpy(eight, codes + i, n - i < 8 ? (size_t)(n - i) : 8);
        int16x8_t words = vmovl_s8(vld1_s8(eight));
        for (int h = 0; h < 2; h++) {
            int16x4_t half = h ? vget_high_s16(words) : vget_low_s16(words);
            float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(half)), scale);
            store_upto_f32x4(out, i + 4 * h, n, vmulq_n_f32(v, HB_INT8_UNIT), io);
        }
    }
}

#define INT8(io, dtype)                                                                            \
    float hb_int8_absmax_##io##_neon(const void *x, int64_t n, float threshold)                    \
    {                                                                                              \
        return absmax_row(x, n, threshold, dtype);                                                 \
    }                                                                                              \
    void hb_int8_outliers_##io##_neon(const void *x, int64_t n, float threshold, uint8_t *mark)    \
    {                                                                                              \
        mark_outliers(x, n, threshold, mark, dtype);                                               \
    }                                                                                              \
    void hb_int8_encode_##io##_neon(const void *x, int64_t n, float absmax, float threshold,       \
                                    const uint8_t *zero, int8_t *codes)                            \
    {                                                                                              \
        encode_row(x, n, absmax, threshold, zero, codes, dtype);                                   \
    }                                                                                              \
    void hb_int8_decode_##io##_neon(const int8_t *codes, int64_t n, float scale, void *out)        \
    {                                                                                              \
        decode_row(codes, n, scale, out, dtype);                                                   \
    }
INT8(f32, HB_F32)
INT8(bf16, HB_BF16)
INT8(f16, HB_F16)
