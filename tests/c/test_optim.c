// Optimizer loops: every ISA gives the reference's bits, in place, to the last element and no
// further.
#include "codec.h"

#include <string.h>

static const hb_optim_scalars scalars = {.gnorm_scale = 0.75f,
                                         .coupled_decay = 0.01f,
                                         .keep = 0.999f,
                                         .beta1 = 0.9f,
                                         .beta1_rest = 0.1f,
                                         .beta2 = 0.999f,
                                         .beta2_rest = 0.001f,
                                         .beta3 = 0.9999f,
                                         .beta3_rest = 0.0001f,
                                         .alpha = 5.0f,
                                         .eps = 1e-8f,
                                         .lr = 1e-3f,
                                         .step_size = 3e-3f,
                                         .inv_corr1 = 2.5f,
                                         .inv_corr2 = 12.0f,
                                         .scale = 0.5f,
                                         .first = false};

static const char *const names[HB_OPTIMIZER_COUNT] = {"adam", "ademamix", "momentum",
                                                      "lion", "rmsprop",  "adagrad"};
enum { ARRAYS = 5 }; // p, g, m, slow, v

static void fill(check *c, float *const *arrays, int64_t n, bool wild)
{
    for (int a = 0; a < ARRAYS; a++) {
        if (wild)
            check_fill_wild(c, arrays[a], n, true);
        else
            check_fill_normal(c, arrays[a], n, a == 0 ? 1.0f : 0.01f);
    }
    for (int64_t i = 0; i < n; i++)
        arrays[4][i] = hb_f32_from_bits(hb_f32_bits(arrays[4][i]) & 0x7fffffffu);
}

static void check_step(check *c, int optimizer, int64_t n, bool wild, bool first)
{
    float *got[ARRAYS], *want[ARRAYS];
    const size_t bytes = (size_t)n * sizeof(float);
    for (int a = 0; a < ARRAYS; a++) {
        got[a] = check_buffer(c, bytes, CHECK_END);
        want[a] = check_buffer(c, bytes, CHECK_END);
    }
    fill(c, want, n, wild);
    for (int a = 0; a < ARRAYS; a++)
        if (n > 0) memcpy(got[a], want[a], bytes);
    hb_optim_scalars s = scalars;
    s.first = first;
    c->reference->optim.step[optimizer](want[0], want[1], want[2], want[3], want[4], n, &s);
    c->kernels->optim.step[optimizer](got[0], got[1], got[2], got[3], got[4], n, &s);
    for (int a = 0; a < ARRAYS; a++)
        for (int64_t i = 0; i < n;
             i++) // a NaN is a NaN: which operand's payload survives is not fixed
            if (want[a][i] != want[a][i] && got[a][i] != got[a][i]) got[a][i] = want[a][i];
    for (int a = 0; a < ARRAYS; a++)
        check_equal(c, got[a], want[a], bytes, "%s: array %d, n=%lld", names[optimizer], a,
                    (long long)n);
    check_release(c);
}

CHECK_GROUP(optim_steps)
{
    if (!CHECK_NEW(c, optim.step[HB_ADAM])) return;
    static const int64_t sizes[] = {0, 1, 7, 8, 15, 16, 17, 31, 33, 255, 256, 1000};
    for (int o = 0; o < HB_OPTIMIZER_COUNT; o++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (int variant = 0; variant < 3; variant++) {
                check_label(c, "%s n=%lld variant=%d", names[o], (long long)sizes[i], variant);
                check_step(c, o, sizes[i], variant == 1, variant == 2);
            }
    enum { N = 1 << 16 };
    float *arrays[ARRAYS];
    for (int a = 0; a < ARRAYS; a++) arrays[a] = check_buffer(c, N * sizeof(float), CHECK_BEGIN);
    fill(c, arrays, N, false);
    CHECK_BENCH(c, b, "optimizer step adam f32", N * 28.0, 0)
    c->kernels->optim.step[HB_ADAM](arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], N,
                                    &scalars);
}

