// The functions of the table of 4-bit codecs, over the inline functions that each ISA's codec4.c
// defines under the names absmax_blocks, encode_blocks, decode_range and search. The type of x, and
// whether the format is FP4, are constants in each call.
#ifndef HB_CPU_CODEC4_ENTRIES_H
#define HB_CPU_CODEC4_ENTRIES_H

#include "core/kernels.h"

// absmax and codes in one walk: a piece at a time, which stays in L1 between the two kernels.
static inline void quantize4_pieces(const void *x, int64_t n, hb_format4 format, int64_t blocksize,
                                    float *absmax, uint8_t *packed, hb_dtype io,
                                    hb_absmax_fn *largest, hb_encode4_fn *encode)
{
    const int64_t piece = 4096; // a multiple of every block size
    for (int64_t first = 0; first < n; first += piece) {
        const int64_t count = n - first < piece ? n - first : piece;
        const uint8_t *from = (const uint8_t *)x + (size_t)first * hb_dtype_bytes(io);
        float *scale = absmax + first / blocksize;
        largest(from, count, blocksize, scale);
        encode(from, count, format, blocksize, scale, packed + first / 2);
    }
}

#define HB_QUANTIZE4(io, dtype, isa)                                                               \
    void hb_code4_quantize_##io##_##isa(const void *x, int64_t n, hb_format4 format,               \
                                        int64_t blocksize, float *absmax, uint8_t *packed)         \
    {                                                                                              \
        quantize4_pieces(x, n, format, blocksize, absmax, packed, dtype, hb_absmax_##io##_##isa,   \
                         hb_code4_encode_##io##_##isa);                                            \
    }

#define HB_CODEC4(io, dtype, isa)                                                                  \
    void hb_absmax_##io##_##isa(const void *x, int64_t n, int64_t blocksize, float *absmax)        \
    {                                                                                              \
        absmax_blocks(x, n, blocksize, absmax, dtype);                                             \
    }                                                                                              \
    void hb_code4_encode_##io##_##isa(const void *x, int64_t n, hb_format4 format,                 \
                                      int64_t blocksize, const float *absmax, uint8_t *packed)     \
    {                                                                                              \
        if (format == HB_FP4)                                                                      \
            encode_blocks(x, n, format, blocksize, absmax, packed, dtype, true);                   \
        else                                                                                       \
            encode_blocks(x, n, format, blocksize, absmax, packed, dtype, false);                  \
    }                                                                                              \
    void hb_code4_decode_##io##_##isa(const uint8_t *packed, int64_t start, int64_t n,             \
                                      hb_format4 format, int64_t blocksize, const float *absmax,   \
                                      void *out, bool stream)                                      \
    {                                                                                              \
        decode_range(packed, start, n, format, blocksize, absmax, out, stream, dtype);             \
    }

#define HB_SEARCH4(isa)                                                                            \
    int64_t hb_code4_search_##isa(const float *x, const float *weight, int64_t n,                  \
                                  hb_format4 format, const float *candidates, int64_t count)       \
    {                                                                                              \
        if (format == HB_FP4) return search(x, weight, n, format, candidates, count, true);        \
        return search(x, weight, n, format, candidates, count, false);                             \
    }

#endif
