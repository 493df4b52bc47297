// The norms of LAMB and LARS with 8-bit states, whole blocks. Formula:
// hb_optim_norm_fn; the order of the sums: core/sums.h, a block being a row of lanes. How a block
// is decoded: states8.h.
//
// The updates of a piece stay in the L1 cache until their squares are added up: a loop for
// decoding, which stores no sums, and one for sums, which are in registers.
#ifndef HB_CPU_NORM8_H
#define HB_CPU_NORM8_H

#include "cpu/states8.h"

#include "core/sums.h"

// Reads element i. What is only prefetched here and read in bursts later comes later: the
// prefetchers of the processor do not see a stream.
static inline void touch_element(const void *x, int64_t i, int64_t bytes)
{
    (void)*((const volatile uint8_t *)x + i * bytes);
}

// The updates of a block. optimizer: HB_ADAM or HB_MOMENTUM.
INLINE void update_block(hb_optimizer optimizer, const void *p, const void *g, int64_t block,
                         const hb_states8 *states, const decoder *decoder1, const decoder *decoder2,
                         const step_lanes *s, hb_dtype io, float updates[BLOCK])
{
    const bool two = optimizer == HB_ADAM;
    const vector scale1 = V(set1_ps)(states->absmax1[block]);
    const vector scale2 = V(set1_ps)(two ? states->absmax2[block] : 0.0f);
    for (int i = 0; i < BLOCK; i += STEP) {
        const int64_t first = block * BLOCK + i, ahead = first + 2 * GROUP * BLOCK;
        prefetch_elements(p, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        if (two) prefetch_elements(states->codes2, ahead, 1);
        vector state1[4], state2[4];
        decode(decoder1, states->codes1 + first, state1);
        if (two) decode(decoder2, states->codes2 + first, state2);
        for (int l = 0; l < 4; l++) {
            vector gradient = V(mul_ps)(s->gnorm, load_lanes(g, first + LANES * l, io)), update;
            const vector m = V(mul_ps)(s->beta1, V(mul_ps)(state1[l], scale1));
            if (two) {
                touch_element(p, first + LANES * l, (int64_t)hb_dtype_bytes(io));
                vector v = V(mul_ps)(s->beta2, V(mul_ps)(state2[l], scale2));
                v = V(add_ps)(v, V(mul_ps)(s->rest2, V(mul_ps)(gradient, gradient)));
                update = V(add_ps)(m, V(mul_ps)(s->rest1, gradient));
                update = V(mul_ps)(update, s->inv_corr1);
                v = V(add_ps)(V(mul_ps)(V(sqrt_ps)(v), s->inv_corr2), s->eps);
                update = V(div_ps)(update, v);
            } else {
                const vector parameter = load_lanes(p, first + LANES * l, io);
                gradient = V(add_ps)(gradient, V(mul_ps)(s->decay, parameter));
                update = V(add_ps)(m, gradient);
            }
            V(store_ps)(updates + i + LANES * l, update);
        }
    }
}

INLINE __m128 load_f32x4(const void *x, int64_t i, hb_dtype io)
{
    if (io == HB_F32) return _mm_loadu_ps((const float *)x + i);
    const __m128i half = _mm_loadl_epi64((const void *)((const uint16_t *)x + i));
    if (io == HB_F16) return _mm_cvtph_ps(half);
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}

// The sum of the squares of whole blocks from element `first` of x. Some lanes of all blocks at a
// time, so that their sums stay in registers. Squares of float32 are exact in float64, so that a
// fused sum is rounded as the reference's. 256 bits: a conversion to 512 is several operations on
// processors that take it in halves.
INLINE double squares_of(const void *x, int64_t first, int64_t blocks, hb_dtype io)
{
    enum { AT_ONCE = 8 /* vectors of sums */ };
    _Alignas(64) double lanes[HB_SUM_LANES];
    for (int i = 0; i < BLOCK; i += 4 * AT_ONCE) {
        __m256d sum[AT_ONCE];
        for (int l = 0; l < AT_ONCE; l++) sum[l] = _mm256_setzero_pd();
        for (int64_t k = 0; k < blocks; k++)
            for (int l = 0; l < AT_ONCE; l++) {
                const __m256d v = _mm256_cvtps_pd(load_f32x4(x, first + k * BLOCK + i + 4 * l, io));
                sum[l] = _mm256_fmadd_pd(v, v, sum[l]);
            }
        for (int l = 0; l < AT_ONCE; l++) _mm256_store_pd(lanes + i + 4 * l, sum[l]);
    }
    return hb_fold(lanes, HB_SUM_LANES);
}

INLINE void norm8(hb_optimizer optimizer, const void *p, const void *g, int64_t blocks,
                  const hb_states8 *states, const hb_optim_scalars *scalars, hb_dtype io,
                  hb_optim_squares *squares)
{
    enum { PIECE_BLOCKS = HB_OPTIM_PIECE / BLOCK };
    _Static_assert((int)BLOCK == (int)HB_SUM_LANES, "a block is a row of lanes");
    const decoder decoder1 = make_decoder(states->map1);
    const decoder decoder2 = optimizer == HB_ADAM ? make_decoder(states->map2) : decoder1;
    const step_lanes s = broadcast_scalars(optimizer, scalars);
    _Alignas(64) float updates[HB_OPTIM_PIECE];
    for (int64_t first = 0; first < blocks; first += PIECE_BLOCKS) {
        const int64_t count = blocks - first < PIECE_BLOCKS ? blocks - first : PIECE_BLOCKS;
        for (int64_t k = 0; k < count; k++)
            update_block(optimizer, p, g, first + k, states, &decoder1, &decoder2, &s, io,
                         updates + k * BLOCK);
        *squares++ = (hb_optim_squares){.update = squares_of(updates, 0, count, HB_F32),
                                        .parameter = squares_of(p, first * BLOCK, count, io)};
    }
}

#define NORM8_OF(optimizer, which, io, dtype, isa)                                                 \
    void hb_dyn8_##optimizer##_norm_##io##_##isa(                                                  \
        const void *p, const void *g, int64_t blocks, const hb_states8 *states,                    \
        const hb_optim_scalars *scalars, hb_optim_squares *squares)                                \
    {                                                                                              \
        norm8(which, p, g, blocks, states, scalars, dtype, squares);                               \
    }
#define NORM8(io, dtype, isa)                                                                      \
    NORM8_OF(adam, HB_ADAM, io, dtype, isa)                                                        \
    NORM8_OF(momentum, HB_MOMENTUM, io, dtype, isa)

#endif
