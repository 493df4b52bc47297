// What encoders and decoders of the 8-bit format need of a map: thresholds, and, for maps like the
// dynamic ones, short ways to codes and back (kernels_codec.h), each proven here for the map at
// hand or refused.
#include "core/formats.h"
#include "core/kernels_codec.h"

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

// The first code of entry e of the decades; entry 0 is code `zero`.
static int first_code(bool is_signed, int e)
{
    return is_signed ? 1 << e >> 1 : (1 << e) - 1;
}

// The line of entry e, which begins above `low` and has 2^r codes: through (t, 1 + k / 2^r) for its
// k-th threshold t, as well as may be.
static float decade_slope(const hb_search8 *search, float low, int first, int r)
{
    const int zero = search->decades.zero;
    const double base = 8.0 / 9.0;
    double least = (double)HB_INFINITY, most = 0.0;
    for (int k = 1; k < 1 << r && first + k < 255 - zero; k++) {
        const double t = magnitude_threshold(search, zero, first + k);
        const double slope = (1.0 + (double)k / (1 << r) - base) / t;
        least = slope < least ? slope : least;
        most = slope > most ? slope : most;
    }
    if (most > 0.0) return (float)((least + most) / 2.0);
    return (float)((1.0 + 0.25 / (1 << r) - base) / (double)low);
}

// The offset for magnitudes with bits from `start` to `last`, of which one border at most parts
// `place` and the one before; false when there are more. first: place below all.
static bool find_offset(const float border[8], int first, uint32_t start, uint32_t last,
                        uint32_t *offset)
{
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

// Both tables of offsets.
static bool find_offsets(hb_decades8 *decades, const float border[8], int first_place)
{
    bool found = true;
    for (uint32_t x = 96; x < 128; x++)
        found = find_offset(border, first_place, x << 23, x << 23 | 0x7fffff,
                            &decades->offset[x % 32]) &&
                found;
    const uint32_t floor = hb_decade8_group(HB_DECADE_FLOOR);
    for (uint32_t group = floor; group < floor + 8; group++) {
        // The high halves of the bits from ceil(group / rate) on, in units of 2^16.
        const uint32_t start = ((group << 16) + HB_DECADE_RATE - 1) / HB_DECADE_RATE;
        const uint32_t end = (((group + 1) << 16) + HB_DECADE_RATE - 1) / HB_DECADE_RATE;
        found = find_offset(border, first_place - 1, start << 16, (end << 16) - 1,
                            &decades->offset8[group % 8]) &&
                found;
    }
    return found && hb_decade8_group(1.0f) < floor + 8;
}

// Whether w at a threshold is within 4 units in the last place of `want` plus those of
// HB_DECADE_BASE.
static bool decade_meets(float slope, float threshold, double want)
{
    const double w = (double)slope * (double)threshold + (double)HB_DECADE_BASE;
    return w - want <= 0x1p-23 * 12 && w - want >= 0x1p-23 * 4;
}

// Entry e, of codes `first` and on: its slope, and whether it finds them.
static bool fit_decade(hb_search8 *search, const float border[8], int e)
{
    hb_decades8 *decades = &search->decades;
    const int place = (decades->is_signed ? 16 : 15) - e, r = 15 - place;
    const int first = first_code(decades->is_signed, e);
    float slope = 0.0f; // entry 0: signed any w; unsigned w in [1, 2)
    if (e > 0)
        slope = decade_slope(search, border[e - 1], first, r);
    else if (!decades->is_signed)
        slope = 0.5f / border[0];
    decades->slope[place % 16] = slope * 0x1p31f;
    if (e > 0) decades->slope8[(place - 1) % 8] = slope * 0x1p30f;
    // Entry 0 has the slope of the last one in that table, with which w is below 1.
    if (e == 8 && !((double)slope * (double)border[0] + (double)HB_DECADE_BASE < 1.0)) return false;
    if (r < 0) return true;
    const double low = e > 0 ? (double)border[e - 1] : (double)HB_DECADE_FLOOR;
    bool fits = (double)slope * low + (double)HB_DECADE_BASE >= 1.0;
    if (e == 0 || e == 8) // a single code, without a cap
        fits = fits && (double)slope * (e == 0 ? (double)border[0] : 1.0) <
                           1.0 + 0.875 / (1 << r) - (double)HB_DECADE_BASE;
    for (int k = 1; e < 8 && k < 1 << r; k++) {
        const double want = 1.0 + (double)k / (1 << r);
        fits = fits &&
               decade_meets(slope, magnitude_threshold(search, decades->zero, first + k), want);
        if (decades->is_signed)
            fits = fits &&
                   decade_meets(slope, mirrored_threshold(search, decades->zero, first + k), want);
    }
    return fits;
}

// Sets the decades and proves them for this map, or leaves fits = false.
//
// Why the code is exact then: w is monotone in a. At threshold number k it is within 4 units in the
// last place (and a rounding) of 1 + k / 2^r plus the 8 of HB_DECADE_BASE; and t's low word, whose
// units are at least as large, is below 16 from -8 to at least +8 of them. So an a whose w lies on
// the wrong side of 1 + k / 2^r + 8 units is left to the search. Borders are compared exactly.
static void fit_decades(hb_search8 *search, const float *map)
{
    hb_decades8 *decades = &search->decades;
    *decades = (hb_decades8){0};
    if (map[0] == 0.0f && map[1] > 0.0f)
        decades->zero = 0;
    else if (map[127] == 0.0f && map[126] < 0.0f && map[128] > 0.0f)
        decades->zero = 127;
    else
        return;
    decades->is_signed = decades->zero != 0;
    float border[8]; // above border k begins entry k + 1
    bool fits = true;
    for (int k = 0; k < 8; k++) {
        const int first = first_code(decades->is_signed, k + 1);
        border[k] = magnitude_threshold(search, decades->zero, first);
        fits = fits && (k == 0 ? HB_DECADE_FLOOR : border[k - 1]) < border[k];
        if (decades->is_signed && k < 7) // there is no 128 on the other side
            fits = fits && mirrored_threshold(search, decades->zero, first) == border[k];
    }
    fits = fits && border[7] < 1.0f && HB_DECADE_FLOOR >= 0x1p-31f;
    if (!fits) return;
    fits = find_offsets(decades, border, decades->is_signed ? 16 : 15);
    for (int e = 0; e < 9; e++) fits = fit_decade(search, border, e) && fits;
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
    fit_decades(search, map);
}
