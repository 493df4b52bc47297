// 4-bit codebook formats (NF4, FP4) with AVX2. Formula, layout, source: ref/codec4.c.
//
// Encode: the rank of v among 15 ascending thresholds is found in two steps, first the quarter,
// then the place in it; the thresholds stay in registers, indexed by the quarter. Decode: the
// sixteen products value * absmax are rounded once per block and then looked up: float32 in two
// halves chosen by bit 3, 16-bit results in a plane of low and one of high bytes. Accuracy:
// bit-equal to the reference.
#include "cpu/avx2/io.h"
#include "cpu/codec4_entries.h"

typedef struct {
    __m256 quarter[3];         // thresholds 3, 7, 11 in all lanes
    __m256 inside[3];          // the three thresholds inside a quarter; entry -quarter mod 4
    __m256 value_lo, value_hi; // of rank r: entry -r mod 16, as all that follows
    __m256i code;              // bytes, in both 128-bit lanes
} encoder;

static encoder make_encoder(hb_format4 format)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    const float *t = book->threshold;
    float value[16];
    uint8_t code[16];
    for (int rank = 0; rank < 16; rank++) {
        value[(16 - rank) % 16] = book->value[book->code_of_rank[rank]];
        code[(16 - rank) % 16] = book->code_of_rank[rank];
    }
    encoder e = {
        .value_lo = _mm256_loadu_ps(value),
        .value_hi = _mm256_loadu_ps(value + 8),
        .code = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)code)),
    };
    for (int k = 0; k < 3; k++) {
        e.quarter[k] = _mm256_set1_ps(t[4 * k + 3]);
        e.inside[k] = _mm256_setr_ps(t[k], t[k + 12], t[k + 8], t[k + 4], t[k], t[k + 12], t[k + 8],
                                     t[k + 4]);
    }
    return e;
}

// -1 where v > threshold.
static inline __m256i above(__m256 v, __m256 threshold)
{
    return _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ));
}

static inline __m256i sum_of_three(__m256i a, __m256i b, __m256i c)
{
    return _mm256_add_epi32(_mm256_add_epi32(a, b), c);
}

// Minus the rank. NaN gets rank 0, which is NF4's nan_code; FP4 wants the rank of 0. Two steps of
// three comparisons each: four halvings, each waiting for the one before, take twice as long.
static inline __m256i minus_rank(const encoder *e, __m256 v, bool nan_is_zero)
{
    if (nan_is_zero) v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    const __m256i quarter =
        sum_of_three(above(v, e->quarter[0]), above(v, e->quarter[1]), above(v, e->quarter[2]));
    const __m256i inside = sum_of_three(above(v, _mm256_permutevar_ps(e->inside[0], quarter)),
                                        above(v, _mm256_permutevar_ps(e->inside[1], quarter)),
                                        above(v, _mm256_permutevar_ps(e->inside[2], quarter)));
    return _mm256_add_epi32(_mm256_slli_epi32(quarter, 2), inside);
}

