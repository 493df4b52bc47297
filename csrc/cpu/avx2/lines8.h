// From 8-bit codes to entries of the map with AVX2: the lines of kernels_codec.h, 32 codes at a
// time. Place, line and correction of a code are found among bytes, 16 entries a look-up, and are
// brought to 32 bits by interleaving; a gather of eight entries takes longer than all of it.
#ifndef HB_CPU_AVX2_LINES8_H
#define HB_CPU_AVX2_LINES8_H

#include "cpu/avx2/io.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *map; // is looked up where the lines do not fit
    bool fits, is_signed;
    __m256 slope, offset;
    __m256i more[3][2]; // bits of 16 rows of eight numbers each
} decoder;

INLINE __m256i both_halves(const uint8_t *bytes)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)bytes));
}

INLINE decoder make_decoder(const float *map, const hb_search8 *search, bool is_signed)
{
    const hb_lines8 *lines = &search->lines;
    decoder d = {.map = map,
                 .fits = lines->fits && lines->is_signed == is_signed,
                 .is_signed = is_signed,
                 .slope = _mm256_loadu_ps(lines->slope),
                 .offset = _mm256_loadu_ps(lines->offset)};
    for (int b = 0; b < 3; b++)
        for (int k = 0; k < 2; k++) d.more[b][k] = both_halves(lines->more[b] + 16 * k);
    return d;
}

// By the low four bits of a number and by the high ones: its highest bit, and its line. The larger
// of the two holds.
static const uint8_t lines8_top[2][2][16] = {
    {{0, 0, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8},
     {0, 16, 32, 32, 64, 64, 64, 64, 128, 128, 128, 128, 128, 128, 128, 128}},
    {{0, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8},
     {0, 16, 32, 32, 64, 64, 64, 64, 128, 0, 0, 0, 0, 0, 0, 0}}};
static const uint8_t lines8_line[2][2][16] = {{{0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3},
                                               {0, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7}},
                                              {{0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4},
                                               {0, 5, 6, 6, 7, 7, 7, 7, 8, 0, 0, 0, 0, 0, 0, 0}}};

// more(k) of 32 numbers.
INLINE __m256i more_of(const decoder *d, __m256i number)
{
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i bits = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    __m256i row = _mm256_srli_epi16(number, 3), more = _mm256_setzero_si256();
    row = _mm256_and_si256(row, _mm256_set1_epi8(d->is_signed ? 15 : 31));
    // A look-up gives 0 for bytes of 128 and more.
    __m256i bit = d->is_signed ? number : _mm256_and_si256(number, _mm256_set1_epi8(15));
    bit = _mm256_shuffle_epi8(bits, bit);
    for (int b = 2; b >= 0; b--) {
        __m256i set = _mm256_shuffle_epi8(d->more[b][0], row);
        if (!d->is_signed)
            set = _mm256_blendv_epi8(set, _mm256_shuffle_epi8(d->more[b][1], row), number);
        set = _mm256_min_epu8(_mm256_and_si256(set, bit), one);
        more = b == 2 ? set : _mm256_add_epi8(_mm256_add_epi8(more, more), set);
    }
    return more;
}

// The entries of 32 codes.
INLINE void decode(const decoder *d, const uint8_t *codes, __m256 value[4])
{
    if (__builtin_expect(!d->fits, 0)) {
        for (int g = 0; g < 4; g++) {
            __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(codes + 8 * g)));
            value[g] = _mm256_i32gather_ps(d->map, index, 4);
        }
        return;
    }
    // Interleaving works in 128-bit lanes, which get every other four codes therefore.
    const __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i zero = _mm256_setzero_si256(), low4 = _mm256_set1_epi8(15);
    const __m256i code =
        _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const void *)codes), apart);
    const __m256i steps = _mm256_sub_epi8(code, _mm256_set1_epi8(d->is_signed ? 127 : -1));
    const __m256i number = d->is_signed ? _mm256_abs_epi8(steps) : steps;
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(number, 4), low4);
    const uint8_t(*tops)[16] = lines8_top[d->is_signed], (*lines)[16] = lines8_line[d->is_signed];
    const __m256i top = _mm256_max_epu8(_mm256_shuffle_epi8(both_halves(tops[0]), number),
                                        _mm256_shuffle_epi8(both_halves(tops[1]), high));
    const __m256i line = _mm256_max_epu8(_mm256_shuffle_epi8(both_halves(lines[0]), number),
                                         _mm256_shuffle_epi8(both_halves(lines[1]), high));
    const __m256i place = _mm256_xor_si256(number, top), more = more_of(d, number);
    // -128, 128 steps above zero, is not negative.
    __m256i sign = zero;
    if (d->is_signed)
        sign = _mm256_andnot_si256(_mm256_or_si256(code, _mm256_set1_epi8(0x7f)), steps);
    for (int half = 0; half < 2; half++) {
        __m256i x = half ? _mm256_unpackhi_epi8(line, place) : _mm256_unpacklo_epi8(line, place);
        __m256i low = half ? _mm256_unpackhi_epi8(more, zero) : _mm256_unpacklo_epi8(more, zero);
        __m256i upper = half ? _mm256_unpackhi_epi8(zero, sign) : _mm256_unpacklo_epi8(zero, sign);
        for (int k = 0; k < 2; k++) {
            __m256i x32 = k ? _mm256_unpackhi_epi16(x, zero) : _mm256_unpacklo_epi16(x, zero);
            __m256i add = k ? _mm256_unpackhi_epi16(low, upper) : _mm256_unpacklo_epi16(low, upper);
            __m256 y =
                _mm256_fmadd_ps(_mm256_permutevar8x32_ps(d->slope, x32), _mm256_cvtepi32_ps(x32),
                                _mm256_permutevar8x32_ps(d->offset, x32));
            value[2 * half + k] =
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), add));
        }
    }
}

#endif
