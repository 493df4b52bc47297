// Names and tables of the formats; the numbers themselves are in formats.def.
#ifndef HB_CORE_FORMATS_H
#define HB_CORE_FORMATS_H

#include "core/dtype.h"
#include "core/integers.h"

typedef enum {
#define HB_CODEBOOK(id, name, values, ranks, thresholds, nan_code) id,
#include "core/formats.def"
#undef HB_CODEBOOK
    HB_CODEBOOK_COUNT
} hb_format4;

// A 16-entry codebook; see formats.def for the meaning of each field.
typedef struct {
    const char *name;
    float value[16];
    float threshold[16]; // [15] is +inf, so that 16 lanes can be compared at once
    uint8_t code_of_rank[16];
    uint8_t nan_code;
} hb_codebook4;

const hb_codebook4 *hb_codebook4_get(hb_format4 format);

// A codebook in integers: value[i] ~ code[i] * step, |code[i]| <= the limit it was rounded to.
typedef struct {
    int16_t code[16];
    float step;
} hb_codebook_int;

enum { HB_INT8_LIMIT = 127, HB_INT16_LIMIT = 16383 };

// Rounds 16 finite values to integers of at most `limit` (>= 64). The largest magnitude becomes one
// of the 64 largest integers: the one that leaves the smallest sum of squared errors (the larger
// one of two such). All zero: codes 0, step 1.
void hb_codebook_round(const float *value, int limit, hb_codebook_int *rounded);

// Returns the format, or -1 when the name is unknown.
int hb_format4_from_name(const char *name);

// How products with int8 weights take x: quantized row-wise (LLM.int8()), or as it is (ops.h).
typedef enum { HB_INT8_DYNAMIC = 0, HB_INT8_EXACT = 1 } hb_int8_mode;

// The block sizes that the bitsandbytes layout knows.
static inline bool hb_blocksize4_is_valid(int64_t blocksize)
{
    return blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

// What the elements of a block are multiplied by before they are encoded: 1 / scale. Zeros stay
// zero where the scale is 0, and an infinity stays one where the scale is infinite.
static inline float hb_inverse_scale(float scale)
{
    const float inverse = 1.0f / scale;
    return scale == 0.0f ? 0.0f : inverse == 0.0f ? 0x1p-149f : inverse;
}

#endif
