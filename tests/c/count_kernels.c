// The main loops of the kernels, each executed once on a known amount of work, for --count: what
// instructions.toml has a line for. Work is small, because counting is slow, and yet large enough
// for the ends of a call to be a few hundredths of it.
#include "check.h"
#include "core/optim.h"
#include "core/sums.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { BLOCKSIZE = 64 };

static const char *named(const char *format, ...) __attribute__((format(printf, 1, 2)));
static const char *named(const char *format, ...)
{
    static char name[96]; // one at a time
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return name;
}

// What counting itself costs: about zero, or what callgrind sees of it.
COUNT_GROUP(empty_counts)
{
    CHECK_COUNT(c, "nothing", 1, "call") {}
}

// ---- products with 4-bit weights ----------------------------------------------------------------

typedef struct {
    _Alignas(64) float value[16];
    hb_codebook_int rounded; // for the integer sets
} codebooks;

static hb_matrix4 some_matrix4(check *c, const hb_linear4_set *set, int64_t rows, int64_t depth,
                               codebooks *books)
{
    const int64_t numel = rows * depth;
    uint8_t *packed = check_buffer(c, (size_t)numel / 2, CHECK_BEGIN);
    float *absmax = check_buffer(c, (size_t)(numel / BLOCKSIZE) * 4, CHECK_BEGIN);
    check_fill_bytes(c, packed, (size_t)numel / 2);
    for (int64_t i = 0; i < numel / BLOCKSIZE; i++) absmax[i] = 1.0f;
    memcpy(books->value, hb_codebook4_get(HB_NF4)->value, sizeof books->value);
    hb_codebook_round(books->value, set->element_bytes == 1 ? HB_INT8_LIMIT : HB_INT16_LIMIT,
                      &books->rounded);
    return (hb_matrix4){.packed = packed,
                        .row_bytes = depth / 2,
                        .absmax = absmax,
                        .absmax_stride = depth / BLOCKSIZE,
                        .blocksize = BLOCKSIZE,
                        .codebook = books->value,
                        .rounded = &books->rounded};
}

static void count_dot4(check *c, const hb_linear4_set *set, const char *type, int64_t rows,
                       int64_t depth, int most_x)
{
    codebooks books;
    const hb_matrix4 w = some_matrix4(c, set, rows, depth, &books);
    const int64_t stride = hb_linear4_permuted_bytes(set, depth);
    float *x = check_buffer(c, (size_t)depth * 4, CHECK_BEGIN);
    check_fill_normal(c, x, depth, 1.0f);
    char *permuted = check_buffer(c, (size_t)(stride * set->dot_rows), CHECK_BEGIN);
    for (int t = 0; t < set->dot_rows; t++) set->permute_x(x, HB_F32, depth, permuted + t * stride);
    float *y = check_buffer(c, (size_t)(rows * set->dot_rows) * 4, CHECK_BEGIN);
    for (int n_x = 1; n_x <= most_x && n_x <= set->dot_rows; n_x *= 2)
        CHECK_COUNT(c,
                    named("linear4 %s dot %lldx%lld, %d of x", type, (long long)rows,
                          (long long)depth, n_x),
                    rows * depth, "weight")
    set->dot(&w, rows, depth, permuted, n_x, y, rows);
    check_release(c);
}

static void count_panels4(check *c, const hb_linear4_set *set, const hb_linear4_set *before,
                          const char *type)
{
    enum { STEPS = 128, ROWS = 64, DEPTH = 512 };
    codebooks books;
    const hb_matrix4 w = some_matrix4(c, set, STEPS, DEPTH, &books);
    const int64_t cols = set->tile_cols, rows = set->tile_rows;
    const int64_t bytes = STEPS * set->element_bytes, groups = STEPS / 64;
    void *panel =
        check_buffer(c, (size_t)(cols * (bytes + groups * set->panel_extra)), CHECK_BEGIN);
    void *packed = check_buffer(c, (size_t)(rows * (bytes + groups * set->x_extra)), CHECK_BEGIN);
    float *sums = check_buffer(c, (size_t)(rows * cols) * 4, CHECK_BEGIN);
    float *x = check_buffer(c, (size_t)(rows * STEPS) * 4, CHECK_BEGIN);
    check_fill_normal(c, x, rows * STEPS, 1.0f);
    if (set->pack_x != before->pack_x)
        CHECK_COUNT(c, named("linear4 %s pack_x", type), rows * STEPS, "element of x")
    set->pack_x(x, HB_F32, STEPS, (int)rows, STEPS, packed);
    set->pack_x(x, HB_F32, STEPS, (int)rows, STEPS, packed);
    if (set->decode_rows != before->decode_rows)
        CHECK_COUNT(c, named("linear4 %s decode_rows", type), cols * STEPS, "weight")
    set->decode_rows(&w, cols, STEPS, panel);
    if (set->decode_cols != NULL && set->decode_cols != before->decode_cols)
        CHECK_COUNT(c, named("linear4 %s decode_cols", type), cols * STEPS, "weight")
    set->decode_cols(&w, STEPS, cols, panel);
    set->decode_rows(&w, cols, STEPS, panel);
    if (set->begin != NULL) set->begin();
    if (set->tile != before->tile)
        CHECK_COUNT(c, named("linear4 %s tile", type), STEPS * rows * cols, "product")
    set->tile(packed, panel, STEPS, (int)rows, true, sums);
    if (set->begin != NULL) set->end();
    check_release(c);
}