// Codes of 32 elements, given minus_rank of 8 each, as 16 packed bytes.
static inline __m128i pack_codes(const encoder *e, const __m256i rank[4])
{
    // Packing works in 128-bit lanes: of each vector the lower half goes to lane 0.
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(rank[0], rank[1]),
                                       _mm256_packs_epi32(rank[2], rank[3]));
    bytes = _mm256_shuffle_epi8(e->code, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
    // The first of a pair is the high nibble: words below 256, each half of a vector has two.
    __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    pairs = _mm256_packus_epi16(pairs, pairs);
    return _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

// Raises most[0] and most[1] to the magnitudes of 32 halves at x.
static inline void keep_largest(const uint16_t *x, __m256i most[2])
{
    for (int g = 0; g < 2; g++) {
        const __m256i v = _mm256_loadu_si256((const void *)(x + 16 * g));
        most[g] = _mm256_max_epu16(most[g], _mm256_and_si256(v, _mm256_set1_epi16(0x7fff)));
    }
}

// The largest magnitude of n 16-bit floats, or NaN: patterns without signs order like the numbers.
static inline float largest_of_halves(const uint16_t *x, int64_t n, hb_dtype io)
{
    __m256i vectors[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (; n >= 32; n -= 32, x += 32) keep_largest(x, vectors);
    if (n > 0) {
        uint16_t rest[32] = {0};
        memcpy(rest, x, (size_t)n * sizeof *x);
        keep_largest(rest, vectors);
    }
    const __m256i a = _mm256_max_epu16(vectors[0], vectors[1]);
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    most = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1))); // the least of 65535 - x
    const uint16_t bits = (uint16_t)~_mm_extract_epi16(most, 0);
    const float largest = hb_load_f32(&bits, 0, io);
    return largest == largest ? largest : hb_f32_from_bits(HB_NAN_BITS);
}

static inline void absmax_blocks(const void *x, int64_t n, int64_t blocksize, float *absmax,
                                 hb_dtype io)
{
    for (int64_t begin = 0; begin < n; absmax++) {
        int64_t i = begin, end = n - begin < blocksize ? n : begin + blocksize;
        if (io != HB_F32) {
            *absmax = largest_of_halves((const uint16_t *)x + i, end - i, io);
            begin = end;
            continue;
        }
        __m256i a = _mm256_setzero_si256(), b = a;
        for (; i + 16 <= end; i += 16) {
            __m256 v0 = magnitude_f32x8(load_f32x8(x, i, io));
            __m256 v1 = magnitude_f32x8(load_f32x8(x, i + 8, io));
            a = _mm256_max_epi32(a, _mm256_castps_si256(v0));
            b = _mm256_max_epi32(b, _mm256_castps_si256(v1));
        }
        for (; i < end; i += 8) {
            __m256 v = magnitude_f32x8(load_upto_f32x8(x, i, end, io));
            a = _mm256_max_epi32(a, _mm256_castps_si256(v));
        }
        *absmax = largest_of_magnitudes(_mm256_max_epi32(a, b));
        begin = end;
    }
}

// nan_is_zero is a constant for the compiler.
static inline __attribute__((always_inline)) void
encode_blocks(const void *x, int64_t n, hb_format4 format, int64_t blocksize, const float *absmax,
              uint8_t *packed, hb_dtype io, bool nan_is_zero)
{
    const encoder e = make_encoder(format);
    const int shift = __builtin_ctzll((uint64_t)blocksize);
    const int64_t whole = n / 32 * 32;
    __m256i rank[4];
    int64_t i = 0;
    while (i < whole) {
        const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(absmax[i >> shift]));
        const int64_t end = i + blocksize < whole ? i + blocksize : whole;
        for (; i < end; i += 32) {
            for (int g = 0; g < 4; g++) {
                __m256 v = _mm256_mul_ps(load_f32x8(x, i + 8 * g, io), inverse);
                rank[g] = minus_rank(&e, v, nan_is_zero);
            }
            _mm_storeu_si128((void *)(packed + i / 2), pack_codes(&e, rank));
        }
    }
    if (i == n) return;
    const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(absmax[i >> shift]));
    for (int g = 0; g < 4; g++) {
        int64_t at = i + 8 * g;
        rank[g] = _mm256_setzero_si256();
        if (at >= n) continue;
        __m256 v = _mm256_mul_ps(load_upto_f32x8(x, at, n, io), inverse);
        rank[g] = minus_rank(&e, v, nan_is_zero);
    }
    uint8_t codes[16];
    _mm_storeu_si128((void *)codes, pack_codes(&e, rank));
    memcpy(packed + i / 2, codes, (size_t)(n - i + 1) / 2);
    if (n % 2 != 0) {
        uint8_t *last = packed + n / 2;
        *last = (uint8_t)((*last & 0xf0) | (format == HB_NF4 ? 7 : 0)); // the code of 0.0
    }
}

