// A step of Adam on whole 8-bit blocks with AVX2. Formula: core/kernels_optim.h.
//
// As avx512/states8.h: a block of 256 is decoded, stepped and kept in the L1 cache while the maxima
// of its states are taken, then encoded. Accuracy: the bits of the separate kernels.
#include "cpu/avx2/ladder8.h"

enum { BLOCK = 256 };

// Encodes a block whose largest magnitude is absmax. keep_sign: negative values do not become 0.
static inline void encode_block(const float *values, float absmax, const ladder *from,
                                const hb_search8 *search, bool keep_sign, uint8_t *codes)
{
    ladder l = *from; // is_signed known to the compiler
    l.is_signed = keep_sign;
    const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(absmax));
    const __m256i least = _mm256_sub_epi8(l.zero, _mm256_set1_epi8(1));
    for (int i = 0; i < BLOCK; i += 32) {
        __m256 v[4];
        __m256i steps[4], near[4], below[4];
        for (int g = 0; g < 4; g++) {
            __m256 x = _mm256_load_ps(values + i + 8 * g);
            v[g] = _mm256_mul_ps(x, inverse);
            steps[g] = climb(&l, v[g], &near[g]);
            below[g] = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
        }
        __m256i code = thirty_two_codes(&l, v, steps);
        __m256i any =
            _mm256_or_si256(_mm256_or_si256(near[0], near[1]), _mm256_or_si256(near[2], near[3]));
        if (__builtin_expect(!_mm256_testz_si256(any, any), 0)) {
            search_thirty_two(search, v, codes + i);
            code = _mm256_loadu_si256((const void *)(codes + i));
        }
        if (keep_sign) {
            const __m256i transpose = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            __m256i negative = _mm256_packs_epi16(_mm256_packs_epi32(below[0], below[1]),
                                                  _mm256_packs_epi32(below[2], below[3]));
            negative = _mm256_permutevar8x32_epi32(negative, transpose);
            code = _mm256_blendv_epi8(code, _mm256_min_epu8(code, least), negative);
        }
        _mm256_storeu_si256((void *)(codes + i), code);
    }
}

// map[code] * scale of eight codes.
static inline __m256 decode_eight(const uint8_t *codes, const float *map, __m256 scale)
{
    __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)codes));
    return _mm256_mul_ps(_mm256_i32gather_ps(map, index, 4), scale);
}

static inline __m256i magnitude_bits(__m256 value)
{
    return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

static inline void adam8(void *p, const void *g, int64_t blocks, const hb_states8 *states,
                         const hb_optim_scalars *scalars, hb_dtype io)
{
    const ladder ladder1 = load_ladder(&states->search1->ladder);
    const ladder ladder2 = load_ladder(&states->search2->ladder);
    const __m256 gnorm = _mm256_set1_ps(scalars->gnorm_scale), keep = _mm256_set1_ps(scalars->keep);
    const __m256 beta1 = _mm256_set1_ps(scalars->beta1), beta2 = _mm256_set1_ps(scalars->beta2);
    const __m256 rest1 = _mm256_set1_ps(scalars->beta1_rest);
    const __m256 rest2 = _mm256_set1_ps(scalars->beta2_rest);
    const __m256 size = _mm256_set1_ps(scalars->step_size * scalars->scale);
    const __m256 inv_corr2 = _mm256_set1_ps(scalars->inv_corr2);
    const __m256 eps = _mm256_set1_ps(scalars->eps);
    const __m256i infinite = _mm256_set1_epi32(0x7f800000);
    _Alignas(32) float new_m[BLOCK], new_v[BLOCK];
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *codes1 = states->codes1 + b * BLOCK, *codes2 = states->codes2 + b * BLOCK;
        const __m256 scale1 = _mm256_set1_ps(states->absmax1[b]);
        const __m256 scale2 = _mm256_set1_ps(states->absmax2[b]);
        __m256i max1 = _mm256_setzero_si256(), max2 = max1;
        for (int i = 0; i < BLOCK; i += 8) {
            const int64_t at = b * BLOCK + i;
            __m256 raw = load_f32x8(g, at, io), parameter = load_f32x8(p, at, io);
            // An element whose gradient is not finite is left alone, its states become zero.
            __m256 finite = _mm256_castsi256_ps(_mm256_cmpgt_epi32(infinite, magnitude_bits(raw)));
            __m256 gradient = _mm256_mul_ps(gnorm, raw);
            __m256 m = decode_eight(codes1 + i, states->map1, scale1);
            __m256 v = decode_eight(codes2 + i, states->map2, scale2);
            m = _mm256_add_ps(_mm256_mul_ps(beta1, m), _mm256_mul_ps(rest1, gradient));
            v = _mm256_add_ps(_mm256_mul_ps(beta2, v),
                              _mm256_mul_ps(rest2, _mm256_mul_ps(gradient, gradient)));
            m = _mm256_and_ps(m, finite);
            v = _mm256_and_ps(v, finite);
            __m256 root = _mm256_mul_ps(_mm256_sqrt_ps(v), inv_corr2);
            __m256 update = _mm256_mul_ps(size, _mm256_div_ps(m, _mm256_add_ps(root, eps)));
            __m256 moved = _mm256_sub_ps(_mm256_mul_ps(keep, parameter), update);
            store_f32x8(p, at, _mm256_blendv_ps(parameter, moved, finite), false, io);
            _mm256_store_ps(new_m + i, m);
            _mm256_store_ps(new_v + i, v);
            max1 = _mm256_max_epi32(max1, magnitude_bits(m));
            max2 = _mm256_max_epi32(max2, magnitude_bits(v));
        }
        states->absmax1[b] = largest_of_magnitudes(max1);
        states->absmax2[b] = largest_of_magnitudes(max2);
        encode_block(new_m, states->absmax1[b], &ladder1, states->search1, true, codes1);
        encode_block(new_v, states->absmax2[b], &ladder2, states->search2, false, codes2);
    }
}

#define ADAM8(io, dtype)                                                                           \
    void hb_dyn8_adam_##io##_avx2(void *p, const void *g, int64_t blocks,                          \
                                  const hb_states8 *states, const hb_optim_scalars *scalars)       \
    {                                                                                              \
        adam8(p, g, blocks, states, scalars, dtype);                                               \
    }
ADAM8(f32, HB_F32)
ADAM8(bf16, HB_BF16)
ADAM8(f16, HB_F16)
