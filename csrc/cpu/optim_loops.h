// The loops of kernels_optim.h, written once in plain C. Each ISA folder's optim.c includes this
// file with its own compiler flags and HB_OPTIM_ISA set; the compiler vectorises (float division
// and square root are IEEE in every ISA, and -ffp-contract=off forbids fused products), so that the
// results are the same bits everywhere.
#include "core/kernels_optim.h"
#include "core/sums.h"
#include "cpu/simd.h"

#include <math.h>

#define OPTIM_PASTE_(name, isa) hb_optim_##name##_##isa
#define OPTIM_PASTE(name, isa)  OPTIM_PASTE_(name, isa)
#define OPTIM(name)             OPTIM_PASTE(name, HB_OPTIM_ISA)

#define EACH(i)       for (int64_t i = 0; i < n; i++)
// The same by rows of lanes: element i = row + l goes to sum l, and the inner loop vectorises.
#define EACH_ROW(row) for (int64_t row = 0; row < n; row += HB_SUM_LANES)
#define EACH_LANE(row, l)                                                                          \
    for (int64_t l = 0, end = n - row < HB_SUM_LANES ? n - row : HB_SUM_LANES; l < end; l++)

static void OPTIM(adam_f32)(float *restrict p, const float *restrict g, float *restrict m,
                            float *restrict slow, float *restrict v, int64_t n,
                            const hb_optim_scalars *scalars)
{
    (void)slow;
    const hb_optim_scalars s = *scalars;
    const float size = s.step_size * s.scale;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i];
        m[i] = s.beta1 * m[i] + s.beta1_rest * gradient;
        v[i] = s.beta2 * v[i] + s.beta2_rest * (gradient * gradient);
        p[i] = s.keep * p[i] - size * (m[i] / (sqrtf(v[i]) * s.inv_corr2 + s.eps));
    }
}

static void OPTIM(adam_norm_f32)(const float *restrict p, const float *restrict g,
                                 const float *restrict m, const float *restrict v, int64_t n,
                                 const hb_optim_scalars *scalars, hb_optim_squares *squares)
{
    const hb_optim_scalars s = *scalars;
    double updates[HB_SUM_LANES] = {0}, parameters[HB_SUM_LANES] = {0};
    EACH_ROW(row)
    EACH_LANE(row, l)
    {
        float gradient = s.gnorm_scale * g[row + l];
        float first = s.beta1 * m[row + l] + s.beta1_rest * gradient;
        float second = s.beta2 * v[row + l] + s.beta2_rest * (gradient * gradient);
        float update = (first * s.inv_corr1) / (sqrtf(second) * s.inv_corr2 + s.eps);
        updates[l] += (double)update * (double)update;
        parameters[l] += (double)p[row + l] * (double)p[row + l];
    }
    *squares = (hb_optim_squares){.update = hb_fold(updates, HB_SUM_LANES),
                                  .parameter = hb_fold(parameters, HB_SUM_LANES)};
}

static void OPTIM(ademamix_f32)(float *restrict p, const float *restrict g, float *restrict m,
                                float *restrict slow, float *restrict v, int64_t n,
                                const hb_optim_scalars *scalars)
{
    const hb_optim_scalars s = *scalars;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i];
        m[i] = s.beta1 * m[i] + s.beta1_rest * gradient;
        slow[i] = s.beta3 * slow[i] + s.beta3_rest * gradient;
        v[i] = s.beta2 * v[i] + s.beta2_rest * (gradient * gradient);
        float mixed = m[i] * s.inv_corr1 + s.alpha * slow[i];
        p[i] = s.keep * p[i] - s.lr * (mixed / (sqrtf(v[i]) * s.inv_corr2 + s.eps));
    }
}

static void OPTIM(momentum_f32)(float *restrict p, const float *restrict g, float *restrict m,
                                float *restrict slow, float *restrict v, int64_t n,
                                const hb_optim_scalars *scalars)
{
    (void)slow, (void)v;
    const hb_optim_scalars s = *scalars;
    const float size = s.lr * s.scale;
    const float carried = s.first ? 0.0f : s.beta1;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i] + s.coupled_decay * p[i];
        m[i] = carried * m[i] + gradient;
        p[i] -= size * m[i];
    }
}

static void OPTIM(momentum_norm_f32)(const float *restrict p, const float *restrict g,
                                     const float *restrict m, const float *restrict v, int64_t n,
                                     const hb_optim_scalars *scalars, hb_optim_squares *squares)
{
    (void)v;
    const hb_optim_scalars s = *scalars;
    const float carried = s.first ? 0.0f : s.beta1;
    double updates[HB_SUM_LANES] = {0}, parameters[HB_SUM_LANES] = {0};
    EACH_ROW(row)
    EACH_LANE(row, l)
    {
        float update =
            carried * m[row + l] + (s.gnorm_scale * g[row + l] + s.coupled_decay * p[row + l]);
        updates[l] += (double)update * (double)update;
        parameters[l] += (double)p[row + l] * (double)p[row + l];
    }
    *squares = (hb_optim_squares){.update = hb_fold(updates, HB_SUM_LANES),
                                  .parameter = hb_fold(parameters, HB_SUM_LANES)};
}

