#include "core/kernels.h"

void hb_table_avxvnni(hb_kernels *kernels)
{
    hb_linear4_int_table_avxvnni(&kernels->linear4);
    hb_linear8_table_avxvnni(&kernels->linear8);
    hb_ruler_table_avxvnni(&kernels->ruler);
}
