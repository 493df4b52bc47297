// Row-wise int8 kernels (LLM.int8()): maxima below a threshold, outliers, encode, decode.
#include "codec.h"

#include <stdio.h>

static const float thresholds[] = {NAN, 6.0f, 0.01f, 1.0f, INFINITY};

static int8_t plain_encode(float x, float absmax, float threshold, bool zero)
{
    double v = (double)(x * (127.0f / absmax)); // the float32 product
    if (isnan(v) || fabsf(x) >= threshold || zero) return 0;
    return (int8_t)fmax(-127, fmin(127, nearbyint(v)));
}

CHECK_GROUP(int8_absmax)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.absmax_int8[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int t = 0; t < 5; t++) {
                const int64_t n = codec_sizes[s];
                codec_input x = codec_make_input(c, n, io, t % 2, t % 2 ? CHECK_END : CHECK_BEGIN);
                uint8_t *want_mark = check_buffer(c, (size_t)n, CHECK_END);
                uint8_t *mark = check_buffer(c, (size_t)n, CHECK_END);
                float *kept = check_buffer(c, (size_t)n * 4, CHECK_END);
                for (int64_t i = 0; i < n; i++) {
                    mark[i] = want_mark[i] =
                        (uint8_t)(i % 7 == 0 ? 5 : 0); // left alone if no outlier
                    bool outlier = fabsf(x.values[i]) >= thresholds[t];
                    if (outlier) want_mark[i] = 1;
                    kept[i] = outlier ? 0.0f : x.values[i];
                }
                float got = c->kernels->codec.absmax_int8[io](x.data, n, thresholds[t]);
                float want = codec_absmax(kept, n);
                check_equal(c, &got, &want, 4, "int8 absmax %s n=%lld threshold %g",
                            hb_dtype_name(io), (long long)n, (double)thresholds[t]);
                c->kernels->codec.outliers_int8[io](x.data, n, thresholds[t], mark);
                check_equal(c, mark, want_mark, (size_t)n, "int8 outliers %s n=%lld threshold %g",
                            hb_dtype_name(io), (long long)n, (double)thresholds[t]);
                check_release(c);
            }
    }
}

CHECK_GROUP(int8_encode)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode_int8[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int t = 0; t < 5; t++) {
                const int64_t n = codec_sizes[s];
                codec_input x = codec_make_input(c, n, io, t % 2, t % 2 ? CHECK_END : CHECK_BEGIN);
                uint8_t *zero = t % 3 ? NULL : check_buffer(c, (size_t)n, CHECK_END);
                int8_t *want = check_buffer(c, (size_t)n, CHECK_END);
                int8_t *got = check_buffer(c, (size_t)n, CHECK_END);
                float absmax = c->reference->codec.absmax_int8[io](x.data, n, thresholds[t]);
                if (s % 5 == 0) absmax *= 0.5f; // beyond 127: saturates
                for (int64_t i = 0; i < n; i++) {
                    if (zero) zero[i] = (uint8_t)(check_random_below(c, 3) == 0 ? 1 + i % 255 : 0);
                    want[i] = plain_encode(x.values[i], absmax, thresholds[t], zero && zero[i]);
                }
                c->kernels->codec.encode_int8[io](x.data, n, absmax, thresholds[t], zero, got);
                check_equal(c, got, want, (size_t)n, "int8 encode %s n=%lld threshold %g absmax %g",
                            hb_dtype_name(io), (long long)n, (double)thresholds[t], (double)absmax);
                check_release(c);
            }
        // Every half between two codes, which must go to the even one.
        float halves[254];
        void *data = check_buffer(c, 254 * hb_dtype_bytes(io), CHECK_END);
        int8_t got[254];
        for (int i = 0; i < 254; i++) halves[i] = (float)i - 126.5f;
        check_convert(halves, data, 254, io);
        c->kernels->codec.encode_int8[io](data, 254, 127.0f, NAN, NULL, got);
        for (int i = 0; i < 254; i++)
            CHECK(c, got[i] == nearbyint(halves[i]), "%g became %d", (double)halves[i], got[i]);
        check_release(c);
        if (!c->bench) continue;
        const int64_t n = 1 << 22;
        void *x = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        int8_t *codes = check_buffer(c, (size_t)n, CHECK_BEGIN);
        memset(x, 0, (size_t)n * hb_dtype_bytes(io));
        char name[64];
        snprintf(name, sizeof name, "int8 quantize row %s", hb_dtype_name(io));
        CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 1), 0)
        for (int64_t i = 0; i < n; i += 4096) {
            const uint8_t *row = (const uint8_t *)x + (size_t)i * hb_dtype_bytes(io);
            float absmax = c->kernels->codec.absmax_int8[io](row, 4096, NAN);
            c->kernels->codec.encode_int8[io](row, 4096, absmax, NAN, NULL, codes + i);
        }
        check_release(c);
    }
}

