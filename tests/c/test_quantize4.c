// quantize4 of the 4-bit formats: the same bytes as absmax and encode4, by whatever way.
#include "codec.h"

#include <stdio.h>

typedef struct {
    const float *values; // [n]
    const void *data;    // the same in `io`
    int64_t n, blocksize;
    hb_dtype io;
    hb_format4 format;
} quantize_case;

// Runs the kernel with guarded outputs and compares both; false when they differ.
static bool quantizes_right(check *c, const quantize_case *q)
{
    const int64_t n_blocks = hb_ceil_div(q->n, q->blocksize);
    const size_t bytes = (size_t)(q->n + 1) / 2;
    float *want_absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
    float *absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
    uint8_t *want = check_buffer(c, bytes, CHECK_END);
    uint8_t *packed = check_buffer(c, bytes, q->n % 3 ? CHECK_END : CHECK_BEGIN);
    for (int64_t b = 0; b < n_blocks; b++) {
        const int64_t first = b * q->blocksize, rest = q->n - first;
        want_absmax[b] = codec_absmax(q->values + first, rest < q->blocksize ? rest : q->blocksize);
    }
    codec4_plain_blocks(q->values, q->n, q->format, q->blocksize, want_absmax, want);
    c->kernels->codec.quantize4[q->io](q->data, q->n, q->format, q->blocksize, absmax, packed);
    const char *format = hb_codebook4_get(q->format)->name, *io = hb_dtype_name(q->io);
    return check_equal(c, absmax, want_absmax, (size_t)n_blocks * 4,
                       "%s quantize %s n=%lld blocksize=%lld: absmax", format, io, (long long)q->n,
                       (long long)q->blocksize) &&
           check_equal(c, packed, want, bytes, "%s quantize %s n=%lld blocksize=%lld", format, io,
                       (long long)q->n, (long long)q->blocksize);
}

CHECK_GROUP(codec4_quantize)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.quantize4[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int64_t blocksize = 32; blocksize <= 4096; blocksize *= 2)
                for (int kind = 0; kind < 4; kind++) {
                    const int64_t n = codec_sizes[s];
                    codec_input x = codec_make_input(c, n, io, kind == 1, CHECK_END);
                    if (kind >= 2) { // finite and of one size, some beyond 1 or very small
                        const float scale = blocksize % 3 == 1 ? 0.02f : s % 2 ? 300.0f : 1e-30f;
                        check_fill_normal(c, x.values, n, scale);
                        check_convert(x.values, x.data, n, io);
                    }
                    if (n > 0 && kind == 3) { // but for one element
                        static const float odd[] = {NAN, INFINITY, -INFINITY, 1e-45f, 0x1p127f};
                        const int64_t at = check_random_below(c, n);
                        x.values[at] = odd[s % 5];
                        hb_store_f32(x.data, at, io, x.values[at]);
                        x.values[at] = hb_load_f32(x.data, at, io);
                    }
                    for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
                        quantize_case q = {x.values, x.data, n, blocksize, io, (hb_format4)f};
                        (void)quantizes_right(c, &q);
                    }
                    check_release(c);
                }
        if (!c->bench) continue;
        const int64_t n = 1 << 15; // stays in L2
        float *x = check_buffer(c, (size_t)n * 4, CHECK_BEGIN);
        float *absmax = check_buffer(c, (size_t)n / 16, CHECK_BEGIN);
        uint8_t *packed = check_buffer(c, (size_t)n / 2, CHECK_BEGIN);
        void *data = check_buffer(c, (size_t)n * 4, CHECK_BEGIN);
        check_fill_normal(c, x, n, 0.02f);
        check_convert(x, data, n, io);
        for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
            char name[64];
            snprintf(name, sizeof name, "%s quantize in one walk %s",
                     hb_codebook4_get((hb_format4)f)->name, hb_dtype_name(io));
            CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 0.5625), 0)
            c->kernels->codec.quantize4[io](data, n, (hb_format4)f, 64, absmax, packed);
        }
        check_release(c);
    }
}

// Everything near the thresholds of blocks with all kinds of scales.
CHECK_GROUP(codec4_quantize_ties)
{
    enum { N = 4096, ROUNDS = 400 };
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.quantize4[io])) continue;
        for (int round = 0; round < (c->emulated ? 10 : ROUNDS); round++)
            for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
                const int64_t blocksize = (int64_t)32 << check_random_below(c, 8);
                float *values = check_buffer(c, N * 4, CHECK_END);
                void *data = check_buffer(c, N * hb_dtype_bytes(io), CHECK_END);
                const int exponent = io == HB_F16 ? (int)check_random_below(c, 30) - 24
                                                  : (int)check_random_below(c, 250) - 130;
                for (int64_t i = 0; i < N; i++) {
                    const float scale =
                        ldexpf(1.0f + (float)(round * 1000 + i / blocksize) * 0x1p-20f, exponent);
                    const float t =
                        hb_codebook4_get((hb_format4)f)->threshold[check_random_below(c, 15)];
                    values[i] = i % blocksize == 0
                                    ? scale
                                    : codec_neighbour(t * scale, (int)check_random_below(c, 9) - 4);
                }
                check_convert(values, data, N, io);
                quantize_case q = {values, data, N, blocksize, io, (hb_format4)f};
                if (!quantizes_right(c, &q)) return;
                check_release(c);
            }
    }
}

// 16-bit dtypes: all quotients. float32: quotients by 1, all of them or a sample of each exponent.
CHECK_GROUP(codec4_quantize_every_value)
{
    enum { N = 4096 };
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.quantize4[io])) continue;
        codec_all_floats walk = codec_all_floats_begin(c);
        const uint32_t fraction = io == HB_BF16 ? 1u << 7 : 1u << 10;
        const uint32_t exponents = 14, one = io == HB_BF16 ? 0x3f80 : 0x3c00;
        uint32_t divisor = 0, next = 0;
        for (;;) {
            float *values = check_buffer(c, N * 4, CHECK_END);
            void *data = check_buffer(c, N * hb_dtype_bytes(io), CHECK_END);
            if (io == HB_F32) {
                values[0] = 1.0f;
                if (codec_all_floats_next(&walk, values + 1, N - 1) < N - 1) break;
                for (int64_t i = 1; i < N; i++)
                    if (!(fabsf(values[i]) <= 1.0f)) values[i] = 0.0f;
                memcpy(data, values, N * 4);
            } else {
                // Smaller magnitudes than a divisor of one binade, both signs; then the next one.
                uint16_t *words = data;
                if (divisor == fraction) break;
                words[0] = (uint16_t)(one + divisor);
                for (int64_t i = 1; i < N; i++, next++) {
                    const uint32_t below = next / 2 % (exponents * fraction);
                    words[i] = (uint16_t)((one + divisor - below) | next % 2 << 15);
                }
                if (next >= 2 * exponents * fraction) {
                    next = 0;
                    divisor += c->emulated ? 61 : io == HB_F16 ? 7 : 1;
                    if (divisor > fraction) divisor = fraction;
                }
                for (int64_t i = 0; i < N; i++) values[i] = hb_load_f32(data, i, io);
            }
            for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
                quantize_case q = {values, data, N, 4096, io, (hb_format4)f};
                if (!quantizes_right(c, &q)) return;
            }
            check_release(c);
        }
        check_release(c);
    }
}