// Sixteen rounded products: float32 [0..7], [8..15], or low bytes and high bytes of 16-bit words,
// the same in both lanes.
typedef struct {
    __m256i first, second;
} scaled_table;

static inline scaled_table scale_table(const hb_codebook4 *book, float absmax, hb_dtype io)
{
    __m256 lo = _mm256_mul_ps(_mm256_loadu_ps(book->value), _mm256_set1_ps(absmax));
    __m256 hi = _mm256_mul_ps(_mm256_loadu_ps(book->value + 8), _mm256_set1_ps(absmax));
    if (io == HB_F32) return (scaled_table){_mm256_castps_si256(lo), _mm256_castps_si256(hi)};
    __m128i a = narrow_f32x8(lo, io), b = narrow_f32x8(hi, io);
    const __m128i low_byte = _mm_set1_epi16(0xff);
    __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_byte), _mm_and_si128(b, low_byte));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    return (scaled_table){_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

// Eight elements whose codes are the low bytes of `codes`.
static inline __m256 look_up_f32x8(__m128i codes, scaled_table table)
{
    __m256i index = _mm256_cvtepu8_epi32(codes); // the permutation uses bits 0..2
    __m256 lo = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.first), index);
    __m256 hi = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.second), index);
    return _mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

// 32 elements from 16 packed bytes.
static inline void decode_unit(__m128i packed, scaled_table table, void *out, bool stream,
                               hb_dtype io)
{
    const __m128i nibble = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);
    __m128i odd = _mm_and_si128(packed, nibble);
    __m128i a = _mm_unpacklo_epi8(even, odd), b = _mm_unpackhi_epi8(even, odd); // 0..15, 16..31
    if (io == HB_F32) {
        store_f32x8(out, 0, look_up_f32x8(a, table), stream, io);
        store_f32x8(out, 8, look_up_f32x8(_mm_unpackhi_epi64(a, a), table), stream, io);
        store_f32x8(out, 16, look_up_f32x8(b, table), stream, io);
        store_f32x8(out, 24, look_up_f32x8(_mm_unpackhi_epi64(b, b), table), stream, io);
        return;
    }
    // Interleaving works per lane: lane 0 takes elements 0..7 and 16..23, lane 1 the others.
    __m256i index = _mm256_set_m128i(_mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(a, b));
    __m256i low = _mm256_shuffle_epi8(table.first, index);
    __m256i high = _mm256_shuffle_epi8(table.second, index);
    __m256i *words = out;
    if (stream) {
        _mm256_stream_si256(words, _mm256_unpacklo_epi8(low, high));
        _mm256_stream_si256(words + 1, _mm256_unpackhi_epi8(low, high));
    } else {
        _mm256_storeu_si256(words, _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256(words + 1, _mm256_unpackhi_epi8(low, high));
    }
}

static inline void decode_range(const uint8_t *packed, int64_t start, int64_t n, hb_format4 format,
                                int64_t blocksize, const float *absmax, void *out, bool stream,
                                hb_dtype io)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    const int64_t bytes = (int64_t)hb_dtype_bytes(io);
    const int64_t end = start + n;
    uint8_t *target = out; // of element e
    stream = stream && start % 32 == 0 && (uintptr_t)out % 32 == 0;
    for (int64_t e = start; e < end;) {
        int64_t block = e / blocksize;
        int64_t stop = (block + 1) * blocksize < end ? (block + 1) * blocksize : end;
        scaled_table table = scale_table(book, absmax[block], io);
        while (e < stop) {
            int64_t unit = e / 32 * 32;
            int64_t unit_end = unit + 32 < stop ? unit + 32 : stop;
            if (unit_end - e == 32) {
                __m128i codes = _mm_loadu_si128((const void *)(packed + e / 2));
                decode_unit(codes, table, target, stream, io);
            } else {
                // A part of a unit: only its bytes are read, only its elements written.
                uint8_t codes[16] = {0};
                memcpy(codes + (e - unit) / 2, packed + e / 2,
                       (size_t)((unit_end + 1) / 2 - e / 2));
                _Alignas(32) uint8_t elements[128];
                decode_unit(_mm_loadu_si128((const void *)codes), table, elements, false, io);
                memcpy(target, elements + (e - unit) * bytes, (size_t)((unit_end - e) * bytes));
            }
            target += (unit_end - e) * bytes;
            e = unit_end;
        }
    }
    if (stream) _mm_sfence();
}

