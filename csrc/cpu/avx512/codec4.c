// 4-bit codebook formats (NF4, FP4) with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/codec4.c.
//
// Encode: the range of v is cut into 32 bins narrower than the distance of two thresholds, so that
// a bin holds at most one; two lookups give that threshold and the number of those below, one
// comparison decides. Rounding in the bin number is harmless: it is monotone in v, and thresholds
// are put into bins by the same instructions. FP4 is mirrored: bins of |v|, and a sign bit. Decode:
// the sixteen products value * absmax are rounded once per block and then looked up. Accuracy:
// bit-equal to the reference.
#include "cpu/avx512/io.h"
#include "cpu/codec4_entries.h"

typedef struct {
    __m512 edge_lo, edge_hi;  // the threshold in each of 32 bins, +inf where there is none
    __m512i base_lo, base_hi; // the number of thresholds in lower bins
    __m512 floor;             // least v (or |v|) that matters; also stands for NaN
    __m512 value;             // by slot: NF4 rank 0..15; FP4 rank of |v| 0..7, + 8 where v < 0
    __m512i code;             // bytes by slot, in every 128-bit lane
    bool mirrored;
} encoder;

static inline __m512i bin_of(__m512 v)
{
    // -1 -> 0.1, 1 -> 31.9: never outside 0..31.
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(v, _mm512_set1_ps(15.9f), _mm512_set1_ps(16.0f)));
}

static encoder make_encoder(hb_format4 format)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    const bool mirrored = format == HB_FP4;
    // In the mirrored book ranks 8..15 are the codes of |v| and thresholds 8..14 part them.
    const int first = mirrored ? 8 : 0;
    _Alignas(64) float edge[32];
    _Alignas(64) int32_t base[32], bin[16];
    _Alignas(16) uint8_t code[16];
    _Alignas(64) float value[16];
    _mm512_store_si512(bin,
                       bin_of(_mm512_min_ps(_mm512_loadu_ps(book->threshold), _mm512_set1_ps(1))));
    for (int b = 0; b < 32; b++) edge[b] = HB_INFINITY;
    for (int t = first; t < 15; t++) edge[bin[t]] = book->threshold[t];
    for (int b = 0, below = 0; b < 32; b++) {
        base[b] = below;
        below += edge[b] < HB_INFINITY;
    }
    for (int slot = 0; slot < 16; slot++) {
        int rank = !mirrored ? slot : slot < 8 ? 8 + slot : 15 - slot;
        code[slot] = book->code_of_rank[rank];
        value[slot] = book->value[code[slot]];
    }
    return (encoder){
        .edge_lo = _mm512_load_ps(edge),
        .edge_hi = _mm512_load_ps(edge + 16),
        .base_lo = _mm512_load_si512(base),
        .base_hi = _mm512_load_si512(base + 16),
        .floor = _mm512_set1_ps(mirrored ? 0.0f : -1.0f),
        .value = _mm512_load_ps(value),
        .code = _mm512_broadcast_i32x4(_mm_load_si128((const void *)code)),
        .mirrored = mirrored,
    };
}

static inline __m512i slot_of(const encoder *e, __m512 v, bool mirrored)
{
    // max gives its second operand for NaN: that is slot 0, whose code is nan_code in both books.
    __m512 at = _mm512_max_ps(mirrored ? magnitude_f32x16(v) : v, e->floor);
    at = _mm512_min_ps(at, _mm512_set1_ps(1.0f));
    __m512i bin = bin_of(at);
    __m512 edge = _mm512_permutex2var_ps(e->edge_lo, bin, e->edge_hi);
    __m512i slot = _mm512_permutex2var_epi32(e->base_lo, bin, e->base_hi);
    __mmask16 above = _mm512_cmp_ps_mask(at, edge, _CMP_GT_OQ);
    slot = _mm512_mask_add_epi32(slot, above, slot, _mm512_set1_epi32(1));
    if (mirrored) {
        __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
        slot = _mm512_mask_or_epi32(slot, negative, slot, _mm512_set1_epi32(8));
    }
    return slot;
}

