// The functions that simde/intrinsics.def turns into; see there.
#ifndef HB_TESTS_SIMDE_OPS_H
#define HB_TESTS_SIMDE_OPS_H

#include <stdint.h>

// in: three vectors of 64 bytes; memory: 64 bytes that the operation may read or write.
typedef void (*simde_op)(const uint8_t in[3][64], uint64_t mask, uint8_t memory[64],
                         uint8_t out[64]);

typedef struct {
    const char *name;
    simde_op run;
} simde_entry;

// The instructions themselves, in the order of simde/intrinsics.def, or NULL where none can be
// compiled.
extern const simde_entry *const simde_native_ops;

#endif
