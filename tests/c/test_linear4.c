// Products with 4-bit weights: each kernel of both sets against its contract in kernels_linear4.h,
// then hb_linear_4bit and hb_linear_4bit_grad_input against sums in double.
//
// Bounds are those of the header; the double results are formed from values rounded as the set
// rounds them, so that only float32 sums remain to be bounded.
#include "check.h"

#include <math.h>
#include <stdio.h>

#define UNIT 0x1p-24

// A 4-bit matrix with plain scales; packed and absmax end at unreadable pages.
typedef struct {
    int64_t rows, depth, blocksize;
    uint8_t *packed;
    float *absmax;
    _Alignas(64) float codebook[16];
} matrix4;

static matrix4 random_matrix(check *c, hb_format4 format, int64_t rows, int64_t depth,
                             int64_t blocksize)
{
    matrix4 w = {.rows = rows, .depth = depth, .blocksize = blocksize};
    int64_t n_blocks = hb_ceil_div(rows * depth, blocksize);
    w.packed = check_buffer(c, (size_t)(rows * depth + 1) / 2, CHECK_END);
    w.absmax = check_buffer(c, (size_t)n_blocks * sizeof(float), CHECK_END);
    check_fill_bytes(c, w.packed, (size_t)(rows * depth + 1) / 2);
    for (int64_t i = 0; i < n_blocks; i++) w.absmax[i] = 0.25f + fabsf(check_random_normal(c));
    memcpy(w.codebook, hb_codebook4_get(format)->value, sizeof w.codebook);
    return w;
}

static float code_value(const matrix4 *w, int64_t row, int64_t column)
{
    int64_t i = row * w->depth + column;
    return w->codebook[i % 2 == 0 ? w->packed[i / 2] >> 4 : w->packed[i / 2] & 15];
}

static float scale_of(const matrix4 *w, int64_t row, int64_t column)
{
    return w->absmax[(row * w->depth + column) / w->blocksize];
}

static float bf16_of(float value)
{
    return hb_f32_from_bf16(hb_bf16_from_f32(value));
}

static hb_matrix4 block_at(const matrix4 *w, int64_t row, int64_t column)
{
    int64_t i = row * w->depth + column;
    return (hb_matrix4){.packed = w->packed + i / 2,
                        .row_bytes = w->depth / 2,
                        .absmax = w->absmax + i / w->blocksize,
                        .absmax_stride = w->depth / w->blocksize,
                        .blocksize = w->blocksize,
                        .codebook = w->codebook};
}

static int64_t round_up(int64_t n, int64_t multiple)
{
    return hb_ceil_div(n, multiple) * multiple;
}

// Random x of `dtype` [rows, stride], and its values as float32, rounded when the set rounds them.
static void *random_x(check *c, hb_dtype dtype, int64_t n, bool bf16, float *values)
{
    void *x = check_buffer(c, (size_t)n * hb_dtype_bytes(dtype), CHECK_END);
    check_fill_normal(c, values, n, 1.0f);
    check_convert(values, x, n, dtype);
    for (int64_t i = 0; bf16 && i < n; i++) values[i] = bf16_of(values[i]);
    return x;
}

// What begin and end enclose, where a set has them.
static void run_tile(const hb_linear4_set *set, const void *packed, const void *panel,
                     int64_t steps, int n_x, bool accumulate, float *sums)
{
    if (set->begin != NULL) set->begin();
    set->tile(packed, panel, steps, n_x, accumulate, sums);
    if (set->end != NULL) set->end();
}

// ---- kernels ----------------------------------------------------------------------------------

static void check_dot(check *c, const hb_linear4_set *set, bool bf16, int64_t rows, int64_t depth,
                      int64_t blocksize, int n_x, hb_dtype dtype)
{
    check_label(c, "dot%s rows=%d depth=%d blocksize=%d n_x=%d dtype=%d", bf16 ? " bf16" : "",
                (int)rows, (int)depth, (int)blocksize, n_x, (int)dtype);
    matrix4 w = random_matrix(c, rows % 2 ? HB_NF4 : HB_FP4, rows, depth, blocksize);
    int64_t padded = round_up(depth, HB_LINEAR4_X_GROUP), y_stride = rows + 3;
    float *values = check_buffer(c, (size_t)(n_x * depth) * 4, CHECK_END);
    void *x = random_x(c, dtype, n_x * depth, bf16, values);
    unsigned char *permuted =
        check_buffer(c, (size_t)(n_x * padded * set->element_bytes), CHECK_END);
    for (int t = 0; t < n_x; t++)
        set->permute_x((char *)x + (size_t)(t * depth) * hb_dtype_bytes(dtype), dtype, depth,
                       permuted + t * padded * set->element_bytes);
    size_t y_bytes = (size_t)((n_x - 1) * y_stride + rows) * 4;
    float *y = check_buffer(c, y_bytes, CHECK_END), *one = check_buffer(c, y_bytes, CHECK_END);
    hb_matrix4 block = block_at(&w, 0, 0);
    set->dot(&block, rows, depth, permuted, n_x, y, y_stride);
    for (int64_t r = 0; r < rows; r++) {
        hb_matrix4 row = block_at(&w, r, 0);
        set->dot(&row, 1, depth, permuted, n_x, one + r, y_stride);
    }
    check_equal(c, one, y, y_bytes, "rows one by one");
    double bound_factor = ((double)depth / 128 + 22) * UNIT;
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0, magnitude = 0;
            for (int64_t k = 0; k < depth; k++) {
                float code = code_value(&w, r, k);
                double product = (double)(bf16 ? bf16_of(code) : code) * scale_of(&w, r, k) *
                                 values[t * depth + k];
                sum += product;
                magnitude += fabs(product);
            }
            double bound = bound_factor * magnitude;
            check_close(c, &y[t * y_stride + r], &sum, &bound, 1, "t=%d r=%d", t, (int)r);
        }
    check_release(c);
}

