// Kernels of the optimizers: one step on n float32 elements.
//
// p and the states are read and written in place, g is read. Nothing aliases. The scalars are
// prepared once per tensor (ops_optim.c) in float64 and rounded to float32. Every ISA runs the same
// source (cpu/optim_loops.h), each operation rounded to float32 without contraction, so that all
// give the same bits.
#ifndef HB_CORE_KERNELS_OPTIM_H
#define HB_CORE_KERNELS_OPTIM_H

#include "core/kernels_codec.h"

// g' = gnorm_scale * g + coupled_decay * p;  p' = keep * p  (keep = 1 - lr * weight_decay)
//
//   adam      m = b1 m + (1-b1) g', v = b2 v + (1-b2) g'^2
//             p = p' - scale * lr/corr1 * m / (sqrt(v)/corr2 + eps)
//   ademamix  m, v as above, slow = b3 slow + (1-b3) g'
//             p = p' - lr * (m/corr1 + alpha * slow) / (sqrt(v)/corr2 + eps)
//   momentum  m = b1 m + g' (m = g' in the first step); p = p - scale * lr * m
//   lion      p = p' - scale * lr * sign(b1 m + (1-b1) g'); m = b2 m + (1-b2) g'
//   rmsprop   m = b1 m + (1-b1) g'^2; p = p - scale * lr * g' / (sqrt(m) + eps)
//   adagrad   m = m + g'^2;           p = p - lr * g' / (sqrt(m) + eps)
//
// with corr1 = 1 - b1^t, corr2 = sqrt(1 - b2^t).
typedef struct {
    float gnorm_scale, coupled_decay, keep;
    float beta1, beta1_rest, beta2, beta2_rest, beta3, beta3_rest; // rest: 1 - beta
    float alpha, eps, lr;
    float step_size;            // lr / corr1
    float inv_corr1, inv_corr2; // 1 / corr1, 1 / corr2
    float scale;                // of the update, from max_unorm; 1 without
    bool first;                 // step 1
} hb_optim_scalars;

// m: first state; slow: AdEMAMix's slow momentum, else unused; v: second state or unused.
typedef void hb_optim_fn(float *p, const float *g, float *m, float *slow, float *v, int64_t n,
                         const hb_optim_scalars *s);
// Sums over the elements: of the square of the update that the step would make before lr, scale and
// weight decay (the norm that LAMB and LARS limit), and of p squared, in float64 and in the order
// of sums.h for a piece; states are not written.
typedef struct {
    double update, parameter;
} hb_optim_squares;
typedef void hb_optim_norm_fn(const float *p, const float *g, const float *m, const float *v,
                              int64_t n, const hb_optim_scalars *s, hb_optim_squares *squares);
// out[i] = x[i] widened / rounded once.
typedef void hb_widen_fn(const void *x, int64_t n, float *out);
typedef void hb_narrow_fn(const float *x, int64_t n, void *out);

// Codes of an ascending map whose values are negative below code `zero`: a code moves by one where
// the sign of its value is not that of x[i].
typedef void hb_keep_sign_fn(const float *x, int64_t n, int zero, uint8_t *codes);

// 8-bit states of whole blocks of 256 elements, with what it takes to decode and encode them. The
// maps have decades; that of map1 is signed, that of map2 is not. AdEMAMix's slow state is of
// map1; one state: only what ends in 1.
typedef struct {
    uint8_t *codes1, *slow_codes, *codes2;  // [blocks * 256]
    float *absmax1, *slow_absmax, *absmax2; // [blocks]
    const float *map1, *map2;               // [256]
    const hb_search8 *search1, *search2;
} hb_states8;

// A whole step in one pass: decode, step, encode, with the signs of map1's states kept. p and g
// have the dtype of the table slot. Where g is not finite p stays and the states become zero.
typedef void hb_step8_fn(void *p, const void *g, int64_t blocks, const hb_states8 *states,
                         const hb_optim_scalars *s);

