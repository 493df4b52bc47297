// A step of Adam on whole 8-bit blocks with AVX-512. Formula: core/kernels_optim.h.
//
// The file that includes this one says how 64 codes become floats:
//
//     decoder                                        the map, prepared
//     decoder make_decoder(const float *map)
//     void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
//     third_bytes                                    see ladder8.h
//
// Some blocks of 256 are taken at a time, and stay in the L1 cache. First their states are decoded
// and averaged with the gradient, which gives their maxima. Then p moves and the states are
// encoded: in one loop, so that the divider and the pipes of integers work side by side. Each byte
// is moved once, and the streams of p, g and the codes advance together, as the prefetchers of the
// processor like it. Accuracy: the bits of the separate kernels (codec8.c, optim_loops.h).
//
// The states of an element whose gradient is not finite must become zero. Its v would be infinite
// or NaN, and so the block's maximum says that there is one: the whole block is then done by plain
// C.
#include "cpu/avx512/ladder8.h"

#include <math.h>

enum { BLOCK = 256, GROUP = 2 /* blocks */ };

// The states of a group after the step, and where the first is negative.
typedef struct {
    _Alignas(64) float m[GROUP * BLOCK], v[GROUP * BLOCK];
    _Alignas(8) uint16_t negative[GROUP * BLOCK / 16]; // a bit an element
} group;

// The scalars in all lanes.
typedef struct {
    __m512 gnorm, beta1, beta2, rest1, rest2, keep, size, inv_corr2, eps;
} step_f32x16;

static inline step_f32x16 broadcast_scalars(const hb_optim_scalars *s)
{
    return (step_f32x16){.gnorm = _mm512_set1_ps(s->gnorm_scale),
                         .beta1 = _mm512_set1_ps(s->beta1),
                         .beta2 = _mm512_set1_ps(s->beta2),
                         .rest1 = _mm512_set1_ps(s->beta1_rest),
                         .rest2 = _mm512_set1_ps(s->beta2_rest),
                         .keep = _mm512_set1_ps(s->keep),
                         .size = _mm512_set1_ps(s->step_size * s->scale),
                         .inv_corr2 = _mm512_set1_ps(s->inv_corr2),
                         .eps = _mm512_set1_ps(s->eps)};
}

// Fetches elements [first, first + 64) of x. The prefetchers of the processor stop at the end of a
// page, which four streams reach every thousand elements.
static inline void prefetch_elements(const void *x, int64_t first, int64_t bytes)
{
    const uintptr_t at = (uintptr_t)x + (uintptr_t)(first * bytes);
    for (int64_t b = 0; b < 64 * bytes; b += 64)
        _mm_prefetch((const void *)(at + (uintptr_t)b), _MM_HINT_T0);
}

// What arithmetic cannot decide, one element at a time.
static inline uint8_t search_code(const hb_search8 *search, float value, float inverse,
                                  bool keep_sign)
{
    const int code = hb_search8_code(search, value * inverse), zero = search->ladder.zero;
    return (uint8_t)(keep_sign && value < 0.0f && code >= zero ? zero - 1 : code);
}

static void search_block(const float *values, float absmax, const hb_search8 *search,
                         bool keep_sign, uint8_t *codes)
{
    const float inverse = hb_inverse_scale(absmax);
    for (int i = 0; i < BLOCK; i++) codes[i] = search_code(search, values[i], inverse, keep_sign);
}

// Seldom, one of 100 groups of 64: the lanes `near`.
static __attribute__((noinline)) void search_lanes(const float *values, float inverse,
                                                   const hb_search8 *search, bool keep_sign,
                                                   unsigned near, uint8_t *codes)
{
    for (; near != 0; near &= near - 1)
        for (int i = __builtin_ctz(near); i < 64; i += 16)
            codes[i] = search_code(search, values[i], inverse, keep_sign);
}