// The step at a place of a panel or packed x: as kernels_linear4.h has it, the other way round.
static int64_t step_at(const hb_linear4_set *set, int64_t place)
{
    return set->pair == 1 ? place : place / 16 * 16 + place % 2 * 8 + place % 16 / 2;
}

static void check_pack_and_tile(check *c, const hb_linear4_set *set, bool bf16, int64_t steps,
                                int n_x, hb_dtype dtype)
{
    check_label(c, "tile%s steps=%d n_x=%d dtype=%d", bf16 ? " bf16" : "", (int)steps, n_x,
                (int)dtype);
    const int64_t rows = set->tile_rows, cols = set->tile_cols, x_stride = steps + 5;
    const int64_t padded = round_up(steps, set->x_block), pair = set->pair;
    const int64_t n_panel = round_up(steps, pair == 1 ? 1 : 16) * cols;
    int64_t n_values = (n_x - 1) * x_stride + steps;
    float *values = check_buffer(c, (size_t)n_values * 4, CHECK_END);
    void *x = random_x(c, dtype, n_values, bf16, values);
    void *packed = check_buffer(c, (size_t)(padded * rows * set->element_bytes), CHECK_END);
    set->pack_x(x, dtype, x_stride, n_x, steps, packed);
    for (int64_t place = 0; place < padded; place++)
        for (int64_t t = 0; t < rows; t++) {
            const int64_t s = step_at(set, place);
            int64_t at = (place / set->x_block * rows + t) * set->x_block + place % set->x_block;
            float got = hb_load_f32(packed, at, set->element_bytes == 4 ? HB_F32 : HB_BF16);
            float want = t < n_x && s < steps ? values[t * x_stride + s] : 0.0f;
            check_equal(c, &got, &want, 4, "packed s=%d t=%d", (int)s, (int)t);
        }

    hb_dtype panel_type = set->element_bytes == 4 ? HB_F32 : HB_BF16;
    float *weights = check_buffer(c, (size_t)n_panel * 4, CHECK_END);
    void *panel = check_buffer(c, (size_t)(n_panel * set->element_bytes), CHECK_END);
    check_fill_normal(c, weights, n_panel, 1.0f);
    for (int64_t i = 0; i < n_panel; i++) {
        if (step_at(set, i / (cols * pair) * pair + i % pair) >= steps) weights[i] = 0.0f;
        if (bf16) weights[i] = bf16_of(weights[i]);
        hb_store_f32(panel, i, panel_type, weights[i]);
    }
    size_t bytes = (size_t)(rows * cols) * 4;
    float *first = check_buffer(c, bytes, CHECK_END), *sums = check_buffer(c, bytes, CHECK_END);
    float *one = check_buffer(c, bytes, CHECK_END);
    uint8_t untouched[4];
    memcpy(untouched, first, 4);
    run_tile(set, packed, panel, steps, n_x, false, first);
    memcpy(sums, first, bytes);
    run_tile(set, packed, panel, steps, n_x, true, sums);
    // A row alone: pack it alone as row 0 of another tile.
    int64_t t_alone = n_x - 1;
    set->pack_x((char *)x + (size_t)(t_alone * x_stride) * hb_dtype_bytes(dtype), dtype, x_stride,
                1, steps, packed);
    run_tile(set, packed, panel, steps, 1, false, one);
    check_equal(c, one, first + t_alone * cols, (size_t)cols * 4, "a row alone");
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < cols; j++) {
            if (t >= n_x) {
                check_equal(c, &sums[t * cols + j], untouched, 4, "sums beyond n_x");
                continue;
            }
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < n_panel / cols; i++) {
                const int64_t s = step_at(set, i);
                if (s >= steps) continue;
                double product = (double)values[t * x_stride + s] *
                                 weights[(i / pair * cols + j) * pair + i % pair];
                sum += product;
                magnitude += fabs(product);
            }
            double bound = ((double)steps + 1) * UNIT * magnitude;
            check_close(c, &first[t * cols + j], &sum, &bound, 1, "t=%d c=%d", (int)t, (int)j);
            double twice = 2 * sum, twice_bound = 2 * bound + 2 * UNIT * fabs(sum);
            check_close(c, &sums[t * cols + j], &twice, &twice_bound, 1, "added t=%d c=%d", (int)t,
                        (int)j);
        }
    check_release(c);
}

// Weight (row, column) of the panel's matrix as the set stores it.
static float panel_weight(const matrix4 *w, bool bf16, int64_t row, int64_t column)
{
    float value = code_value(w, row, column) * scale_of(w, row, column);
    return bf16 ? bf16_of(value) : value;
}

