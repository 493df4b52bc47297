// 4-bit codebook formats (NF4, FP4) with NEON. Formula, layout, source: ref/codec4.c.
//
// Encode: the rank of v among 15 ascending thresholds is found by four halvings; the thresholds of
// a level are a byte table, indexed by the rank so far. Decode: the sixteen products value * absmax
// are rounded once per block, split into planes of equal bytes, looked up plane by plane, and
// stored interleaved. Accuracy: bit-equal to the reference.
#include "cpu/neon/io.h"
#include "cpu/codec4_entries.h"

typedef struct {
    float32x4_t level0;               // threshold 7
    float32x4_t level1_lo, level1_hi; // 3, 11
    uint8x16_t level2;                // 1 5 9 13
    uint8x16x2_t level3;              // 0 2 ... 14
    uint8x16x4_t value;               // by rank
    uint8x16_t code;                  // by rank
} encoder;

static encoder make_encoder(hb_format4 format)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    const float *t = book->threshold;
    const float level2[4] = {t[1], t[5], t[9], t[13]};
    const float level3[8] = {t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]};
    float value[16];
    for (int rank = 0; rank < 16; rank++) value[rank] = book->value[book->code_of_rank[rank]];
    encoder e;
    e.level0 = vdupq_n_f32(t[7]);
    e.level1_lo = vdupq_n_f32(t[3]);
    e.level1_hi = vdupq_n_f32(t[11]);
    e.level2 = vreinterpretq_u8_f32(vld1q_f32(level2));
    for (int k = 0; k < 2; k++) e.level3.val[k] = vreinterpretq_u8_f32(vld1q_f32(level3 + 4 * k));
    for (int k = 0; k < 4; k++) e.value.val[k] = vreinterpretq_u8_f32(vld1q_f32(value + 4 * k));
    e.code = vld1q_u8(book->code_of_rank);
    return e;
}

// NaN gets rank 0, which is NF4's nan_code; FP4 wants the rank of 0.
static inline uint32x4_t rank_of(const encoder *e, float32x4_t v, bool nan_is_zero)
{
    if (nan_is_zero)
        v = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vceqq_f32(v, v)));
    uint32x4_t above = vcgtq_f32(v, e->level0);
    uint32x4_t rank = vshrq_n_u32(above, 31);
    rank = descend(rank, v, vbslq_f32(above, e->level1_hi, e->level1_lo));
    rank = descend(rank, v, vreinterpretq_f32_u8(vqtbl1q_u8(e->level2, float_index(rank))));
    return descend(rank, v, vreinterpretq_f32_u8(vqtbl2q_u8(e->level3, float_index(rank))));
}

static inline uint8x16_t narrow_to_bytes(const uint32x4_t lane[4])
{
    uint16x8_t lo = vuzp1q_u16(vreinterpretq_u16_u32(lane[0]), vreinterpretq_u16_u32(lane[1]));
    uint16x8_t hi = vuzp1q_u16(vreinterpretq_u16_u32(lane[2]), vreinterpretq_u16_u32(lane[3]));
    return vuzp1q_u8(vreinterpretq_u8_u16(lo), vreinterpretq_u8_u16(hi));
}

// Codes of 32 elements, given the ranks of 4 each, as 16 packed bytes.
static inline uint8x16_t pack_codes(const encoder *e, const uint32x4_t rank[8])
{
    uint8x16_t a = vqtbl1q_u8(e->code, narrow_to_bytes(rank));
    uint8x16_t b = vqtbl1q_u8(e->code, narrow_to_bytes(rank + 4));
    return vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4); // odd | even << 4
}

static inline void absmax_blocks(const void *x, int64_t n, int64_t blocksize, float *absmax,
                                 hb_dtype io)
{
    for (int64_t i = 0; i < n; absmax++) {
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        uint32x4_t a = vdupq_n_u32(0), b = a;
        for (; i + 8 <= end; i += 8) {
            a = vmaxq_u32(a, magnitude_bits(load_f32x4(x, i, io)));
            b = vmaxq_u32(b, magnitude_bits(load_f32x4(x, i + 4, io)));
        }
        for (; i < end; i += 4) a = vmaxq_u32(a, magnitude_bits(load_upto_f32x4(x, i, end, io)));
        *absmax = largest_of_magnitudes(vmaxq_u32(a, b));
        i = end;
    }
}

static inline void encode_blocks(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                                 const float *absmax, uint8_t *packed, hb_dtype io,
                                 bool nan_is_zero)
{
    const encoder e = make_encoder(format);
    const int shift = __builtin_ctzll((uint64_t)blocksize);
    for (int64_t i = 0; i < n; i += 32) {
        const float32x4_t inverse = vdupq_n_f32(hb_inverse_scale(absmax[i >> shift]));
        uint32x4_t rank[8];
        for (int g = 0; g < 8; g++) {
            float32x4_t v = vmulq_f32(load_upto_f32x4(x, i + 4 * g, n, io), inverse);
            rank[g] = rank_of(&e, v, nan_is_zero);
        }
        uint8x16_t codes = pack_codes(&e, rank);
        if (n - i >= 32) {
            vst1q_u8(packed + i / 2, codes);
        } else {
            uint8_t part[16];
            vst1q_u8(part, codes);
            memcpy(packed + i / 2, part, (size_t)(n - i + 1) / 2);
        }
    }
    if (n % 2 != 0) {
        uint8_t *last = packed + n / 2;
        *last = (uint8_t)((*last & 0xf0) | (format == HB_NF4 ? 7 : 0)); // the code of 0.0
    }
}

