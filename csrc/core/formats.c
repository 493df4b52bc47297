#include "core/formats.h"

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