static void check_decode(check *c, const hb_linear4_set *set, bool bf16, bool by_rows,
                         int64_t n_rows, int64_t column, int64_t n_cols, int64_t depth,
                         int64_t blocksize)
{
    check_label(c, "decode_%s%s rows=%d columns=%d+%d of %d blocksize=%d",
                by_rows ? "rows" : "cols", bf16 ? " bf16" : "", (int)n_rows, (int)column,
                (int)n_cols, (int)depth, (int)blocksize);
    matrix4 w = random_matrix(c, n_rows % 2 ? HB_FP4 : HB_NF4, n_rows, depth, blocksize);
    const int64_t cols = set->tile_cols, pair = set->pair;
    int64_t steps = by_rows ? n_cols : n_rows;
    int64_t n = round_up(steps, pair == 1 ? 1 : 16) * cols;
    hb_dtype type = set->element_bytes == 4 ? HB_F32 : HB_BF16;
    void *panel = check_buffer(c, (size_t)(n * set->element_bytes), CHECK_END);
    hb_matrix4 block = block_at(&w, 0, column);
    if (by_rows)
        set->decode_rows(&block, n_rows, n_cols, panel);
    else
        set->decode_cols(&block, n_rows, n_cols, panel);
    for (int64_t i = 0; i < n; i++) {
        int64_t step = step_at(set, i / (cols * pair) * pair + i % pair), place = i / pair % cols;
        int64_t row = by_rows ? place : step, k = by_rows ? step : set->column_order[place];
        float got = hb_load_f32(panel, i, type), want;
        if (by_rows ? row >= n_rows : k >= n_cols) continue;
        want = !by_rows && row >= n_rows ? 0.0f : panel_weight(&w, bf16, row, column + k);
        check_equal(c, &got, &want, 4, "step=%d place=%d", (int)step, (int)place);
    }
    check_release(c);
}

// Weights are those of panels, the sums are panel_steps roundings at most from where they began.
// Columns of W do not know where in the matrix they lie, nor sums how many rows of dy there are.
static void check_add(check *c, const hb_linear4_set *set, bool bf16, int64_t n_rows,
                      int64_t column, int64_t n_cols, int64_t depth, int64_t blocksize, int n_x)
{
    check_label(c, "add_rows%s rows=%d columns=%d+%d of %d blocksize=%d n_x=%d",
                bf16 ? " bf16" : "", (int)n_rows, (int)column, (int)n_cols, (int)depth,
                (int)blocksize, n_x);
    matrix4 w = random_matrix(c, n_rows % 2 ? HB_NF4 : HB_FP4, n_rows, depth, blocksize);
    const int64_t stride = round_up(n_cols, HB_LINEAR4_ADD_GROUP), padded = n_rows + 5;
    float *values = check_buffer(c, (size_t)(n_x * padded) * 4, CHECK_END);
    void *dy = random_x(c, HB_F32, n_x * padded, bf16, values);
    void *packed = check_buffer(
        c, (size_t)(round_up(n_rows, set->x_block) * set->tile_rows * set->element_bytes),
        CHECK_END);
    set->pack_x(dy, HB_F32, padded, n_x, n_rows, packed);
    const size_t bytes = (size_t)(n_x * stride) * 4;
    float *sums = check_buffer(c, bytes, CHECK_END), *before = check_buffer(c, bytes, CHECK_END);
    check_fill_normal(c, before, n_x * stride, 1.0f);
    memcpy(sums, before, bytes);
    hb_matrix4 block = block_at(&w, 0, column);
    set->add_rows(&block, n_rows, n_cols, packed, n_x, sums, stride);
    for (int t = 0; t < n_x; t++)
        for (int64_t i = 0; i < stride; i++) {
            const int64_t within = i % HB_LINEAR4_ADD_GROUP,
                          k = i - within + set->add_order[within];
            if (k >= n_cols) continue;
            double sum = before[t * stride + i], magnitude = fabs(sum);
            for (int64_t r = 0; r < n_rows; r++) {
                double product =
                    (double)values[t * padded + r] * panel_weight(&w, bf16, r, column + k);
                sum += product;
                magnitude += fabs(product);
            }
            double bound = ((double)n_rows + 1) * UNIT * magnitude;
            check_close(c, &sums[t * stride + i], &sum, &bound, 1, "t=%d column=%d", t, (int)k);
        }
    // The last row of dy alone, the second half of the columns alone.
    float *one = check_buffer(c, (size_t)stride * 4, CHECK_END);
    const float *last = sums + (n_x - 1) * stride;
    memcpy(one, before + (n_x - 1) * stride, (size_t)stride * 4);
    set->pack_x((float *)dy + (n_x - 1) * padded, HB_F32, padded, 1, n_rows, packed);
    const int64_t middle = n_cols / 2 / HB_LINEAR4_ADD_GROUP * HB_LINEAR4_ADD_GROUP;
    if (middle % blocksize == 0 || blocksize % depth == 0) {
        hb_matrix4 right = block_at(&w, 0, column + middle);
        set->add_rows(&right, n_rows, n_cols - middle, packed, 1, one + middle, stride);
        if (middle > 0) set->add_rows(&block, n_rows, middle, packed, 1, one, stride);
    } else {
        set->add_rows(&block, n_rows, n_cols, packed, 1, one, stride);
    }
    for (int64_t i = 0; i < stride; i++)
        if (i / HB_LINEAR4_ADD_GROUP * HB_LINEAR4_ADD_GROUP +
                set->add_order[i % HB_LINEAR4_ADD_GROUP] <
            n_cols)
            check_equal(c, &one[i], &last[i], 4, "a row alone, in two parts, place %d", (int)i);
    check_release(c);
}

static void check_adds(check *c, const hb_linear4_set *set, bool bf16)
{
    static const int64_t shapes[][2] = {{32, 32},   {64, 64},  {96, 32},   {128, 128},
                                        {160, 32},  {192, 64}, {320, 64},  {256, 256},
                                        {512, 128}, {480, 32}, {1024, 256}};
    static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63};
    uint8_t seen[HB_LINEAR4_ADD_GROUP] = {0};
    CHECK(c, (set->add_rows == NULL) == (set->add_until == 0), "add_until without add_rows");
    CHECK(c, set->add_until <= set->tile_rows, "add_until %d", (int)set->add_until);
    if (set->add_rows == NULL) return;
    for (int i = 0; i < HB_LINEAR4_ADD_GROUP; i++) seen[set->add_order[i]]++;
    for (int i = 0; i < HB_LINEAR4_ADD_GROUP; i++)
        CHECK(c, seen[i] == 1, "add_order is no permutation");
    for (int i = 0; i < 11; i++) {
        const int64_t depth = shapes[i][0], blocksize = shapes[i][1];
        for (int r = 0; r < 12; r += c->emulated ? 3 : 1)
            for (int n_x = 1; n_x <= set->add_until; n_x++) {
                const int64_t column = check_random_below(c, hb_ceil_div(depth, 128)) * 128;
                const int64_t begin = column / blocksize * blocksize;
                check_add(c, set, bf16, rows[r], begin, depth - begin, depth, blocksize, n_x);
            }
        check_add(c, set, bf16, set->panel_steps, 0, depth, depth, blocksize, 1);
    }
    check_add(c, set, bf16, 0, 0, 64, 64, 64, 1);
}