// 1 or -1; zeros and NaN stay. By bits, so that the loop vectorises without masks.
static inline float OPTIM(sign)(float x)
{
    const uint32_t bits = hb_f32_bits(x), magnitude = bits & 0x7fffffffu;
    const uint32_t one = magnitude == 0u ? bits : (bits & 0x80000000u) | 0x3f800000u;
    return hb_f32_from_bits(magnitude > 0x7f800000u ? bits : one);
}

static void OPTIM(lion_f32)(float *restrict p, const float *restrict g, float *restrict m,
                            float *restrict slow, float *restrict v, int64_t n,
                            const hb_optim_scalars *scalars)
{
    (void)slow, (void)v;
    const hb_optim_scalars s = *scalars;
    const float size = s.lr * s.scale;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i];
        float mixed = s.beta1 * m[i] + s.beta1_rest * gradient;
        p[i] = s.keep * p[i] - size * OPTIM(sign)(mixed);
        m[i] = s.beta2 * m[i] + s.beta2_rest * gradient;
    }
}

static void OPTIM(rmsprop_f32)(float *restrict p, const float *restrict g, float *restrict m,
                               float *restrict slow, float *restrict v, int64_t n,
                               const hb_optim_scalars *scalars)
{
    (void)slow, (void)v;
    const hb_optim_scalars s = *scalars;
    const float size = s.lr * s.scale;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i] + s.coupled_decay * p[i];
        m[i] = s.beta1 * m[i] + s.beta1_rest * (gradient * gradient);
        p[i] -= size * (gradient / (sqrtf(m[i]) + s.eps));
    }
}

static void OPTIM(adagrad_f32)(float *restrict p, const float *restrict g, float *restrict m,
                               float *restrict slow, float *restrict v, int64_t n,
                               const hb_optim_scalars *scalars)
{
    (void)slow, (void)v;
    const hb_optim_scalars s = *scalars;
    EACH(i)
    {
        float gradient = s.gnorm_scale * g[i] + s.coupled_decay * p[i];
        m[i] = m[i] + gradient * gradient;
        p[i] -= s.lr * (gradient / (sqrtf(m[i]) + s.eps));
    }
}

static void OPTIM(keep_sign_f32)(const float *restrict x, int64_t n, int zero,
                                 uint8_t *restrict codes)
{
    EACH(i)
    {
        const int code = codes[i];
        const int up = (x[i] > 0.0f) & (code < zero);
        const int down = (x[i] < 0.0f) & (code >= zero);
        codes[i] = (uint8_t)(code + up - down);
    }
}

static void OPTIM(widen_f32)(const void *restrict x, int64_t n, float *restrict out)
{
    if (n > 0) memcpy(out, x, (size_t)n * sizeof *out);
}

static void OPTIM(narrow_f32)(const float *restrict x, int64_t n, void *restrict out)
{
    if (n > 0) memcpy(out, x, (size_t)n * sizeof *x);
}

static void OPTIM(widen_bf16)(const void *restrict x, int64_t n, float *restrict out)
{
    const uint16_t *half = x;
    EACH(i) out[i] = hb_f32_from_bf16(half[i]);
}

static void OPTIM(narrow_bf16)(const float *restrict x, int64_t n, void *restrict out)
{
    uint16_t *half = out;
    EACH(i)
    {
        // hb_bf16_from_f32 without its branch, so that the loop vectorises.
        uint32_t bits = hb_f32_bits(x[i]);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        uint32_t quiet = (bits >> 16) | 0x0040u;
        half[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
    }
}

static void OPTIM(widen_f16)(const void *restrict x, int64_t n, float *restrict out)
{
    const uint16_t *half = x;
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(half + i))));
#endif
    for (; i < n; i++) out[i] = hb_f32_from_f16(half[i]);
}

static void OPTIM(narrow_f16)(const float *restrict x, int64_t n, void *restrict out)
{
    uint16_t *half = out;
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((void *)(half + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) half[i] = hb_f16_from_f32(x[i]);
}

void OPTIM(table)(hb_kernels_optim *kernels)
{
    *kernels = (hb_kernels_optim){
        .step = {[HB_ADAM] = OPTIM(adam_f32),
                 [HB_ADEMAMIX] = OPTIM(ademamix_f32),
                 [HB_MOMENTUM] = OPTIM(momentum_f32),
                 [HB_LION] = OPTIM(lion_f32),
                 [HB_RMSPROP] = OPTIM(rmsprop_f32),
                 [HB_ADAGRAD] = OPTIM(adagrad_f32)},
        .norm = {[HB_ADAM] = OPTIM(adam_norm_f32), [HB_MOMENTUM] = OPTIM(momentum_norm_f32)},
        .keep_sign = OPTIM(keep_sign_f32),
        .widen = {OPTIM(widen_f32), OPTIM(widen_bf16), OPTIM(widen_f16)},
        .narrow = {OPTIM(narrow_f32), OPTIM(narrow_bf16), OPTIM(narrow_f16)},
    };
}