// Sixteen rounded products as planes: byte k of each in plane k (16-bit results: two planes).
static inline uint8x16x4_t scaled_planes(const hb_codebook4 *book, float absmax, hb_dtype io)
{
    uint8_t table[64];
    for (int k = 0; k < 16; k += 4)
        store_f32x4(table, k, vmulq_n_f32(vld1q_f32(book->value + k), absmax), io);
    if (io == HB_F32) return vld4q_u8(table);
    uint8x16x2_t two = vld2q_u8(table);
    return (uint8x16x4_t){{two.val[0], two.val[1], two.val[1], two.val[1]}};
}

static inline void decode_sixteen(uint8x16_t index, uint8x16x4_t plane, uint8_t *out, hb_dtype io)
{
    uint8x16_t b0 = vqtbl1q_u8(plane.val[0], index), b1 = vqtbl1q_u8(plane.val[1], index);
    if (io == HB_F32) {
        uint8x16_t b2 = vqtbl1q_u8(plane.val[2], index), b3 = vqtbl1q_u8(plane.val[3], index);
        vst4q_u8(out, ((uint8x16x4_t){{b0, b1, b2, b3}}));
    } else {
        vst2q_u8(out, ((uint8x16x2_t){{b0, b1}}));
    }
}

// 32 elements from 16 packed bytes.
static inline void decode_unit(uint8x16_t packed, uint8x16x4_t plane, uint8_t *out, hb_dtype io)
{
    uint8x16_t even = vshrq_n_u8(packed, 4), odd = vandq_u8(packed, vdupq_n_u8(15));
    decode_sixteen(vzip1q_u8(even, odd), plane, out, io);
    decode_sixteen(vzip2q_u8(even, odd), plane, out + 16 * hb_dtype_bytes(io), io);
}

static inline void decode_range(const uint8_t *packed, int64_t start, int64_t n, hb_format4 format,
                                int64_t blocksize, const float *absmax, void *out, bool stream,
                                hb_dtype io)
{
    (void)stream; // there is no faster way to store
    const hb_codebook4 *book = hb_codebook4_get(format);
    const int64_t bytes = (int64_t)hb_dtype_bytes(io);
    const int64_t end = start + n;
    uint8_t *target = out; // of element e
    for (int64_t e = start; e < end;) {
        int64_t block = e / blocksize;
        int64_t stop = (block + 1) * blocksize < end ? (block + 1) * blocksize : end;
        uint8x16x4_t plane = scaled_planes(book, absmax[block], io);
        while (e < stop) {
            int64_t unit = e / 32 * 32;
            int64_t unit_end = unit + 32 < stop ? unit + 32 : stop;
            if (unit_end - e == 32) {
                decode_unit(vld1q_u8(packed + e / 2), plane, target, io);
            } else {
                // A part of a unit: only its bytes are read, only its elements written.
                uint8_t codes[16] = {0}, elements[128];
                memcpy(codes + (e - unit) / 2, packed + e / 2,
                       (size_t)((unit_end + 1) / 2 - e / 2));
                decode_unit(vld1q_u8(codes), plane, elements, io);
                memcpy(target, elements + (e - unit) * bytes, (size_t)((unit_end - e) * bytes));
            }
            target += (unit_end - e) * bytes;
            e = unit_end;
        }
    }
}

static inline float32x4_t squared_error(const encoder *e, float32x4_t x, float inverse, float scale,
                                        bool nan_is_zero)
{
    uint32x4_t rank = rank_of(e, vmulq_n_f32(x, inverse), nan_is_zero);
    float32x4_t q = vreinterpretq_f32_u8(vqtbl4q_u8(e->value, float_index(rank)));
    float32x4_t difference = vsubq_f32(x, vmulq_n_f32(q, scale));
    return vmulq_f32(difference, difference);
}

// The error of four elements, of which only those before n count.
static inline float32x4_t error_at(const encoder *e, const float *x, const float *weight, int64_t i,
                                   int64_t n, float inverse, float scale, bool nan_is_zero)
{
    float32x4_t error =
        squared_error(e, load_upto_f32x4(x, i, n, HB_F32), inverse, scale, nan_is_zero);
    if (weight) error = vmulq_f32(error, load_upto_f32x4(weight, i, n, HB_F32));
    if (i + 4 <= n) return error;
    const int32_t lanes[4] = {0, 1, 2, 3};
    uint32x4_t valid = vcltq_s32(vld1q_s32(lanes), vdupq_n_s32((int32_t)(n - i)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(error), valid));
}

static inline int64_t search(const float *x, const float *weight, int64_t n, hb_format4 format,
                             const float *candidates, int64_t count, bool nan_is_zero)
{
    const encoder e = make_encoder(format);
    int64_t best = 0;
    float least = 0.0f;
    for (int64_t c = 0; c < count; c++) {
        const float scale = candidates[c], inverse = 1.0f / scale;
        float32x4_t sum[4]; // partial sums 4 k .. 4 k + 3
        for (int k = 0; k < 4; k++) sum[k] = vdupq_n_f32(0.0f);
        for (int64_t i = 0; i < n; i += 16)
            for (int k = 0; k < 4 && i + 4 * k < n; k++)
                sum[k] = vaddq_f32(
                    sum[k], error_at(&e, x, weight, i + 4 * k, n, inverse, scale, nan_is_zero));
        // sum l += sum l + half, for half = 8, 4, 2, 1.
        float32x4_t s4 = vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3]));
        float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
        float error = vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
        if (c == 0 || error < least) {
            least = error;
            best = c;
        }
    }
    return best;
}

HB_SEARCH4(neon)
HB_CODEC4(f32, HB_F32, neon)
HB_QUANTIZE4(f32, HB_F32, neon)
HB_CODEC4(bf16, HB_BF16, neon)
HB_QUANTIZE4(bf16, HB_BF16, neon)
HB_CODEC4(f16, HB_F16, neon)
HB_QUANTIZE4(f16, HB_F16, neon)
