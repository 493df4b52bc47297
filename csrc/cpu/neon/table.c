#include "core/kernels.h"

void hb_table_neon(hb_kernels *kernels)
{
    hb_linear8_table_neon(&kernels->linear8);
}
