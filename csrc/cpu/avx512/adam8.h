// A step of Adam on whole 8-bit blocks with AVX-512. Formula: core/kernels_optim.h.
//
// The file that includes this one says how 64 codes become floats:
//
//     decoder                                        the map, prepared
//     decoder make_decoder(const float *map)
//     void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
//
// A block of 256 is decoded, stepped and kept in the L1 cache, while the maxima of its states are
// taken; then its states are encoded. So each byte is moved once, and the streams of p, g and the
// codes advance together, as the prefetchers of the processor like it. Accuracy: the bits of the
// separate kernels (codec8.c, optim_loops.h).
#include "cpu/avx512/ladder8.h"

enum { BLOCK = 256 };

// Encodes a block whose largest magnitude is *absmax. keep_sign: negative values do not become 0.
static inline void encode_block(const float *values, float absmax, const ladder *from,
                                const hb_search8 *search, bool keep_sign, uint8_t *codes)
{
    ladder own = *from; // is_signed known to the compiler
    own.is_signed = keep_sign;
    const ladder *l = &own;
    const __m512 inverse = _mm512_set1_ps(hb_inverse_scale(absmax));
    const __m512i least = _mm512_sub_epi8(l->zero, _mm512_set1_epi8(1));
    for (int i = 0; i < BLOCK; i += 64) {
        __m512 v[4];
        __m512i steps[4];
        __mmask16 near[4], negative[4];
        for (int g = 0; g < 4; g++) {
            __m512 x = _mm512_load_ps(values + i + 16 * g);
            v[g] = _mm512_mul_ps(x, inverse);
            steps[g] = climb(l, v[g], true, &near[g]);
            negative[g] = keep_sign ? _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ) : 0;
        }
        __m512i code = sixty_four_codes(l, negative, steps);
        __mmask64 below = 0;
        if (keep_sign) {
            below = join_masks(negative);
            code = _mm512_mask_min_epu8(code, below, code, least);
        }
        _mm512_storeu_si512(codes + i, code);
        if (__builtin_expect(near[0] | near[1] | near[2] | near[3], 0))
            for (int g = 0; g < 4; g++) {
                if (near[g] == 0) continue;
                __m128i found = search_codes(search, v[g]);
                __m512i all = _mm512_castsi128_si512(found);
                found = _mm512_castsi512_si128(_mm512_mask_min_epu8(all, negative[g], all, least));
                _mm_storeu_si128((void *)(codes + i + 16 * g), found);
            }
    }
}

static inline void adam8(void *p, const void *g, int64_t blocks, const hb_states8 *states,
                         const hb_optim_scalars *scalars, bool scaled, hb_dtype io)
{
    const decoder decoder1 = make_decoder(states->map1), decoder2 = make_decoder(states->map2);
    const ladder ladder1 = load_ladder(&states->search1->ladder);
    const ladder ladder2 = load_ladder(&states->search2->ladder);
    const __m512 gnorm = _mm512_set1_ps(scalars->gnorm_scale), keep = _mm512_set1_ps(scalars->keep);
    const __m512 beta1 = _mm512_set1_ps(scalars->beta1), beta2 = _mm512_set1_ps(scalars->beta2);
    const __m512 rest1 = _mm512_set1_ps(scalars->beta1_rest);
    const __m512 rest2 = _mm512_set1_ps(scalars->beta2_rest);
    const __m512 size = _mm512_set1_ps(scalars->step_size * scalars->scale);
    const __m512 inv_corr2 = _mm512_set1_ps(scalars->inv_corr2);
    const __m512 eps = _mm512_set1_ps(scalars->eps);
    _Alignas(64) float new_m[BLOCK], new_v[BLOCK];
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *codes1 = states->codes1 + b * BLOCK, *codes2 = states->codes2 + b * BLOCK;
        const __m512 scale1 = _mm512_set1_ps(states->absmax1[b]);
        const __m512 scale2 = _mm512_set1_ps(states->absmax2[b]);
        __m512i max1 = _mm512_setzero_si512(), max2 = max1;
        for (int i = 0; i < BLOCK; i += 64) {
            __m512 first[4], second[4];
            decode(&decoder1, codes1 + i, first);
            decode(&decoder2, codes2 + i, second);
            for (int k = 0; k < 4; k++) {
                const int64_t at = b * BLOCK + i + 16 * k;
                __m512 raw = load_f32x16(g, at, io), parameter = load_f32x16(p, at, io);
                // An element whose gradient is not finite is left alone, its states become zero.
                __mmask16 finite = _mm512_cmpgt_epi32_mask(
                    _mm512_set1_epi32(0x7f800000), _mm512_castps_si512(magnitude_f32x16(raw)));
                __m512 gradient = scaled ? _mm512_mul_ps(gnorm, raw) : raw;
                __m512 m = _mm512_mul_ps(first[k], scale1), v = _mm512_mul_ps(second[k], scale2);
                m = _mm512_maskz_add_ps(finite, _mm512_mul_ps(beta1, m),
                                        _mm512_mul_ps(rest1, gradient));
                v = _mm512_maskz_add_ps(finite, _mm512_mul_ps(beta2, v),
                                        _mm512_mul_ps(rest2, _mm512_mul_ps(gradient, gradient)));
                __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), inv_corr2);
                __m512 update = _mm512_mul_ps(size, _mm512_div_ps(m, _mm512_add_ps(root, eps)));
                parameter =
                    _mm512_mask_sub_ps(parameter, finite, _mm512_mul_ps(keep, parameter), update);
                store_f32x16(p, at, parameter, false, io);
                _mm512_store_ps(new_m + i + 16 * k, m);
                _mm512_store_ps(new_v + i + 16 * k, v);
                max1 = _mm512_max_epi32(max1, _mm512_castps_si512(magnitude_f32x16(m)));
                max2 = _mm512_max_epi32(max2, _mm512_castps_si512(magnitude_f32x16(v)));
            }
        }
        states->absmax1[b] = largest_of_magnitudes(max1);
        states->absmax2[b] = largest_of_magnitudes(max2);
        encode_block(new_m, states->absmax1[b], &ladder1, states->search1, true, codes1);
        encode_block(new_v, states->absmax2[b], &ladder2, states->search2, false, codes2);
    }
}

#define ADAM8(io, dtype, isa)                                                                      \
    void hb_dyn8_adam_##io##_##isa(void *p, const void *g, int64_t blocks,                         \
                                   const hb_states8 *states, const hb_optim_scalars *scalars)      \
    {                                                                                              \
        if (scalars->gnorm_scale == 1.0f)                                                          \
            adam8(p, g, blocks, states, scalars, false, dtype);                                    \
        else                                                                                       \
            adam8(p, g, blocks, states, scalars, true, dtype);                                     \
    }