CHECK_GROUP(optim_norms)
{
    if (!CHECK_NEW(c, optim.step[HB_ADAM])) return;
    enum { N = 1000 };
    float *arrays[ARRAYS];
    for (int a = 0; a < ARRAYS; a++) arrays[a] = check_buffer(c, N * sizeof(float), CHECK_END);
    fill(c, arrays, N, false);
    static const int limited[] = {HB_ADAM, HB_MOMENTUM};
    for (int i = 0; i < 2; i++)
        for (int64_t n = 0; n <= N; n += 37) {
            hb_optim_squares want, got;
            c->reference->optim.norm[limited[i]](arrays[0], arrays[1], arrays[2], arrays[4], n,
                                                 &scalars, &want);
            c->kernels->optim.norm[limited[i]](arrays[0], arrays[1], arrays[2], arrays[4], n,
                                               &scalars, &got);
            check_equal(c, &got, &want, sizeof got, "norm of %s, n=%lld", names[limited[i]],
                        (long long)n);
        }
}

CHECK_GROUP(optim_conversions)
{
    if (!CHECK_NEW(c, optim.step[HB_ADAM])) return;
    for (int io = 0; io < HB_IO_COUNT; io++)
        for (int64_t n = 0; n <= 67; n++) {
            check_label(c, "%s n=%lld", hb_dtype_name((hb_dtype)io), (long long)n);
            const size_t bytes = (size_t)n * hb_dtype_bytes((hb_dtype)io);
            float *x = check_buffer(c, (size_t)n * sizeof *x, CHECK_END);
            check_fill_wild(c, x, n, true);
            void *got = check_buffer(c, bytes, CHECK_END),
                 *want = check_buffer(c, bytes, CHECK_END);
            c->reference->optim.narrow[io](x, n, want);
            c->kernels->optim.narrow[io](x, n, got);
            check_equal(c, got, want, bytes, "narrow");
            for (int64_t i = 0; i < n; i++) hb_store_f32(got, i, (hb_dtype)io, x[i]);
            check_equal(c, want, got, bytes, "narrow of the reference");
            float *wide = check_buffer(c, (size_t)n * sizeof *wide, CHECK_END);
            c->kernels->optim.widen[io](want, n, wide);
            for (int64_t i = 0; i < n; i++) x[i] = hb_load_f32(want, i, (hb_dtype)io);
            check_equal(c, wide, x, (size_t)n * sizeof *x, "widen");
            check_release(c);
        }
}

CHECK_GROUP(optim_keep_sign)
{
    if (!CHECK_NEW(c, optim.step[HB_ADAM])) return;
    enum { ZERO = 127 }; // codes below stand for negative values
    for (int64_t n = 0; n <= 300; n += 13) {
        float *x = check_buffer(c, (size_t)n * sizeof *x, CHECK_END);
        uint8_t *codes = check_buffer(c, (size_t)n, CHECK_END);
        uint8_t *want = check_buffer(c, (size_t)n, CHECK_END);
        check_fill_wild(c, x, n, true);
        for (int64_t i = 0; i < n; i++) {
            codes[i] = (uint8_t)(ZERO - 3 + check_random_below(c, 6));
            want[i] = codes[i];
            if (x[i] > 0.0f && codes[i] < ZERO) want[i]++;
            if (x[i] < 0.0f && codes[i] >= ZERO) want[i]--;
        }
        c->kernels->optim.keep_sign(x, n, ZERO, codes);
        check_equal(c, codes, want, (size_t)n, "keep_sign n=%lld", (long long)n);
        check_release(c);
    }
}

// A tensor with 8-bit states, all zero.
static hb_optim_tensor tensor8(check *c, int optimizer, int64_t n, hb_dtype io)
{
    const int64_t rows = optimizer == HB_ADEMAMIX ? 2 : 1;
    const size_t n_blocks = (size_t)hb_ceil_div(n, HB_OPTIM_BLOCKSIZE);
    hb_optim_tensor t = {.p = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_END),
                         .p_dtype = io,
                         .g_dtype = io,
                         .n = n,
                         .state_is_8bit = true,
                         .state1 = check_buffer(c, (size_t)(rows * n), CHECK_END),
                         .absmax1 = check_buffer(c, (size_t)rows * n_blocks * 4, CHECK_END)};
    memset(t.state1, 0, (size_t)(rows * n));
    memset(t.absmax1, 0, (size_t)rows * n_blocks * 4);
    if (optimizer > HB_ADEMAMIX) return t;
    t.state2 = check_buffer(c, (size_t)n, CHECK_END);
    t.absmax2 = check_buffer(c, n_blocks * 4, CHECK_END);
    memset(t.state2, 0, (size_t)n);
    memset(t.absmax2, 0, n_blocks * 4);
    return t;
}

