// 8-bit block-wise format with a 256-entry map: quantize and dequantize. The reference.
//
//   encode:  v = x * inverse(absmax[b]);  code = #{i < 255: v > threshold[i]},  0 for v = NaN
//   decode:  x' = map[code] * absmax[b], rounded once to the output's dtype
//
// One byte per element, in order. Source: 8-bit Optimizers via Block-wise Quantization
// (arXiv:2110.02861) §2; thresholds are made by hb_search8_init (core/maps8.c).
// Accuracy: exact nearest entry; every other ISA gives the same bits.
#include "core/kernels.h"

// Halves the interval of possible codes eight times; NaN compares false and ends at 0.
static uint8_t encode(const hb_search8 *search, float v)
{
    int code = 0;
    for (int step = 128; step > 0; step /= 2)
        if (v > search->threshold[code + step - 1]) code += step;
    return (uint8_t)code;
}

static void encode_blocks(const void *x, int64_t n, const hb_search8 *search, int64_t blocksize,
                          const float *absmax, uint8_t *codes, hb_dtype io)
{
    int64_t i = 0;
    for (int64_t b = 0; i < n; b++) {
        float inverse = hb_inverse_scale(absmax[b]);
        for (int64_t j = 0; j < blocksize && i < n; j++, i++)
            codes[i] = encode(search, hb_load_f32(x, i, io) * inverse);
    }
}

static void decode_blocks(const uint8_t *codes, int64_t n, const float *map, int64_t blocksize,
                          const float *absmax, void *out, hb_dtype io)
{
    int64_t i = 0;
    for (int64_t b = 0; i < n; b++)
        for (int64_t j = 0; j < blocksize && i < n; j++, i++)
            hb_store_f32(out, i, io, map[codes[i]] * absmax[b]);
}

#define CODEC8(io, dtype)                                                                          \
    void hb_map8_encode_##io##_ref(const void *x, int64_t n, const hb_search8 *search,             \
                                   int64_t blocksize, const float *absmax, uint8_t *codes)         \
    {                                                                                              \
        encode_blocks(x, n, search, blocksize, absmax, codes, dtype);                              \
    }                                                                                              \
    void hb_map8_decode_##io##_ref(const uint8_t *codes, int64_t n, const float *map,              \
                                   int64_t blocksize, const float *absmax, void *out, bool stream) \
    {                                                                                              \
        (void)stream;                                                                              \
        decode_blocks(codes, n, map, blocksize, absmax, out, dtype);                               \
    }
CODEC8(f32, HB_F32)
CODEC8(bf16, HB_BF16)
CODEC8(f16, HB_F16)