// Codes of 64 elements, given the slots of 16 each, as 32 packed bytes.
static inline __m256i pack_codes(const encoder *e, const __m512i slot[4])
{
    // Byte b of lane l is element 16 b + l; a byte of codes stays below 16.
    __m512i bytes = _mm512_or_si512(
        _mm512_or_si512(slot[0], _mm512_slli_epi32(slot[1], 8)),
        _mm512_or_si512(_mm512_slli_epi32(slot[2], 16), _mm512_slli_epi32(slot[3], 24)));
    bytes = _mm512_shuffle_epi8(e->code, bytes);
    // Even lanes are high nibbles, odd lanes low ones: byte b of the j-th pair is packed byte 8 b +
    // j.
    __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(bytes, 4), _mm512_srli_epi64(bytes, 32));
    __m256i packed = _mm512_cvtepi64_epi32(pairs);
    const __m256i transpose = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    packed = _mm256_shuffle_epi8(packed, transpose);
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The largest bit pattern of the magnitudes of count floats, which order like the numbers.
static inline __m512i largest_bits_f32(const void *x, int64_t i, int64_t end)
{
    __m512i a = _mm512_setzero_si512(), b = a;
    for (; i + 32 <= end; i += 32) {
        __m512 v0 = magnitude_f32x16(load_f32x16(x, i, HB_F32));
        __m512 v1 = magnitude_f32x16(load_f32x16(x, i + 16, HB_F32));
        a = _mm512_max_epi32(a, _mm512_castps_si512(v0));
        b = _mm512_max_epi32(b, _mm512_castps_si512(v1));
    }
    for (; i < end; i += 16) {
        __m512 v = magnitude_f32x16(load_lanes_f32x16(x, i, first_lanes(end - i), HB_F32));
        a = _mm512_max_epi32(a, _mm512_castps_si512(v));
    }
    return _mm512_max_epi32(a, b);
}

// The same of 16-bit floats, in the low words of the lanes.
static inline __m512i largest_bits_16(const void *x, int64_t i, int64_t end)
{
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    const uint16_t *words = x;
    __m512i a = _mm512_setzero_si512(), b = a;
    for (; i + 64 <= end; i += 64) {
        __m512i v0 = _mm512_and_si512(_mm512_loadu_si512(words + i), magnitude);
        __m512i v1 = _mm512_and_si512(_mm512_loadu_si512(words + i + 32), magnitude);
        a = _mm512_max_epu16(a, v0);
        b = _mm512_max_epu16(b, v1);
    }
    for (; i < end; i += 32) {
        __mmask32 lanes = end - i >= 32 ? 0xffffffff : (1u << (end - i)) - 1;
        __m512i v = _mm512_and_si512(_mm512_maskz_loadu_epi16(lanes, words + i), magnitude);
        a = _mm512_max_epu16(a, v);
    }
    a = _mm512_max_epu16(a, b);
    return _mm512_max_epu16(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)),
                            _mm512_srli_epi32(a, 16));
}

static inline __m512i largest_bits(const void *x, int64_t i, int64_t end, hb_dtype io)
{
    return io == HB_F32 ? largest_bits_f32(x, i, end) : largest_bits_16(x, i, end);
}

// Lane k: the largest lane of v[k].
static inline __m512i fold_sixteen(__m512i v[16])
{
    for (int k = 0; k < 8; k++)
        v[k] = _mm512_max_epi32(_mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]),
                                _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]));
    // Now each 128-bit lane has what is left of two vectors; soon of four.
    for (int k = 0; k < 4; k++)
        v[k] = _mm512_max_epi32(_mm512_unpacklo_epi64(v[2 * k], v[2 * k + 1]),
                                _mm512_unpackhi_epi64(v[2 * k], v[2 * k + 1]));
    for (int k = 0; k < 2; k++)
        v[k] = _mm512_max_epi32(_mm512_shuffle_i32x4(v[2 * k], v[2 * k + 1], 0x88),
                                _mm512_shuffle_i32x4(v[2 * k], v[2 * k + 1], 0xdd));
    return _mm512_max_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x88),
                            _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
}

// The numbers with these bit patterns, and one NaN for all.
static inline __m512 magnitudes_of_bits(__m512i bits, hb_dtype io)
{
    __m512 largest =
        io == HB_F32 ? _mm512_castsi512_ps(bits) : widen_f32x16(_mm512_cvtepi32_epi16(bits), io);
    __mmask16 nan = _mm512_cmp_ps_mask(largest, largest, _CMP_UNORD_Q);
    const __m512 one_nan = _mm512_castsi512_ps(_mm512_set1_epi32(HB_NAN_BITS));
    return _mm512_mask_mov_ps(largest, nan, one_nan);
}

