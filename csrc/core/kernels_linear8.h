#ifndef HB_CORE_KERNELS_LINEAR8_H
#define HB_CORE_KERNELS_LINEAR8_H

#include "core/formats.h"

typedef struct {
    int unused;
} hb_kernels_linear8;

#endif
