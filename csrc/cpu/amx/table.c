#include "core/kernels.h"

void hb_table_amx(hb_kernels *kernels)
{
    hb_linear4_table_amx(&kernels->linear4);
    hb_linear8_table_amx(&kernels->linear8);
}