static void check_tensors8(check *c, const hb_optim_tensor *got, const hb_optim_tensor *want,
                           int optimizer)
{
    const int64_t rows = optimizer == HB_ADEMAMIX ? 2 : 1, n = want->n;
    const size_t n_blocks = (size_t)hb_ceil_div(n, HB_OPTIM_BLOCKSIZE);
    for (int64_t i = 0; i < n; i++) { // a NaN is a NaN
        const float p = hb_load_f32(want->p, i, want->p_dtype);
        const float q = hb_load_f32(got->p, i, want->p_dtype);
        if (p != p && q != q) hb_store_f32(got->p, i, want->p_dtype, p);
    }
    check_equal(c, got->p, want->p, (size_t)n * hb_dtype_bytes(want->p_dtype), "p");
    check_equal(c, got->absmax1, want->absmax1, (size_t)rows * n_blocks * 4, "absmax1");
    check_equal(c, got->state1, want->state1, (size_t)(rows * n), "codes of the first state");
    if (want->state2 == NULL) return;
    check_equal(c, got->absmax2, want->absmax2, n_blocks * 4, "absmax2");
    check_equal(c, got->state2, want->state2, (size_t)n, "codes of the second state");
}

// Several steps of the fused kernel beside the separate ones of the reference, to the bit. Wild
// gradients and parameters, blocks of zeros and of tiny numbers.
static void check_steps8(check *c, int optimizer, int64_t n, hb_dtype io, int round, bool limited)
{
    static const float grains[] = {1e-2f, 1e-12f, 1e-21f, 1e18f};
    hb_context plain = *c->context;
    plain.kernels = *c->reference;
    const size_t p_bytes = (size_t)n * hb_dtype_bytes(io);
    float map1[256], map2[256], *values = check_buffer(c, (size_t)n * 4, CHECK_END);
    void *g = check_buffer(c, p_bytes, CHECK_END);
    hb_map8_fill(HB_MAP_DYNAMIC, map1);
    hb_map8_fill(HB_MAP_DYNAMIC_UNSIGNED, map2);
    hb_optim_tensor got = tensor8(c, optimizer, n, io), want = tensor8(c, optimizer, n, io);
    check_fill_normal(c, values, n, 0.02f);
    if (round % 3 == 2) // infinite and NaN parameters, which decay brings into states
        for (int64_t i = 0; i < n; i += 700)
            values[i] = hb_f32_from_bits(0x7f800000u | (i % 3 == 1));
    check_convert(values, got.p, n, io);
    memcpy(want.p, got.p, p_bytes);
    got.g = want.g = g;
    float norms[2] = {0};
    if (limited) got.unorm = &norms[0], want.unorm = &norms[1];
    for (int step = 1; step <= 6; step++) {
        const hb_optim_settings settings = {.lr = 1e-2,
                                            .beta1 = 0.9,
                                            .beta2 = 0.999,
                                            .beta3 = 0.9999,
                                            .alpha = 5.0,
                                            .eps = step % 2 ? 1e-8 : 0.0,
                                            .weight_decay = step == 4 ? 0.0 : 0.1,
                                            .gnorm_scale = step % 3 ? 1.0 : 0.3,
                                            .max_unorm = limited ? 1e-3 : 0.0};
        if (step == 5)
            check_fill_wild(c, values, n, true);
        else
            check_fill_normal(c, values, n, grains[(step + round) % 4]);
        for (int64_t i = 0; i < n; i++)
            if (i / 100 % 7 == 0) values[i] = i % 2 ? 0.0f : -0.0f;
        check_convert(values, g, n, io);
        hb_error error;
        got.step = want.step = step;
        const hb_device device = {.type = HB_CPU};
        hb_status status = hb_optimizer_step(c->context, &device, (hb_optimizer)optimizer, &got, 1,
                                             &settings, map1, map2, NULL, &error);
        CHECK(c, status == HB_OK, "step: %s", error.text);
        status = hb_optimizer_step(&plain, &device, (hb_optimizer)optimizer, &want, 1, &settings,
                                   map1, map2, NULL, &error);
        CHECK(c, status == HB_OK, "step of the reference: %s", error.text);
        check_label(c, "%s %s n=%lld step %d", names[optimizer], hb_dtype_name(io), (long long)n,
                    step);
        check_tensors8(c, &got, &want, optimizer);
        if (norms[0] == norms[0] || norms[1] == norms[1])
            check_equal(c, &norms[0], &norms[1], sizeof *norms, "norm of the update");
    }
    check_release(c);
}

