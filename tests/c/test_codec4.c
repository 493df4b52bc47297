// NF4 and FP4 kernels: absmax, encode, decode, scale search; and the tables of formats.def.
#include "codec.h"

#include <stdio.h>

CHECK_GROUP_ONCE(codec4_tables)
{
    for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
        const hb_codebook4 *book = hb_codebook4_get((hb_format4)f);
        CHECK(c, hb_format4_from_name(book->name) == f, "%s", book->name);
        unsigned seen = 0;
        for (int r = 0; r < 16; r++) seen |= 1u << book->code_of_rank[r];
        CHECK(c, seen == 0xffff, "%s: ranks are no permutation", book->name);
        for (int r = 0; r < 15; r++) {
            float low = book->value[book->code_of_rank[r]];
            float high = book->value[book->code_of_rank[r + 1]];
            float threshold = book->threshold[r];
            CHECK(c, low < high || (low == 0 && high == 0), "%s: value of rank %d", book->name, r);
            CHECK(c, r == 0 || book->threshold[r - 1] < threshold, "%s: threshold %d", book->name,
                  r);
            // The CUDA kernel's decimal literals for FP4 are midpoints to 1e-6.
            CHECK(c, fabs(((double)low + high) / 2 - threshold) < (f == HB_NF4 ? 6e-8 : 1e-6),
                  "%s: threshold %d is no midpoint", book->name, r);
        }
        CHECK(c, book->threshold[15] == INFINITY, "%s: [15]", book->name);
        CHECK(c, book->nan_code == 0, "%s: nan_code", book->name);
    }
    CHECK(c, hb_format4_from_name("nf3") == -1, "unknown name");
}

CHECK_GROUP(codec4_absmax)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.absmax[io])) continue;
        static const int64_t blocksizes[] = {1, 2, 5, 16, 31, 32, 64, 100, 256, 4096, INT64_MAX};
        for (int s = 0; s < codec_size_count(c); s++)
            for (int b = 0; b < 11; b++) {
                const int64_t n = codec_sizes[s], blocksize = blocksizes[b];
                const int64_t n_blocks = hb_ceil_div(n, blocksize);
                codec_input x = codec_make_input(c, n, io, b % 2, b % 3 ? CHECK_END : CHECK_BEGIN);
                float *got = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
                c->kernels->codec.absmax[io](x.data, n, blocksize, got);
                for (int64_t i = 0; i < n_blocks; i++) {
                    int64_t count = n - i * blocksize < blocksize ? n - i * blocksize : blocksize;
                    float want = codec_absmax(x.values + i * blocksize, count);
                    check_equal(c, got + i, &want, 4, "absmax %s n=%lld block %lld of %lld",
                                hb_dtype_name(io), (long long)n, (long long)i,
                                (long long)blocksize);
                }
                check_release(c);
            }
    }
}

CHECK_GROUP(codec4_encode)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode4[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int f = 0; f < HB_CODEBOOK_COUNT; f++)
                for (int64_t blocksize = 32; blocksize <= 4096; blocksize *= 2) {
                    const int64_t n = codec_sizes[s], n_blocks = hb_ceil_div(n, blocksize);
                    const size_t bytes = (size_t)(n + 1) / 2;
                    codec_input x = codec_make_input(c, n, io, true,
                                                     blocksize % 3 == 1 ? CHECK_END : CHECK_BEGIN);
                    float *absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
                    c->reference->codec.absmax[io](x.data, n, blocksize, absmax);
                    if (s % 3 == 0) // scales below absmax: v beyond 1
                        for (int64_t i = 0; i < n_blocks; i++) absmax[i] *= i % 2 ? 0.7f : -0.01f;
                    uint8_t *want = check_buffer(c, bytes, CHECK_END);
                    uint8_t *got = check_buffer(c, bytes, CHECK_END);
                    codec4_plain_blocks(x.values, n, (hb_format4)f, blocksize, absmax, want);
                    c->kernels->codec.encode4[io](x.data, n, (hb_format4)f, blocksize, absmax, got);
                    check_equal(c, got, want, bytes, "%s encode %s n=%lld blocksize=%lld",
                                hb_codebook4_get((hb_format4)f)->name, hb_dtype_name(io),
                                (long long)n, (long long)blocksize);
                    check_release(c);
                }
        if (!c->bench) continue;
        const int64_t n = 1 << 22;
        float *x = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        float *absmax = check_buffer(c, (size_t)n / 16, CHECK_BEGIN);
        uint8_t *packed = check_buffer(c, (size_t)n / 2, CHECK_BEGIN);
        memset(x, 0, (size_t)n * hb_dtype_bytes(io));
        const double moved = (double)n * ((double)hb_dtype_bytes(io) + 0.5625);
        for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
            char name[64];
            snprintf(name, sizeof name, "%s quantize %s", hb_codebook4_get((hb_format4)f)->name,
                     hb_dtype_name(io));
            CHECK_BENCH(c, b, name, moved, 0)
            for (int64_t i = 0; i < n; i += 4096) {
                const uint8_t *piece = (const uint8_t *)x + (size_t)i * hb_dtype_bytes(io);
                c->kernels->codec.absmax[io](piece, 4096, 64, absmax + i / 64);
                c->kernels->codec.encode4[io](piece, 4096, (hb_format4)f, 64, absmax + i / 64,
                                              packed + i / 2);
            }
        }
        check_release(c);
    }
}