static float largest_magnitude(const float *values)
{
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        const uint32_t bits = hb_f32_bits(values[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return hb_f32_from_bits(largest > 0x7f800000u ? HB_NAN_BITS : largest);
}

// The whole step of one block, for gradients that are not finite or squares that overflow.
static __attribute__((noinline)) void plain_block(void *p, const void *g, int64_t block,
                                                  const hb_states8 *states,
                                                  const hb_optim_scalars *s, hb_dtype io)
{
    uint8_t *codes1 = states->codes1 + block * BLOCK, *codes2 = states->codes2 + block * BLOCK;
    float *absmax1 = states->absmax1 + block, *absmax2 = states->absmax2 + block;
    const float size = s->step_size * s->scale;
    float new_m[BLOCK], new_v[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float raw = hb_load_f32(g, block * BLOCK + i, io), gradient = s->gnorm_scale * raw;
        float m = states->map1[codes1[i]] * *absmax1, v = states->map2[codes2[i]] * *absmax2;
        m = s->beta1 * m + s->beta1_rest * gradient;
        v = s->beta2 * v + s->beta2_rest * (gradient * gradient);
        const bool finite = raw - raw == 0.0f;
        new_m[i] = finite ? m : 0.0f;
        new_v[i] = finite ? v : 0.0f;
        if (!finite) continue;
        const float parameter = hb_load_f32(p, block * BLOCK + i, io);
        const float update = size * (m / (sqrtf(v) * s->inv_corr2 + s->eps));
        hb_store_f32(p, block * BLOCK + i, io, s->keep * parameter - update);
    }
    *absmax1 = largest_magnitude(new_m);
    *absmax2 = largest_magnitude(new_v);
    search_block(new_m, *absmax1, states->search1, true, codes1);
    search_block(new_v, *absmax2, states->search2, false, codes2);
}

// Decodes a block, number `k` of the group, and averages it with the gradient. Its new scales. (p
// is only fetched.)
static inline void average_block(const void *p, const void *g, int64_t block,
                                 const hb_states8 *states, const decoder *decoder1,
                                 const decoder *decoder2, const step_f32x16 *s, bool scaled,
                                 hb_dtype io, group *to, int k, float *absmax1, float *absmax2)
{
    const uint8_t *codes1 = states->codes1 + block * BLOCK;
    const uint8_t *codes2 = states->codes2 + block * BLOCK;
    const __m512 scale1 = _mm512_set1_ps(states->absmax1[block]);
    const __m512 scale2 = _mm512_set1_ps(states->absmax2[block]);
    __m512i max1 = _mm512_setzero_si512(), max2 = max1;
    for (int i = 0; i < BLOCK; i += 64) {
        prefetch_elements(p, block * BLOCK + i, (int64_t)hb_dtype_bytes(io));
        __m512 first[4], second[4];
        decode(decoder1, codes1 + i, first);
        decode(decoder2, codes2 + i, second);
        for (int l = 0; l < 4; l++) {
            const int at = k * BLOCK + i + 16 * l;
            __m512 gradient = load_f32x16(g, block * BLOCK + i + 16 * l, io);
            if (scaled) gradient = _mm512_mul_ps(s->gnorm, gradient);
            __m512 m = _mm512_mul_ps(first[l], scale1), v = _mm512_mul_ps(second[l], scale2);
            m = _mm512_add_ps(_mm512_mul_ps(s->beta1, m), _mm512_mul_ps(s->rest1, gradient));
            v = _mm512_add_ps(_mm512_mul_ps(s->beta2, v),
                              _mm512_mul_ps(s->rest2, _mm512_mul_ps(gradient, gradient)));
            _mm512_store_ps(to->m + at, m);
            _mm512_store_ps(to->v + at, v);
            to->negative[at / 16] = _mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_LT_OQ);
            max1 = _mm512_max_epi32(max1, _mm512_castps_si512(magnitude_f32x16(m)));
            // v is not negative; a NaN may be, and is large without a sign, too.
            max2 = _mm512_max_epu32(max2, _mm512_castps_si512(v));
        }
    }
    *absmax1 = largest_of_magnitudes(max1);
    const uint32_t bits = _mm512_reduce_max_epu32(max2);
    *absmax2 = hb_f32_from_bits(bits > 0x7f800000u ? HB_NAN_BITS : bits);
}

// Moves the parameters of a block, number `k` of the group, and encodes its states.
static inline void move_block(void *p, const void *g, int64_t block, const hb_states8 *states,
                              const ladder *ladder1, const ladder *ladder2, const step_f32x16 *s,
                              hb_dtype io, const group *from, int k)
{
    uint8_t *codes1 = states->codes1 + block * BLOCK, *codes2 = states->codes2 + block * BLOCK;
    const float *ms = from->m + k * BLOCK, *vs = from->v + k * BLOCK;
    const float absmax1 = states->absmax1[block], absmax2 = states->absmax2[block];
    const float inverse1 = hb_inverse_scale(absmax1), inverse2 = hb_inverse_scale(absmax2);
    const __m512 inverse_m = _mm512_set1_ps(inverse1), inverse_v = _mm512_set1_ps(inverse2);
    for (int i = 0; i < BLOCK; i += 64) {
        const int64_t ahead = (block + GROUP) * BLOCK + i;
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        prefetch_elements(states->codes2, ahead, 1);
        __m512i t1[4], t2[4];
        for (int l = 0; l < 4; l++) {
            const int64_t at = block * BLOCK + i + 16 * l;
            __m512 m = _mm512_load_ps(ms + i + 16 * l), v = _mm512_load_ps(vs + i + 16 * l);
            __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), s->inv_corr2);
            __m512 update = _mm512_mul_ps(s->size, _mm512_div_ps(m, _mm512_add_ps(root, s->eps)));
            __m512 parameter = _mm512_mul_ps(s->keep, load_f32x16(p, at, io));
            store_f32x16(p, at, _mm512_sub_ps(parameter, update), false, io);
            t1[l] = climb(ladder1, magnitude(ladder1, _mm512_mul_ps(m, inverse_m)));
            t2[l] = climb(ladder2, magnitude(ladder2, _mm512_mul_ps(v, inverse_v)));
        }
        // Negative values do not become 0.
        __mmask64 negative;
        memcpy(&negative, from->negative + (k * BLOCK + i) / 16, sizeof negative);
        __m512i steps = third_bytes(t1);
        __m512i code = _mm512_add_epi8(ladder1->zero, steps);
        steps = _mm512_max_epu8(steps, _mm512_set1_epi8(1));
        code = _mm512_mask_subs_epu8(code, negative, ladder1->zero, steps);
        _mm512_storeu_si512(codes1 + i, code);
        _mm512_storeu_si512(codes2 + i, _mm512_add_epi8(ladder2->zero, third_bytes(t2)));
        const unsigned near1 = near_a_threshold(t1), near2 = near_a_threshold(t2);
        if (__builtin_expect((near1 | near2) != 0, 0)) {
            search_lanes(ms + i, inverse1, states->search1, true, near1, codes1 + i);
            search_lanes(vs + i, inverse2, states->search2, false, near2, codes2 + i);
        }
    }
    // Scales that are NaN, infinite or so small that their inverse is.
    if (!(absmax1 < HB_INFINITY && inverse1 < HB_INFINITY))
        search_block(ms, absmax1, states->search1, true, codes1);
    if (!(inverse2 < HB_INFINITY)) search_block(vs, absmax2, states->search2, false, codes2);
}

