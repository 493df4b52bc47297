// An emulation of the tile registers of AMX, after the pseudocode of Intel's manual (volume 2,
// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS, TDPBSSD): what the processor answers with
// an exception, and what a kernel that leaves tiles behind does, ends the test program.
//
// Each thread has its own tiles. Numbers of tiles are plain integers here.
#ifndef HB_SIMDE_TILES_H
#define HB_SIMDE_TILES_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { TILES_COUNT = 8, TILES_MAX_ROWS = 16, TILES_ROW_BYTES = 64 };

typedef struct {
    bool configured;
    int rows[TILES_COUNT], row_bytes[TILES_COUNT]; // 0, 0: not in the configuration
    uint8_t data[TILES_COUNT][TILES_MAX_ROWS][TILES_ROW_BYTES];
} tiles_state;

// tests/c/tiles.c. The state of the calling thread; a fault reports and does not return.
tiles_state *tiles_of_thread(void);
__attribute__((noreturn)) void tiles_fault(const char *instruction, const char *what);
// Counts threads that have a configuration, and instructions (for tests that ask whether any ran).
void tiles_count_configured(int change);
int tiles_configured(void);
void tiles_count_dot(void);
int64_t tiles_dots(void);

static inline void tiles_check(bool condition, const char *instruction, const char *what)
{
    if (!condition) tiles_fault(instruction, what);
}

static inline tiles_state *tiles_with(int tile, const char *instruction)
{
    tiles_state *state = tiles_of_thread();
    tiles_check(state->configured, instruction, "no configuration");
    tiles_check(tile >= 0 && tile < TILES_COUNT, instruction, "no such tile");
    tiles_check(state->rows[tile] > 0, instruction, "this tile is not in the configuration");
    return state;
}

// Rows and bytes outside the shape become zero whenever a tile is written.
static inline void tiles_clip(tiles_state *state, int tile)
{
    for (int r = 0; r < TILES_MAX_ROWS; r++)
        for (int b = 0; b < TILES_ROW_BYTES; b++)
            if (r >= state->rows[tile] || b >= state->row_bytes[tile]) state->data[tile][r][b] = 0;
}

static inline void tiles_release(void)
{
    tiles_state *state = tiles_of_thread();
    if (state->configured) tiles_count_configured(-1);
    memset(state, 0, sizeof *state);
}

static inline void tiles_load_config(const void *memory)
{
    uint8_t bytes[64];
    memcpy(bytes, memory, sizeof bytes);
    tiles_check(bytes[0] == 1, "ldtilecfg",
                "palette, expected 1"); // 0 releases: ask for that by name
    tiles_check(bytes[1] == 0, "ldtilecfg", "start_row, expected 0");
    for (int i = 2; i < 16; i++) tiles_check(bytes[i] == 0, "ldtilecfg", "reserved bytes 2..15");
    for (int i = 32; i < 48; i++) tiles_check(bytes[i] == 0, "ldtilecfg", "reserved bytes 32..47");
    for (int i = 56; i < 64; i++) tiles_check(bytes[i] == 0, "ldtilecfg", "reserved bytes 56..63");
    tiles_release();
    tiles_state *state = tiles_of_thread();
    for (int tile = 0; tile < TILES_COUNT; tile++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof row_bytes);
        const uint8_t rows = bytes[48 + tile];
        tiles_check(row_bytes <= TILES_ROW_BYTES, "ldtilecfg", "more than 64 bytes in a row");
        tiles_check(rows <= TILES_MAX_ROWS, "ldtilecfg", "more than 16 rows");
        tiles_check((rows == 0) == (row_bytes == 0), "ldtilecfg", "rows without bytes");
        state->rows[tile] = rows;
        state->row_bytes[tile] = row_bytes;
    }
    state->configured = true;
    tiles_count_configured(1);
}

static inline void tiles_zero(int tile)
{
    tiles_state *state = tiles_with(tile, "tilezero");
    memset(state->data[tile], 0, sizeof state->data[tile]);
}

static inline void tiles_load(int tile, const void *base, int64_t stride)
{
    tiles_state *state = tiles_with(tile, "tileloadd");
    for (int r = 0; r < state->rows[tile]; r++)
        memcpy(state->data[tile][r], (const char *)base + r * stride,
               (size_t)state->row_bytes[tile]);
    tiles_clip(state, tile);
}

