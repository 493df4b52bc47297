// absmax and 4-bit codes in one walk, with AVX-512 F/BW/DQ/VL. Layout, source: ref/codec4.c.
//
// A fused multiply-add with a large constant leaves w = floor(2^15 SHRINK x / absmax) in the low
// word of each float32, and the rest is done on 32 words at once. The five high bits of w are the
// bin, at most one threshold falls into a bin, and adding offset[bin] moves it to a multiple of
// 2^12: the four high bits of the sum are the rank.
//
//   w    s|bin.|...........      + offset[w >> 11]     ->     rank|............     16 bits
//
// Values up to absmax do not wrap, because SHRINK < 1. The reference rounds the quotient 1 / absmax
// and the product, we round the quotient times SHRINK and down to w: all together that is less than
// 2^-8 units of w, and SHRINK is such that no threshold is nearer than 0.15 units to a border of
// two w. So w decides, except where it is the one with the threshold in it: there the twelve low
// bits of the sum are zero, and the reference's comparisons decide. (That is one of 4,000 weights.)
// FP4's threshold at zero is the border of two bins, because w < 0 exactly where x < 0.
// Accuracy: bit-equal to the reference.
#include "cpu/avx512/io.h"

enum {
    GROUP = 128, // elements encoded at once: 64 bytes of codes
    STEP = 2048  // elements between whose two passes they stay in L1
};

#define SHRINK (1.0f - 1578.0f / 65536.0f)
#define MAGIC  384.0f // a unit in its last place is 2^-15

typedef struct {
    __m512i offset;   // words
    __m512 threshold; // for the reference's comparisons
    __m512i code;     // bytes by rank, in every 128-bit lane
    const uint8_t *code_of_rank;
    bool code_is_rank;
} encoder;

static encoder make_encoder(hb_format4 format)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    _Alignas(64) uint16_t offset[32];
    int rank = 0;
    for (int bin = 0; bin < 32; bin++) {
        const int first = (bin - 16) * 2048; // w
        const float *t = &book->threshold[rank];
        if (first == 0 && *t > -0x1p-20f && *t < 0.0f) t = &book->threshold[++rank];
        const double w_of_t = *t < 1.0f ? (double)(*t) * (double)SHRINK * 32768.0 : 65536.0;
        const int w = (int)(w_of_t + 32768.0) - 32768; // rounded down
        if (w >= first && w < first + 2048)
            offset[bin ^ 16] = (uint16_t)(++rank * 4096 - w);
        else
            offset[bin ^ 16] = (uint16_t)(rank * 4096 + 1024 - first);
    }
    return (encoder){
        .offset = _mm512_load_si512(offset),
        .threshold = _mm512_loadu_ps(book->threshold),
        .code = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)book->code_of_rank)),
        .code_of_rank = book->code_of_rank,
        .code_is_rank = format == HB_NF4,
    };
}

// The factors of x in `scales` blocks. False when the arithmetic above does not hold: for scales
// that are NaN, infinite, or have no normal inverse, and for FP4 where x / absmax might round to 0.
static inline bool shrunken_inverses(const float *absmax, int64_t scales, float largest,
                                     float *inverse)
{
    __mmask16 odd = 0;
    for (int64_t b = 0; b < scales; b += 16) {
        const __mmask16 lanes = first_lanes(scales - b);
        const __m512 scale = _mm512_maskz_loadu_ps(lanes, absmax + b);
        const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        odd |= _mm512_mask_cmp_ps_mask(some, scale, _mm512_set1_ps(0x1p-125f), _CMP_NGE_UQ) |
               _mm512_mask_cmp_ps_mask(some, scale, _mm512_set1_ps(largest), _CMP_NLE_UQ);
        const __m512 exact = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
        _mm512_storeu_ps(inverse + b, _mm512_maskz_mul_ps(some, exact, _mm512_set1_ps(SHRINK)));
    }
    return odd == 0;
}

static inline __m512i scaled_floor(__m512 x, float inverse)
{
    return _mm512_castps_si512(_mm512_fmadd_round_ps(x, _mm512_set1_ps(inverse),
                                                     _mm512_set1_ps(MAGIC),
                                                     _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}

// w of 32 elements, in order.
static inline __m512i words_of(const void *x, int64_t i, float inverse, hb_dtype io)
{
    // clang-format off
    const __m512i low_words = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
        30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i interleaved = _mm512_set_epi16(
        62, 30, 60, 28, 58, 26, 56, 24, 54, 22, 52, 20, 50, 18, 48, 16,
        46, 14, 44, 12, 42, 10, 40, 8, 38, 6, 36, 4, 34, 2, 32, 0);
    // clang-format on
    if (io == HB_BF16) {
        // Half as many instructions to widen when even and odd elements are kept apart.
        const __m512i pairs = _mm512_loadu_si512((const uint16_t *)x + i);
        const __m512i even = _mm512_slli_epi32(pairs, 16);
        const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
        return _mm512_permutex2var_epi16(scaled_floor(_mm512_castsi512_ps(even), inverse),
                                         interleaved,
                                         scaled_floor(_mm512_castsi512_ps(odd), inverse));
    }
    return _mm512_permutex2var_epi16(scaled_floor(load_f32x16(x, i, io), inverse), low_words,
                                     scaled_floor(load_f32x16(x, i + 16, io), inverse));
}

static inline __m512i ranked_words(const encoder *e, __m512i w)
{
    return _mm512_add_epi16(w, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 11), e->offset));
}

