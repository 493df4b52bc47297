// Rulers: that they read every word once and make every product, since a loop that the compiler
// shortened would measure too much.
#include "check.h"

#include <math.h>

CHECK_GROUP(ruler_read)
{
    if (!CHECK_NEW(c, ruler.read)) return;
    enum { LEAST = 64 * HB_RULER_LINES };
    for (int64_t bytes = 0; bytes <= 9 * LEAST; bytes += LEAST) {
        uint8_t *data = check_buffer(c, (size_t)bytes, CHECK_END);
        check_fill_bytes(c, data, (size_t)bytes);
        uint64_t want = 0;
        for (int64_t i = 0; i < bytes; i += 8) {
            uint64_t word;
            memcpy(&word, data + i, 8);
            want += word;
        }
        const uint64_t got = c->kernels->ruler.read(data, bytes);
        check_equal(c, &got, &want, 8, "sum of %lld bytes", (long long)bytes);
        check_release(c);
    }
}

static const int64_t round_counts[] = {0, 1, 2, 100, 1000};

static void check_ruler(check *c, const hb_ruler *ruler, double (*chain)(double, int64_t),
                        const char *kind)
{
    CHECK(c, ruler->operations % (2 * HB_RULER_CHAINS) == 0 && ruler->operations > 0,
          "%s: %lld operations", kind, (long long)ruler->operations);
    for (int i = 0; i < 5; i++) {
        double want = 0;
        for (int k = 0; k < HB_RULER_CHAINS; k++) want += chain(k, round_counts[i]);
        const double got = (double)ruler->run(round_counts[i]);
        // Sums of integers and halves are exact; a float32 chain adds up to 2 u |x| a round, |x| <=
        // 11, but forgets a thousandth of its error in each.
        const double most = 0x1p-24 * (2 * 11 * HB_RULER_CHAINS) * (double)round_counts[i];
        CHECK(c, chain(1, 1) == 1 ? fabs(got - want) <= most : got == want,
              "%s, %lld rounds: %.9g, expected %.9g", kind, (long long)round_counts[i], got, want);
    }
}

static double chain_f32(double x, int64_t rounds)
{
    // x - 1 shrinks by the factor; float32's 0.999 and 0.001 differ from these by less than u.
    return 1 + (x - 1) * pow(0.999, (double)rounds);
}

static double chain_bf16(double x, int64_t rounds)
{
    return x + 0.5 * (double)rounds;
}

static double chain_int8(double x, int64_t rounds)
{
    return x + 36.0 * (double)rounds;
}

CHECK_GROUP(ruler_multiply)
{
    if (CHECK_NEW(c, ruler.f32.run)) check_ruler(c, &c->kernels->ruler.f32, chain_f32, "float32");
    if (CHECK_NEW(c, ruler.bf16.run))
        check_ruler(c, &c->kernels->ruler.bf16, chain_bf16, "bfloat16");
    if (CHECK_NEW(c, ruler.int8.run)) check_ruler(c, &c->kernels->ruler.int8, chain_int8, "int8");
}
