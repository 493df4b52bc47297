#include "core/kernels.h"

void hb_table_ref(hb_kernels *kernels)
{
    HB_SET_CODEC(kernels->codec, ref);
    hb_linear4_table_ref(&kernels->linear4);
    hb_linear4_int_table_ref(&kernels->linear4);
    hb_linear8_table_ref(&kernels->linear8);
    hb_dense_table_ref(&kernels->dense);
    hb_fused_table_ref(&kernels->fused);
    hb_optim_table_ref(&kernels->optim);
    hb_ruler_table_ref(&kernels->ruler);
}
