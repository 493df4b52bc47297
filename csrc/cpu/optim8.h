// All steps on whole 8-bit blocks of one instruction set: what states8.h asks for comes first.
#ifndef HB_CPU_OPTIM8_H
#define HB_CPU_OPTIM8_H

#include "cpu/adam8.h"
#include "cpu/norm8.h"
#include "cpu/single8.h"

#define OPTIM8_IO(io, dtype, isa)                                                                  \
    ADAM8(io, dtype, isa)                                                                          \
    SINGLE8(io, dtype, isa)                                                                        \
    NORM8(io, dtype, isa)
#define OPTIM8(isa)                                                                                \
    OPTIM8_IO(f32, HB_F32, isa)                                                                    \
    OPTIM8_IO(bf16, HB_BF16, isa)                                                                  \
    OPTIM8_IO(f16, HB_F16, isa)

#endif
