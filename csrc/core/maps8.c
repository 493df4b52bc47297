// The 256-entry maps of the 8-bit format, and the thresholds that make encoding exact.
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

// The next float below `value`.
static float float_below(float value)
{
    uint32_t bits = hb_f32_bits(value);
    if ((bits & 0x7fffffffu) == 0) return -0x1p-149f;
    return hb_f32_from_bits(bits & 0x80000000u ? bits + 1 : bits - 1);
}

// a > magnitude_threshold(c) is the passage from code zero + c - 1 to zero + c.
static float magnitude_threshold(const hb_search8 *search, int zero, int c)
{
    return search->threshold[zero + c - 1];
}

// The same for the negative codes: a > it is the passage from code zero - c + 1 to zero - c. For
// v = -a: not v > t, a >= -t.
static float mirrored_threshold(const hb_search8 *search, int zero, int c)
{
    return float_below(-search->threshold[zero - c]);
}

// The line of range d, whose thresholds first + 1 .. end - 1 lie inside and first, end are borders.
static void fit_range(hb_ladder8 *ladder, const hb_search8 *search, int d, int first, int end)
{
    const double unit = HB_LADDER_UNIT;
    const double low = d > 0 ? (double)ladder->border[d - 1] : 0.0;
    ladder->slope[d] = 0.0f;
    ladder->offset[d] = (float)((first + 0.5) * unit);
    ladder->cap[d] = (int32_t)((end - 0.5) * unit);
    if (end - first < 2) return;
    const double from = magnitude_threshold(search, ladder->zero, first + 1);
    const double to = magnitude_threshold(search, ladder->zero, end - 1);
    // A single threshold leaves the slope open: half a code down to the border.
    const double slope = end - first > 2 ? (end - first - 2) / (to - from) : 0.5 / (from - low);
    ladder->slope[d] = (float)(slope * unit);
    ladder->offset[d] = (float)((first + 1) * unit - (double)ladder->slope[d] * from);
}

// Whether the line of range d is within `tolerance` of threshold c at t.
static bool line_meets(const hb_ladder8 *ladder, int d, float t, int c, double tolerance)
{
    double q = (double)ladder->slope[d] * (double)t + (double)ladder->offset[d];
    return q - c * (double)HB_LADDER_UNIT <= tolerance &&
           c * (double)HB_LADDER_UNIT - q <= tolerance;
}

// Sets the ladder and proves it for this map, or leaves fits = false.
//
// Why the code is exact then: slope * a + offset, rounded or not, is monotone in a, so that between
// two neighbouring thresholds, where it is within half a unit of q = c * UNIT and (c + 1) * UNIT,
// it stays within these plus half a unit and a rounding (2^-4 units: q < 2^20), and every q that
// could be on the wrong side is among those left to the search. Below the first threshold inside, a
// range starts above code `first`; above the last one, the cap holds.
static void fit_ladder(hb_search8 *search, const float *map)
{
    hb_ladder8 *ladder = &search->ladder;
    *ladder = (hb_ladder8){0};
    if (map[0] == 0.0f && map[1] > 0.0f)
        ladder->zero = 0;
    else if (map[127] == 0.0f && map[126] < 0.0f && map[128] > 0.0f)
        ladder->zero = 127;
    else
        return;
    ladder->is_signed = ladder->zero != 0;
    const int zero = ladder->zero, top = 255 - zero;
    // The first codes of the ranges: a decade each, the lowest together with zero, and the top.
    int first[9] = {0};
    for (int d = 1; d < 7; d++) first[d] = ladder->is_signed ? 1 << d : (2 << d) - 1;
    first[7] = top;
    first[8] = top + 1;
    for (int d = 0; d < 7; d++) ladder->border[d] = magnitude_threshold(search, zero, first[d + 1]);
    ladder->border[7] = HB_INFINITY;
    bool fits = ladder->border[6] < 1.0f;
    for (int d = 0; d < 8; d++) {
        const float low = d > 0 ? ladder->border[d - 1] : 0.0f;
        fit_range(ladder, search, d, first[d], first[d + 1]);
        fits = fits && low < ladder->border[d] && ladder->slope[d] < HB_INFINITY &&
               (double)ladder->slope[d] * (double)low + (double)ladder->offset[d] >=
                   first[d] * (double)HB_LADDER_UNIT;
        if (d < 7) fits = fits && hb_ladder8_guess(ladder->border[d]) == (unsigned)d;
        if (d > 0 && d < 7 && ladder->is_signed)
            fits = fits && mirrored_threshold(search, zero, first[d]) == low;
        for (int c = first[d] + 1; c < first[d + 1]; c++) {
            fits = fits && line_meets(ladder, d, magnitude_threshold(search, zero, c), c, 0.5);
            if (ladder->is_signed && c <= zero)
                fits = fits && line_meets(ladder, d, mirrored_threshold(search, zero, c), c, 0.5);
        }
    }
    ladder->fits = fits;
}

// The line of entry e, which begins above `low` with code `first` and has 2^r codes: through (t,
// 1 + k / 2^r) for its k-th threshold t, as well as may be.
static float decade_slope(const hb_search8 *search, float low, int first, int r)
{
    const double base = 8.0 / 9.0;
    double least = (double)HB_INFINITY, most = 0.0;
    for (int k = 1; k < 1 << r && first + k < 255 - search->ladder.zero; k++) {
        const double t = magnitude_threshold(search, search->ladder.zero, first + k);
        const double slope = (1.0 + (double)k / (1 << r) - base) / t;
        least = slope < least ? slope : least;
        most = slope > most ? slope : most;
    }
    if (most > 0.0) return (float)((least + most) / 2.0);
    return (float)((1.0 + 0.25 / (1 << r) - base) / (double)low);
}

