#include "core/kernels.h"

void hb_table_avx512vbmi(hb_kernels *kernels)
{
    (void)kernels;
}
