// Products with 4-bit weights in integers: every ISA gives the bits of the reference, whose results
// lie within the bound of kernels_linear4.h of the exact product.
#include "check.h"

#include <math.h>

#define UNIT 0x1p-24

typedef struct {
    int64_t rows, depth, blocksize;
    uint8_t *packed;
    float *absmax;
    _Alignas(64) float codebook[16];
    hb_codebook_int rounded;
} matrix4;

// Codebooks: of a format, or any 16 numbers.
static void random_matrix(check *c, matrix4 *w, int64_t rows, int64_t depth, int64_t blocksize,
                          bool wide)
{
    int64_t n_blocks = rows * depth / blocksize;
    w->rows = rows;
    w->depth = depth;
    w->blocksize = blocksize;
    w->packed = check_buffer(c, (size_t)(rows * depth) / 2, CHECK_END);
    w->absmax = check_buffer(c, (size_t)n_blocks * sizeof(float), CHECK_END);
    check_fill_bytes(c, w->packed, (size_t)(rows * depth) / 2);
    for (int64_t i = 0; i < n_blocks; i++) w->absmax[i] = 0.25f + fabsf(check_random_normal(c));
    memcpy(w->codebook, hb_codebook4_get(rows % 2 ? HB_NF4 : HB_FP4)->value, sizeof w->codebook);
    if (check_random_below(c, 2)) check_fill_normal(c, w->codebook, 16, 3.0f);
    if (check_random_below(c, 8) == 0) memset(w->codebook, 0, sizeof w->codebook);
    hb_codebook_round(w->codebook, wide ? HB_INT16_LIMIT : HB_INT8_LIMIT, &w->rounded);
}

static hb_matrix4 block_of(const matrix4 *w, int64_t row)
{
    return (hb_matrix4){.packed = w->packed + row * w->depth / 2,
                        .row_bytes = w->depth / 2,
                        .absmax = w->absmax + row * w->depth / w->blocksize,
                        .absmax_stride = w->depth / w->blocksize,
                        .blocksize = w->blocksize,
                        .codebook = w->codebook,
                        .rounded = &w->rounded};
}

static int code_of(const matrix4 *w, int64_t row, int64_t column)
{
    int64_t i = row * w->depth + column;
    return i % 2 == 0 ? w->packed[i / 2] >> 4 : w->packed[i / 2] & 15;
}

enum { NORMAL, OUTLIERS, WILD, NONFINITE, MOODS };

static void *random_x(check *c, int64_t n, hb_dtype dtype, int mood, float *values)
{
    void *x = check_buffer(c, (size_t)n * hb_dtype_bytes(dtype), CHECK_END);
    check_fill_normal(c, values, n, 1.0f);
    if (mood == OUTLIERS)
        for (int64_t i = 0; i < n; i += 1 + check_random_below(c, 200)) values[i] *= 300.0f;
    if (mood == WILD) check_fill_wild(c, values, n, false);
    if (mood == NONFINITE && n > 0)
        values[check_random_below(c, n)] = check_random_below(c, 2) ? NAN : -INFINITY;
    check_convert(values, x, n, dtype);
    return x;
}

// As fmax() where b is no NaN; a loop of fmax() breaks gcc 12 for AArch64.
static double larger(double a, double b)
{
    return b > a ? b : a;
}

// The exact y and the bound of the error; n_terms covers what float32 sums add.
static double expected(const matrix4 *w, int64_t row, const float *x, bool wide, double n_terms,
                       double *bound)
{
    const double limit = wide ? HB_INT16_LIMIT : HB_INT8_LIMIT;
    double sum = 0.0;
    *bound = 0.0;
    for (int64_t k = 0; k < w->depth; k++) {
        double amax = 0.0;
        for (int64_t i = k / 64 * 64; i < k / 64 * 64 + 64 && i < w->depth; i++)
            amax = larger(amax, fabs((double)x[i]));
        const double scale = (double)w->absmax[(row * w->depth + k) / w->blocksize];
        const int code = code_of(w, row, k);
        const double value = (double)w->codebook[code];
        const double rounded = (double)w->rounded.step * w->rounded.code[code];
        const double x_error = 0.502 * fmax(amax / limit, 0x1p-112);
        const double x_most = fabs((double)x[k]) + x_error;
        sum += scale * value * x[k];
        *bound += scale * (fabs(value) * x_error + fabs(value - rounded) * x_most +
                           n_terms * UNIT * fabs(rounded) * x_most);
    }
    *bound += 0x1p-140; // absmax times a scale of x below the normal numbers
    return sum;
}