static void count_add4(check *c, const hb_linear4_set *set, const char *type)
{
    enum { ROWS = 64, DEPTH = 1024 };
    codebooks books;
    const hb_matrix4 w = some_matrix4(c, set, ROWS, DEPTH, &books);
    float *dy = check_buffer(c, (size_t)(set->add_until * ROWS) * 4, CHECK_BEGIN);
    check_fill_normal(c, dy, set->add_until * ROWS, 1.0f);
    void *packed =
        check_buffer(c, (size_t)(ROWS * set->tile_rows * set->element_bytes), CHECK_BEGIN);
    set->pack_x(dy, HB_F32, ROWS, set->add_until, ROWS, packed);
    float *sums = check_buffer(c, (size_t)(set->add_until * DEPTH) * 4, CHECK_BEGIN);
    memset(sums, 0, (size_t)(set->add_until * DEPTH) * 4);
    for (int n_x = 1; n_x <= set->add_until; n_x *= 2)
        CHECK_COUNT(c, named("linear4 %s add_rows, %d of dy", type, n_x), ROWS * DEPTH, "weight")
    set->add_rows(&w, ROWS, DEPTH, packed, n_x, sums, DEPTH);
    check_release(c);
}

static void count_set4(check *c, const hb_linear4_set *set, const hb_linear4_set *before,
                       const char *type)
{
    if (set->permute_x != before->permute_x) {
        enum { DEPTH = 1024 };
        float *x = check_buffer(c, DEPTH * 4, CHECK_BEGIN);
        check_fill_normal(c, x, DEPTH, 1.0f);
        void *permuted =
            check_buffer(c, (size_t)hb_linear4_permuted_bytes(set, DEPTH), CHECK_BEGIN);
        CHECK_COUNT(c, named("linear4 %s permute_x", type), DEPTH, "element of x")
        set->permute_x(x, HB_F32, DEPTH, permuted);
        check_release(c);
    }
    if (set->dot != before->dot) {
        count_dot4(c, set, type, 16, 512, 8);
        count_dot4(c, set, type, 4, 8192, 1); // deep: rows side by side
    }
    if (set->add_rows != NULL && set->add_rows != before->add_rows) count_add4(c, set, type);
    if (set->tile != NULL) count_panels4(c, set, before, type);
}

COUNT_GROUP(linear4_counts)
{
    const hb_kernels_linear4 *k = &c->kernels->linear4, *before = &c->previous->linear4;
    count_set4(c, &k->f32, &before->f32, "f32");
    count_set4(c, &k->bf16, &before->bf16, "bf16");
    count_set4(c, &k->i16, &before->i16, "i16");
    count_set4(c, &k->i8, &before->i8, "i8");
}

// ---- products with int8 weights -----------------------------------------------------------------