// The offset for magnitudes from 2^(exponent - 127) to the next power of two, of which one border
// at most parts `place` and the one before; false when there are more. first: place below all.
static bool find_offset(const float border[8], int first, unsigned exponent, uint32_t *offset)
{
    const uint32_t start = exponent << 23, last = start | 0x7fffff;
    unsigned below = 0, inside = 0;
    for (int k = 0; k < 8; k++) {
        const uint32_t bits = hb_f32_bits(border[k]);
        below += bits < start;
        inside += bits >= start && bits < last;
    }
    const uint32_t place = (uint32_t)first - below;
    *offset = (place << 27) + (inside == 0 ? (1u << 26) + start : hb_f32_bits(border[below]));
    return inside <= 1;
}

// Whether w at a threshold is within 4 units in the last place of `want` plus those of
// HB_DECADE_BASE.
static bool decade_meets(float slope, float threshold, double want)
{
    const double w = (double)slope * (double)threshold + (double)HB_DECADE_BASE;
    return w - want <= 0x1p-23 * 12 && w - want >= 0x1p-23 * 4;
}

// Sets the decades and proves them for this map, which has a ladder, or leaves fits = false.
//
// Why the code is exact then: w is monotone in a. At threshold number k it is within 4 units in the
// last place (and a rounding) of 1 + k / 2^r plus the 8 of HB_DECADE_BASE; and t's low word, whose
// units are at least as large, is below 16 from -8 to at least +8 of them. So an a whose w lies on
// the wrong side of 1 + k / 2^r + 8 units is left to the search. Borders are compared exactly.
static void fit_decades(hb_search8 *search)
{
    const hb_ladder8 *ladder = &search->ladder;
    hb_decades8 *decades = &search->decades;
    *decades = (hb_decades8){0};
    if (!ladder->fits) return;
    const int zero = ladder->zero, first_place = ladder->is_signed ? 16 : 15;
    float border[8] = {magnitude_threshold(search, zero, 1)};
    memcpy(border + 1, ladder->border, 7 * sizeof *border);
    bool fits = HB_DECADE_FLOOR < border[0] && HB_DECADE_FLOOR >= 0x1p-31f &&
                (!ladder->is_signed || mirrored_threshold(search, zero, 1) == border[0]);
    for (unsigned x = 96; x < 128; x++)
        fits = find_offset(border, first_place, x, &decades->offset[x % 32]) && fits;
    for (int e = 0; e < 9; e++) {
        const int place = first_place - e, r = 15 - place;
        const int first = ladder->is_signed ? 1 << e >> 1 : (1 << e) - 1;
        float slope = 0.0f; // entry 0: signed any w; unsigned w in [1, 2)
        if (e > 0)
            slope = decade_slope(search, border[e - 1], first, r);
        else if (!ladder->is_signed)
            slope = 0.5f / border[0];
        decades->slope[place % 16] = slope * 0x1p31f;
        if (r < 0) continue;
        const double low = e > 0 ? (double)border[e - 1] : (double)HB_DECADE_FLOOR;
        fits = fits && (double)slope * low + (double)HB_DECADE_BASE >= 1.0;
        if (e == 0 || e == 8) // a single code, without a cap
            fits = fits && (double)slope * (e == 0 ? (double)border[0] : 1.0) <
                               1.0 + 0.875 / (1 << r) - (double)HB_DECADE_BASE;
        for (int k = 1; e < 8 && k < 1 << r; k++) {
            const double want = 1.0 + (double)k / (1 << r);
            fits = fits && decade_meets(slope, magnitude_threshold(search, zero, first + k), want);
            if (ladder->is_signed)
                fits =
                    fits && decade_meets(slope, mirrored_threshold(search, zero, first + k), want);
        }
    }
    decades->fits = fits;
}

void hb_search8_init(hb_search8 *search, const float *map)
{
    // Between entries i and i + 1 lies m, their midpoint in float32 arithmetic as bitsandbytes'
    // CUDA search computes it, and m itself goes to the even entry: from an even i it takes v > m
    // to pass, from an odd i v >= m, that is v > float_below(m). (Where the midpoint is no float32,
    // a v equal to the rounded one may be nearer to the other entry by half a unit: compatibility
    // wins.) Equal entries are passed by v > m alone, so that the first of them stands for its
    // value.
    float last = -HB_INFINITY;
    for (int i = 0; i < 255; i++) {
        float low = map[i], high = map[i + 1];
        float sum = low + high;
        float middle = sum - sum == 0.0f ? sum * 0.5f : low * 0.5f + high * 0.5f;
        if (i % 2 == 1 && low != high) middle = float_below(middle);
        // Entries closer than roundings must not disorder the thresholds.
        if (middle > last) last = middle;
        search->threshold[i] = last;
    }
    search->threshold[255] = HB_INFINITY;
    // Level l of the tree has 2^l nodes, 2^(8-l) codes apart.
    search->tree[0] = 0.0f;
    for (int level = 0; level < 8; level++)
        for (int k = 0; k < 1 << level; k++)
            search->tree[(1 << level) + k] = search->threshold[(2 * k + 1) * (128 >> level) - 1];
    fit_ladder(search, map);
    fit_decades(search);
}