static void check_set(check *c, const hb_linear4_set *set, bool bf16)
{
    static const int64_t dot_shapes[][3] = {
        {1, 32, 32},  {3, 64, 64},  {2, 96, 32},   {5, 128, 32},   {4, 128, 128},  {7, 192, 64},
        {3, 160, 32}, {2, 256, 64}, {6, 512, 256}, {2, 1024, 512}, {1, 4096, 4096}};
    uint8_t seen[HB_LINEAR4_MAX_TILE_COLS] = {0};
    for (int i = 0; i < set->tile_cols; i++) seen[set->column_order[i]]++;
    for (int i = 0; i < set->tile_cols; i++)
        CHECK(c, seen[i] == 1, "column_order is no permutation");
    CHECK(c, set->x_block == 16 || set->x_block == 32, "x_block %d", set->x_block);
    CHECK(c, (set->begin == NULL) == (set->end == NULL), "begin without end");

    int step = c->emulated ? 3 : 1;
    for (int i = 0; i < 11; i++)
        for (int n_x = 1; n_x <= set->dot_rows; n_x++)
            check_dot(c, set, bf16, dot_shapes[i][0], dot_shapes[i][1], dot_shapes[i][2], n_x,
                      (hb_dtype)((i + n_x) % HB_IO_COUNT));
    check_dot(c, set, bf16, 0, 64, 64, 1, HB_F32);

    static const int64_t steps[] = {1, 2, 3, 15, 16, 17, 33, 100, 127, 128};
    for (int i = 0; i < 10; i++)
        for (int n_x = 1; n_x <= set->tile_rows; n_x += step)
            check_pack_and_tile(c, set, bf16, steps[i], n_x, (hb_dtype)((i + n_x) % HB_IO_COUNT));
    check_pack_and_tile(c, set, bf16, set->panel_steps, set->tile_rows, HB_F32);

    check_adds(c, set, bf16);

    const int64_t cols = set->tile_cols, panel = set->panel_steps;
    static const int64_t panel_shapes[][2] = {{32, 32},   {64, 64},    {96, 32},  {128, 128},
                                              {128, 32},  {192, 64},   {256, 64}, {256, 256},
                                              {512, 512}, {1024, 256}, {480, 32}};
    for (int i = 0; i < 11; i++) {
        int64_t depth = panel_shapes[i][0], blocksize = panel_shapes[i][1];
        for (int64_t n = 1; n <= cols; n += n < 3 ? 1 : 13) {
            int64_t column = check_random_below(c, hb_ceil_div(depth, panel)) * panel;
            int64_t count = depth - column < panel ? depth - column : panel;
            check_decode(c, set, bf16, true, n, column, count, depth, blocksize);
        }
        check_decode(c, set, bf16, true, cols, 0, depth < panel ? depth : panel, depth, blocksize);
        for (int64_t n = 1; n <= panel; n = n * 3 + 1) {
            int64_t column = check_random_below(c, hb_ceil_div(depth, cols)) * cols;
            int64_t count = depth - column < cols ? depth - column : cols;
            check_decode(c, set, bf16, false, n, column, count, depth, blocksize);
        }
        check_decode(c, set, bf16, false, panel, 0, depth < cols ? depth : cols, depth, blocksize);
    }
}

static void check_finish(check *c)
{
    for (hb_dtype dtype = 0; dtype < HB_IO_COUNT; dtype++)
        for (int64_t n = 0; n <= 64; n += n < 36 ? 1 : 7)
            for (int biased = 0; biased < 2; biased++) {
                check_label(c, "finish n=%d dtype=%d bias=%d", (int)n, (int)dtype, biased);
                float *sums = check_buffer(c, 64 * 4, CHECK_BEGIN);
                float *bias = check_buffer(c, (size_t)n * 4, CHECK_END);
                check_fill_wild(c, sums, 64, true);
                check_fill_wild(c, bias, n, false);
                size_t bytes = (size_t)n * hb_dtype_bytes(dtype);
                void *got = check_buffer(c, bytes, CHECK_END),
                     *want = check_buffer(c, bytes, CHECK_END);
                c->kernels->linear4.finish(sums, biased ? bias : NULL, n, dtype, got);
                for (int64_t i = 0; i < n; i++)
                    hb_store_f32(want, i, dtype, biased ? sums[i] + bias[i] : sums[i]);
                check_equal(c, got, want, bytes, "y");
                check_release(c);
            }
}

