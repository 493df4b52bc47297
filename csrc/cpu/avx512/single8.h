// A step of momentum, Lion, RMSprop or Adagrad on whole 8-bit blocks with AVX-512. How: states8.h.
//
// The parameters move while the state is averaged, because Lion needs the state from before. An
// element whose gradient is not finite is masked: p stays, the state becomes zero.
#include "cpu/avx512/states8.h"

// The new state of sixteen elements, zero where not `finite`; moves p there.
INLINE __m512 step_sixteen(hb_optimizer optimizer, const step_f32x16 *s, __m512 raw,
                           __mmask16 finite, __m512 m, __m512 *p)
{
    __m512 gradient = _mm512_mul_ps(s->gnorm, raw);
    if (optimizer == HB_LION) {
        const __m512 signs = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
        __m512 mixed = _mm512_add_ps(_mm512_mul_ps(s->beta1, m), _mm512_mul_ps(s->rest1, gradient));
        // 0 and NaN stay what they are.
        __mmask16 nonzero = _mm512_cmp_ps_mask(mixed, _mm512_setzero_ps(), _CMP_NEQ_OQ);
        __m512 sign = _mm512_mask_or_ps(mixed, nonzero, _mm512_and_ps(mixed, signs), one);
        *p = _mm512_mask_sub_ps(*p, finite, _mm512_mul_ps(s->keep, *p),
                                _mm512_mul_ps(s->size, sign));
        return _mm512_maskz_add_ps(finite, _mm512_mul_ps(s->beta2, m),
                                   _mm512_mul_ps(s->rest2, gradient));
    }
    gradient = _mm512_add_ps(gradient, _mm512_mul_ps(s->decay, *p));
    __m512 update;
    if (optimizer == HB_MOMENTUM) {
        m = _mm512_maskz_add_ps(finite, _mm512_mul_ps(s->beta1, m), gradient);
        update = m;
    } else {
        __m512 square = _mm512_mul_ps(gradient, gradient);
        if (optimizer == HB_RMSPROP) {
            m = _mm512_mul_ps(s->beta1, m);
            square = _mm512_mul_ps(s->rest1, square);
        }
        m = _mm512_maskz_add_ps(finite, m, square);
        update = _mm512_div_ps(gradient, _mm512_add_ps(_mm512_sqrt_ps(m), s->eps));
    }
    *p = _mm512_mask_sub_ps(*p, finite, *p, _mm512_mul_ps(s->size, update));
    return m;
}

// Steps a block, number `k` of the group. Returns its new scale.
INLINE float step_block(hb_optimizer optimizer, void *p, const void *g, int64_t block,
                        const hb_states8 *states, const decoder *decoder1, const step_f32x16 *s,
                        hb_dtype io, new_state *to, int k)
{
    const uint8_t *codes = states->codes1 + block * BLOCK;
    const __m512 scale = _mm512_set1_ps(states->absmax1[block]);
    __m512i max = _mm512_setzero_si512();
    for (int i = 0; i < BLOCK; i += 64) {
        __m512 state[4];
        decode(decoder1, codes + i, state);
        for (int l = 0; l < 4; l++) {
            const int64_t at = block * BLOCK + i + 16 * l;
            const __m512 raw = load_f32x16(g, at, io);
            const __mmask16 finite =
                _mm512_cmp_ps_mask(magnitude_f32x16(raw), _mm512_set1_ps(HB_INFINITY), _CMP_LT_OQ);
            __m512 parameter = load_f32x16(p, at, io);
            const __m512 m =
                step_sixteen(optimizer, s, raw, finite, _mm512_mul_ps(state[l], scale), &parameter);
            store_f32x16(p, at, parameter, false, io);
            max = keep_state(to, k * BLOCK + i + 16 * l, m, max);
        }
    }
    return largest_of_magnitudes(max);
}

// Encodes the state of a block, number `k` of the group, and fetches what the next group needs.
INLINE void encode_state(const void *p, const void *g, int64_t block, const hb_states8 *states,
                         const ladder *ladder1, hb_dtype io, const new_state *from, int k)
{
    uint8_t *codes = states->codes1 + block * BLOCK;
    const float absmax = states->absmax1[block], inverse = hb_inverse_scale(absmax);
    const __m512 inverse_f32x16 = _mm512_set1_ps(inverse);
    for (int i = 0; i < BLOCK; i += 64) {
        const int64_t ahead = (block + GROUP) * BLOCK + i;
        prefetch_elements(p, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        const float *values = from->value + k * BLOCK + i;
        __m512i t[4];
        for (int l = 0; l < 4; l++)
            t[l] = climb_state(ladder1, _mm512_load_ps(values + 16 * l), inverse_f32x16);
        const unsigned near = store_signed_codes(ladder1, t, from, k * BLOCK + i, codes + i);
        if (__builtin_expect(near != 0, 0))
            search_lanes(values, inverse, states->search1, true, near, codes + i);
    }
    if (is_extreme(absmax, inverse))
        search_block(from->value + k * BLOCK, absmax, states->search1, true, codes);
}

INLINE void single8(hb_optimizer optimizer, void *p, const void *g, int64_t blocks,
                    const hb_states8 *states, const hb_optim_scalars *scalars, hb_dtype io)
{
    const decoder decoder1 = make_decoder(states->map1);
    const ladder ladder1 = load_ladder_of(states->search1, true);
    const step_f32x16 s = broadcast_scalars(optimizer, scalars);
    new_state new;
    for (int64_t first = 0; first < blocks; first += GROUP) {
        const int count = blocks - first < GROUP ? (int)(blocks - first) : GROUP;
        for (int k = 0; k < count; k++)
            states->absmax1[first + k] =
                step_block(optimizer, p, g, first + k, states, &decoder1, &s, io, &new, k);
        for (int k = 0; k < count; k++)
            encode_state(p, g, first + k, states, &ladder1, io, &new, k);
    }
}

#define SINGLE8_IO(optimizer, which, io, dtype, isa)                                               \
    void hb_dyn8_##optimizer##_##io##_##isa(void *p, const void *g, int64_t blocks,                \
                                            const hb_states8 *states,                              \
                                            const hb_optim_scalars *scalars)                       \
    {                                                                                              \
        single8(which, p, g, blocks, states, scalars, dtype);                                      \
    }
#define SINGLE8(io, dtype, isa)                                                                    \
    SINGLE8_IO(momentum, HB_MOMENTUM, io, dtype, isa)                                              \
    SINGLE8_IO(lion, HB_LION, io, dtype, isa)                                                      \
    SINGLE8_IO(rmsprop, HB_RMSPROP, io, dtype, isa)                                                \
    SINGLE8_IO(adagrad, HB_ADAGRAD, io, dtype, isa)