// Those of `lanes` where w decides.
static inline __mmask32 decided(__mmask32 lanes, __m512i ranked)
{
    return _mm512_mask_test_epi16_mask(lanes, ranked, _mm512_set1_epi16(0xfff));
}

// Two codes in each word, from words with the ranks of 32 elements each, in every 128-bit lane
// those of a before those of b.
static inline __m512i pair_codes(const encoder *e, __m512i a, __m512i b, bool code_is_rank)
{
    __m512i bytes = _mm512_packus_epi16(_mm512_srli_epi16(a, 12), _mm512_srli_epi16(b, 12));
    if (!code_is_rank) bytes = _mm512_shuffle_epi8(e->code, bytes);
    return _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
}

// The elements of a group that w does not decide anew, as the reference does it.
static __attribute__((noinline)) void decide(const encoder *e, const __m512i ranked[4],
                                             const void *x, int64_t i, hb_dtype io, int shift,
                                             const float *absmax, uint8_t *packed)
{
    for (int g = 0; g < 4; g++, i += 32)
        for (__mmask32 left = ~decided(~(__mmask32)0, ranked[g]); left != 0; left &= left - 1) {
            const int64_t at = i + __builtin_ctz(left);
            const float v = hb_load_f32(x, at, io) * hb_inverse_scale(absmax[at >> shift]);
            __mmask16 above = _mm512_cmp_ps_mask(_mm512_set1_ps(v), e->threshold, _CMP_GT_OQ);
            const unsigned code = e->code_of_rank[__builtin_popcount(above)];
            uint8_t *byte = packed + at / 2;
            *byte = (uint8_t)(at % 2 == 0 ? (*byte & 0x0f) | code << 4 : (*byte & 0xf0) | code);
        }
}

// n is a multiple of GROUP.
static inline void encode_groups(const encoder *e, const void *x, int64_t n, int shift,
                                 const float *absmax, const float *inverse, uint8_t *packed,
                                 hb_dtype io, bool code_is_rank)
{
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < n; i += GROUP) {
        __m512i ranked[4];
        __mmask32 sure = ~(__mmask32)0;
        for (int g = 0; g < 4; g++) {
            const int64_t at = i + 32 * g;
            ranked[g] = ranked_words(e, words_of(x, at, inverse[at >> shift], io));
            sure = decided(sure, ranked[g]);
        }
        __m512i codes = _mm512_packus_epi16(pair_codes(e, ranked[0], ranked[1], code_is_rank),
                                            pair_codes(e, ranked[2], ranked[3], code_is_rank));
        _mm512_storeu_si512(packed + i / 2, _mm512_permutexvar_epi32(transpose, codes));
        if (__builtin_expect(sure != ~(__mmask32)0, 0))
            decide(e, ranked, x, i, io, shift, absmax, packed);
    }
}

static inline void quantize(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                            float *absmax, uint8_t *packed, hb_dtype io, hb_absmax_fn *largest,
                            hb_encode4_fn *encode)
{
    const encoder e = make_encoder(format);
    const int shift = __builtin_ctzll((uint64_t)blocksize);
    const int64_t step = blocksize > STEP ? blocksize : STEP;
    const float most = format == HB_NF4 ? 0x1p125f : io == HB_F32 ? 1.0f : 65536.0f;
    float inverse[STEP / 32];
    for (int64_t first = 0; first < n; first += step) {
        const int64_t count = n - first < step ? n - first : step;
        const int64_t blocks = (count + blocksize - 1) >> shift;
        const uint8_t *from = (const uint8_t *)x + first * (int64_t)hb_dtype_bytes(io);
        float *scale = absmax + (first >> shift);
        uint8_t *to = packed + first / 2;
        largest(from, count, blocksize, scale);
        if (!shrunken_inverses(scale, blocks, most, inverse)) {
            encode(from, count, format, blocksize, scale, to);
            continue;
        }
        const int64_t whole = count / GROUP * GROUP;
        if (e.code_is_rank)
            encode_groups(&e, from, whole, shift, scale, inverse, to, io, true);
        else
            encode_groups(&e, from, whole, shift, scale, inverse, to, io, false);
        // Fewer than a group: its first element begins a block, or is in the only one.
        if (whole < count)
            encode(from + whole * (int64_t)hb_dtype_bytes(io), count - whole, format, blocksize,
                   scale + (whole >> shift), to + whole / 2);
    }
}

#define QUANTIZE4(io, dtype)                                                                       \
    void hb_code4_quantize_##io##_avx512(const void *x, int64_t n, hb_format4 format,              \
                                         int64_t blocksize, float *absmax, uint8_t *packed)        \
    {                                                                                              \
        quantize(x, n, format, blocksize, absmax, packed, dtype, hb_absmax_##io##_avx512,          \
                 hb_code4_encode_##io##_avx512);                                                   \
    }
QUANTIZE4(f32, HB_F32)
QUANTIZE4(bf16, HB_BF16)
QUANTIZE4(f16, HB_F16)
