// A step of Adam or AdEMAMix on whole 8-bit blocks. How: states8.h.
//
// p moves in the second loop, where the states are encoded, so that the divider and the pipes of
// integers work side by side.
//
// The states of an element whose gradient is not finite must become zero. Its v would be infinite
// or NaN, and so the block's maximum says that there is one: the whole block is then done by plain
// C.
#ifndef HB_CPU_ADAM8_H
#define HB_CPU_ADAM8_H

#include "cpu/states8.h"

#include <math.h>

// The states of a group after the step; AdEMAMix has the slow one.
typedef struct {
    new_state m, slow;
    _Alignas(64) float v[GROUP * BLOCK];
} group;

// What decodes and encodes the states.
typedef struct {
    decoder decoder1, decoder2;
    ladder ladder1, ladder2;
} adam_maps;

static float largest_magnitude(const float *values)
{
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        const uint32_t bits = hb_f32_bits(values[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    return hb_f32_from_bits(largest > 0x7f800000u ? HB_NAN_BITS : largest);
}

static void store_plain(const float *values, const hb_search8 *search, bool keep_sign,
                        float *absmax, uint8_t *codes)
{
    *absmax = largest_magnitude(values);
    search_block(values, *absmax, search, keep_sign, codes);
}

// The whole step of one block, for gradients that are not finite or squares that overflow.
static __attribute__((noinline)) void plain_block(void *p, const void *g, int64_t block,
                                                  const hb_states8 *states,
                                                  const hb_optim_scalars *s, bool mix, hb_dtype io)
{
    uint8_t *codes1 = states->codes1 + block * BLOCK, *codes2 = states->codes2 + block * BLOCK;
    uint8_t *slow_codes = mix ? states->slow_codes + block * BLOCK : NULL;
    float *absmax1 = states->absmax1 + block, *absmax2 = states->absmax2 + block;
    float *slow_absmax = mix ? states->slow_absmax + block : NULL;
    const float size = mix ? s->lr : s->step_size * s->scale;
    float new_m[BLOCK], new_slow[BLOCK], new_v[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float raw = hb_load_f32(g, block * BLOCK + i, io), gradient = s->gnorm_scale * raw;
        float m = states->map1[codes1[i]] * *absmax1, v = states->map2[codes2[i]] * *absmax2;
        float mixed = m = s->beta1 * m + s->beta1_rest * gradient, slow = 0.0f;
        v = s->beta2 * v + s->beta2_rest * (gradient * gradient);
        if (mix) {
            slow = states->map1[slow_codes[i]] * *slow_absmax;
            slow = s->beta3 * slow + s->beta3_rest * gradient;
            mixed = m * s->inv_corr1 + s->alpha * slow;
        }
        const bool finite = raw - raw == 0.0f;
        new_m[i] = finite ? m : 0.0f;
        new_slow[i] = finite ? slow : 0.0f;
        new_v[i] = finite ? v : 0.0f;
        if (!finite) continue;
        const float parameter = hb_load_f32(p, block * BLOCK + i, io);
        const float update = size * (mixed / (sqrtf(v) * s->inv_corr2 + s->eps));
        hb_store_f32(p, block * BLOCK + i, io, s->keep * parameter - update);
    }
    store_plain(new_m, states->search1, true, absmax1, codes1);
    if (mix) store_plain(new_slow, states->search1, true, slow_absmax, slow_codes);
    store_plain(new_v, states->search2, false, absmax2, codes2);
}

typedef struct {
    float m, slow, v;
} adam_absmax;

// Decodes a block, number `k` of the group, and averages it with the gradient. Its new scales. (p
// is only fetched.)
INLINE adam_absmax average_block(const void *p, const void *g, int64_t block,
                                 const hb_states8 *states, const adam_maps *maps,
                                 const step_lanes *s, bool mix, bool scaled, hb_dtype io, group *to,
                                 int k)
{
    const uint8_t *codes1 = states->codes1 + block * BLOCK;
    const uint8_t *codes2 = states->codes2 + block * BLOCK;
    const uint8_t *slow_codes = mix ? states->slow_codes + block * BLOCK : NULL;
    const vector scale1 = V(set1_ps)(states->absmax1[block]);
    const vector scale2 = V(set1_ps)(states->absmax2[block]);
    const vector slow_scale = V(set1_ps)(mix ? states->slow_absmax[block] : 0.0f);
    integers max1 = no_bits(), max_slow = max1, max2 = max1;
    for (int i = 0; i < BLOCK; i += STEP) {
        prefetch_elements(p, block * BLOCK + i, (int64_t)hb_dtype_bytes(io));
        vector first[4], slow[4], second[4];
        decode(&maps->decoder1, codes1 + i, first);
        if (mix) decode(&maps->decoder1, slow_codes + i, slow);
        decode(&maps->decoder2, codes2 + i, second);
        for (int l = 0; l < 4; l++) {
            const int at = k * BLOCK + i + LANES * l;
            vector gradient = load_lanes(g, block * BLOCK + i + LANES * l, io);
            if (scaled) gradient = V(mul_ps)(s->gnorm, gradient);
            vector m = V(mul_ps)(first[l], scale1), v = V(mul_ps)(second[l], scale2);
            m = V(add_ps)(V(mul_ps)(s->beta1, m), V(mul_ps)(s->rest1, gradient));
            v = V(add_ps)(V(mul_ps)(s->beta2, v),
                          V(mul_ps)(s->rest2, V(mul_ps)(gradient, gradient)));
            max1 = keep_state(&to->m, at, m, max1);
            if (mix) {
                m = V(mul_ps)(s->beta3, V(mul_ps)(slow[l], slow_scale));
                m = V(add_ps)(m, V(mul_ps)(s->rest3, gradient));
                max_slow = keep_state(&to->slow, at, m, max_slow);
            }
            V(store_ps)(to->v + at, v);
            // v is not negative; a NaN may be, and is large without a sign, too.
            max2 = V(max_epu32)(max2, bits_of(v));
        }
    }
    return (adam_absmax){.m = largest_of_magnitudes(max1),
                         .slow = mix ? largest_of_magnitudes(max_slow) : 0.0f,
                         .v = largest_of_magnitudes(max2)};
}

// Moves the parameters of a block, number `k` of the group, and encodes its states.
INLINE void move_block(void *p, const void *g, int64_t block, const hb_states8 *states,
                       const adam_maps *maps, const step_lanes *s, bool mix, hb_dtype io,
                       const group *from, int k)
{
    uint8_t *codes1 = states->codes1 + block * BLOCK, *codes2 = states->codes2 + block * BLOCK;
    uint8_t *slow_codes = mix ? states->slow_codes + block * BLOCK : NULL;
    const float *ms = from->m.value + k * BLOCK, *vs = from->v + k * BLOCK;
    const float *slows = from->slow.value + k * BLOCK;
    const float absmax1 = states->absmax1[block], absmax2 = states->absmax2[block];
    const float slow_absmax = mix ? states->slow_absmax[block] : 0.0f;
    const float inverse1 = hb_inverse_scale(absmax1), inverse2 = hb_inverse_scale(absmax2);
    const float slow_inverse = hb_inverse_scale(slow_absmax);
    const vector inverse_m = V(set1_ps)(inverse1), inverse_v = V(set1_ps)(inverse2);
    const vector inverse_slow = V(set1_ps)(slow_inverse);
    for (int i = 0; i < BLOCK; i += STEP) {
        const int64_t ahead = (block + GROUP) * BLOCK + i;
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        if (mix) prefetch_elements(states->slow_codes, ahead, 1);
        prefetch_elements(states->codes2, ahead, 1);
        integers t1[4], slow_t[4], t2[4];
        for (int l = 0; l < 4; l++) {
            const int64_t at = block * BLOCK + i + LANES * l;
            vector m = V(load_ps)(ms + i + LANES * l), v = V(load_ps)(vs + i + LANES * l);
            t1[l] = climb_state(&maps->ladder1, m, inverse_m);
            if (mix) {
                vector slow = V(load_ps)(slows + i + LANES * l);
                slow_t[l] = climb_state(&maps->ladder1, slow, inverse_slow);
                m = V(add_ps)(V(mul_ps)(m, s->inv_corr1), V(mul_ps)(s->alpha, slow));
            }
            vector root = V(mul_ps)(V(sqrt_ps)(v), s->inv_corr2);
            vector update = V(mul_ps)(s->size, V(div_ps)(m, V(add_ps)(root, s->eps)));
            vector parameter = V(mul_ps)(s->keep, load_lanes(p, at, io));
            store_lanes(p, at, V(sub_ps)(parameter, update), io);
            t2[l] = climb_state(&maps->ladder2, v, inverse_v);
        }
        unsigned slow_near = 0;
        const unsigned near1 =
            store_signed_codes(&maps->ladder1, t1, &from->m, k * BLOCK + i, codes1 + i);
        if (mix)
            slow_near = store_signed_codes(&maps->ladder1, slow_t, &from->slow, k * BLOCK + i,
                                           slow_codes + i);
        const unsigned near2 = store_codes(&maps->ladder2, t2, codes2 + i);
        if (__builtin_expect((near1 | slow_near | near2) != 0, 0)) {
            search_lanes(ms + i, inverse1, states->search1, true, near1, codes1 + i);
            if (mix)
                search_lanes(slows + i, slow_inverse, states->search1, true, slow_near,
                             slow_codes + i);
            search_lanes(vs + i, inverse2, states->search2, false, near2, codes2 + i);
        }
    }
    if (is_extreme(absmax1, inverse1)) search_block(ms, absmax1, states->search1, true, codes1);
    if (mix && is_extreme(slow_absmax, slow_inverse))
        search_block(slows, slow_absmax, states->search1, true, slow_codes);
    if (is_extreme(absmax2, inverse2)) search_block(vs, absmax2, states->search2, false, codes2);
}

INLINE void adam8(void *p, const void *g, int64_t blocks, const hb_states8 *states,
                  const hb_optim_scalars *scalars, bool mix, bool scaled, hb_dtype io)
{
    const adam_maps maps = {.decoder1 = make_decoder(states->map1),
                            .decoder2 = make_decoder(states->map2),
                            .ladder1 = load_ladder(states->search1, true),
                            .ladder2 = load_ladder(states->search2, false)};
    const step_lanes s = broadcast_scalars(mix ? HB_ADEMAMIX : HB_ADAM, scalars);
    group new;
    for (int64_t first = 0; first < blocks; first += GROUP) {
        const int count = blocks - first < GROUP ? (int)(blocks - first) : GROUP;
        bool done[GROUP];
        for (int k = 0; k < count; k++) {
            const int64_t block = first + k;
            const adam_absmax absmax =
                average_block(p, g, block, states, &maps, &s, mix, scaled, io, &new, k);
            done[k] = !(absmax.v < HB_INFINITY);
            if (__builtin_expect(done[k], 0)) {
                plain_block(p, g, block, states, scalars, mix, io);
            } else {
                states->absmax1[block] = absmax.m;
                if (mix) states->slow_absmax[block] = absmax.slow;
                states->absmax2[block] = absmax.v;
            }
        }
        for (int k = 0; k < count; k++)
            if (!done[k]) move_block(p, g, first + k, states, &maps, &s, mix, io, &new, k);
    }
}

#define ADAM8_OF(optimizer, mix, io, dtype, isa)                                                   \
    void hb_dyn8_##optimizer##_##io##_##isa(void *p, const void *g, int64_t blocks,                \
                                            const hb_states8 *states,                              \
                                            const hb_optim_scalars *scalars)                       \
    {                                                                                              \
        if (scalars->gnorm_scale == 1.0f)                                                          \
            adam8(p, g, blocks, states, scalars, mix, false, dtype);                               \
        else                                                                                       \
            adam8(p, g, blocks, states, scalars, mix, true, dtype);                                \
    }
#define ADAM8(io, dtype, isa)                                                                      \
    ADAM8_OF(adam, false, io, dtype, isa)                                                          \
    ADAM8_OF(ademamix, true, io, dtype, isa)

#endif
