#ifndef HB_CORE_KERNELS_CODEC_H
#define HB_CORE_KERNELS_CODEC_H

#include "core/formats.h"

typedef struct {
    int unused;
} hb_kernels_codec;

#endif
