// Kernels that turn floats into codes and codes into floats, for every format.
//
// All work on contiguous memory aligned to its elements, touch no byte outside what is said, and
// give the same bits on every ISA. `x` and `out` have the io dtype of the table slot; it is widened
// exactly, arithmetic is IEEE float32 in round-to-nearest without contraction, and a result is
// rounded once. Block b of a range covers its elements [b * blocksize, (b + 1) * blocksize); the
// last may be short.
#ifndef HB_CORE_KERNELS_CODEC_H
#define HB_CORE_KERNELS_CODEC_H

#include "core/formats.h"

// A short way to the code, for maps like the dynamic ones: symmetric about code `zero` (or without
// negative entries), and the magnitudes fall into decades, in each of which the thresholds are
// evenly spaced. Each decade is brought to [1, 2), where its 2^r codes are the first r bits behind
// the binary point. With a = min(|v|, 1) (without negative entries max(v, 0) for |v|), but at least
// HB_DECADE_FLOOR, and e = #{k < 8: a > border k} (0: code `zero`, 1..7: a decade each, 8: the last
// code),
//
//   place = (offset[exponent of a % 32] - bits of a) >> 27            = 16 - e (unsigned: 15 - e)
//   w = slope[place % 16] * a + HB_DECADE_BASE,                       place = 15 - r
//   t = min(trunc(2^31 w), 2^32 - 1) >> place
//   byte 2 of t = code - zero (unsigned: + 1, modulo 256)
//
// unless the low word of t is below HB_DECADE_NEAR (and for NaN): only a search decides. Negative
// codes saturate at 0. The minimum, at which conversions saturate, is in the last step of every
// decade, but not near its end. The slopes hold the factor 2^31.
//
// Where a register has eight lanes and conversions give signed numbers,
//
//   place - 1 = (offset8[hb_decade8_group(a) % 8] - bits of a) >> 27
//   t = min(trunc(2^30 w), 2^31 - 128) >> (place - 1)                 slope8[(place - 1) % 8]
//
// with the factor 2^30, and the high word of t is code - zero (unsigned: max(code + 1, 1); w is
// below 1 for code 0, which has the slope of the last code). A group holds one border at most.
typedef struct {
    bool fits; // otherwise there is only the search
    bool is_signed;
    int32_t zero;
    uint32_t offset[32], offset8[8];
    float slope[16], slope8[8];
} hb_decades8;
#define HB_DECADE_FLOOR 1e-7f
#define HB_DECADE_BASE  (0x1.c71c72p-1f + 0x1p-20f) // 8/9, and 8 units in the last place of w
// RATE / 2^16 is log10(2) / 2^7: a straight line in place of the logarithm.
enum { HB_DECADE_NEAR = 16, HB_DECADE_RATE = 154 };
static inline unsigned hb_decade8_group(float a)
{
    return (hb_f32_bits(a) >> 16) * HB_DECADE_RATE >> 16;
}

// What an 8-bit encoder needs of a map: the code of v is #{i < 255: v > threshold[i]}, ascending.
// [255] is +inf, so that 16 lanes can be filled. `tree` holds the same thresholds as a search tree:
// from node k (root 1; [0] is unused) v > tree[k] leads to 2k + 1, otherwise to 2k; code = leaf -
// 256.
typedef struct {
    float threshold[256];
    float tree[256];
    hb_decades8 decades;
} hb_search8;
static inline uint8_t hb_search8_code(const hb_search8 *search, float v)
{
    unsigned node = 1;
    while (node < 256) node = 2 * node + (v > search->tree[node]);
    return (uint8_t)node;
}
// map: 256 finite ascending values.
void hb_search8_init(hb_search8 *search, const float *map);

// absmax[b] = max |x| of block b, NaN when the block holds one. Any blocksize >= 1.
typedef void hb_absmax_fn(const void *x, int64_t n, int64_t blocksize, float *absmax);

