// Tile registers (AMX): eight of them, each of at most 16 rows of 64 bytes, tmm0..tmm7.
//
//   TILE_DOT_*(sum, a, b)   sum[m][n] += sum_k a[m][k] . b[k][n], elements 32 bits wide: one
//   float32 or
//                           int32 of `sum`, two bfloat16 or four int8 of `a` and `b`.
//
// Shapes come from a tile_config, which lives in the thread until it is replaced or released: a
// kernel that configures must release. Loading a configuration zeroes all tiles. Numbers of tiles
// are literals.
//
// Not the compilers' intrinsics: those of gcc 12 tell the compiler that ldtilecfg reads eight bytes
// (of 64) and that tileloadd reads no memory, so that stores to a configuration or to a buffer
// before them may be dropped. Test builds get the emulation in tests/c/simde instead.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18.
#ifndef HB_CPU_AMX_TILES_H
#define HB_CPU_AMX_TILES_H

#include "cpu/simd.h"

#include <stdint.h>

enum { TILE_ROW_BYTES = 64, TILE_HEIGHT = 16 };

// As ldtilecfg reads it. Tiles that are not used have no rows and no bytes.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; // tiles 8..15 do not exist: 0
    uint8_t rows[16];
} tile_config;

_Static_assert(sizeof(tile_config) == 64, "layout of ldtilecfg");

static inline void shape_tile(tile_config *config, int tile, int rows, int row_bytes)
{
    config->row_bytes[tile] = (uint16_t)(rows > 0 ? row_bytes : 0);
    config->rows[tile] = (uint8_t)(rows > 0 ? rows : 0);
}

#if defined(HB_EMULATE_TILES)
#define TILE_CONFIGURE(config)         tiles_load_config(config)
#define TILE_RELEASE()                 tiles_release()
#define TILE_ZERO(tile)                tiles_zero(tile)
#define TILE_LOAD(tile, base, stride)  tiles_load(tile, base, stride)
#define TILE_STORE(tile, base, stride) tiles_store(tile, base, stride)
#define TILE_DOT_BF16(sum, a, b)       tiles_dot_bf16(sum, a, b)
#define TILE_DOT_INT8(sum, a, b)       tiles_dot_int8(sum, a, b)
#else
#define TILE_CONFIGURE(config)                                                                     \
    __asm__ volatile("ldtilecfg %0" ::"m"(*(const tile_config *)(config)) : "memory")
#define TILE_RELEASE()  __asm__ volatile("tilerelease" ::: "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
// Row i lies `stride` bytes times i behind base.
#define TILE_LOAD(tile, base, stride)                                                              \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)),               \
                     "r"((int64_t)(stride))                                                        \
                     : "memory")
#define TILE_STORE(tile, base, stride)                                                             \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void *)(base)),                 \
                     "r"((int64_t)(stride))                                                        \
                     : "memory")
#define TILE_DOT_BF16(sum, a, b)                                                                   \
    __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
#define TILE_DOT_INT8(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
#endif

#endif
