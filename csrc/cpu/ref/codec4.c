// 4-bit codebook formats (NF4, FP4): quantize, dequantize, scale search. The reference.
//
//   encode:  v = x * inverse(absmax[b]);  rank = #{t in threshold: v > t};  code =
//   code_of_rank[rank] decode:  x' = value[code] * absmax[b], rounded once to the output's dtype
//
//   packed byte   0               1               2
//   bits        7654 3210       7654 3210       7654 3210
//   element       0    1          2    3          4    5      even element in the high nibble
//
// Source: QLoRA (arXiv:2305.14314) §3 and appendix E; the order of operations and the thresholds
// are those of bitsandbytes' CUDA kernels with IEEE arithmetic instead of fast-math.
// Accuracy: exact; every other ISA gives the same bits.
#include "core/kernels.h"
#include "cpu/codec4_entries.h"

static void absmax_blocks(const void *x, int64_t n, int64_t blocksize, float *absmax, hb_dtype io)
{
    int64_t i = 0;
    for (int64_t b = 0; i < n; b++) {
        // Magnitudes order like their bit patterns, and every NaN lies above infinity.
        uint32_t largest = 0;
        for (int64_t j = 0; j < blocksize && i < n; j++, i++) {
            uint32_t bits = hb_f32_bits(hb_load_f32(x, i, io)) & 0x7fffffffu;
            if (bits > largest) largest = bits;
        }
        absmax[b] =
            largest > 0x7f800000u ? hb_f32_from_bits(HB_NAN_BITS) : hb_f32_from_bits(largest);
    }
}

static uint8_t encode(const hb_codebook4 *book, float v)
{
    if (v != v) return book->nan_code;
    int rank = 0;
    for (int t = 0; t < 15; t++) rank += v > book->threshold[t];
    return book->code_of_rank[rank];
}

static void encode_blocks(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                          const float *absmax, uint8_t *packed, hb_dtype io)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    for (int64_t i = 0; i < n; i += 2) {
        float inverse =
            hb_inverse_scale(absmax[i / blocksize]); // blocksize is even: a byte has one scale
        uint8_t high = encode(book, hb_load_f32(x, i, io) * inverse);
        uint8_t low =
            i + 1 < n ? encode(book, hb_load_f32(x, i + 1, io) * inverse) : encode(book, 0.0f);
        packed[i / 2] = (uint8_t)(high << 4 | low);
    }
}

static void decode_range(const uint8_t *packed, int64_t start, int64_t n, hb_format4 format,
                         int64_t blocksize, const float *absmax, void *out, hb_dtype io)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    for (int64_t i = 0; i < n; i++) {
        int64_t element = start + i;
        int code = element % 2 == 0 ? packed[element / 2] >> 4 : packed[element / 2] & 15;
        hb_store_f32(out, i, io, book->value[code] * absmax[element / blocksize]);
    }
}

static float block_error(const float *x, const float *weight, int64_t n, const hb_codebook4 *book,
                         float scale)
{
    float inverse = 1.0f / scale;
    float sum[16] = {0};
    for (int64_t i = 0; i < n; i++) {
        float difference = x[i] - book->value[encode(book, x[i] * inverse)] * scale;
        float error = difference * difference;
        sum[i % 16] += weight ? error * weight[i] : error;
    }
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    return sum[0];
}

int64_t hb_code4_search_ref(const float *x, const float *weight, int64_t n, hb_format4 format,
                            const float *candidates, int64_t count)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    int64_t best = 0;
    float least = block_error(x, weight, n, book, candidates[0]);
    for (int64_t c = 1; c < count; c++) {
        float error = block_error(x, weight, n, book, candidates[c]);
        if (error < least) {
            least = error;
            best = c;
        }
    }
    return best;
}

#define CODEC4(io, dtype)                                                                          \
    void hb_absmax_##io##_ref(const void *x, int64_t n, int64_t blocksize, float *absmax)          \
    {                                                                                              \
        absmax_blocks(x, n, blocksize, absmax, dtype);                                             \
    }                                                                                              \
    void hb_code4_encode_##io##_ref(const void *x, int64_t n, hb_format4 format,                   \
                                    int64_t blocksize, const float *absmax, uint8_t *packed)       \
    {                                                                                              \
        encode_blocks(x, n, format, blocksize, absmax, packed, dtype);                             \
    }                                                                                              \
    void hb_code4_decode_##io##_ref(const uint8_t *packed, int64_t start, int64_t n,               \
                                    hb_format4 format, int64_t blocksize, const float *absmax,     \
                                    void *out, bool stream)                                        \
    {                                                                                              \
        (void)stream;                                                                              \
        decode_range(packed, start, n, format, blocksize, absmax, out, dtype);                     \
    }                                                                                              \
    HB_QUANTIZE4(io, dtype, ref)
CODEC4(f32, HB_F32)
CODEC4(bf16, HB_BF16)
CODEC4(f16, HB_F16)