COUNT_GROUP(linear8_counts)
{
    enum { ROWS = 8, DEPTH = 1024, STEPS = 64 };
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int64_t stride = hb_int8_prepared_bytes(DEPTH, k->prepared_bytes);
    int8_t *w = check_buffer(c, 64 * DEPTH, CHECK_BEGIN);
    uint8_t *prepared =
        check_buffer(c, (size_t)(k->dot_int8_rows * stride), CHECK_BEGIN); // 64-byte aligned
    int8_t *codes = check_buffer(c, DEPTH, CHECK_BEGIN);
    float *x = check_buffer(c, (size_t)(k->dot_f32_rows * DEPTH) * 4, CHECK_BEGIN);
    void *y = check_buffer(c, 64 * ROWS * 4, CHECK_BEGIN);
    float *panel = check_buffer(c, 64 * STEPS * 4, CHECK_BEGIN);
    check_fill_bytes(c, w, 64 * DEPTH);
    check_fill_bytes(c, codes, DEPTH);
    check_fill_normal(c, x, k->dot_f32_rows * DEPTH, 1.0f);
    for (int t = 0; t < k->dot_int8_rows; t++) k->prepare_int8(codes, DEPTH, prepared + t * stride);
    if (CHECK_NEW(c, linear8.prepare_int8))
        CHECK_COUNT(c, "linear8 prepare_int8", DEPTH, "element of x")
    k->prepare_int8(codes, DEPTH, prepared);
    if (CHECK_NEW(c, linear8.dot_int8)) {
        CHECK_COUNT(c, "linear8 dot_int8, 1 of x", ROWS * DEPTH, "product")
        k->dot_int8(w, DEPTH, ROWS, DEPTH, prepared, 1, y, ROWS);
        CHECK_COUNT(c, "linear8 dot_int8, all of x", ROWS * DEPTH * k->dot_int8_rows, "product")
        k->dot_int8(w, DEPTH, ROWS, DEPTH, prepared, k->dot_int8_rows, y, ROWS);
    }
    if (CHECK_NEW(c, linear8.pairs.multiply)) {
        enum { PANEL = HB_INT8_PAIR_W };
        const hb_int8_pairs *set = &k->pairs;
        void *tile = check_buffer(c, (size_t)hb_int8_pair_bytes(DEPTH, set->rows), CHECK_BEGIN);
        void *wide = check_buffer(c, (size_t)hb_int8_pair_bytes(DEPTH, PANEL), CHECK_BEGIN);
        int32_t *sums = check_buffer(c, (size_t)(set->rows * PANEL) * sizeof *sums, CHECK_BEGIN);
        set->widen_x(codes, 0, set->rows, DEPTH, tile);
        CHECK_COUNT(c, "linear8 pairs widen_w", PANEL * DEPTH, "weight")
        set->widen_w(w, DEPTH, PANEL, DEPTH, wide);
        CHECK_COUNT(c, "linear8 pairs multiply", PANEL * DEPTH * set->rows, "product")
        set->multiply(wide, PANEL, DEPTH, tile, tile, set->rows, false, sums, PANEL);
    }
    if (CHECK_NEW(c, linear8.dot_f32)) {
        CHECK_COUNT(c, "linear8 dot_f32, 1 of x", ROWS * DEPTH, "product")
        k->dot_f32(w, DEPTH, ROWS, DEPTH, x, DEPTH, 1, y, ROWS);
        CHECK_COUNT(c, "linear8 dot_f32, all of x", ROWS * DEPTH * k->dot_f32_rows, "product")
        k->dot_f32(w, DEPTH, ROWS, DEPTH, x, DEPTH, k->dot_f32_rows, y, ROWS);
    }
    if (CHECK_NEW(c, linear8.decode_rows))
        CHECK_COUNT(c, "linear8 decode_rows", 64 * STEPS, "weight")
    k->decode_rows(w, DEPTH, 64, STEPS, 64, panel);
    if (CHECK_NEW(c, linear8.decode_cols)) CHECK_COUNT(c, "linear8 decode_cols", 64 * 64, "weight")
    k->decode_cols(w, DEPTH, x, 64, 64, 64, panel);
    if (CHECK_NEW(c, linear8.rescale)) CHECK_COUNT(c, "linear8 rescale", 512, "element")
    k->rescale((const int32_t *)(const void *)w, 0.1f, NULL, x, 512, panel);
}

// ---- products with plain weights ----------------------------------------------------------------

COUNT_GROUP(dense_counts)
{
    enum { ROWS = 8, DEPTH = 1024 };
    const hb_kernels_dense *k = &c->kernels->dense;
    for (hb_dtype io = HB_F32; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, dense.dot[io])) continue;
        float *values = check_buffer(c, ROWS * DEPTH * 4, CHECK_BEGIN);
        void *w = check_buffer(c, ROWS * DEPTH * 4, CHECK_BEGIN);
        float *y = check_buffer(c, (size_t)k->rows * ROWS * 4, CHECK_BEGIN);
        check_fill_normal(c, values, ROWS * DEPTH, 1.0f);
        check_convert(values, w, ROWS * DEPTH, io);
        for (int n_x = 1; n_x <= k->rows; n_x *= 2)
            CHECK_COUNT(c, named("dense %s, %d of x", hb_dtype_name(io), n_x), ROWS * DEPTH * n_x,
                        "product")
        k->dot[io](w, DEPTH, ROWS, DEPTH, w, DEPTH, n_x, y, ROWS);
        check_release(c);
    }
}

