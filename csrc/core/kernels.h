// The kernel table: what each ISA folder may replace. dispatch.c fills it reference first, then
// each better ISA overwrites what it does better. Kernels cannot fail, allocate, lock or print,
// take every size including zero, and give the same result however the work is split.
#ifndef HB_CORE_KERNELS_H
#define HB_CORE_KERNELS_H

#include "core/kernels_codec.h"
#include "core/kernels_dense.h"
#include "core/kernels_fused.h"
#include "core/kernels_linear4.h"
#include "core/kernels_linear8.h"
#include "core/kernels_optim.h"
#include "core/kernels_ruler.h"

typedef struct {
    hb_kernels_codec codec;     // quantize / dequantize
    hb_kernels_linear4 linear4; // matrix products with 4-bit weights
    hb_kernels_linear8 linear8; // matrix products with int8 weights
    hb_kernels_dense dense;     // products of few rows with plain weights
    hb_kernels_fused fused;     // norms, activations: what lies between the products
    hb_kernels_optim optim;     // steps of the optimizers
    hb_kernels_ruler ruler;     // what the machine can do at most
} hb_kernels;

// Fills the table for a subset of the machine's flags (hb_cpu_detect()).
void hb_kernels_init(hb_kernels *kernels, uint32_t cpu_flags);

// One per ISA folder, in table.c.
void hb_table_ref(hb_kernels *kernels);
void hb_table_avx2(hb_kernels *kernels);
void hb_table_avxvnni(hb_kernels *kernels);
void hb_table_avx512(hb_kernels *kernels);
void hb_table_avx512vnni(hb_kernels *kernels);
void hb_table_avx512vbmi(hb_kernels *kernels);
void hb_table_avx512bf16(hb_kernels *kernels);
void hb_table_amx(hb_kernels *kernels);
void hb_table_neon(hb_kernels *kernels);

#endif
