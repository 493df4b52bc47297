// The 256-entry maps of the 8-bit format.
//
// dynamic   7 decades 10^-6..10^0; decade i holds 2^i (unsigned 2^(i+1)) means of neighbouring
// points
//           of an even division of [0.1, 1], both signs, and 0 and 1. arXiv:1511.04561 and
//           2110.02861.
// linear    255 even steps from -1 to 1, and a second zero.
// fp8       every e4m3 / e5m2 bit pattern without infinities, divided by the largest.
// normal    the NF4 table with its zero 241 times (quantiles of N(0, 1), arXiv:2305.14314 appendix
// E).
//
// The arithmetic follows bitsandbytes.functional.create_*_map bit for bit: torch.linspace is
// start + i * step in the lower half and end - (n - 1 - i) * step in the upper, each fused.
#include "core/ops.h"

// Point i of n that divide [start, end] evenly, n > 1. The float64 product is exact, and so the sum
// is rounded to float32 as a fused multiply-add is (tests compare every point in use).
static float even_point(float start, float end, int n, int i)
{
    float step = (end - start) / (float)(n - 1);
    if (i < n / 2) return (float)((double)start + (double)i * (double)step);
    return (float)((double)end - (double)(n - 1 - i) * (double)step);
}

static void fill_dynamic(float *map, bool is_signed)
{
    static const float decade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    float *zero = map + (is_signed ? 127 : 0);
    float *next = zero;
    *next++ = 0.0f;
    for (int i = 0; i < 7; i++) {
        int points = (1 << (is_signed ? i : i + 1)) + 1;
        for (int p = 0; p + 1 < points; p++) {
            float sum = even_point(0.1f, 1.0f, points, p) + even_point(0.1f, 1.0f, points, p + 1);
            *next++ = decade[i] * (sum / 2.0f);
        }
    }
    *next = 1.0f;
    if (is_signed)
        for (int i = 1; i <= 127; i++) zero[-i] = -zero[i];
}

static void fill_linear(float *map)
{
    for (int i = 0; i < 255; i++) map[i < 127 ? i : i + 1] = even_point(-1.0f, 1.0f, 255, i);
    map[127] = 0.0f;
}

// Both zeros of the format are there: +0 at 127, -0 at 128, as a stable sort leaves them.
static void fill_fp8(float *map, int exponent_bits, int mantissa_bits)
{
    int bias = 1 << (exponent_bits - 1);
    int mantissas = 1 << mantissa_bits;
    float value[128]; // magnitudes, ascending; the exponent counts down in the stored pattern
    for (int i = 0; i < 128; i++) {
        int exponent = i / mantissas;
        float fraction = (float)(i % mantissas) / (float)mantissas;
        // The smallest exponent but one is as small as the subnormals'.
        float unit = 1.0f;
        int power = exponent == 0 ? -bias : bias + 1 - ((1 << exponent_bits) - exponent);
        for (; power > 0; power--) unit *= 2.0f;
        for (; power < 0; power++) unit *= 0.5f;
        value[i] = (exponent == 0 ? fraction : 1.0f + fraction) * unit;
    }
    for (int i = 0; i < 128; i++) {
        map[128 + i] = value[i] / value[127];
        map[127 - i] = -(value[i] / value[127]);
    }
    map[127] = 0.0f;
    map[128] = -0.0f;
}

static void fill_normal(float *map)
{
    const float *nf4 = hb_codebook4_get(HB_NF4)->value;
    for (int i = 0; i < 256; i++) map[i] = i < 7 ? nf4[i] : i < 248 ? 0.0f : nf4[i - 240];
}

void hb_map8_fill(hb_map8 which, float *map)
{
    switch (which) {
    case HB_MAP_DYNAMIC: fill_dynamic(map, true); break;
    case HB_MAP_DYNAMIC_UNSIGNED: fill_dynamic(map, false); break;
    case HB_MAP_LINEAR: fill_linear(map); break;
    case HB_MAP_FP8_E4M3: fill_fp8(map, 4, 3); break;
    case HB_MAP_FP8_E5M2: fill_fp8(map, 5, 2); break;
    case HB_MAP_NORMAL: fill_normal(map); break;
    case HB_MAP8_COUNT: break;
    }
}

int hb_map8_from_name(const char *name)
{
    static const char *const names[HB_MAP8_COUNT] = {"dynamic",  "dynamic_unsigned", "linear",
                                                     "fp8_e4m3", "fp8_e5m2",         "normal"};
    for (int i = 0; i < HB_MAP8_COUNT; i++)
        if (strcmp(name, names[i]) == 0) return i;
    return -1;
}
