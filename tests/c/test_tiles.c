// The emulation of tile registers: its arithmetic on examples worked out by hand, and that each
// fault of the processor ends the program.
#include "check.h"

#if defined(HB_EMULATE_TILES)
#include "core/dtype.h"
#include "cpu/amx/tiles.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static tile_config all_full(void)
{
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape_tile(&config, tile, 16, 64);
    return config;
}

static uint32_t bf16_pair(float even, float odd)
{
    return (uint32_t)hb_bf16_from_f32(odd) << 16 | hb_bf16_from_f32(even);
}

// Of one row and one column: sum + sum_k (even + odd products), in the order of the instruction.
static float dot_bf16(float sum, int n, const float (*a)[2], const float (*b)[2])
{
    uint32_t x[16] = {0}, y[16] = {0};
    for (int k = 0; k < n; k++) {
        x[k] = bf16_pair(a[k][0], a[k][1]);
        y[k] = bf16_pair(b[k][0], b[k][1]);
    }
    tile_config config = {.palette = 1};
    shape_tile(&config, 0, 1, 4);
    shape_tile(&config, 1, 1, 4 * n);
    shape_tile(&config, 2, n, 4);
    TILE_CONFIGURE(&config);
    TILE_LOAD(0, &sum, 4);
    TILE_LOAD(1, x, 64);
    TILE_LOAD(2, y, 4);
    TILE_DOT_BF16(0, 1, 2);
    TILE_STORE(0, &sum, 4);
    TILE_RELEASE();
    return sum;
}

static void check_bf16(check *c)
{
    const float ones[2][2] = {{1, 1}, {1, 1}}, huge = 0x1p100f, tiny = 0x1p-126f;
    // Even and odd products have a sum each: 2^100 cancels before it meets the small ones.
    CHECK(c, dot_bf16(0, 2, (const float[][2]){{huge, 1}, {-huge, 1}}, ones) == 2.0f, "apart");
    CHECK(c, dot_bf16(0, 2, (const float[][2]){{huge, 1}, {1, -huge}}, ones) == 0.0f, "apart");
    // The sum comes last: 1 + 2^-24 + 2^-24 is 1 + 2^-23 when these two meet first.
    const float half_ulp[2][2] = {{0x1p-24f, 0}, {0x1p-24f, 0}};
    CHECK(c, dot_bf16(1.0f, 2, half_ulp, ones) == 1.0f + 0x1p-23f, "last");
    CHECK(c, dot_bf16(1.0f, 1, half_ulp, ones) == 1.0f, "to even");
    // Subnormals count as zero, as factors, sums and results.
    CHECK(c, dot_bf16(tiny / 2, 1, (const float[][2]){{0, 0}}, ones) == 0.0f, "sum");
    CHECK(c, dot_bf16(0, 1, (const float[][2]){{tiny / 2, 0}}, (const float[][2]){{4, 0}}) == 0.0f,
          "factor");
    CHECK(c, dot_bf16(0, 1, (const float[][2]){{tiny, 0}}, (const float[][2]){{0.5f, 0}}) == 0.0f,
          "product");
    CHECK(c,
          dot_bf16(tiny, 1, (const float[][2]){{tiny, 0}}, (const float[][2]){{-0.5f, 0}}) == tiny,
          "a product that is flushed before it is added");
    CHECK(c, dot_bf16(0, 1, (const float[][2]){{tiny, 0}}, ones) == tiny, "normal");
    CHECK(c, dot_bf16(0, 1, (const float[][2]){{INFINITY, 1}}, ones) == INFINITY, "infinity");
    CHECK(c, isnan(dot_bf16(0, 1, (const float[][2]){{INFINITY, -INFINITY}}, ones)), "NaN");
}

static void check_shapes(check *c)
{
    int32_t sums[16][16], all[16][16];
    int8_t a[16][64], b[16][64];
    check_fill_bytes(c, a, sizeof a);
    check_fill_bytes(c, b, sizeof b);
    for (int round = 0; round < 200; round++) {
        const int rows = 1 + (int)check_random_below(c, 16),
                  columns = 1 + (int)check_random_below(c, 16);
        const int depth = 1 + (int)check_random_below(c, 16);
        check_label(c, "%d x %d x %d", rows, columns, depth);
        check_fill_bytes(c, sums, sizeof sums);
        memset(all, 0x5a, sizeof all);
        tile_config config = {.palette = 1};
        shape_tile(&config, 5, rows, 4 * columns);
        shape_tile(&config, 7, rows, 4 * depth);
        shape_tile(&config, 3, depth, 4 * columns);
        TILE_CONFIGURE(&config);
        TILE_LOAD(5, sums, 64);
        TILE_LOAD(7, a, 64);
        TILE_LOAD(3, b, 64);
        TILE_DOT_INT8(5, 7, 3);
        TILE_STORE(5, all, 64);
        TILE_RELEASE();
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 16; n++) {
                uint32_t want = 0x5a5a5a5a;
                if (m < rows && n < columns) {
                    want = (uint32_t)sums[m][n];
                    for (int k = 0; k < 4 * depth; k++)
                        want += (uint32_t)(a[m][k] * b[k / 4][4 * n + k % 4]);
                }
                check_equal(c, &all[m][n], &want, 4, "[%d][%d]", m, n);
            }
    }
}