static void bench_set(check *c, const hb_linear4_set *set, const char *name)
{
    enum { ROWS = 512, DEPTH = 4096 };
    if (!c->bench) return;
    matrix4 w = random_matrix(c, HB_NF4, ROWS, DEPTH, 64);
    hb_matrix4 block = block_at(&w, 0, 0);
    void *x = check_buffer(c, DEPTH * 4, CHECK_BEGIN);
    check_fill_normal(c, x, DEPTH, 1.0f);
    void *permuted =
        check_buffer(c, (size_t)(DEPTH * set->element_bytes * set->dot_rows), CHECK_BEGIN);
    for (int t = 0; t < set->dot_rows; t++)
        set->permute_x(x, HB_F32, DEPTH, (char *)permuted + t * DEPTH * set->element_bytes);
    float *y = check_buffer(c, ROWS * 4 * (size_t)set->dot_rows, CHECK_BEGIN);
    char label[64];
    double weight_bytes = ROWS * DEPTH * (0.5 + 4.0 / 64), products = 2.0 * ROWS * DEPTH;
    snprintf(label, sizeof label, "linear4 dot %s, 1 row", name);
    CHECK_BENCH(c, b, label, weight_bytes, products)
    set->dot(&block, ROWS, DEPTH, permuted, 1, y, ROWS);
    snprintf(label, sizeof label, "linear4 dot %s, %d rows", name, (int)set->dot_rows);
    CHECK_BENCH(c, b, label, weight_bytes, products * set->dot_rows)
    set->dot(&block, ROWS, DEPTH, permuted, set->dot_rows, y, ROWS);

    int64_t steps = set->panel_steps, cols = set->tile_cols, rows = set->tile_rows;
    if (set->add_rows != NULL) {
        enum { COLS = 1024 };
        void *dy = check_buffer(c, (size_t)(steps * rows * set->element_bytes), CHECK_BEGIN);
        set->pack_x(x, HB_F32, steps, 1, steps, dy);
        float *columns = check_buffer(c, COLS * 4, CHECK_BEGIN);
        memset(columns, 0, COLS * 4);
        snprintf(label, sizeof label, "linear4 add_rows %s, 1 row", name);
        CHECK_BENCH(c, b, label, (double)(steps * COLS) * (0.5 + 4.0 / 64),
                    2.0 * (double)(steps * COLS))
        set->add_rows(&block, steps, COLS, dy, 1, columns, COLS);
    }
    void *panel = check_buffer(c, (size_t)(steps * cols * set->element_bytes), CHECK_BEGIN);
    void *packed = check_buffer(c, (size_t)(steps * rows * set->element_bytes), CHECK_BEGIN);
    memset(packed, 0, (size_t)(steps * rows * set->element_bytes));
    float *sums = check_buffer(c, (size_t)(rows * cols) * 4, CHECK_BEGIN);
    double panel_bytes = (double)(steps * cols) * (0.5 + 4.0 / 64 + set->element_bytes);
    snprintf(label, sizeof label, "linear4 decode_rows %s", name);
    CHECK_BENCH(c, b, label, panel_bytes, 0) set->decode_rows(&block, cols, steps, panel);
    snprintf(label, sizeof label, "linear4 decode_cols %s", name);
    CHECK_BENCH(c, b, label, panel_bytes, 0) set->decode_cols(&block, steps, cols, panel);
    snprintf(label, sizeof label, "linear4 tile %s", name);
    CHECK_BENCH(c, b, label, 0, 2.0 * (double)(steps * cols * rows))
    run_tile(set, packed, panel, steps, (int)rows, false, sums);
    check_release(c);
}

CHECK_GROUP(linear4)
{
    const hb_kernels_linear4 *kernels = &c->kernels->linear4;
    if (CHECK_NEW(c, linear4.f32.dot) || CHECK_NEW(c, linear4.f32.tile)) {
        if (!c->bench) check_set(c, &kernels->f32, false);
        bench_set(c, &kernels->f32, "f32");
    }
    if (CHECK_NEW(c, linear4.bf16.dot) || CHECK_NEW(c, linear4.bf16.tile)) {
        if (!c->bench) check_set(c, &kernels->bf16, true);
        bench_set(c, &kernels->bf16, "bf16");
    }
    if (CHECK_NEW(c, linear4.finish) && !c->bench) check_finish(c);
}

// ---- operations -------------------------------------------------------------------------------

typedef struct {
    int64_t m, rows, depth, blocksize;
    bool nested, backward, bf16, strided, biased;
    hb_dtype x_dtype, y_dtype;
} op_case;

// A random [m, cols] view of dtype; strided: every second column of every third row.
static hb_view random_view(check *c, int64_t m, int64_t cols, hb_dtype dtype, bool strided,
                           float *values)
{
    int64_t col_stride = strided ? 2 : 1, row_stride = strided ? 3 * (2 * cols + 1) : cols;
    int64_t n = m == 0 || cols == 0 ? 0 : (m - 1) * row_stride + (cols - 1) * col_stride + 1;
    unsigned char *data = check_buffer(c, (size_t)n * hb_dtype_bytes(dtype), CHECK_END);
    for (int64_t i = 0; values != NULL && i < m * cols; i++) {
        float value = check_random_normal(c);
        int64_t at = i / cols * row_stride + i % cols * col_stride;
        hb_store_f32(data, at, dtype, value);
        values[i] = hb_load_f32(data, at, dtype);
    }
    return (hb_view){.data = data,
                     .dtype = dtype,
                     .device = {HB_CPU, 0, NULL},
                     .ndim = 2,
                     .shape = {m, cols},
                     .stride = {row_stride, col_stride}};
}

// The relative rounding unit of a dtype, and half its smallest subnormal.
static double unit_of(hb_dtype dtype, double *smallest)
{
    *smallest = dtype == HB_F16 ? 0x1p-25 : 0x1p-134;
    return dtype == HB_F32 ? UNIT : dtype == HB_BF16 ? 0x1p-8 : 0x1p-11;
}

