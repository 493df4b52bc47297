// Products with 4-bit weights in integers, AVX-VNNI: see cpu/avx2/linear4_int.h.
#include "cpu/avxvnni/vnni.h"

#include "cpu/avx2/linear4_int.h"

HB_INT4_ENTRIES(avxvnni, 16, 8)