// ---- faults -----------------------------------------------------------------------------------

static void not_configured(void)
{
    TILE_ZERO(0);
}
static void released(void)
{
    tile_config config = all_full();
    TILE_CONFIGURE(&config);
    TILE_RELEASE();
    TILE_ZERO(0);
}
static void wrong_palette(void)
{
    tile_config config = all_full();
    config.palette = 2;
    TILE_CONFIGURE(&config);
}
static void reserved_bytes(void)
{
    tile_config config = all_full();
    config.reserved[13] = 1;
    TILE_CONFIGURE(&config);
}
static void ninth_tile(void)
{
    tile_config config = all_full();
    config.row_bytes[8] = 64;
    TILE_CONFIGURE(&config);
}
static void ninth_tile_rows(void)
{
    tile_config config = all_full();
    config.rows[8] = 1;
    TILE_CONFIGURE(&config);
}
static void too_many_rows(void)
{
    tile_config config = all_full();
    config.rows[0] = 17;
    TILE_CONFIGURE(&config);
}
static void too_long_rows(void)
{
    tile_config config = all_full();
    config.row_bytes[7] = 68;
    TILE_CONFIGURE(&config);
}
static void rows_without_bytes(void)
{
    tile_config config = all_full();
    config.row_bytes[7] = 0;
    TILE_CONFIGURE(&config);
}
static void unused_tile(void)
{
    tile_config config = all_full();
    shape_tile(&config, 4, 0, 0);
    TILE_CONFIGURE(&config);
    TILE_ZERO(4);
}
static void multiply_shaped(int tile, int rows, int row_bytes)
{
    tile_config config = all_full();
    shape_tile(&config, tile, rows, row_bytes);
    TILE_CONFIGURE(&config);
    TILE_DOT_BF16(0, 1, 2);
}
static void rows_differ(void)
{
    multiply_shaped(1, 15, 64);
}
static void columns_differ(void)
{
    multiply_shaped(0, 16, 60);
}
static void depth_differs(void)
{
    multiply_shaped(2, 15, 64);
}
static void odd_bytes(void)
{
    multiply_shaped(1, 16, 62);
}
static void same_tile(void)
{
    tile_config config = all_full();
    TILE_CONFIGURE(&config);
    TILE_DOT_INT8(0, 0, 1);
}

// Runs `act` in a child: its exit status, and nothing of what it prints.
static int status_of(void (*act)(void))
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (freopen("/dev/null", "w", stdout) == NULL) _exit(99);
        act();
        _exit(0);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status)
               ? WEXITSTATUS(status)
               : -1;
}

CHECK_GROUP_ONCE(tiles)
{
    check_bf16(c);
    check_shapes(c);
    CHECK(c, tiles_configured() == 0, "nothing is left");
    tile_config config = all_full();
    TILE_CONFIGURE(&config);
    TILE_CONFIGURE(&config);
    CHECK(c, tiles_configured() == 1, "what is left is counted");
    TILE_RELEASE();
    TILE_RELEASE();
    CHECK(c, tiles_configured() == 0, "and what is released");

    const struct {
        const char *name;
        void (*act)(void);
    } faults[] = {
#define FAULT(name) {#name, name}
        FAULT(not_configured), FAULT(released),      FAULT(wrong_palette),
        FAULT(reserved_bytes), FAULT(ninth_tile),    FAULT(ninth_tile_rows),
        FAULT(too_many_rows),  FAULT(too_long_rows), FAULT(rows_without_bytes),
        FAULT(unused_tile),    FAULT(rows_differ),   FAULT(columns_differ),
        FAULT(depth_differs),  FAULT(odd_bytes),     FAULT(same_tile),
#undef FAULT
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        CHECK(c, status_of(faults[i].act) == 3, "%s is no fault", faults[i].name);
}
#endif
