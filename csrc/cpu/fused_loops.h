// The loops of kernels_fused.h, written once in plain C. Each ISA folder's fused.c includes this
// file with its own compiler flags and HB_FUSED_ISA set; the compiler vectorises (division is IEEE
// in every ISA, and -ffp-contract=off forbids fused products), so that the results are the same
// bits everywhere.
#include "core/kernels_fused.h"
#include "cpu/simd.h"

#include <math.h>

#define FUSED_PASTE_(name, isa) hb_fused_##name##_##isa
#define FUSED_PASTE(name, isa)  FUSED_PASTE_(name, isa)
#define FUSED(name)             FUSED_PASTE(name, HB_FUSED_ISA)

#define EACH(i) for (int64_t i = 0; i < n; i++)

// exp(x) with |err| <= 2 u exp(x), 0 below -104, infinity above 88.73.
//
// x = k ln2 + r with |r| <= ln2/2: k by adding 1.5 * 2^23, in whose units a float32 there is a
// whole number; ln2 in two parts, the first so short that its product with k is exact. exp(r) is
// its Taylor series to r^7, which lacks 0.09 u. 2^k is multiplied in two steps, because for both
// ends of the range it is no normal number. A NaN stays one: it reaches r.
static inline float exp_f32(float x)
{
    const float magic = 12582912.0f;
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * 1.44269504f + magic, k = shifted - magic;
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    float tail = 1.0f / 5040;
    tail = tail * r + 1.0f / 720;
    tail = tail * r + 1.0f / 120;
    tail = tail * r + 1.0f / 24;
    tail = tail * r + 1.0f / 6;
    tail = tail * r + 0.5f;
    const float power = (tail * (r * r) + r) + 1.0f;
    const int32_t exponent = (int32_t)(hb_f32_bits(shifted) - hb_f32_bits(magic));
    const int32_t half = exponent >> 1;
    return power * hb_f32_from_bits((uint32_t)(half + 127) << 23) *
           hb_f32_from_bits((uint32_t)(exponent - half + 127) << 23);
}

static void FUSED(squares)(const float *restrict x, int64_t n, double *restrict sum)
{
    int64_t i = 0;
    for (; i + HB_FUSED_LANES <= n; i += HB_FUSED_LANES)
        for (int l = 0; l < HB_FUSED_LANES; l++) sum[l] += (double)x[i + l] * (double)x[i + l];
    for (int l = 0; i + l < n; l++) sum[l] += (double)x[i + l] * (double)x[i + l];
}

static void FUSED(scale)(float *restrict x, int64_t n, float factor)
{
    EACH(i) x[i] *= factor;
}

static void FUSED(multiply)(float *restrict x, const float *restrict y, int64_t n)
{
    EACH(i) x[i] *= y[i];
}

static void FUSED(silu)(float *restrict x, int64_t n)
{
    EACH(i) x[i] = x[i] / (1.0f + exp_f32(-x[i]));
}

static void FUSED(gelu_tanh)(float *restrict x, int64_t n)
{
    EACH(i)
    {
        const float z = x[i] + 0.044715f * (x[i] * x[i] * x[i]);
        x[i] = x[i] / (1.0f + exp_f32(-1.59576912f * z));
    }
}

static float FUSED(exponentials)(float *restrict x, int64_t n, float scale)
{
    float largest = -INFINITY, lanes[HB_FUSED_LANES] = {0}, sum = 0;
    EACH(i)
    {
        x[i] *= scale;
        largest = x[i] > largest ? x[i] : largest;
    }
    EACH(i) x[i] = exp_f32(x[i] - largest);
    int64_t i = 0;
    for (; i + HB_FUSED_LANES <= n; i += HB_FUSED_LANES)
        for (int l = 0; l < HB_FUSED_LANES; l++) lanes[l] += x[i + l];
    for (int l = 0; i + l < n; l++) lanes[l] += x[i + l];
    for (int l = 0; l < HB_FUSED_LANES; l++) sum += lanes[l];
    return sum;
}

static void FUSED(weigh)(const float *restrict p, const float *restrict v, int64_t rows,
                         int64_t cols, float *restrict y)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols; i++) y[i] += p[r] * v[r * cols + i];
}

void FUSED(table)(hb_kernels_fused *kernels)
{
    kernels->squares = FUSED(squares);
    kernels->scale = FUSED(scale);
    kernels->multiply = FUSED(multiply);
    kernels->activate[HB_SILU] = FUSED(silu);
    kernels->activate[HB_GELU_TANH] = FUSED(gelu_tanh);
    kernels->exponentials = FUSED(exponentials);
    kernels->weigh = FUSED(weigh);
}