static inline void adam8(void *p, const void *g, int64_t blocks, const hb_states8 *states,
                         const hb_optim_scalars *scalars, bool scaled, hb_dtype io)
{
    const decoder decoder1 = make_decoder(states->map1), decoder2 = make_decoder(states->map2);
    ladder ladder1 = load_ladder(states->search1), ladder2 = load_ladder(states->search2);
    ladder1.is_signed = true; // known to the compiler
    ladder2.is_signed = false;
    const step_f32x16 s = broadcast_scalars(scalars);
    group new;
    for (int64_t first = 0; first < blocks; first += GROUP) {
        const int count = blocks - first < GROUP ? (int)(blocks - first) : GROUP;
        bool done[GROUP];
        for (int k = 0; k < count; k++) {
            const int64_t block = first + k;
            float absmax1, absmax2;
            average_block(p, g, block, states, &decoder1, &decoder2, &s, scaled, io, &new, k,
                          &absmax1, &absmax2);
            done[k] = !(absmax2 < HB_INFINITY);
            if (__builtin_expect(done[k], 0)) {
                plain_block(p, g, block, states, scalars, io);
            } else {
                states->absmax1[block] = absmax1;
                states->absmax2[block] = absmax2;
            }
        }
        for (int k = 0; k < count; k++)
            if (!done[k]) move_block(p, g, first + k, states, &ladder1, &ladder2, &s, io, &new, k);
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