static void check_op(check *c, const op_case *o)
{
    check_label(
        c, "op m=%d %dx%d blocksize=%d nested=%d backward=%d bf16=%d strided=%d bias=%d x=%d y=%d",
        (int)o->m, (int)o->rows, (int)o->depth, (int)o->blocksize, o->nested, o->backward, o->bf16,
        o->strided, o->biased, (int)o->x_dtype, (int)o->y_dtype);
    matrix4 w = random_matrix(c, o->rows % 2 ? HB_NF4 : HB_FP4, o->rows, o->depth, o->blocksize);
    int64_t n_blocks = hb_ceil_div(o->rows * o->depth, o->blocksize);
    hb_tensor4 tensor = {.format = o->rows % 2 ? HB_NF4 : HB_FP4,
                         .blocksize = o->blocksize,
                         .numel = o->rows * o->depth,
                         .rows = o->rows,
                         .depth = o->depth,
                         .packed = w.packed,
                         .absmax = w.absmax};
    float map[256];
    if (o->nested) {
        uint8_t *codes = check_buffer(c, (size_t)n_blocks, CHECK_END);
        float *nested = check_buffer(c, (size_t)hb_ceil_div(n_blocks, 256) * 4, CHECK_END);
        check_fill_bytes(c, codes, (size_t)n_blocks);
        for (int i = 0; i < 256; i++) map[i] = (float)(i - 128) / 256.0f;
        for (int64_t i = 0; i < hb_ceil_div(n_blocks, 256); i++) nested[i] = 0.5f + (float)(i % 3);
        tensor.absmax = NULL;
        tensor.absmax_codes = codes;
        tensor.nested_absmax = nested;
        tensor.nested_map = map;
        tensor.nested_offset = 1.75f;
        tensor.nested_blocksize = 256;
        hb_expand_absmax(c->context, &tensor, 0, n_blocks, w.absmax);
    }
    int64_t steps = o->backward ? o->rows : o->depth, outputs = o->backward ? o->depth : o->rows;
    float *x_values = check_buffer(c, (size_t)(o->m * steps) * 4, CHECK_END);
    float *bias_values = check_buffer(c, (size_t)outputs * 4, CHECK_END);
    hb_view x = random_view(c, o->m, steps, o->x_dtype, o->strided, x_values);
    hb_view bias = random_view(c, 1, outputs, o->y_dtype, o->strided, bias_values);
    bias.ndim = 1;
    bias.shape[0] = outputs;
    bias.stride[0] = bias.stride[1];
    hb_compute compute = o->bf16 ? HB_COMPUTE_BF16 : HB_COMPUTE_F32;
    float *first = check_buffer(c, (size_t)(o->m * outputs) * 4, CHECK_END);
    for (int threads = 1; threads <= 3; threads++) {
        hb_pool_set_threads(c->context->pool, threads);
        hb_view y = random_view(c, o->m, outputs, o->y_dtype, o->strided, NULL);
        hb_error error = {{0}};
        hb_status status =
            o->backward
                ? hb_linear_4bit_grad_input(c->context, &x, &tensor, compute, &y, NULL, &error)
                : hb_linear_4bit(c->context, &x, &tensor, o->biased ? &bias : NULL, compute, &y,
                                 NULL, &error);
        CHECK(c, status == HB_OK, "status %d: %s", (int)status, error.text);
        for (int64_t i = 0; i < o->m * outputs; i++) {
            int64_t at = i / outputs * y.stride[0] + i % outputs * y.stride[1];
            float value = hb_load_f32(y.data, at, o->y_dtype);
            if (threads == 1)
                first[i] = value;
            else
                check_equal(c, &value, &first[i], 4, "%d threads, element %d", threads, (int)i);
        }
    }
    const hb_linear4_set *set = o->bf16 ? &c->kernels->linear4.bf16 : &c->kernels->linear4.f32;
    double factor = (fmin((double)steps, set->panel_steps) + (double)steps / 128 + 22) * UNIT;
    if (o->bf16) factor += 0x1p-7 + 0x1p-15; // x and the weight rounded by at most 2^-8 each
    double smallest, unit = unit_of(o->y_dtype, &smallest);
    for (int64_t i = 0; i < o->m * outputs; i++) {
        double sum = 0, magnitude = 0;
        for (int64_t s = 0; s < steps; s++) {
            int64_t row = o->backward ? s : i % outputs, column = o->backward ? i % outputs : s;
            double product = (double)code_value(&w, row, column) * scale_of(&w, row, column) *
                             x_values[i / outputs * steps + s];
            sum += product;
            magnitude += fabs(product);
        }
        double bound = factor * magnitude;
        if (o->biased && !o->backward) {
            sum += bias_values[i % outputs];
            bound += UNIT * (fabs(sum) + bound);
        }
        bound += unit * (fabs(sum) + bound) + smallest;
        check_close(c, &first[i], &sum, &bound, 1, "element %d", (int)i);
    }
    check_release(c);
}