// 4-bit codes of v = x * hb_inverse_scale(absmax[b]), as formats.def says; |v| > 1 saturates.
// blocksize is a power of two, 32..4096. packed [(n + 1) / 2], even element in the high nibble; for
// an odd n the last low nibble is the code of 0.0.
typedef void hb_encode4_fn(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                           const float *absmax, uint8_t *packed);
// Both in one walk: the absmax of each block, and the codes by it.
typedef void hb_quantize4_fn(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                             float *absmax, uint8_t *packed);

// out[i] = value[code of element start + i] * absmax[(start + i) / blocksize], i < n; packed and
// absmax point at element 0 and block 0. `stream` asks for non-temporal stores (a hint).
typedef void hb_decode4_fn(const uint8_t *packed, int64_t start, int64_t n, hb_format4 format,
                           int64_t blocksize, const float *absmax, void *out, bool stream);

// Index of the first of `count` candidate scales with the least error on one block of n elements:
//   v_i = x_i * (1 / s), q_i = value[code(v_i)], d_i = x_i - q_i * s, e_i = d_i * d_i (* weight_i)
// each operation rounded to float32. Sixteen partial sums (element i goes to sum i % 16, in
// ascending order of i) are folded 8, 4, 2, 1: sum l += sum l + half. A candidate replaces the best
// only if its error is smaller (a NaN error never is). x is finite, candidates are finite, not
// zero, of either sign; weight [n] or NULL for ones.
typedef int64_t hb_search4_fn(const float *x, const float *weight, int64_t n, hb_format4 format,
                              const float *candidates, int64_t count);

// The candidates of HB_SCALES_SEARCH, as parts of absmax; the first wins ties.
enum { HB_SEARCH_COUNT = 19 };
#define HB_SEARCH_FACTORS                                                                          \
    {1.00f, 0.70f, 0.72f, 0.74f, 0.76f, 0.78f, 0.80f, 0.82f, 0.84f, 0.86f,                         \
     0.88f, 0.90f, 0.92f, 0.94f, 0.96f, 0.98f, 1.02f, 1.04f, 1.06f}

// Codes of v = x * hb_inverse_scale(absmax[b]); v = NaN has code 0. Any blocksize >= 1.
typedef void hb_encode8_fn(const void *x, int64_t n, const hb_search8 *search, int64_t blocksize,
                           const float *absmax, uint8_t *codes);
// out[i] = map[codes[i]] * absmax[i / blocksize].
typedef void hb_decode8_fn(const uint8_t *codes, int64_t n, const float *map, int64_t blocksize,
                           const float *absmax, void *out, bool stream);

// One row of LLM.int8(). Elements with |x| >= threshold are outliers; threshold NaN: none are.
// Largest |x| of the others, NaN when there is one, 0 when there is nothing.
typedef float hb_absmax_int8_fn(const void *x, int64_t n, float threshold);
// mark[i] = 1 where x[i] is an outlier; other marks are left alone.
typedef void hb_outliers_int8_fn(const void *x, int64_t n, float threshold, uint8_t *mark);
// codes[i] = rint(x[i] * (127 / absmax)), half to even, saturated to -127..127, NaN to 0; 0 for
// outliers and where zero[i] != 0 (zero may be NULL).
typedef void hb_encode_int8_fn(const void *x, int64_t n, float absmax, float threshold,
                               const uint8_t *zero, int8_t *codes);
// out[i] = (codes[i] * scale) * HB_INT8_UNIT.
typedef void hb_decode_int8_fn(const int8_t *codes, int64_t n, float scale, void *out);

#define HB_INT8_UNIT 0x1.020408p-7f // float32 nearest to 1/127
#define HB_NAN_BITS  0x7fc00000u    // the NaN that absmax gives
#define HB_INFINITY  __builtin_inff()

