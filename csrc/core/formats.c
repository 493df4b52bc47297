#include "core/formats.h"

#include <math.h>

// The float just below a negative normal `t`, or below zero, as a constant expression. With
// t = m * 2^e, 1 <= m < 2, the factor adds 0.625 m units in the last place, which rounds to one.
#define HB_BELOW(t)  ((t) == 0.0f ? -0x1p-149f : (float)((double)(t) * (1.0 + 0x1.4p-24)))
#define HB_LIST(...) {__VA_ARGS__}

static const hb_codebook4 codebooks[HB_CODEBOOK_COUNT] = {
#define HB_CODEBOOK(id, label, values, ranks, thresholds, nan)                                     \
    [id] = {.name = label,                                                                         \
            .value = values,                                                                       \
            .threshold = thresholds,                                                               \
            .threshold[15] = __builtin_inff(),                                                     \
            .code_of_rank = ranks,                                                                 \
            .nan_code = nan},
#include "core/formats.def"
#undef HB_CODEBOOK
};

const hb_codebook4 *hb_codebook4_get(hb_format4 format)
{
    return &codebooks[format];
}

int hb_format4_from_name(const char *name)
{
    for (int i = 0; i < HB_CODEBOOK_COUNT; i++)
        if (strcmp(name, codebooks[i].name) == 0) return i;
    return -1;
}

void hb_codebook_round(const float *value, int limit, hb_codebook_int *rounded)
{
    double largest = 0.0, least_error = INFINITY;
    for (int i = 0; i < 16; i++) { // fmax() here breaks gcc 12 for AArch64
        const double magnitude = fabs((double)value[i]);
        if (magnitude > largest) largest = magnitude;
    }
    *rounded = (hb_codebook_int){.step = 1.0f};
    if (largest == 0.0) return;
    for (int top = limit; top > limit - 64; top--) {
        const double step = largest / top;
        double error = 0.0;
        for (int i = 0; i < 16; i++) {
            const double off = (double)value[i] - rint((double)value[i] / step) * step;
            error += off * off;
        }
        if (error >= least_error) continue;
        least_error = error;
        rounded->step = (float)step;
        for (int i = 0; i < 16; i++) rounded->code[i] = (int16_t)rint((double)value[i] / step);
    }
}