// ---- codecs -------------------------------------------------------------------------------------

COUNT_GROUP(codec_counts)
{
    enum { N = 2048 };
    const hb_kernels_codec *k = &c->kernels->codec;
    float map[256];
    hb_search8 *search = check_buffer(c, sizeof *search, CHECK_BEGIN);
    hb_map8_fill(HB_MAP_DYNAMIC, map);
    hb_search8_init(search, map);
    for (hb_dtype io = HB_F32; io <= HB_BF16; io++) { // float16 differs in a conversion
        const char *type = hb_dtype_name(io);
        float *values = check_buffer(c, N * 4, CHECK_BEGIN);
        void *x = check_buffer(c, N * 4, CHECK_BEGIN), *out = check_buffer(c, N * 4, CHECK_BEGIN);
        float *absmax = check_buffer(c, N / BLOCKSIZE * 4, CHECK_BEGIN);
        uint8_t *codes = check_buffer(c, N, CHECK_BEGIN);
        int8_t *int8 = check_buffer(c, N, CHECK_BEGIN);
        check_fill_normal(c, values, N, 0.02f);
        check_convert(values, x, N, io);
        c->reference->codec.absmax[io](x, N, BLOCKSIZE, absmax);
        if (CHECK_NEW(c, codec.absmax[io])) {
            CHECK_COUNT(c, named("absmax blocks of 64, %s", type), N, "element")
            k->absmax[io](x, N, BLOCKSIZE, absmax);
            CHECK_COUNT(c, named("absmax blocks of 256, %s", type), N, "element")
            k->absmax[io](x, N, 256, (float *)out);
        }
        if (CHECK_NEW(c, codec.encode4[io]))
            CHECK_COUNT(c, named("encode4 nf4 %s", type), N, "element")
        k->encode4[io](x, N, HB_NF4, BLOCKSIZE, absmax, codes);
        if (CHECK_NEW(c, codec.quantize4[io]))
            CHECK_COUNT(c, named("quantize4 nf4 %s", type), N, "element")
        k->quantize4[io](x, N, HB_NF4, BLOCKSIZE, absmax, codes);
        if (CHECK_NEW(c, codec.decode4[io]))
            CHECK_COUNT(c, named("decode4 nf4 %s", type), N, "element")
        k->decode4[io](codes, 0, N, HB_NF4, BLOCKSIZE, absmax, out, false);
        c->reference->codec.absmax[io](x, N, 256, absmax);
        if (CHECK_NEW(c, codec.encode8[io]))
            CHECK_COUNT(c, named("encode8 dynamic %s", type), N, "element")
        k->encode8[io](x, N, search, 256, absmax, codes);
        if (CHECK_NEW(c, codec.decode8[io]))
            CHECK_COUNT(c, named("decode8 dynamic %s", type), N, "element")
        k->decode8[io](codes, N, map, 256, absmax, out, false);
        if (CHECK_NEW(c, codec.absmax_int8[io]))
            CHECK_COUNT(c, named("absmax_int8 %s", type), N, "element")
        k->absmax_int8[io](x, N, NAN);
        if (CHECK_NEW(c, codec.encode_int8[io]))
            CHECK_COUNT(c, named("encode_int8 %s", type), N, "element")
        k->encode_int8[io](x, N, 0.1f, NAN, NULL, int8);
        if (CHECK_NEW(c, codec.decode_int8[io]))
            CHECK_COUNT(c, named("decode_int8 %s", type), N, "element")
        k->decode_int8[io](int8, N, 0.1f, out);
    }
    if (CHECK_NEW(c, codec.search4)) {
        enum { BLOCKS_N = 64 };
        float x[BLOCKS_N], candidates[HB_SEARCH_COUNT];
        check_fill_normal(c, x, BLOCKS_N, 1.0f);
        for (int i = 0; i < HB_SEARCH_COUNT; i++) candidates[i] = 2.0f + 0.1f * (float)i;
        CHECK_COUNT(c, "search4 nf4", BLOCKS_N * HB_SEARCH_COUNT, "element and candidate")
        k->search4(x, NULL, BLOCKS_N, HB_NF4, candidates, HB_SEARCH_COUNT);
    }
}

// ---- optimizers ---------------------------------------------------------------------------------

