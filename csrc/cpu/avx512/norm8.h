// The norms of LAMB and LARS with 8-bit states, whole blocks with AVX-512. Formula:
// hb_optim_norm_fn; the order of the sums: core/sums.h, a block being a row of lanes. How a block
// is decoded: states8.h.
#include "cpu/avx512/states8.h"

#include "core/sums.h"

// Squares of float32 are exact in float64, so that a fused sum is rounded as the reference's.
INLINE void add_squares(__m512 value, double *sums)
{
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
    _mm512_store_pd(sums, _mm512_fmadd_pd(low, low, _mm512_load_pd(sums)));
    _mm512_store_pd(sums + 8, _mm512_fmadd_pd(high, high, _mm512_load_pd(sums + 8)));
}

// Adds the squares of a block. optimizer: HB_ADAM or HB_MOMENTUM.
INLINE void norm_block(hb_optimizer optimizer, const void *p, const void *g, int64_t block,
                       const hb_states8 *states, const decoder *decoder1, const decoder *decoder2,
                       const step_f32x16 *s, hb_dtype io, double *updates, double *parameters)
{
    const bool two = optimizer == HB_ADAM;
    const __m512 scale1 = _mm512_set1_ps(states->absmax1[block]);
    const __m512 scale2 = _mm512_set1_ps(two ? states->absmax2[block] : 0.0f);
    for (int i = 0; i < BLOCK; i += 64) {
        const int64_t first = block * BLOCK + i, ahead = first + 2 * GROUP * BLOCK;
        prefetch_elements(p, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        if (two) prefetch_elements(states->codes2, ahead, 1);
        __m512 state1[4], state2[4];
        decode(decoder1, states->codes1 + first, state1);
        if (two) decode(decoder2, states->codes2 + first, state2);
        for (int l = 0; l < 4; l++) {
            const __m512 parameter = load_f32x16(p, first + 16 * l, io);
            __m512 gradient = _mm512_mul_ps(s->gnorm, load_f32x16(g, first + 16 * l, io)), update;
            const __m512 m = _mm512_mul_ps(s->beta1, _mm512_mul_ps(state1[l], scale1));
            if (two) {
                __m512 v = _mm512_mul_ps(s->beta2, _mm512_mul_ps(state2[l], scale2));
                v = _mm512_add_ps(v, _mm512_mul_ps(s->rest2, _mm512_mul_ps(gradient, gradient)));
                update = _mm512_add_ps(m, _mm512_mul_ps(s->rest1, gradient));
                update = _mm512_mul_ps(update, s->inv_corr1);
                v = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), s->inv_corr2), s->eps);
                update = _mm512_div_ps(update, v);
            } else {
                gradient = _mm512_add_ps(gradient, _mm512_mul_ps(s->decay, parameter));
                update = _mm512_add_ps(m, gradient);
            }
            add_squares(update, updates + i + 16 * l);
            add_squares(parameter, parameters + i + 16 * l);
        }
    }
}

INLINE void norm8(hb_optimizer optimizer, const void *p, const void *g, int64_t blocks,
                  const hb_states8 *states, const hb_optim_scalars *scalars, hb_dtype io,
                  hb_optim_squares *squares)
{
    enum { PIECE_BLOCKS = HB_OPTIM_PIECE / BLOCK };
    _Static_assert((int)BLOCK == (int)HB_SUM_LANES, "a block is a row of lanes");
    const decoder decoder1 = make_decoder(states->map1);
    const decoder decoder2 = make_decoder(optimizer == HB_ADAM ? states->map2 : states->map1);
    const step_f32x16 s = broadcast_scalars(optimizer, scalars);
    _Alignas(64) double updates[HB_SUM_LANES], parameters[HB_SUM_LANES];
    for (int64_t block = 0; block < blocks;) {
        const int64_t end = blocks - block < PIECE_BLOCKS ? blocks : block + PIECE_BLOCKS;
        memset(updates, 0, sizeof updates);
        memset(parameters, 0, sizeof parameters);
        for (; block < end; block++)
            norm_block(optimizer, p, g, block, states, &decoder1, &decoder2, &s, io, updates,
                       parameters);
        *squares++ = (hb_optim_squares){.update = hb_fold(updates, HB_SUM_LANES),
                                        .parameter = hb_fold(parameters, HB_SUM_LANES)};
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
