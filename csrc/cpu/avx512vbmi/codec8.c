// 8-bit block-wise format with AVX-512 VBMI: dequantize. Formula, layout, source: ref/codec8.c.
//
// The 256 floats of the map are split into four planes of equal bytes; a plane is four registers,
// in which 64 codes are looked up by two byte permutations and a blend. The four result bytes of a
// code are put together again by interleaving. Accuracy: bit-equal to the reference.
#include "cpu/avx512/io.h"

typedef struct {
    __m512i byte[4][4]; // [byte of the float][entries 64 k .. 64 k + 63]
} planes;

static inline planes split_map(const float *map)
{
    _Alignas(64) uint8_t split[4][256];
    for (int i = 0; i < 256; i += 16) {
        __m512i bits = _mm512_loadu_si512(map + i);
        _mm_store_si128((void *)(split[0] + i), _mm512_cvtepi32_epi8(bits));
        _mm_store_si128((void *)(split[1] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
        _mm_store_si128((void *)(split[2] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 16)));
        _mm_store_si128((void *)(split[3] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 24)));
    }
    planes p;
    for (int b = 0; b < 4; b++)
        for (int k = 0; k < 4; k++) p.byte[b][k] = _mm512_load_si512(split[b] + 64 * k);
    return p;
}

// A permutation of two registers uses 7 bits of a code; `upper` marks those with bit 7.
static inline __m512i look_up(const __m512i table[4], __m512i codes, __mmask64 upper)
{
    __m512i lo = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    __m512i hi = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    return _mm512_mask_blend_epi8(upper, lo, hi);
}

static inline void decode_sixty_four(const planes *p, __m512i codes, __m512 scale, void *out,
                                     int64_t i, bool stream, hb_dtype io)
{
    // Interleaving works in 128-bit lanes: dword g of lane l must hold codes 16 g + 4 l .. + 3.
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    codes = _mm512_permutexvar_epi32(transpose, codes);
    __mmask64 upper = _mm512_movepi8_mask(codes);
    __m512i b0 = look_up(p->byte[0], codes, upper), b1 = look_up(p->byte[1], codes, upper);
    __m512i b2 = look_up(p->byte[2], codes, upper), b3 = look_up(p->byte[3], codes, upper);
    __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    const __m512i value[4] = {
        _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
        _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int g = 0; g < 4; g++)
        store_f32x16(out, i + 16 * g, _mm512_mul_ps(_mm512_castsi512_ps(value[g]), scale), stream,
                     io);
}

// Returns how many elements it did: whole groups of 64, each in one block. The AVX-512 kernel does
// the rest, and everything where splitting the map would not pay.
static inline int64_t decode_groups(const uint8_t *codes, int64_t n, const float *map,
                                    int64_t blocksize, const float *absmax, void *out, bool stream,
                                    hb_dtype io)
{
    if (n < 512 || (blocksize % 64 != 0 && blocksize < n)) return 0;
    const planes p = split_map(map);
    const int64_t whole = n / 64 * 64;
    stream = stream && (uintptr_t)out % 64 == 0;
    for (int64_t i = 0; i < whole; absmax++) {
        const __m512 scale = _mm512_set1_ps(*absmax);
        const int64_t end = whole - i < blocksize ? whole : i + blocksize;
        for (; i < end; i += 64)
            decode_sixty_four(&p, _mm512_loadu_si512(codes + i), scale, out, i, stream, io);
    }
    if (stream) _mm_sfence();
    return whole;
}

#define CODEC8(io, dtype)                                                                          \
    void hb_map8_decode_##io##_avx512vbmi(const uint8_t *codes, int64_t n, const float *map,       \
                                          int64_t blocksize, const float *absmax, void *out,       \
                                          bool stream)                                             \
    {                                                                                              \
        int64_t done = decode_groups(codes, n, map, blocksize, absmax, out, stream, dtype);        \
        hb_map8_decode_##io##_avx512(                                                              \
            codes + done, n - done, map, blocksize, absmax + done / blocksize,                     \
            (uint8_t *)out + (size_t)done * hb_dtype_bytes(dtype), false);                         \
    }
CODEC8(f32, HB_F32)
CODEC8(bf16, HB_BF16)
CODEC8(f16, HB_F16)