static void check_dot(check *c, const hb_linear4_set *set, const hb_linear4_set *reference,
                      bool wide, int64_t rows, int64_t depth, int64_t blocksize, int n_x,
                      hb_dtype dtype, int mood)
{
    check_label(c, "%s dot rows=%d depth=%d blocksize=%d n_x=%d dtype=%d mood=%d",
                wide ? "i16" : "i8", (int)rows, (int)depth, (int)blocksize, n_x, (int)dtype, mood);
    matrix4 w;
    random_matrix(c, &w, rows, depth, blocksize, wide);
    float *values = check_buffer(c, (size_t)(n_x * depth) * 4, CHECK_END);
    unsigned char *x = random_x(c, n_x * depth, dtype, mood, values);
    const int64_t bytes = hb_linear4_permuted_bytes(set, depth), y_stride = rows + 3;
    const int64_t ref_bytes = hb_linear4_permuted_bytes(reference, depth);
    unsigned char *permuted = check_buffer(c, (size_t)(n_x * bytes), CHECK_BEGIN);
    unsigned char *plain = check_buffer(c, (size_t)(n_x * ref_bytes), CHECK_BEGIN);
    const size_t y_bytes = (size_t)((n_x - 1) * y_stride + rows) * 4;
    float *y = check_buffer(c, y_bytes, CHECK_END), *one = check_buffer(c, y_bytes, CHECK_END);
    float *want = check_buffer(c, y_bytes, CHECK_END);
    hb_matrix4 all = block_of(&w, 0);
    for (int t = 0; t < n_x; t++) {
        const unsigned char *row = x + (size_t)(t * depth) * hb_dtype_bytes(dtype);
        set->permute_x(row, dtype, depth, permuted + t * bytes);
        reference->permute_x(row, dtype, depth, plain + t * ref_bytes);
    }
    set->dot(&all, rows, depth, permuted, n_x, y, y_stride);
    for (int64_t r = 0; r < rows; r++) {
        hb_matrix4 row = block_of(&w, r);
        set->dot(&row, 1, depth, permuted, n_x, one + r, y_stride);
    }
    for (int t = 0; t < n_x; t++)
        reference->dot(&all, rows, depth, plain + t * ref_bytes, 1, want + t * y_stride, y_stride);
    check_equal(c, one, y, y_bytes, "rows one by one");
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < rows; r++) {
            const float got = y[t * y_stride + r], ref = want[t * y_stride + r];
            if (!(got != got && ref != ref)) // the sign of a NaN is nobody's promise
                check_equal(c, &got, &ref, 4, "t=%d r=%d: bits of the reference", t, (int)r);
            if (mood == NONFINITE) {
                bool finite = true;
                for (int64_t k = 0; k < depth; k++)
                    finite = finite && isfinite(values[t * depth + k]);
                CHECK(c, finite == (bool)isfinite(got), "t=%d r=%d is %g", t, (int)r, (double)got);
            } else if (mood != WILD || depth < 1024) {
                double bound;
                double sum =
                    expected(&w, r, values + t * depth, wide, (double)depth / 128 + 10, &bound);
                if (bound + fabs(sum) < 0x1p126) // products beyond float32 are not promised
                    check_close(c, &got, &sum, &bound, 1, "t=%d r=%d", t, (int)r);
            }
        }
    check_release(c);
}

static void check_tile(check *c, const hb_linear4_set *set, const hb_linear4_set *reference,
                       int64_t rows, int64_t depth, int64_t blocksize, int n_x, hb_dtype dtype,
                       int mood)
{
    check_label(c, "i8 tile rows=%d depth=%d blocksize=%d n_x=%d dtype=%d mood=%d", (int)rows,
                (int)depth, (int)blocksize, n_x, (int)dtype, mood);
    matrix4 w;
    random_matrix(c, &w, rows, depth, blocksize, false);
    const int64_t stride = depth + 5, n = (n_x - 1) * stride + depth;
    float *values = check_buffer(c, (size_t)n * 4, CHECK_END);
    unsigned char *x = random_x(c, n, dtype, mood, values);
    const hb_linear4_set *sets[2] = {set, reference};
    float *y = check_buffer(c, (size_t)(n_x * rows) * 4, CHECK_END);
    for (int s = 0; s < 2; s++) {
        const int64_t cols = sets[s]->tile_cols, tile = sets[s]->tile_rows, chunks = depth / 64;
        const int64_t bytes[2] = {64 * sets[s]->element_bytes + sets[s]->x_extra,
                                  64 * sets[s]->element_bytes + sets[s]->panel_extra};
        unsigned char *packed = check_buffer(c, (size_t)(chunks * tile * bytes[0]), CHECK_BEGIN);
        unsigned char *panel = check_buffer(c, (size_t)(chunks * cols * bytes[1]), CHECK_BEGIN);
        float *sums = check_buffer(c, (size_t)(tile * cols) * 4, CHECK_BEGIN);
        for (int64_t first = 0; first < n_x; first += tile) {
            const int64_t count = n_x - first < tile ? n_x - first : tile;
            sets[s]->pack_x(x + (size_t)(first * stride) * hb_dtype_bytes(dtype), dtype, stride,
                            (int)count, depth, packed);
            for (int64_t r = 0; r < rows; r += cols) {
                const int64_t n_rows = rows - r < cols ? rows - r : cols;
                const int64_t at_once = sets[s]->panel_steps;
                for (int64_t k = 0; k < depth; k += at_once) {
                    hb_matrix4 block = block_of(&w, r);
                    block.packed += k / 2;
                    block.absmax += k / blocksize;
                    const int64_t steps = depth - k < at_once ? depth - k : at_once;
                    sets[s]->decode_rows(&block, n_rows, steps, panel);
                    sets[s]->tile(packed + k / 64 * tile * bytes[0], panel, steps, (int)count,
                                  k > 0, sums);
                }
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < n_rows; i++) {
                        float got = sums[t * cols + i], *place = &y[(first + t) * rows + r + i];
                        if (s == 1 && !(got != got && *place != *place))
                            check_equal(c, place, &got, 4, "t=%d r=%d: bits of the reference",
                                        (int)(first + t), (int)(r + i));
                        *place = got * (w.rounded.step * 0x1p7f);
                        if (s == 0) {
                            *place = got;
                            continue;
                        }
                        const float *row = values + (first + t) * stride;
                        if (mood == NONFINITE || mood == WILD) continue;
                        double bound;
                        double sum =
                            expected(&w, r + i, row, false, (double)depth / 64 + 5, &bound);
                        check_close(c, place, &sum, &bound, 1, "t=%d r=%d", (int)(first + t),
                                    (int)(r + i));
                    }
            }
        }
    }
    check_release(c);
}

