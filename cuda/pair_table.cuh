// Decoding by pairs: a byte of codes becomes two 16-bit floats in one look-up.
//
//   pair[byte] = (value[byte >> 4], value[byte & 15]), the first in the low half
//
// 32 copies, entry e of copy l at word e * 32 + l, so that lane l reads bank l whatever the byte:
// with 16 copies a look-up of random bytes takes two turns, with one three.
#ifndef HB_CUDA_PAIR_TABLE_CUH
#define HB_CUDA_PAIR_TABLE_CUH

#include "codebooks.cuh"

enum { PAIR_TABLE_BYTES = 256 * HB_LANES * 4 };

// To be followed by block_sync. IO: 1 bfloat16, 2 float16.
template <int IO, int THREADS> HB_DEVICE void pair_table_fill(void *table, int format)
{
    for (int i = thread_index(); i < 256 * HB_LANES / 4; i += THREADS) {
        const int entry = i / (HB_LANES / 4);
        const uint32_t bits =
            pack<IO>(codebooks[format].value[entry >> 4], codebooks[format].value[entry & 15]);
        shared_store((uint4 *)table + i, uint4{bits, bits, bits, bits});
    }
}

// The pair of byte `i` of `codes`. copy: the 32-bit address of the table and 4 times the lane.
HB_DEVICE uint32_t pair_at(uint32_t copy, uint32_t codes, int i)
{
    return shared_load_at<uint32_t>(multiply_add(byte_of(codes, i), HB_LANES * 4, copy));
}

#endif