static inline void absmax_blocks(const void *x, int64_t n, int64_t blocksize, float *absmax,
                                 hb_dtype io)
{
    int64_t i = 0;
    // Sixteen blocks at a time: folding one by one takes as long as reading 64 elements.
    if (blocksize <= 1024)
        for (; n - i >= 16 * blocksize; absmax += 16) {
            __m512i bits[16];
            for (int k = 0; k < 16; k++, i += blocksize)
                bits[k] = largest_bits(x, i, i + blocksize, io);
            _mm512_storeu_ps(absmax, magnitudes_of_bits(fold_sixteen(bits), io));
        }
    while (i < n) {
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        const int32_t bits = _mm512_reduce_max_epi32(largest_bits(x, i, end, io));
        const __m512 largest = magnitudes_of_bits(_mm512_set1_epi32(bits), io);
        *absmax++ = _mm512_cvtss_f32(largest);
        i = end;
    }
}

static inline void encode_blocks(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                                 const float *absmax, uint8_t *packed, hb_dtype io, bool mirrored)
{
    const encoder e = make_encoder(format);
    const int shift = __builtin_ctzll((uint64_t)blocksize);
    int64_t i = 0;
    __m512i slot[4];
    for (; i + 64 <= n; i += 64) {
        // Two scales, for blocks of 32.
        __m512 inverse[2] = {_mm512_set1_ps(hb_inverse_scale(absmax[i >> shift])),
                             _mm512_set1_ps(hb_inverse_scale(absmax[(i + 32) >> shift]))};
        for (int g = 0; g < 4; g++) {
            __m512 v = _mm512_mul_ps(load_f32x16(x, i + 16 * g, io), inverse[g / 2]);
            slot[g] = slot_of(&e, v, mirrored);
        }
        _mm256_storeu_si256((void *)(packed + i / 2), pack_codes(&e, slot));
    }
    if (i == n) return;
    for (int g = 0; g < 4; g++) {
        int64_t at = i + 16 * g;
        slot[g] = _mm512_setzero_si512();
        if (at >= n) continue;
        __m512 v = _mm512_mul_ps(load_lanes_f32x16(x, at, first_lanes(n - at), io),
                                 _mm512_set1_ps(hb_inverse_scale(absmax[at >> shift])));
        slot[g] = slot_of(&e, v, mirrored);
    }
    const int64_t bytes = (n - i + 1) / 2;
    _mm256_mask_storeu_epi8(packed + i / 2, (__mmask32)((1ull << bytes) - 1), pack_codes(&e, slot));
    if (n % 2 != 0) {
        uint8_t *last = packed + n / 2;
        *last = (uint8_t)((*last & 0xf0) | (format == HB_NF4 ? 7 : 0)); // the code of 0.0
    }
}

// Sixteen rounded products: float32 lanes, or 16-bit words twice over.
static inline __m512i scaled_table(const hb_codebook4 *book, float absmax, hb_dtype io)
{
    __m512 product = _mm512_mul_ps(_mm512_loadu_ps(book->value), _mm512_set1_ps(absmax));
    if (io == HB_F32) return _mm512_castps_si512(product);
    return _mm512_broadcast_i64x4(narrow_f32x16(product, io));
}

// 32 elements from 16 packed bytes. The lookups use the low 4 (words: 5, the table is there twice)
// bits of an index, so that the low nibble needs no mask.
static inline void decode_unit(__m128i packed, __m512i table, void *out, bool stream, hb_dtype io)
{
    if (io == HB_F32) {
        // Dwords 2 j and 2 j + 1 get byte j; the even one is shifted down.
        const __m512i spread = _mm512_set_epi8(
            -1, -1, -1, 7, -1, -1, -1, 7, -1, -1, -1, 6, -1, -1, -1, 6, -1, -1, -1, 5, -1, -1, -1,
            5, -1, -1, -1, 4, -1, -1, -1, 4, -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1,
            -1, 2, -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 0, -1, -1, -1, 0);
        const __m512i down = _mm512_set1_epi64(4);
        for (int h = 0; h < 2; h++) {
            __m128i half = h ? _mm_unpackhi_epi64(packed, packed) : packed;
            __m512i index = _mm512_shuffle_epi8(_mm512_broadcastq_epi64(half), spread);
            index = _mm512_srlv_epi32(index, down);
            __m512 value = _mm512_permutexvar_ps(index, _mm512_castsi512_ps(table));
            store_f32x16(out, 16 * h, value, stream, io);
        }
        return;
    }
    const __m512i spread = _mm512_set_epi8(
        -1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12, -1, 11, -1, 11, -1, 10, -1,
        10, -1, 9, -1, 9, -1, 8, -1, 8, -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4, -1,
        3, -1, 3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0);
    __m512i index = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed), spread);
    index = _mm512_srlv_epi16(index, _mm512_set1_epi32(4));
    __m512i value = _mm512_permutexvar_epi16(index, table);
    if (stream)
        _mm512_stream_si512(out, value);
    else
        _mm512_storeu_si512(out, value);
}

