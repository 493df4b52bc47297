// What the tests of the codec kernels share: sizes, io dtypes, data with every kind of trouble.
#ifndef HB_TESTS_CODEC_H
#define HB_TESTS_CODEC_H

#include "check.h"

#include <math.h>
#include <stdlib.h>

static const int64_t codec_sizes[] = {0,   1,   2,    3,    7,    8,    9,    15,   16,  17,  31,
                                      32,  33,  47,   63,   64,   65,   95,   97,   127, 128, 129,
                                      255, 257, 1000, 1023, 1025, 4095, 4096, 4097, 8229};
enum { CODEC_SIZES = sizeof codec_sizes / sizeof *codec_sizes };

// How many of the sizes a run can afford.
static inline int codec_size_count(const check *c)
{
    return c->emulated ? 22 : CODEC_SIZES;
}

// n elements of `io` at the end (or the beginning) of a page, and the same values as float32.
typedef struct {
    void *data;
    float *values;
} codec_input;

static inline codec_input codec_make_input(check *c, int64_t n, hb_dtype io, bool nonfinite,
                                           check_side side)
{
    codec_input input;
    input.values = check_buffer(c, (size_t)n * 4, CHECK_END);
    input.data = check_buffer(c, (size_t)n * hb_dtype_bytes(io), side);
    if (check_random_below(c, 2))
        check_fill_wild(c, input.values, n, nonfinite);
    else
        check_fill_normal(c, input.values, n, 0.02f);
    // Runs of zeros make blocks of zeros, of both signs.
    if (n > 4 && check_random_below(c, 3) == 0) {
        int64_t begin = check_random_below(c, n);
        for (int64_t i = begin; i < n && i < begin + 100; i++)
            input.values[i] = i % 3 ? 0.0f : -0.0f;
    }
    check_convert(input.values, input.data, n, io);
    return input;
}

// What v = x * ... is multiplied by: zeros stay zero, infinities stay infinite (docs/numerics.md).
static inline float codec_inverse(float scale)
{
    if (scale == 0.0f) return 0.0f;
    return isinf(scale) ? 1.40129846e-45f : 1.0f / scale;
}

static inline float codec_absmax(const float *x, int64_t n)
{
    float largest = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i])) return hb_f32_from_bits(HB_NAN_BITS);
        if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
    }
    return largest;
}

static inline void codec_store(void *out, int64_t i, hb_dtype io, float value)
{
    // NaN results may differ in sign and payload between processors: compare them as one.
    hb_store_f32(out, i, io, isnan(value) ? hb_f32_from_bits(HB_NAN_BITS) : value);
}

// Replaces every NaN by one pattern.
static inline void codec_settle_nan(void *out, int64_t n, hb_dtype io)
{
    for (int64_t i = 0; i < n; i++) codec_store(out, i, io, hb_load_f32(out, i, io));
}

// The float32 whose bits are `bits`, moved by `ulp` units in the last place along the number line.
static inline float codec_neighbour(float value, int ulp)
{
    for (; ulp > 0; ulp--) value = nextafterf(value, INFINITY);
    for (; ulp < 0; ulp++) value = nextafterf(value, -INFINITY);
    return value;
}

// All 2^32 float32 in slices, or without HALFBYTE_TEST_EXHAUSTIVE a sample of every exponent.
typedef struct {
    uint64_t next, step;
} codec_all_floats;

static inline codec_all_floats codec_all_floats_begin(const check *c)
{
    bool all = getenv("HALFBYTE_TEST_EXHAUSTIVE") != NULL;
    return (codec_all_floats){0, all ? 1 : c->emulated ? 1048573 : 4099}; // primes
}

// Fills up to n values and returns how many.
static inline int64_t codec_all_floats_next(codec_all_floats *walk, float *values, int64_t n)
{
    int64_t i = 0;
    for (; i < n && walk->next < (uint64_t)1 << 32; i++, walk->next += walk->step)
        values[i] = hb_f32_from_bits((uint32_t)walk->next);
    return i;
}

// The encoders once more, not from formats.def: NF4 by the constants in bitsandbytes' compiled CUDA
// code (bits of float32), FP4 as sign and magnitude by the literals of its source. NaN has code 0.
static inline uint8_t codec4_plain(hb_format4 format, float v)
{
    static const uint32_t nf4_limit[15] = {0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76,
                                           0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff,
                                           0x3df64863, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9,
                                           0x3f006d03, 0x3f248daf, 0x3f5c89d9};
    if (isnan(v)) return 0;
    if (format == HB_NF4) {
        int code = 0;
        for (int t = 0; t < 15; t++) code += v > hb_f32_from_bits(nf4_limit[t]);
        return (uint8_t)code;
    }
    static const float limit[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                   0.4166667f,  0.583333f,  0.8333333f};
    static const uint8_t code_of[8] = {0, 1, 6, 7, 4, 5, 2, 3};
    int rank = 0;
    for (int t = 0; t < 7; t++) rank += fabsf(v) > limit[t];
    return code_of[rank] | (v < 0.0f ? 8 : 0);
}

static const uint8_t codec4_code_of_zero[HB_CODEBOOK_COUNT] = {7, 0};

static inline void codec4_plain_blocks(const float *x, int64_t n, hb_format4 format,
                                       int64_t blocksize, const float *absmax, uint8_t *packed)
{
    for (int64_t i = 0; i < n; i++) {
        float inverse = codec_inverse(absmax[i / blocksize]);
        uint8_t code = codec4_plain(format, x[i] * inverse);
        if (i % 2 == 0)
            packed[i / 2] = (uint8_t)(code << 4 | codec4_code_of_zero[format]);
        else
            packed[i / 2] = (uint8_t)((packed[i / 2] & 0xf0) | code);
    }
}

#endif
