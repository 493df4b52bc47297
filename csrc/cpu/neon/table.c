#include "core/kernels.h"

void hb_table_neon(hb_kernels *kernels)
{
    HB_SET_CODEC(kernels->codec, neon);
    hb_linear4_table_neon(&kernels->linear4);
    hb_linear8_table_neon(&kernels->linear8);
    hb_dense_table_neon(&kernels->dense);
    hb_fused_table_neon(&kernels->fused);
    hb_optim_table_neon(&kernels->optim);
    hb_ruler_table_neon(&kernels->ruler);
}