typedef struct {
    hb_absmax_fn *absmax[HB_IO_COUNT];
    hb_encode4_fn *encode4[HB_IO_COUNT];
    hb_quantize4_fn *quantize4[HB_IO_COUNT];
    hb_decode4_fn *decode4[HB_IO_COUNT];
    hb_search4_fn *search4;
    hb_encode8_fn *encode8[HB_IO_COUNT];
    hb_decode8_fn *decode8[HB_IO_COUNT];
    hb_absmax_int8_fn *absmax_int8[HB_IO_COUNT];
    hb_outliers_int8_fn *outliers_int8[HB_IO_COUNT];
    hb_encode_int8_fn *encode_int8[HB_IO_COUNT];
    hb_decode_int8_fn *decode_int8[HB_IO_COUNT];
} hb_kernels_codec;

// Declares the kernels of one ISA folder; each table.c names those that it has.
#define HB_DECLARE_CODEC_IO(io, isa)                                                               \
    hb_absmax_fn hb_absmax_##io##_##isa;                                                           \
    hb_encode4_fn hb_code4_encode_##io##_##isa;                                                    \
    hb_quantize4_fn hb_code4_quantize_##io##_##isa;                                                \
    hb_decode4_fn hb_code4_decode_##io##_##isa;                                                    \
    hb_encode8_fn hb_map8_encode_##io##_##isa;                                                     \
    hb_decode8_fn hb_map8_decode_##io##_##isa;                                                     \
    hb_absmax_int8_fn hb_int8_absmax_##io##_##isa;                                                 \
    hb_outliers_int8_fn hb_int8_outliers_##io##_##isa;                                             \
    hb_encode_int8_fn hb_int8_encode_##io##_##isa;                                                 \
    hb_decode_int8_fn hb_int8_decode_##io##_##isa;
#define HB_DECLARE_CODEC(isa)                                                                      \
    HB_DECLARE_CODEC_IO(f32, isa)                                                                  \
    HB_DECLARE_CODEC_IO(bf16, isa)                                                                 \
    HB_DECLARE_CODEC_IO(f16, isa)                                                                  \
    hb_search4_fn hb_code4_search_##isa;

HB_DECLARE_CODEC(ref)
HB_DECLARE_CODEC(avx2)
HB_DECLARE_CODEC(avx512)
HB_DECLARE_CODEC(avx512vbmi)
HB_DECLARE_CODEC(avx512bf16)
HB_DECLARE_CODEC(neon)

// Sets the three io slots of `field` to hb_<kernel>_<io>_<isa>.
#define HB_SET_IO(table, field, kernel, isa)                                                       \
    do {                                                                                           \
        (table).field[HB_F32] = hb_##kernel##_f32_##isa;                                           \
        (table).field[HB_BF16] = hb_##kernel##_bf16_##isa;                                         \
        (table).field[HB_F16] = hb_##kernel##_f16_##isa;                                           \
    } while (0)
// All codec kernels of an ISA folder that has every one.
#define HB_SET_CODEC(table, isa)                                                                   \
    do {                                                                                           \
        HB_SET_IO(table, absmax, absmax, isa);                                                     \
        HB_SET_IO(table, encode4, code4_encode, isa);                                              \
        HB_SET_IO(table, quantize4, code4_quantize, isa);                                          \
        HB_SET_IO(table, decode4, code4_decode, isa);                                              \
        (table).search4 = hb_code4_search_##isa;                                                   \
        HB_SET_IO(table, encode8, map8_encode, isa);                                               \
        HB_SET_IO(table, decode8, map8_decode, isa);                                               \
        HB_SET_IO(table, absmax_int8, int8_absmax, isa);                                           \
        HB_SET_IO(table, outliers_int8, int8_outliers, isa);                                       \
        HB_SET_IO(table, encode_int8, int8_encode, isa);                                           \
        HB_SET_IO(table, decode_int8, int8_decode, isa);                                           \
    } while (0)

#endif
