// 8-bit block-wise format with AVX-512 VBMI: dequantize. Formula, layout, source: ref/codec8.c.
// Accuracy: bit-equal to the reference.
#include "cpu/avx512vbmi/planes8.h"

static inline void decode_sixty_four(const planes *p, __m512i codes, __m512 scale, void *out,
                                     int64_t i, bool stream, hb_dtype io)
{
    __m512 value[4];
    look_up_sixty_four(p, codes, value);
    for (int g = 0; g < 4; g++)
        store_f32x16(out, i + 16 * g, _mm512_mul_ps(value[g], scale), stream, io);
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