// v = x with absmax 1, over every threshold, every exponent, every 16-bit float, or all of float32.
CHECK_GROUP(codec4_every_value)
{
    enum { SLICE = 1 << 16 };
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode4[io])) continue;
        float *values = check_buffer(c, SLICE * 4, CHECK_END);
        void *data = check_buffer(c, SLICE * hb_dtype_bytes(io), CHECK_END);
        float *absmax = check_buffer(c, SLICE / 4096 * 4, CHECK_END);
        uint8_t *want = check_buffer(c, SLICE / 2, CHECK_END);
        uint8_t *got = check_buffer(c, SLICE / 2, CHECK_END);
        for (int i = 0; i < SLICE / 4096; i++) absmax[i] = 1.0f;
        codec_all_floats walk = codec_all_floats_begin(c);
        bool first = true;
        for (;;) {
            int64_t n = 0;
            if (io != HB_F32) {
                for (; n < SLICE; n++) ((uint16_t *)data)[n] = (uint16_t)n;
                for (int64_t i = 0; i < n; i++) values[i] = hb_load_f32(data, i, io);
            } else if (first) {
                for (int f = 0; f < HB_CODEBOOK_COUNT; f++)
                    for (int t = 0; t < 15; t++)
                        for (int ulp = -3; ulp <= 3; ulp++)
                            values[n++] =
                                codec_neighbour(hb_codebook4_get((hb_format4)f)->threshold[t], ulp);
                for (uint32_t exponent = 0; exponent < 512; exponent++)
                    for (int k = 0; k < 100; k++)
                        values[n++] = hb_f32_from_bits(exponent << 23 |
                                                       (uint32_t)check_random_below(c, 1 << 23));
            } else {
                n = codec_all_floats_next(&walk, values, SLICE);
            }
            if (n == 0) break;
            if (io == HB_F32) memcpy(data, values, (size_t)n * 4);
            for (int f = 0; f < HB_CODEBOOK_COUNT; f++) {
                codec4_plain_blocks(values, n, (hb_format4)f, 4096, absmax, want);
                c->kernels->codec.encode4[io](data, n, (hb_format4)f, 4096, absmax, got);
                if (!check_equal(c, got, want, (size_t)(n + 1) / 2, "%s encode %s of all values",
                                 hb_codebook4_get((hb_format4)f)->name, hb_dtype_name(io)))
                    return;
            }
            if (io != HB_F32) break;
            first = false;
        }
        check_release(c);
    }
}