CHECK_GROUP(linear4_op)
{
    static const int64_t depths[] = {1,   31,  32,  33,  64,  100, 128, 160,
                                     192, 256, 288, 320, 384, 448, 512, 640};
    const bool is_new = CHECK_NEW(c, linear4.f32.dot) || CHECK_NEW(c, linear4.bf16.dot) ||
                        CHECK_NEW(c, linear4.f32.tile) || CHECK_NEW(c, linear4.bf16.tile);
    if (!is_new || c->bench) return;
    int count = c->emulated ? 60 : 400;
    for (int i = 0; i < count; i++) {
        uint64_t bits = check_random(c);
        int64_t depth = depths[check_random_below(c, 16)];
        int64_t rows = 1 + check_random_below(c, bits & 1 ? 16 : 200);
        int64_t m = 1 + check_random_below(c, bits & 2 ? 4 : 40);
        if (c->emulated) rows = 1 + rows / 4;
        op_case o = {.m = m,
                     .rows = rows,
                     .depth = depth,
                     .blocksize = (int64_t)32 << check_random_below(c, 8),
                     .nested = bits & 4,
                     .backward = bits & 8,
                     .bf16 = bits & 16,
                     .strided = (bits & 96) == 0,
                     .biased = bits & 128,
                     .x_dtype = (hb_dtype)check_random_below(c, HB_IO_COUNT),
                     .y_dtype = (hb_dtype)check_random_below(c, HB_IO_COUNT)};
        check_op(c, &o);
    }
    check_op(c, &(op_case){.m = 0, .rows = 3, .depth = 64, .blocksize = 64});
    check_op(c, &(op_case){.m = 2, .rows = 0, .depth = 64, .blocksize = 64});
    check_op(c, &(op_case){.m = 2, .rows = 3, .depth = 0, .blocksize = 64, .biased = true});
    check_op(c, &(op_case){.m = 2, .rows = 0, .depth = 64, .blocksize = 64, .backward = true});
    if (!c->emulated) { // large enough for several threads, several passes over x
        check_op(c, &(op_case){.m = 1, .rows = 1100, .depth = 2048, .blocksize = 64});
        check_op(c, &(op_case){.m = 600, .rows = 70, .depth = 256, .blocksize = 64, .bf16 = true});
        // Chunks of the add regime: columns that do not fill them, blocks that begin inside one or
        // straddle rows, several times panel_steps rows.
        static const int64_t shapes[][3] = {{700, 1120, 64},   {530, 2304, 256},  {300, 2048, 2048},
                                            {400, 3072, 4096}, {260, 1120, 4096}, {517, 1536, 512}};
        for (int i = 0; i < 6; i++)
            for (int m = 1; m <= 5; m += i % 2 + 1)
                check_op(c, &(op_case){.m = m,
                                       .rows = shapes[i][0],
                                       .depth = shapes[i][1],
                                       .blocksize = shapes[i][2],
                                       .nested = (i + m) % 3 == 0,
                                       .bf16 = (i + m) % 4 < 2,
                                       .strided = m == 3,
                                       .x_dtype = (hb_dtype)(m % HB_IO_COUNT),
                                       .backward = true});
        check_op(c,
                 &(op_case){.m = 300, .rows = 64, .depth = 128, .blocksize = 64, .backward = true});
        // Groups of panels, larger ones on fewer threads, the last of them not full; blocks that
        // straddle rows, and nested scales: a row of expanded scales for each output of a group.
        for (int i = 0; i < 8; i++)
            check_op(c, &(op_case){.m = 17,
                                   .rows = i % 2 ? 520 : 1096,
                                   .depth = i % 2 ? 2080 : 544,
                                   .blocksize = i & 2 ? 64 : 32,
                                   .nested = i >= 6,
                                   .bf16 = i & 4,
                                   .backward = i % 2});
    }
}

// ---- several weights, one x -------------------------------------------------------------------

static hb_view view_of(void *data, hb_dtype dtype, int64_t m, int64_t cols)
{
    return (hb_view){.data = data,
                     .dtype = dtype,
                     .device = {HB_CPU, 0, NULL},
                     .ndim = 2,
                     .shape = {m, cols},
                     .stride = {cols, 1}};
}

// hb_linear_4bit_group has the bits of hb_linear_4bit for each weight, on any number of threads.
static void check_items(check *c, int64_t m, int64_t depth, const int64_t *rows, int n,
                        bool strided, hb_dtype dtype, hb_compute compute)
{
    check_label(c, "group of %d, m=%d depth=%d strided=%d dtype=%d compute=%d", n, (int)m,
                (int)depth, strided, (int)dtype, (int)compute);
    hb_tensor4 tensor[HB_LINEAR4_MAX_ITEMS];
    hb_view bias[HB_LINEAR4_MAX_ITEMS], y[HB_LINEAR4_MAX_ITEMS];
    hb_linear4_item items[HB_LINEAR4_MAX_ITEMS];
    void *wanted[HB_LINEAR4_MAX_ITEMS];
    float *values = check_buffer(c, (size_t)(m * depth) * 4, CHECK_END);
    const hb_view x = random_view(c, m, depth, dtype, strided, values);
    hb_error error = {{0}};
    for (int i = 0; i < n; i++) {
        const hb_format4 format = i % 2 ? HB_FP4 : HB_NF4;
        const int64_t blocksize = i == 2 ? 32 : 64;
        const matrix4 w = random_matrix(c, format, rows[i], depth, blocksize);
        const size_t bytes = (size_t)(m * rows[i]) * hb_dtype_bytes(dtype);
        tensor[i] = (hb_tensor4){.format = format,
                                 .blocksize = blocksize,
                                 .numel = rows[i] * depth,
                                 .rows = rows[i],
                                 .depth = depth,
                                 .packed = w.packed,
                                 .absmax = w.absmax};
        float *added = check_buffer(c, (size_t)rows[i] * 4, CHECK_END);
        bias[i] = random_view(c, 1, rows[i], i == 1 ? HB_F32 : dtype, i == 3, added);
        bias[i].ndim = 1;
        bias[i].shape[0] = rows[i];
        bias[i].stride[0] = bias[i].stride[1];
        y[i] = view_of(check_buffer(c, bytes, CHECK_END), dtype, m, rows[i]);
        const hb_view alone =
            view_of(wanted[i] = check_buffer(c, bytes, CHECK_END), dtype, m, rows[i]);
        items[i] = (hb_linear4_item){&tensor[i], i > 0 ? &bias[i] : NULL, &y[i]};
        const hb_status status = hb_linear_4bit(c->context, &x, &tensor[i], items[i].bias, compute,
                                                &alone, NULL, &error);
        CHECK(c, status == HB_OK, "status %d: %s", (int)status, error.text);
    }
    for (int threads = 1; threads <= 3; threads++) {
        hb_pool_set_threads(c->context->pool, threads);
        for (int i = 0; i < n; i++)
            if (m * rows[i] > 0)
                memset(y[i].data, 0xff, (size_t)(m * rows[i]) * hb_dtype_bytes(dtype));
        const hb_status status = hb_linear_4bit_group(c->context, &x, n, items, compute, &error);
        CHECK(c, status == HB_OK, "status %d: %s", (int)status, error.text);
        for (int i = 0; i < n; i++)
            check_equal(c, y[i].data, wanted[i], (size_t)(m * rows[i]) * hb_dtype_bytes(dtype),
                        "weight %d, %d threads", i, threads);
    }
    check_release(c);
}