CHECK_GROUP(optim_step8)
{
    static const int64_t sizes[] = {1, 255, 256, 257, 1024, 2048, 2049, 5000};
    for (int o = 0; o < HB_OPTIMIZER_COUNT; o++)
        for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
            if (!CHECK_NEW(c, optim.step8[o][io])) continue;
            for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
                for (int limited = 0; limited <= (c->kernels->optim.norm[o] != NULL); limited++)
                    check_steps8(c, o, sizes[k], io, (int)k, limited);
        }
}

// Every code of both maps, dynamic and nearly so, as a state: what the step moves p by says to
// which float it was decoded.
CHECK_GROUP(optim_step8_every_code)
{
    enum { N = HB_OPTIM_BLOCKSIZE, ROUNDS = 60 };
    if (!CHECK_NEW(c, optim.step8[HB_ADAM][HB_F32])) return;
    hb_search8 *search = check_buffer(c, 2 * sizeof *search, CHECK_BEGIN);
    float *g = check_buffer(c, N * 4, CHECK_END), *p = check_buffer(c, N * 4, CHECK_END);
    float *want = check_buffer(c, N * 4, CHECK_END);
    uint8_t *codes1 = check_buffer(c, N, CHECK_END), *codes2 = check_buffer(c, N, CHECK_END);
    memset(g, 0, N * 4);
    for (int round = 0; round < ROUNDS; round++) {
        float map[2][256], absmax1 = 0.7f, absmax2 = 0.3f;
        const float size = exp2f(-(float)(round % 25));
        for (int k = 0; k < 2; k++) {
            hb_map8_fill(k ? HB_MAP_DYNAMIC_UNSIGNED : HB_MAP_DYNAMIC, map[k]);
            for (int i = 1; i < 255 && round > 0; i++) {
                const float moved = map[k][i] * (1 + size * check_random_normal(c));
                if (map[k][i - 1] <= moved && moved <= map[k][i + 1] && moved != 0.0f)
                    map[k][i] = moved;
            }
            hb_search8_init(&search[k], map[k]);
            if (!search[k].decades.fits) { // not for these kernels
                hb_map8_fill(k ? HB_MAP_DYNAMIC_UNSIGNED : HB_MAP_DYNAMIC, map[k]);
                hb_search8_init(&search[k], map[k]);
            }
        }
        const hb_states8 states = {.codes1 = codes1,
                                   .codes2 = codes2,
                                   .absmax1 = &absmax1,
                                   .absmax2 = &absmax2,
                                   .map1 = map[0],
                                   .map2 = map[1],
                                   .search1 = &search[0],
                                   .search2 = &search[1]};
        for (int second = 0; second < 2; second++) {
            // p = -m, or -(0.7 / sqrt(v)) with the largest m
            const hb_optim_scalars s = {.gnorm_scale = 1.0f,
                                        .keep = 1.0f,
                                        .beta1 = 1.0f,
                                        .beta2 = 1.0f,
                                        .inv_corr2 = second ? 1.0f : 0.0f,
                                        .eps = second ? 0.0f : 1.0f,
                                        .step_size = 1.0f,
                                        .scale = 1.0f};
            absmax1 = 0.7f, absmax2 = 0.3f;
            for (int i = 0; i < N; i++) {
                codes1[i] = second ? 255 : (uint8_t)i;
                codes2[i] = second ? (uint8_t)(255 - i) : 1;
                p[i] = 0.0f;
                const float m = map[0][codes1[i]] * absmax1, v = map[1][codes2[i]] * absmax2;
                want[i] = 0.0f - m / (sqrtf(v) * s.inv_corr2 + s.eps);
            }
            c->kernels->optim.step8[HB_ADAM][HB_F32](p, g, 1, &states, &s);
            if (!check_equal(c, p, want, N * 4, "round %d, state %d", round, second + 1)) return;
        }
    }
}