// The norms of hb_optim_norm_fn, for each piece of sums.h; the last may have fewer blocks.
typedef void hb_norm8_fn(const void *p, const void *g, int64_t blocks, const hb_states8 *states,
                         const hb_optim_scalars *s, hb_optim_squares *squares);

typedef enum {
    HB_ADAM = 0,
    HB_ADEMAMIX,
    HB_MOMENTUM,
    HB_LION,
    HB_RMSPROP,
    HB_ADAGRAD,
    HB_OPTIMIZER_COUNT
} hb_optimizer;

typedef struct {
    hb_optim_fn *step[HB_OPTIMIZER_COUNT];
    hb_optim_norm_fn *norm[HB_OPTIMIZER_COUNT]; // NULL: the optimizer has no norm limit
    hb_keep_sign_fn *keep_sign;
    hb_widen_fn *widen[HB_IO_COUNT];
    hb_narrow_fn *narrow[HB_IO_COUNT];
    hb_step8_fn *step8[HB_OPTIMIZER_COUNT][HB_IO_COUNT]; // NULL: by the separate kernels
    hb_norm8_fn *norm8[HB_OPTIMIZER_COUNT][HB_IO_COUNT]; // likewise
} hb_kernels_optim;

// One per ISA folder, in optim.c.
void hb_optim_table_ref(hb_kernels_optim *kernels);
void hb_optim_table_avx2(hb_kernels_optim *kernels);
void hb_optim_table_avx512(hb_kernels_optim *kernels);
void hb_optim_table_neon(hb_kernels_optim *kernels);

#define HB_DECLARE_STEP8(optimizer, isa)                                                           \
    hb_step8_fn hb_dyn8_##optimizer##_f32_##isa, hb_dyn8_##optimizer##_bf16_##isa,                 \
        hb_dyn8_##optimizer##_f16_##isa;
#define HB_DECLARE_NORM8(optimizer, isa)                                                           \
    hb_norm8_fn hb_dyn8_##optimizer##_norm_f32_##isa, hb_dyn8_##optimizer##_norm_bf16_##isa,       \
        hb_dyn8_##optimizer##_norm_f16_##isa;
#define HB_DECLARE_OPTIM8(isa)                                                                     \
    HB_DECLARE_STEP8(adam, isa)                                                                    \
    HB_DECLARE_STEP8(ademamix, isa)                                                                \
    HB_DECLARE_STEP8(momentum, isa)                                                                \
    HB_DECLARE_STEP8(lion, isa)                                                                    \
    HB_DECLARE_STEP8(rmsprop, isa)                                                                 \
    HB_DECLARE_STEP8(adagrad, isa)                                                                 \
    HB_DECLARE_NORM8(adam, isa)                                                                    \
    HB_DECLARE_NORM8(momentum, isa)
HB_DECLARE_OPTIM8(avx2)
HB_DECLARE_OPTIM8(avx512)
HB_DECLARE_OPTIM8(avx512vbmi)

// All steps on 8-bit states of an ISA folder that has every one.
#define HB_SET_OPTIM8(table, isa)                                                                  \
    do {                                                                                           \
        HB_SET_IO(table, step8[HB_ADAM], dyn8_adam, isa);                                          \
        HB_SET_IO(table, step8[HB_ADEMAMIX], dyn8_ademamix, isa);                                  \
        HB_SET_IO(table, step8[HB_MOMENTUM], dyn8_momentum, isa);                                  \
        HB_SET_IO(table, step8[HB_LION], dyn8_lion, isa);                                          \
        HB_SET_IO(table, step8[HB_RMSPROP], dyn8_rmsprop, isa);                                    \
        HB_SET_IO(table, step8[HB_ADAGRAD], dyn8_adagrad, isa);                                    \
        HB_SET_IO(table, norm8[HB_ADAM], dyn8_adam_norm, isa);                                     \
        HB_SET_IO(table, norm8[HB_MOMENTUM], dyn8_momentum_norm, isa);                             \
    } while (0)

#endif