COUNT_GROUP(optim_counts)
{
    enum { N = HB_OPTIM_PIECE, BLOCKS = N / HB_OPTIM_BLOCKSIZE };
    static const hb_optim_scalars scalars = {.gnorm_scale = 1.0f,
                                             .keep = 0.999f,
                                             .beta1 = 0.9f,
                                             .beta1_rest = 0.1f,
                                             .beta2 = 0.999f,
                                             .beta2_rest = 0.001f,
                                             .eps = 1e-8f,
                                             .lr = 1e-3f,
                                             .step_size = 3e-3f,
                                             .inv_corr1 = 2.5f,
                                             .inv_corr2 = 12.0f,
                                             .scale = 1.0f};
    const hb_kernels_optim *k = &c->kernels->optim;
    float *p = check_buffer(c, N * 4, CHECK_BEGIN), *g = check_buffer(c, N * 4, CHECK_BEGIN);
    float *m = check_buffer(c, N * 4, CHECK_BEGIN), *v = check_buffer(c, N * 4, CHECK_BEGIN);
    check_fill_normal(c, p, N, 1.0f);
    check_fill_normal(c, g, N, 0.01f);
    check_fill_normal(c, m, N, 0.01f);
    for (int64_t i = 0; i < N; i++) v[i] = g[i] * g[i];
    static const char *const names[HB_OPTIMIZER_COUNT] = {"adam", "ademamix", "momentum",
                                                          "lion", "rmsprop",  "adagrad"};
    float *slow = check_buffer(c, N * 4, CHECK_BEGIN);
    memcpy(slow, m, N * 4);
    for (int o = 0; o < HB_OPTIMIZER_COUNT; o++) {
        if (!CHECK_NEW(c, optim.step[o])) continue;
        CHECK_COUNT(c, named("%s, 32-bit states", names[o]), N, "element")
        k->step[o](p, g, o >= HB_RMSPROP ? v : m, slow, v, N, &scalars);
    }

    float map1[256], map2[256], absmax1[BLOCKS], slow_absmax[BLOCKS], absmax2[BLOCKS];
    uint8_t *codes1 = check_buffer(c, N, CHECK_BEGIN), *codes2 = check_buffer(c, N, CHECK_BEGIN);
    uint8_t *slow_codes = check_buffer(c, N, CHECK_BEGIN);
    hb_search8 *search = check_buffer(c, 2 * sizeof *search, CHECK_BEGIN);
    hb_map8_fill(HB_MAP_DYNAMIC, map1);
    hb_map8_fill(HB_MAP_DYNAMIC_UNSIGNED, map2);
    hb_search8_init(&search[0], map1);
    hb_search8_init(&search[1], map2);
    const hb_states8 states = {.codes1 = codes1,
                               .slow_codes = slow_codes,
                               .codes2 = codes2,
                               .absmax1 = absmax1,
                               .slow_absmax = slow_absmax,
                               .absmax2 = absmax2,
                               .map1 = map1,
                               .map2 = map2,
                               .search1 = &search[0],
                               .search2 = &search[1]};
    for (int o = 0; o < HB_OPTIMIZER_COUNT; o++)
        for (hb_dtype io = HB_F32; io <= (o == HB_ADAM ? HB_BF16 : HB_F32); io++) {
            if (!CHECK_NEW(c, optim.step8[o][io])) continue;
            check_fill_bytes(c, codes1, N);
            if (o >= HB_RMSPROP) // sums of squares
                for (int i = 0; i < N; i++) codes1[i] |= 0x80;
            check_fill_bytes(c, slow_codes, N);
            check_fill_bytes(c, codes2, N);
            for (int i = 0; i < BLOCKS; i++)
                absmax1[i] = 0.03f, slow_absmax[i] = 0.01f, absmax2[i] = 1e-3f;
            check_convert(p, m, N, io);
            check_convert(g, v, N, io);
            if (CHECK_NEW(c, optim.norm8[o][io])) {
                hb_optim_squares squares[N / HB_OPTIM_PIECE];
                CHECK_COUNT(c, named("norm of %s, 8-bit states, %s", names[o], hb_dtype_name(io)),
                            N, "element")
                k->norm8[o][io](m, v, BLOCKS, &states, &scalars, squares);
            }
            CHECK_COUNT(c, named("%s, 8-bit states, %s", names[o], hb_dtype_name(io)), N, "element")
            k->step8[o][io](m, v, BLOCKS, &states, &scalars);
        }
}