static inline void tiles_store(int tile, void *base, int64_t stride)
{
    const tiles_state *state = tiles_with(tile, "tilestored");
    for (int r = 0; r < state->rows[tile]; r++)
        memcpy((char *)base + r * stride, state->data[tile][r], (size_t)state->row_bytes[tile]);
}

// What the three shapes of a product must be to each other.
static inline tiles_state *tiles_of_product(int sum, int a, int b, const char *instruction)
{
    tiles_state *state = tiles_with(sum, instruction);
    (void)tiles_with(a, instruction);
    (void)tiles_with(b, instruction);
    tiles_check(sum != a && sum != b && a != b, instruction, "the same tile twice");
    for (int i = 0; i < 3; i++)
        tiles_check(state->row_bytes[i == 0   ? sum
                                     : i == 1 ? a
                                              : b] %
                            4 ==
                        0,
                    instruction, "bytes of a row, expected a multiple of 4");
    tiles_check(state->rows[sum] == state->rows[a], instruction, "rows of sum and a differ");
    tiles_check(state->row_bytes[sum] == state->row_bytes[b], instruction,
                "columns of sum and b differ");
    tiles_check(state->row_bytes[a] / 4 == state->rows[b], instruction,
                "columns of a and rows of b differ");
    tiles_count_dot();
    return state;
}

// DAZ = FTZ = 1, to nearest even. A result is tiny when it would be so with any exponent: what
// rounds up to 2^-126 at 24 bits of precision stays.
static inline float tiles_flushed(float value, double exact)
{
    const bool tiny = fabsf(value) < 0x1p-126f ||
                      (fabsf(value) == 0x1p-126f && fabs(exact) < 0x1p-126 - 0x1p-151);
    return tiny ? copysignf(0.0f, value) : value;
}

static inline float tiles_operand(float value) // of a sum: subnormals count as zero
{
    return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

static inline float tiles_add(float a, float b)
{
    a = tiles_operand(a), b = tiles_operand(b);
    return tiles_flushed(a + b, (double)a + (double)b);
}

static inline float tiles_fma(float a, float b, float c)
{
    a = tiles_operand(a), b = tiles_operand(b), c = tiles_operand(c);
    return tiles_flushed(fmaf(a, b, c), (double)a * (double)b + (double)c);
}

static inline float tiles_bf16(const uint8_t *bytes)
{
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Even and odd elements of k are summed apart, from zero, then together, then to the tile.
static inline void tiles_dot_bf16(int sum, int a, int b)
{
    tiles_state *state = tiles_of_product(sum, a, b, "tdpbf16ps");
    for (int m = 0; m < state->rows[sum]; m++)
        for (int n = 0; n < state->row_bytes[sum] / 4; n++) {
            float part[2] = {0.0f, 0.0f}, total;
            for (int k = 0; k < state->rows[b]; k++)
                for (int i = 0; i < 2; i++)
                    part[i] = tiles_fma(tiles_bf16(&state->data[a][m][4 * k + 2 * i]),
                                        tiles_bf16(&state->data[b][k][4 * n + 2 * i]), part[i]);
            memcpy(&total, &state->data[sum][m][4 * n], sizeof total);
            total = tiles_add(total, tiles_add(part[0], part[1]));
            memcpy(&state->data[sum][m][4 * n], &total, sizeof total);
        }
    tiles_clip(state, sum);
}

// Sums of four products of bytes, modulo 2^32.
static inline void tiles_dot_bytes(int sum, int a, int b, bool a_signed, bool b_signed,
                                   const char *instruction)
{
    tiles_state *state = tiles_of_product(sum, a, b, instruction);
    for (int m = 0; m < state->rows[sum]; m++)
        for (int n = 0; n < state->row_bytes[sum] / 4; n++) {
            uint32_t total;
            memcpy(&total, &state->data[sum][m][4 * n], sizeof total);
            for (int k = 0; k < state->rows[b]; k++)
                for (int i = 0; i < 4; i++) {
                    const uint8_t x = state->data[a][m][4 * k + i],
                                  y = state->data[b][k][4 * n + i];
                    total += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
                }
            memcpy(&state->data[sum][m][4 * n], &total, sizeof total);
        }
    tiles_clip(state, sum);
}

static inline void tiles_dot_int8(int sum, int a, int b)
{
    tiles_dot_bytes(sum, a, b, true, true, "tdpbssd");
}

static inline void tiles_dot_uint8(int sum, int a, int b)
{
    tiles_dot_bytes(sum, a, b, false, true, "tdpbusd");
}

#endif
