// absmax and 4-bit codes in one walk: a piece at a time, which stays in L1 between the two kernels
// of the folder that includes this.
#ifndef HB_CPU_QUANTIZE4_H
#define HB_CPU_QUANTIZE4_H

#include "core/kernels.h"

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

#endif