// v = x with absmax 127: the neighbours of every half, and all of the dtype.
CHECK_GROUP(int8_every_value)
{
    enum { SLICE = 1 << 16 };
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode_int8[io])) continue;
        float *values = check_buffer(c, SLICE * 4, CHECK_END);
        void *data = check_buffer(c, SLICE * hb_dtype_bytes(io), CHECK_END);
        int8_t *want = check_buffer(c, SLICE, CHECK_END);
        int8_t *got = check_buffer(c, SLICE, CHECK_END);
        int64_t n = 0;
        if (io != HB_F32) {
            for (; n < SLICE; n++) ((uint16_t *)data)[n] = (uint16_t)n;
            for (int64_t i = 0; i < n; i++) values[i] = hb_load_f32(data, i, io);
        } else {
            for (int half = -256; half <= 256; half++)
                for (int ulp = -3; ulp <= 3; ulp++)
                    values[n++] = codec_neighbour((float)half / 2, ulp);
        }
        codec_all_floats walk = codec_all_floats_begin(c);
        do {
            if (io == HB_F32) memcpy(data, values, (size_t)n * 4);
            for (int64_t i = 0; i < n; i++) want[i] = plain_encode(values[i], 127.0f, NAN, false);
            c->kernels->codec.encode_int8[io](data, n, 127.0f, NAN, NULL, got);
            if (!check_equal(c, got, want, (size_t)n, "int8 encode %s of all values",
                             hb_dtype_name(io)))
                return;
            n = io == HB_F32 ? codec_all_floats_next(&walk, values, SLICE) : 0;
        } while (n > 0);
        check_release(c);
    }
}

CHECK_GROUP(int8_decode)
{
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.decode_int8[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int round = 0; round < 4; round++) {
                const int64_t n = codec_sizes[s];
                const size_t bytes = (size_t)n * hb_dtype_bytes(io);
                static const float scales[4] = {1.0f, 0.0f, 1e-40f, NAN};
                const float scale = round ? scales[round] : fabsf(check_random_normal(c)) * 1e3f;
                int8_t *codes = check_buffer(c, (size_t)n, CHECK_END);
                void *want = check_buffer(c, bytes, CHECK_END);
                void *got = check_buffer(c, bytes, round % 2 ? CHECK_END : CHECK_BEGIN);
                check_fill_bytes(c, codes, (size_t)n);
                for (int64_t i = 0; i < n; i++)
                    codec_store(want, i, io, ((float)codes[i] * scale) * (1.0f / 127.0f));
                c->kernels->codec.decode_int8[io](codes, n, scale, got);
                codec_settle_nan(got, n, io);
                check_equal(c, got, want, bytes, "int8 decode %s n=%lld scale %g",
                            hb_dtype_name(io), (long long)n, (double)scale);
                check_release(c);
            }
        if (!c->bench) continue;
        const int64_t n = 1 << 22;
        int8_t *codes = check_buffer(c, (size_t)n, CHECK_BEGIN);
        void *out = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        char name[64];
        snprintf(name, sizeof name, "int8 dequantize row %s", hb_dtype_name(io));
        CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 1), 0)
        c->kernels->codec.decode_int8[io](codes, n, 1.0f, out);
        check_release(c);
    }
}