static inline void decode_range(const uint8_t *packed, int64_t start, int64_t n, hb_format4 format,
                                int64_t blocksize, const float *absmax, void *out, bool stream,
                                hb_dtype io)
{
    const hb_codebook4 *book = hb_codebook4_get(format);
    const int64_t bytes = (int64_t)hb_dtype_bytes(io);
    const int64_t end = start + n;
    uint8_t *target = (uint8_t *)out - start * bytes; // of element 0
    stream = stream && start % 32 == 0 && (uintptr_t)out % 64 == 0;
    for (int64_t e = start; e < end;) {
        int64_t block = e / blocksize;
        int64_t stop = (block + 1) * blocksize < end ? (block + 1) * blocksize : end;
        __m512i table = scaled_table(book, absmax[block], io);
        while (e < stop) {
            int64_t unit = e / 32 * 32;
            if (unit == e && e + 32 <= stop) {
                __m128i codes = _mm_loadu_si128((const void *)(packed + e / 2));
                decode_unit(codes, table, target + e * bytes, stream, io);
                e += 32;
                continue;
            }
            // A part of a unit: only its bytes are read, only its elements written.
            int64_t unit_end = unit + 32 < stop ? unit + 32 : stop;
            unsigned first = (unsigned)(e - unit) / 2, last = (unsigned)(unit_end - unit + 1) / 2;
            __mmask16 valid = (__mmask16)(((1u << last) - 1) & ~((1u << first) - 1));
            _Alignas(64) uint8_t elements[128];
            decode_unit(_mm_maskz_loadu_epi8(valid, packed + unit / 2), table, elements, false, io);
            memcpy(target + e * bytes, elements + (e - unit) * bytes,
                   (size_t)((unit_end - e) * bytes));
            e = unit_end;
        }
    }
    if (stream) _mm_sfence();
}

// sum l += sum l + half, for half = 8, 4, 2, 1.
static inline float fold_sums(__m512 sum)
{
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}

static inline __m512 squared_error(const encoder *e, __m512 x, float inverse, float scale,
                                   bool mirrored)
{
    __m512i slot = slot_of(e, _mm512_mul_ps(x, _mm512_set1_ps(inverse)), mirrored);
    __m512 q = _mm512_permutexvar_ps(slot, e->value);
    __m512 difference = _mm512_sub_ps(x, _mm512_mul_ps(q, _mm512_set1_ps(scale)));
    return _mm512_mul_ps(difference, difference);
}

enum { SEARCH_WIDTH = 4 }; // candidates at once, to hide latencies

static inline int64_t search(const float *x, const float *weight, int64_t n, hb_format4 format,
                             const float *candidates, int64_t count, bool mirrored)
{
    const encoder e = make_encoder(format);
    int64_t best = 0;
    float least = 0.0f;
    for (int64_t c = 0; c < count; c += SEARCH_WIDTH) {
        float scale[SEARCH_WIDTH], inverse[SEARCH_WIDTH];
        __m512 sum[SEARCH_WIDTH];
        for (int k = 0; k < SEARCH_WIDTH; k++) {
            scale[k] = candidates[c + k < count ? c + k : count - 1];
            inverse[k] = 1.0f / scale[k];
            sum[k] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < n; i += 16) {
            __mmask16 lanes = first_lanes(n - i);
            __m512 values = _mm512_maskz_loadu_ps(lanes, x + i);
            __m512 weights =
                weight ? _mm512_maskz_loadu_ps(lanes, weight + i) : _mm512_undefined_ps();
            for (int k = 0; k < SEARCH_WIDTH; k++) {
                __m512 error = squared_error(&e, values, inverse[k], scale[k], mirrored);
                if (weight) error = _mm512_mul_ps(error, weights);
                sum[k] = _mm512_mask_add_ps(sum[k], lanes, sum[k], error);
            }
        }
        for (int k = 0; k < SEARCH_WIDTH && c + k < count; k++) {
            float error = fold_sums(sum[k]);
            if (c + k == 0 || error < least) {
                least = error;
                best = c + k;
            }
        }
    }
    return best;
}

HB_SEARCH4(avx512)
HB_CODEC4(f32, HB_F32, avx512)
HB_CODEC4(bf16, HB_BF16, avx512)
HB_CODEC4(f16, HB_F16, avx512)
