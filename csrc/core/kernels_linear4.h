#ifndef HB_CORE_KERNELS_LINEAR4_H
#define HB_CORE_KERNELS_LINEAR4_H

#include "core/formats.h"

typedef struct {
    int unused;
} hb_kernels_linear4;

#endif