CHECK_GROUP(linear4_group)
{
    static const int64_t rows[][HB_LINEAR4_MAX_ITEMS] = {
        {64, 1, 65, 130}, {7, 200, 64, 0}, {900, 300, 200, 5}};
    static const int64_t depths[] = {0, 31, 64, 96, 640};
    const bool is_new = CHECK_NEW(c, linear4.f32.dot) || CHECK_NEW(c, linear4.bf16.dot) ||
                        CHECK_NEW(c, linear4.i16.dot) || CHECK_NEW(c, linear4.i8.dot);
    if (!is_new || c->bench) return;
    for (int i = 0; i < (c->emulated ? 20 : 120); i++) {
        const uint64_t bits = check_random(c);
        const int64_t m = check_random_below(c, bits & 1 ? 3 : 20);
        check_items(c, m, depths[check_random_below(c, 5)], rows[check_random_below(c, 2)],
                    1 + (int)check_random_below(c, 4), (bits & 14) == 0,
                    (hb_dtype)check_random_below(c, HB_IO_COUNT), (hb_compute)(bits >> 8 & 3));
    }
    if (!c->emulated) // one loop over several threads, and x of more rows than dot takes
        for (int compute = 0; compute < 4; compute++)
            for (int64_t m = 1; m <= 64; m *= 8)
                check_items(c, m, 1024, rows[2], 4, false, HB_BF16, (hb_compute)compute);
    hb_error error = {{0}};
    hb_view x = {.device = {HB_CPU, 0, NULL}};
    CHECK(c, hb_linear_4bit_group(c->context, &x, 5, NULL, HB_COMPUTE_F32, &error) == HB_ERR_VALUE,
          "five weights");
    x.device.type = HB_CUDA;
    CHECK(c, hb_linear_4bit_group(c->context, &x, 1, NULL, HB_COMPUTE_F32, &error) == HB_ERR_DEVICE,
          "memory of a GPU");
}

// ---- how often W is decoded -------------------------------------------------------------------

static struct {
    void (*decode_rows)(const hb_matrix4 *w, int64_t n_rows, int64_t depth, void *panel);
    int64_t calls;
} counted; // by one thread

static void counting_decode_rows(const hb_matrix4 *w, int64_t n_rows, int64_t depth, void *panel)
{
    counted.calls++;
    counted.decode_rows(w, n_rows, depth, panel);
}

// `m` rows of x decode every panel `passes` times.
static void check_passes(check *c, bool bf16, int64_t m, int64_t passes)
{
    enum { DEPTH = 1024, ROWS = 256, BLOCKSIZE = 64 };
    check_label(c, "passes bf16=%d m=%d", bf16, (int)m);
    hb_context mine = *c->context;
    hb_pool_set_threads(mine.pool, 1);
    hb_linear4_set *set = bf16 ? &mine.kernels.linear4.bf16 : &mine.kernels.linear4.f32;
    counted.decode_rows = set->decode_rows;
    counted.calls = 0;
    set->decode_rows = counting_decode_rows;
    matrix4 w = random_matrix(c, HB_NF4, ROWS, DEPTH, BLOCKSIZE);
    const hb_tensor4 tensor = {.format = HB_NF4,
                               .blocksize = BLOCKSIZE,
                               .numel = ROWS * DEPTH,
                               .rows = ROWS,
                               .depth = DEPTH,
                               .packed = w.packed,
                               .absmax = w.absmax};
    const hb_dtype dtype = bf16 ? HB_BF16 : HB_F32;
    hb_view x = random_view(c, m, DEPTH, dtype, false, NULL);
    hb_view y = random_view(c, m, ROWS, dtype, false, NULL);
    hb_error error = {{0}};
    hb_status status = hb_linear_4bit(&mine, &x, &tensor, NULL,
                                      bf16 ? HB_COMPUTE_BF16 : HB_COMPUTE_F32, &y, NULL, &error);
    CHECK(c, status == HB_OK, "status %d: %s", (int)status, error.text);
    const int64_t panels = hb_ceil_div(ROWS, set->tile_cols);
    const int64_t want = passes * panels * hb_ceil_div(DEPTH, set->panel_steps);
    CHECK(c, counted.calls == want, "decode_rows: %d calls, not %d", (int)counted.calls, (int)want);
    check_release(c);
}

CHECK_GROUP(linear4_passes)
{
    if (c->bench || c->emulated) return;
    // A pass of 1024 bytes of a column of x, however many rows a tile has; then two of one length.
    for (int bf16 = 0; bf16 < 2; bf16++) {
        const hb_linear4_set *set = bf16 ? &c->kernels->linear4.bf16 : &c->kernels->linear4.f32;
        const int64_t rows = 1024 / set->element_bytes;
        check_passes(c, bf16, rows, 1);
        check_passes(c, bf16, rows + set->tile_rows, 2);
        check_passes(c, bf16, 2 * rows, 2);
    }
}
