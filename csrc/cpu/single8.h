// A step of momentum, Lion, RMSprop or Adagrad on whole 8-bit blocks. How: states8.h.
//
// The parameters move while the state is averaged, because Lion needs the state from before. An
// element whose gradient is not finite is left out: p stays, the state becomes zero.
#ifndef HB_CPU_SINGLE8_H
#define HB_CPU_SINGLE8_H

#include "cpu/states8.h"

// The new state of LANES elements, zero where not `finite`; moves p there.
INLINE vector step_lanes_of(hb_optimizer optimizer, const step_lanes *s, vector raw,
                            lanes_mask finite, vector m, vector *p)
{
    vector gradient = V(mul_ps)(s->gnorm, raw);
    if (optimizer == HB_LION) {
        vector mixed = V(add_ps)(V(mul_ps)(s->beta1, m), V(mul_ps)(s->rest1, gradient));
        vector moved = V(sub_ps)(V(mul_ps)(s->keep, *p), V(mul_ps)(s->size, sign_of(mixed)));
        *p = where(finite, moved, *p);
        return only(finite, V(add_ps)(V(mul_ps)(s->beta2, m), V(mul_ps)(s->rest2, gradient)));
    }
    gradient = V(add_ps)(gradient, V(mul_ps)(s->decay, *p));
    vector update;
    if (optimizer == HB_MOMENTUM) {
        m = only(finite, V(add_ps)(V(mul_ps)(s->beta1, m), gradient));
        update = m;
    } else {
        vector square = V(mul_ps)(gradient, gradient);
        if (optimizer == HB_RMSPROP) {
            m = V(mul_ps)(s->beta1, m);
            square = V(mul_ps)(s->rest1, square);
        }
        m = only(finite, V(add_ps)(m, square));
        update = V(div_ps)(gradient, V(add_ps)(V(sqrt_ps)(m), s->eps));
    }
    *p = where(finite, V(sub_ps)(*p, V(mul_ps)(s->size, update)), *p);
    return m;
}

// Steps a block, number `k` of the group. Returns its new scale.
INLINE float step_block(hb_optimizer optimizer, void *p, const void *g, int64_t block,
                        const hb_states8 *states, const decoder *decoder1, const step_lanes *s,
                        hb_dtype io, new_state *to, int k)
{
    const uint8_t *codes = states->codes1 + block * BLOCK;
    const vector scale = V(set1_ps)(states->absmax1[block]);
    integers max = no_bits();
    for (int i = 0; i < BLOCK; i += STEP) {
        vector state[4];
        decode(decoder1, codes + i, state);
        for (int l = 0; l < 4; l++) {
            const int64_t at = block * BLOCK + i + LANES * l;
            const vector raw = load_lanes(g, at, io);
            const lanes_mask finite = is_finite(raw);
            vector parameter = load_lanes(p, at, io);
            const vector m =
                step_lanes_of(optimizer, s, raw, finite, V(mul_ps)(state[l], scale), &parameter);
            store_lanes(p, at, parameter, io);
            max = keep_state(to, k * BLOCK + i + LANES * l, m, max);
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
    const vector inverse_lanes = V(set1_ps)(inverse);
    for (int i = 0; i < BLOCK; i += STEP) {
        const int64_t ahead = (block + GROUP) * BLOCK + i;
        prefetch_elements(p, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(g, ahead, (int64_t)hb_dtype_bytes(io));
        prefetch_elements(states->codes1, ahead, 1);
        const float *values = from->value + k * BLOCK + i;
        integers t[4];
        for (int l = 0; l < 4; l++)
            t[l] = climb_state(ladder1, V(load_ps)(values + LANES * l), inverse_lanes);
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
    const ladder ladder1 = load_ladder(states->search1, true);
    const step_lanes s = broadcast_scalars(optimizer, scalars);
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

#endif