static void check_set(check *c, const hb_linear4_set *set, const hb_linear4_set *reference,
                      bool wide)
{
    static const int64_t shapes[][3] = {
        {1, 32, 32},  {3, 64, 64},  {2, 96, 32},   {5, 128, 32},  {4, 128, 128},   {7, 192, 64},
        {3, 160, 32}, {9, 256, 64}, {6, 512, 256}, {2, 1024, 64}, {3, 4096, 4096}, {2, 224, 32}};
    for (int i = 0; i < 12; i++)
        for (int n_x = 1; n_x <= set->dot_rows; n_x++)
            for (int mood = 0; mood < MOODS; mood++)
                check_dot(c, set, reference, wide, shapes[i][0], shapes[i][1], shapes[i][2], n_x,
                          (hb_dtype)((i + n_x + mood) % HB_IO_COUNT), mood);
    check_dot(c, set, reference, wide, 0, 64, 64, 1, HB_F32, NORMAL);
    if (set->tile == NULL) return;
    for (int i = 0; i < 12; i++) {
        if (shapes[i][2] < 64 || shapes[i][1] % 64 != 0) continue;
        for (int j = 0; j < 6; j++)
            check_tile(c, set, reference, j < 2 ? set->tile_cols + 3 : shapes[i][0],
                       j < 2 ? 64 * (1 + j) : shapes[i][1], j < 2 ? 64 : shapes[i][2],
                       1 + (int)check_random_below(c, 2 * set->tile_rows),
                       (hb_dtype)((i + j) % HB_IO_COUNT), (i + j) % MOODS);
    }
}

CHECK_GROUP(linear4_int)
{
    const hb_kernels_linear4 *kernels = &c->kernels->linear4, *reference = &c->reference->linear4;
    if (c->bench) return;
    if (CHECK_NEW(c, linear4.i16.dot)) check_set(c, &kernels->i16, &reference->i16, true);
    if (CHECK_NEW(c, linear4.i8.dot) || CHECK_NEW(c, linear4.i8.tile))
        check_set(c, &kernels->i8, &reference->i8, false);
}

CHECK_GROUP_ONCE(codebook_round)
{
    for (int round = 0; round < 200; round++) {
        float value[16];
        hb_codebook_int got;
        check_fill_normal(c, value, 16, 1.0f);
        const int limit = round % 2 ? HB_INT8_LIMIT : HB_INT16_LIMIT;
        if (round < 4)
            memcpy(value, hb_codebook4_get(round / 2 ? HB_NF4 : HB_FP4)->value, sizeof value);
        hb_codebook_round(value, limit, &got);
        double largest = 0.0;
        for (int i = 0; i < 16; i++) largest = larger(largest, fabs((double)value[i]));
        for (int i = 0; i < 16; i++) {
            CHECK(c, got.code[i] >= -limit && got.code[i] <= limit, "code %d", got.code[i]);
            const double off = fabs((double)value[i] - (double)got.step * got.code[i]);
            CHECK(c, off <= 0.5 * largest / (limit - 63) + largest * UNIT, "value %d off by %g", i,
                  off);
        }
    }
    const float zero[16] = {0};
    hb_codebook_int got;
    hb_codebook_round(zero, HB_INT8_LIMIT, &got);
    for (int i = 0; i < 16; i++) CHECK(c, got.code[i] == 0, "zero");
    CHECK(c, got.step == 1.0f, "step of zeros");
}