// Every float32 up to 1 as a state (in first steps m is the gradient), and their squares as Adam's
// second state, in blocks whose largest is 1: the codes of the separate kernels, which
// codec8_every_value compares with the map itself.
CHECK_GROUP(optim_step8_every_state)
{
    enum { BLOCKS = 64, N = BLOCKS * HB_OPTIM_BLOCKSIZE, ZERO = 127 };
    if (!CHECK_NEW(c, optim.step8[HB_ADAM][HB_F32])) return;
    float map1[256], map2[256], absmax1[BLOCKS], absmax2[BLOCKS], ones[BLOCKS];
    hb_search8 *search = check_buffer(c, 2 * sizeof *search, CHECK_BEGIN);
    hb_map8_fill(HB_MAP_DYNAMIC, map1);
    hb_map8_fill(HB_MAP_DYNAMIC_UNSIGNED, map2);
    hb_search8_init(&search[0], map1);
    hb_search8_init(&search[1], map2);
    float *values = check_buffer(c, N * 4, CHECK_END), *squares = check_buffer(c, N * 4, CHECK_END);
    float *p = check_buffer(c, N * 4, CHECK_END);
    uint8_t *codes[4]; // of both states: got, wanted
    for (int k = 0; k < 4; k++) codes[k] = check_buffer(c, N, CHECK_END);
    const hb_states8 states = {.codes1 = codes[0],
                               .codes2 = codes[1],
                               .absmax1 = absmax1,
                               .absmax2 = absmax2,
                               .map1 = map1,
                               .map2 = map2,
                               .search1 = &search[0],
                               .search2 = &search[1]};
    const hb_optim_scalars plain = {.gnorm_scale = 1.0f,
                                    .keep = 1.0f,
                                    .beta1_rest = 1.0f,
                                    .beta2_rest = 1.0f,
                                    .inv_corr2 = 1.0f,
                                    .eps = 1.0f,
                                    .first = true};
    for (int b = 0; b < BLOCKS; b++) ones[b] = 1.0f;
    memset(p, 0, N * 4);
    for (codec_all_floats walk = codec_all_floats_begin(c); walk.next <= 0xbf800000u;) {
        for (int i = 0; i < N; i++) {
            if (walk.next > 0x3f800000u && walk.next < 0x80000000u) walk.next = 0x80000000u;
            const bool extra = i % HB_OPTIM_BLOCKSIZE == 0 || walk.next > 0xbf800000u;
            values[i] = extra ? 1.0f : hb_f32_from_bits((uint32_t)walk.next);
            squares[i] = values[i] * values[i];
            walk.next += extra ? 0 : walk.step;
        }
        c->kernels->codec.encode8[HB_F32](values, N, &search[0], 256, ones, codes[2]);
        c->kernels->optim.keep_sign(values, N, ZERO, codes[2]);
        c->kernels->codec.encode8[HB_F32](squares, N, &search[1], 256, ones, codes[3]);
        for (int o = HB_ADAM; o <= HB_MOMENTUM; o += HB_MOMENTUM) {
            if (c->kernels->optim.step8[o][HB_F32] == NULL) continue;
            memset(codes[0], ZERO, N);
            memset(codes[1], 0, N);
            for (int b = 0; b < BLOCKS; b++) absmax1[b] = absmax2[b] = 0.0f;
            c->kernels->optim.step8[o][HB_F32](p, values, BLOCKS, &states, &plain);
            bool same = check_equal(c, absmax1, ones, sizeof ones, "%s: absmax1", names[o]) &&
                        check_equal(c, codes[0], codes[2], N, "%s: codes up to %#llx", names[o],
                                    (unsigned long long)walk.next);
            if (o == HB_ADAM)
                same = same && check_equal(c, codes[1], codes[3], N, "codes of squares up to %#llx",
                                           (unsigned long long)walk.next);
            if (!same) return;
        }
    }
}