CHECK_GROUP(codec4_decode)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.decode4[io])) continue;
        static const int64_t starts[] = {0, 1, 2, 31, 32, 33, 64, 97};
        for (int s = 0; s < codec_size_count(c); s++)
            for (int k = 0; k < 8; k++) {
                const int64_t n = codec_sizes[s], start = starts[k], numel = start + n;
                const int64_t blocksize = (int64_t)32 << check_random_below(c, 8);
                const int64_t n_blocks = hb_ceil_div(numel, blocksize);
                const hb_format4 format = (hb_format4)check_random_below(c, 2);
                const hb_codebook4 *book = hb_codebook4_get(format);
                const size_t bytes = (size_t)n * hb_dtype_bytes(io);
                uint8_t *packed = check_buffer(c, (size_t)(numel + 1) / 2, CHECK_END);
                float *absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
                void *want = check_buffer(c, bytes, CHECK_END);
                void *got = check_buffer(c, bytes, k % 2 ? CHECK_END : CHECK_BEGIN);
                check_fill_bytes(c, packed, (size_t)(numel + 1) / 2);
                check_fill_wild(c, absmax, n_blocks, true);
                if (k % 3)
                    for (int64_t b = 0; b < n_blocks; b++)
                        absmax[b] = fabsf(check_random_normal(c));
                for (int64_t i = 0; i < n; i++) {
                    int64_t e = start + i;
                    int code = e % 2 ? packed[e / 2] & 15 : packed[e / 2] >> 4;
                    codec_store(want, i, io, book->value[code] * absmax[e / blocksize]);
                }
                c->kernels->codec.decode4[io](packed, start, n, format, blocksize, absmax, got,
                                              k % 4 == 0);
                codec_settle_nan(got, n, io);
                check_equal(c, got, want, bytes, "%s decode %s n=%lld start=%lld blocksize=%lld",
                            book->name, hb_dtype_name(io), (long long)n, (long long)start,
                            (long long)blocksize);
                check_release(c);
            }
        if (!c->bench) continue;
        const int64_t n = 1 << 22;
        uint8_t *packed = check_buffer(c, (size_t)n / 2, CHECK_BEGIN);
        float *absmax = check_buffer(c, (size_t)n / 16, CHECK_BEGIN);
        void *out = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        for (int64_t i = 0; i < n / 64; i++) absmax[i] = 1.0f;
        char name[64];
        snprintf(name, sizeof name, "nf4 dequantize %s", hb_dtype_name(io));
        CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 0.5625), 0)
        c->kernels->codec.decode4[io](packed, 0, n, HB_NF4, 64, absmax, out, true);
        check_release(c);
    }
}

CHECK_GROUP(codec4_search)
{
    if (!CHECK_NEW(c, codec.search4)) return;
    float candidates[40];
    for (int round = 0; round < (c->emulated ? 40 : 600); round++) {
        const int64_t n = 1 + check_random_below(c, round % 7 ? 130 : 4096);
        const int64_t count = 1 + check_random_below(c, 40);
        const hb_format4 format = (hb_format4)(round % 2);
        const hb_codebook4 *book = hb_codebook4_get(format);
        float *x = check_buffer(c, (size_t)n * 4, CHECK_END);
        float *weight = round % 3 ? NULL : check_buffer(c, (size_t)n * 4, CHECK_END);
        check_fill_normal(c, x, n, round % 5 ? 0.02f : 1e-30f);
        if (weight)
            for (int64_t i = 0; i < n; i++) weight[i] = fabsf(check_random_normal(c));
        const float absmax = codec_absmax(x, n);
        for (int64_t k = 0; k < count; k++)
            candidates[k] =
                absmax * (0.6f + 0.02f * (float)k) * (round % 4 == 3 && k % 2 ? -1.0f : 1.0f);
        if (!(absmax > 0)) continue;
        // Errors in float64 of the same codes.
        double least = INFINITY, error[40];
        for (int64_t k = 0; k < count; k++) {
            error[k] = 0;
            for (int64_t i = 0; i < n; i++) {
                float q = book->value[codec4_plain(format, x[i] * (1.0f / candidates[k]))];
                double d = (double)x[i] - (double)q * candidates[k];
                error[k] += d * d * (weight ? weight[i] : 1.0);
            }
            least = fmin(least, error[k]);
        }
        const int64_t got = c->kernels->codec.search4(x, weight, n, format, candidates, count);
        const int64_t want = c->reference->codec.search4(x, weight, n, format, candidates, count);
        CHECK(c, got == want, "search n=%lld: candidate %lld, reference %lld", (long long)n,
              (long long)got, (long long)want);
        // The float32 error of one candidate is off by at most n/16 + 8 roundings, 2 more in each
        // square, relative to a sum of squares, and by the rounding of q * s against x in each
        // difference (|x| ulp / 2 against errors of 0.02 |x|: far below 1e-4).
        CHECK(c, round % 5 == 0 || error[got] <= least * (1 + 1e-4 + (double)n * 1.2e-7),
              "search n=%lld: error %g, least %g", (long long)n, error[got], least);
        check_release(c);
    }
    if (!c->bench) return;
    const int64_t n = 1 << 16;
    float *x = check_buffer(c, (size_t)n * 4, CHECK_BEGIN);
    check_fill_normal(c, x, n, 1.0f);
    for (int k = 0; k < 19; k++) candidates[k] = 3.0f * (0.70f + 0.02f * (float)k);
    CHECK_BENCH(c, b, "nf4 scale search f32", (double)n * 4, 0)
    for (int64_t i = 0; i < n; i += 64)
        c->kernels->codec.search4(x + i, NULL, 64, HB_NF4, candidates, 19);
}