// sum l += sum l + half, for half = 8, 4, 2, 1; sums 0..7 and 8..15.
static inline float fold_sums(__m256 lo, __m256 hi)
{
    __m256 s8 = _mm256_add_ps(lo, hi);
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}

static inline __m256 squared_error(const encoder *e, __m256 x, float inverse, float scale,
                                   bool nan_is_zero)
{
    __m256i rank = minus_rank(e, _mm256_mul_ps(x, _mm256_set1_ps(inverse)), nan_is_zero);
    __m256 q_lo = _mm256_permutevar8x32_ps(e->value_lo, rank);
    __m256 q_hi = _mm256_permutevar8x32_ps(e->value_hi, rank);
    __m256 q = _mm256_blendv_ps(q_lo, q_hi, _mm256_castsi256_ps(_mm256_slli_epi32(rank, 28)));
    __m256 difference = _mm256_sub_ps(x, _mm256_mul_ps(q, _mm256_set1_ps(scale)));
    return _mm256_mul_ps(difference, difference);
}

// The error of eight elements, of which only those before n count.
static inline __m256 error_at(const encoder *e, const float *x, const float *weight, int64_t i,
                              int64_t n, float inverse, float scale, bool nan_is_zero)
{
    if (i + 8 <= n) {
        __m256 error = squared_error(e, _mm256_loadu_ps(x + i), inverse, scale, nan_is_zero);
        return weight ? _mm256_mul_ps(error, _mm256_loadu_ps(weight + i)) : error;
    }
    __m256 error =
        squared_error(e, load_part_f32x8(x, i, n - i, HB_F32), inverse, scale, nan_is_zero);
    if (weight) error = _mm256_mul_ps(error, load_part_f32x8(weight, i, n - i, HB_F32));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)(n - i)), lane);
    return _mm256_and_ps(error, _mm256_castsi256_ps(valid));
}

static inline int64_t search(const float *x, const float *weight, int64_t n, hb_format4 format,
                             const float *candidates, int64_t count, bool nan_is_zero)
{
    const encoder e = make_encoder(format);
    int64_t best = 0;
    float least = 0.0f;
    for (int64_t c = 0; c < count; c++) {
        const float scale = candidates[c], inverse = 1.0f / scale;
        __m256 lo = _mm256_setzero_ps(), hi = lo;
        for (int64_t i = 0; i < n; i += 16) {
            lo = _mm256_add_ps(lo, error_at(&e, x, weight, i, n, inverse, scale, nan_is_zero));
            if (i + 8 < n)
                hi = _mm256_add_ps(hi,
                                   error_at(&e, x, weight, i + 8, n, inverse, scale, nan_is_zero));
        }
        float error = fold_sums(lo, hi);
        if (c == 0 || error < least) {
            least = error;
            best = c;
        }
    }
    return best;
}

HB_SEARCH4(avx2)
HB_CODEC4(f32, HB_F32, avx2)
HB_QUANTIZE4(f32, HB_F32, avx2)
HB_CODEC4(bf16, HB_BF16, avx2)
HB_QUANTIZE4(bf16, HB_BF16, avx2)
HB_CODEC4(f16, HB_F16, avx2)
HB_QUANTIZE4(f16, HB_F16, avx2)
