// Rulers: loops that only read memory, or only multiply in registers, as fast as the instruction
// set lets them. They compute nothing that anybody wants; speeds are laid beside theirs.
#ifndef HB_CORE_KERNELS_RULER_H
#define HB_CORE_KERNELS_RULER_H

#include <stdint.h>

typedef struct {
    // `rounds` rounds of HB_RULER_CHAINS independent multiply-adds each, on vectors whose lanes are
    // all alike. Chain i starts with i. float32: x = x * 0.999 + 0.001; bfloat16: x += 2 * 0.5 *
    // 0.5; int8: x += 4 * 3 * 3. Returns the sum of the chains (of one lane).
    float (*run)(int64_t rounds);
    int64_t operations; // of one round, a multiply-add counted as two
} hb_ruler;

#define HB_RULER_CHAINS 12 // more than latency times throughput of any processor so far
#define HB_RULER_LINES  8  // `bytes` of read is a multiple of so many lines of 64 bytes

typedef struct {
    // Reads each byte of data once, in eight streams; returns the sum of its 64-bit words.
    uint64_t (*read)(const void *data, int64_t bytes);
    hb_ruler f32, bf16, int8; // run is NULL where no instruction multiplies these
} hb_kernels_ruler;

void hb_ruler_table_ref(hb_kernels_ruler *kernels);
void hb_ruler_table_avx2(hb_kernels_ruler *kernels);
void hb_ruler_table_avxvnni(hb_kernels_ruler *kernels);
void hb_ruler_table_avx512(hb_kernels_ruler *kernels);
void hb_ruler_table_avx512vnni(hb_kernels_ruler *kernels);
void hb_ruler_table_avx512bf16(hb_kernels_ruler *kernels);
void hb_ruler_table_neon(hb_kernels_ruler *kernels);

#endif
