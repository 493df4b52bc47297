// What lies between the products: every ISA gives the reference's bits, and the reference is right
// to what kernels_fused.h promises, measured in float64.
#include "check.h"

#include <math.h>
#include <string.h>

static const double U = 0x1p-24;
static const int64_t sizes[] = {0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1000};
enum { N_SIZES = sizeof sizes / sizeof *sizes };
static const char *const activations[HB_ACTIVATION_COUNT] = {"silu", "gelu_tanh"};

// A NaN is a NaN: which payload survives is not fixed.
static void same_nan(float *got, const float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (want[i] != want[i] && got[i] != got[i]) got[i] = want[i];
}

static void check_bits(check *c, int64_t n, bool wild)
{
    const size_t bytes = (size_t)n * sizeof(float);
    float *x = check_buffer(c, bytes, CHECK_END), *y = check_buffer(c, bytes, CHECK_END);
    float *got = check_buffer(c, bytes, CHECK_END), *want = check_buffer(c, bytes, CHECK_END);
    if (wild) {
        check_fill_wild(c, x, n, true);
        check_fill_wild(c, y, n, true);
    } else {
        check_fill_normal(c, x, n, 4.0f);
        check_fill_normal(c, y, n, 1.0f);
    }
    for (int what = 0; what < 2 + HB_ACTIVATION_COUNT; what++) {
        if (n > 0) memcpy(got, x, bytes), memcpy(want, x, bytes);
        const hb_kernels_fused *mine = &c->kernels->fused, *other = &c->reference->fused;
        if (what == 0)
            mine->scale(got, n, 0.3f), other->scale(want, n, 0.3f);
        else if (what == 1)
            mine->multiply(got, y, n), other->multiply(want, y, n);
        else
            mine->activate[what - 2](got, n), other->activate[what - 2](want, n);
        same_nan(got, want, n);
        check_equal(c, got, want, bytes, "%d of %d elements, wild %d", what, (int)n, wild);
    }
    const hb_kernels_fused *tables[2] = {&c->kernels->fused, &c->reference->fused};
    float *results[2] = {got, want}, totals[2];
    for (int i = 0; i < 2; i++) {
        if (n > 0) memcpy(results[i], x, bytes);
        totals[i] = tables[i]->exponentials(results[i], n, 0.5f);
    }
    same_nan(got, want, n);
    same_nan(&totals[0], &totals[1], 1);
    check_equal(c, got, want, bytes, "exponentials of %d, wild %d", (int)n, wild);
    check_equal(c, &totals[0], &totals[1], sizeof totals[0], "their sum");
    for (int64_t rows = 0; rows < 4; rows++) {
        for (int i = 0; i < 2; i++) {
            if (n > 0) memcpy(results[i], y, bytes);
            tables[i]->weigh(x, y, n > 0 ? rows : 0, rows > 0 ? n / rows : 0, results[i]);
        }
        same_nan(got, want, n);
        check_equal(c, got, want, bytes, "%d weighed rows of %d", (int)rows, (int)n);
    }
    double sums[2][HB_FUSED_LANES] = {{1.5}, {1.5}};
    for (int i = 0; i < 2; i++) // twice: sums go on where they were
        c->kernels->fused.squares(x, n, sums[0]), c->reference->fused.squares(x, n, sums[1]);
    for (int l = 0; l < HB_FUSED_LANES; l++)
        if (isnan(sums[0][l]) && isnan(sums[1][l])) sums[0][l] = sums[1][l] = 0;
    check_equal(c, sums[0], sums[1], sizeof sums[0], "squares of %d, wild %d", (int)n, wild);
    check_release(c);
}

CHECK_GROUP(fused_bits)
{
    if (!CHECK_NEW(c, fused.scale)) return;
    if (!c->bench)
        for (int i = 0; i < N_SIZES; i++)
            for (int wild = 0; wild < 2; wild++) check_bits(c, sizes[i], wild);
    enum { N = 1024 };
    float *x = check_buffer(c, N * sizeof *x, CHECK_BEGIN);
    double sums[HB_FUSED_LANES] = {0};
    check_fill_normal(c, x, N, 1.0f);
    CHECK_BENCH(c, a, "fused squares f32, L1", N * 4.0, 0) c->kernels->fused.squares(x, N, sums);
    CHECK_BENCH(c, b, "fused silu f32, L1", N * 4.0, 0) c->kernels->fused.activate[HB_SILU](x, N);
}

static double exactly(hb_activation f, double x)
{
    const double z = f == HB_SILU ? x / 2 : sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x);
    return x / (1 + exp(-2 * z));
}

// Every bfloat16, and as many float32 between them.
CHECK_GROUP(fused_accuracy)
{
    enum { N = 1 << 10 };
    if (!CHECK_NEW(c, fused.scale) || c->previous->fused.scale != NULL) return; // bits: above
    float x[N], got[N];
    for (int f = 0; f < HB_ACTIVATION_COUNT; f++)
        for (int between = 0; between < 2; between++)
            for (uint32_t high = 0; high < 1 << 16; high += N) {
                for (uint32_t i = 0; i < N; i++) {
                    const uint32_t low = between ? (uint32_t)check_random_below(c, 1 << 16) : 0;
                    x[i] = got[i] = hb_f32_from_bits((high + i) << 16 | low);
                }
                c->kernels->fused.activate[f](got, N);
                for (int i = 0; i < N; i++) {
                    if (!isfinite(x[i])) {
                        const bool right = x[i] > 0 ? got[i] == x[i] : isnan(got[i]);
                        CHECK(c, right, "%s(%g) = %g", activations[f], (double)x[i],
                              (double)got[i]);
                        continue;
                    }
                    const double want = exactly((hb_activation)f, x[i]);
                    const double unit = f == HB_SILU ? 4 * U * fabs(want) : 8 * U * fabs(x[i]);
                    const double least = 0x1p-126 * fmax(fabs(x[i]), 0x1p-23);
                    CHECK(c, fabs((double)got[i] - want) <= unit + least, "%s(%a) = %a, not %a",
                          activations[f], (double)x[i], (double)got[i], want);
                }
            }
}
