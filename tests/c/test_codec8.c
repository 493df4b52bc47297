// 8-bit block-wise kernels, their maps and the thresholds made from a map.
#include "codec.h"

#include <stdio.h>

// The rule itself, in float64: the nearest entry to v, the even index where v is the float32
// midpoint of two; of equal entries the first for v up to theirs, the last for v above. NaN has
// code 0.
static bool passes(const float *map, int i, float v)
{
    float middle = (map[i] + map[i + 1]) * 0.5f;
    return i % 2 == 0 || map[i] == map[i + 1] ? v > middle : v >= middle;
}

// Walks to the code of v from that of a value near by.
static uint8_t plain_encode(const float *map, float v, uint8_t near)
{
    int code = near;
    if (isnan(v)) return 0;
    while (code < 255 && passes(map, code, v)) code++;
    while (code > 0 && !passes(map, code - 1, v)) code--;
    return (uint8_t)code;
}

// A map of the user's: random, ascending, with equal entries and a wide range.
static void random_map(check *c, float *map)
{
    check_fill_normal(c, map, 256, 1.0f);
    for (int i = 0; i < 256; i++)
        if (i % 5 == 0) map[i] = map[i / 2];
    for (int i = 1; i < 256; i++) // insertion sort
        for (int k = i; k > 0 && map[k - 1] > map[k]; k--) {
            float swap = map[k];
            map[k] = map[k - 1];
            map[k - 1] = swap;
        }
}

static void some_map(check *c, int which, float *map)
{
    if (which < HB_MAP8_COUNT)
        hb_map8_fill((hb_map8)which, map);
    else
        random_map(c, map);
}

CHECK_GROUP_ONCE(codec8_maps)
{
    static const char *const names[] = {"dynamic",  "dynamic_unsigned", "linear",
                                        "fp8_e4m3", "fp8_e5m2",         "normal"};
    for (int which = 0; which < HB_MAP8_COUNT; which++) {
        float map[256];
        hb_search8 search;
        hb_map8_fill((hb_map8)which, map);
        CHECK(c, hb_map8_from_name(names[which]) == which, "%s", names[which]);
        for (int i = 1; i < 256; i++)
            CHECK(c, map[i - 1] <= map[i], "%s[%d] is out of order", names[which], i);
        CHECK(c, map[255] == 1.0f, "%s ends at %g", names[which], (double)map[255]);
        hb_search8_init(&search, map);
        for (int i = 1; i < 256; i++)
            CHECK(c, search.threshold[i - 1] <= search.threshold[i], "%s: threshold %d",
                  names[which], i);
        CHECK(c, search.decades.fits == (which <= HB_MAP_DYNAMIC_UNSIGNED), "%s: decades %d",
              names[which], search.decades.fits);
        // The tree holds each threshold once.
        for (int leaf = 256; leaf < 512; leaf++)
            for (int node = leaf; node > 1; node /= 2) {
                float t = search.tree[node / 2];
                CHECK(c,
                      node % 2 ? t <= search.threshold[leaf - 256 ? leaf - 257 : 0]
                               : t >= search.threshold[leaf - 256],
                      "%s: tree leaf %d", names[which], leaf);
            }
    }
    CHECK(c, hb_map8_from_name("cubic") == -1, "unknown name");
    // Neighbouring floats, huge floats: midpoints round or overflow, order must survive.
    float map[256];
    hb_search8 search;
    for (int i = 0; i < 256; i++)
        map[i] = i < 128   ? hb_f32_from_bits(0x3f800000u + (uint32_t)i)
                 : i < 200 ? 2.0f
                           : 0x1.fffffep127f;
    hb_search8_init(&search, map);
    for (int i = 0; i < 256; i++) {
        CHECK(c, i == 0 || search.threshold[i - 1] <= search.threshold[i],
              "close map: threshold %d", i);
        int code = 0;
        while (code < 255 && map[i] > search.threshold[code]) code++;
        CHECK(c, map[code] == map[i], "close map: entry %d is stored as %d", i, code);
    }
}

CHECK_GROUP(codec8_encode)
{
    static const int64_t blocksizes[] = {1, 3, 16, 17, 64, 100, 256, 4096, INT64_MAX};
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode8[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int b = 0; b < 9; b++) {
                const int64_t n = codec_sizes[s], blocksize = blocksizes[b];
                const int64_t n_blocks = hb_ceil_div(n, blocksize);
                float map[256];
                hb_search8 search;
                some_map(c, (s + b) % (HB_MAP8_COUNT + 1), map);
                hb_search8_init(&search, map);
                codec_input x = codec_make_input(c, n, io, b % 2, b % 3 ? CHECK_END : CHECK_BEGIN);
                float *absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
                c->reference->codec.absmax[io](x.data, n, blocksize, absmax);
                uint8_t *want = check_buffer(c, (size_t)n, CHECK_END);
                uint8_t *got = check_buffer(c, (size_t)n, CHECK_END);
                for (int64_t i = 0; i < n; i++)
                    want[i] =
                        plain_encode(map, x.values[i] * codec_inverse(absmax[i / blocksize]), 128);
                c->kernels->codec.encode8[io](x.data, n, &search, blocksize, absmax, got);
                check_equal(c, got, want, (size_t)n, "map8 encode %s n=%lld blocksize=%lld",
                            hb_dtype_name(io), (long long)n, (long long)blocksize);
                check_release(c);
            }
        if (!c->bench) continue;
        const int64_t n = 1 << 20;
        float map[256], *x = check_buffer(c, (size_t)n * 4, CHECK_BEGIN);
        void *data = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        float *absmax = check_buffer(c, (size_t)n / 64, CHECK_BEGIN);
        uint8_t *codes = check_buffer(c, (size_t)n, CHECK_BEGIN);
        check_fill_normal(c, x, n, 1.0f);
        check_convert(x, data, n, io);
        hb_search8 search;
        hb_map8_fill(HB_MAP_DYNAMIC, map);
        hb_search8_init(&search, map);
        char name[64];
        snprintf(name, sizeof name, "dynamic8 quantize %s", hb_dtype_name(io));
        CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 1 + 4. / 256), 0)
        for (int64_t i = 0; i < n; i += 4096) {
            const uint8_t *piece = (const uint8_t *)data + (size_t)i * hb_dtype_bytes(io);
            c->kernels->codec.absmax[io](piece, 4096, 256, absmax + i / 256);
            c->kernels->codec.encode8[io](piece, 4096, &search, 256, absmax + i / 256, codes + i);
        }
        check_release(c);
    }
}

// The codes of n values. Codes ascend with v, so where all ascend or all descend (and the last is
// no NaN), a stretch whose ends have one code has it everywhere.
static void plain_encode_slice(const float *map, const float *values, int64_t n, bool in_order,
                               uint8_t *codes)
{
    enum { STRETCH = 512 };
    for (int64_t first = 0; first < n; first += STRETCH) {
        const int64_t count = n - first < STRETCH ? n - first : STRETCH;
        const float *v = values + first;
        const uint8_t near = first > 0 ? codes[first - 1] : 128;
        const uint8_t begin = plain_encode(map, v[0], near);
        const uint8_t end = plain_encode(map, v[count - 1], begin);
        if (in_order && begin == end && !isnan(v[0]) && !isnan(v[count - 1])) {
            memset(codes + first, begin, (size_t)count);
            continue;
        }
        for (int64_t i = 0; i < count; i++)
            codes[first + i] = plain_encode(map, v[i], i > 0 ? codes[first + i - 1] : near);
    }
}

// v = x with absmax 1: the neighbours of every threshold, every exponent, or all of float32; all of
// the 16-bit dtypes.
CHECK_GROUP(codec8_every_value)
{
    enum { SLICE = 1 << 14 }; // divides 2^31: no slice has numbers of both signs
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.encode8[io])) continue;
        const int64_t size = io == HB_F32 ? SLICE : 1 << 16;
        float *values = check_buffer(c, (size_t)size * 4, CHECK_END);
        void *data = io == HB_F32 ? values : check_buffer(c, (size_t)size * 2, CHECK_END);
        uint8_t *want = check_buffer(c, (size_t)size, CHECK_END);
        uint8_t *got = check_buffer(c, (size_t)size, CHECK_END);
        for (int which = 0; which <= HB_MAP8_COUNT; which++) {
            float map[256];
            const float one = 1.0f;
            hb_search8 search;
            some_map(c, which, map);
            hb_search8_init(&search, map);
            int64_t n = 0;
            if (io != HB_F32) {
                for (; n < size; n++) ((uint16_t *)data)[n] = (uint16_t)n;
                for (int64_t i = 0; i < n; i++) values[i] = hb_load_f32(data, i, io);
            } else {
                for (int t = 0; t < 255; t++)
                    for (int ulp = -3; ulp <= 3; ulp++)
                        values[n++] = codec_neighbour(search.threshold[t], ulp);
            }
            codec_all_floats walk = codec_all_floats_begin(c);
            const bool in_order = walk.step == 1 && io == HB_F32;
            for (bool first = true; n > 0; first = false) {
                plain_encode_slice(map, values, n, in_order && !first, want);
                c->kernels->codec.encode8[io](data, n, &search, INT64_MAX, &one, got);
                if (!check_equal(c, got, want, (size_t)n, "map8 encode %s of all values, map %d",
                                 hb_dtype_name(io), which))
                    return;
                n = io == HB_F32 ? codec_all_floats_next(&walk, values, SLICE) : 0;
            }
        }
        check_release(c);
    }
}

// Maps that are nearly dynamic: either the decades are refused, or they still find every code.
CHECK_GROUP(codec8_near_maps)
{
    enum { N = 255 * 9 + 1025, ROUNDS = 200 };
    if (!CHECK_NEW(c, codec.encode8[HB_F32])) return;
    int fitting = 0;
    float *values = check_buffer(c, N * 4, CHECK_END);
    uint8_t *want = check_buffer(c, N, CHECK_END);
    uint8_t *got = check_buffer(c, N, CHECK_END);
    for (int round = 0; round < (c->emulated ? 10 : ROUNDS); round++) {
        float map[256];
        const float one = 1.0f;
        hb_search8 search;
        hb_map8_fill(round % 2 ? HB_MAP_DYNAMIC : HB_MAP_DYNAMIC_UNSIGNED, map);
        const float size = exp2f(-(float)(round % 25));
        const int changes = round % 3 ? 1 : 40;
        for (int k = 0; k < changes; k++) {
            const int i = (int)check_random_below(c, 256);
            const float moved = map[i] * (1 + size * check_random_normal(c));
            if ((i == 0 || map[i - 1] <= moved) && (i == 255 || moved <= map[i + 1]))
                map[i] = moved;
        }
        hb_search8_init(&search, map);
        fitting += search.decades.fits;
        int64_t n = 0;
        for (int t = 0; t < 255; t++)
            for (int ulp = -4; ulp <= 4; ulp++)
                values[n++] = codec_neighbour(search.threshold[t], ulp * (1 + round % 7));
        for (int i = -512; i <= 512; i++) values[n++] = (float)i / 500;
        for (int64_t i = 0; i < n; i++) want[i] = plain_encode(map, values[i], 128);
        c->kernels->codec.encode8[HB_F32](values, n, &search, INT64_MAX, &one, got);
        check_equal(c, got, want, (size_t)n, "nearly dynamic map %d", round);
    }
    if (!c->emulated)
        CHECK(c, fitting > ROUNDS / 20 && fitting < ROUNDS, "%d of %d maps have decades", fitting,
              ROUNDS);
}

// Every scale: with the entry 1 the output is the scale itself, rounded to the dtype of the output.
CHECK_GROUP(codec8_every_scale)
{
    enum { SLICE = 1 << 14 };
    static const float map[256] = {1.0f, -1.0f};
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.decode8[io])) continue;
        float *absmax = check_buffer(c, SLICE * 4, CHECK_END);
        uint8_t *codes = check_buffer(c, SLICE, CHECK_END);
        void *want = check_buffer(c, SLICE * 4, CHECK_BEGIN);
        void *got = check_buffer(c, SLICE * 4, CHECK_BEGIN);
        for (int i = 0; i < SLICE; i++) codes[i] = (uint8_t)(i % 2);
        codec_all_floats walk = codec_all_floats_begin(c);
        for (int64_t n; (n = codec_all_floats_next(&walk, absmax, SLICE)) > 0;) {
            for (int64_t i = 0; i < n; i++) codec_store(want, i, io, map[i % 2] * absmax[i]);
            c->kernels->codec.decode8[io](codes, n, map, 1, absmax, got, false);
            codec_settle_nan(got, n, io);
            if (!check_equal(c, got, want, (size_t)n * hb_dtype_bytes(io),
                             "map8 decode %s of all scales", hb_dtype_name(io)))
                return;
        }
        check_release(c);
    }
}

CHECK_GROUP(codec8_decode)
{
    static const int64_t blocksizes[] = {1, 3, 16, 17, 64, 100, 256, 4096, INT64_MAX};
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, codec.decode8[io])) continue;
        for (int s = 0; s < codec_size_count(c); s++)
            for (int b = 0; b < 9; b++) {
                const int64_t n = codec_sizes[s], blocksize = blocksizes[b];
                const int64_t n_blocks = hb_ceil_div(n, blocksize);
                const size_t bytes = (size_t)n * hb_dtype_bytes(io);
                float *map = check_buffer(c, 1024, CHECK_END);
                some_map(c, (s + b) % (HB_MAP8_COUNT + 1), map);
                uint8_t *codes = check_buffer(c, (size_t)n, CHECK_END);
                float *absmax = check_buffer(c, (size_t)n_blocks * 4, CHECK_END);
                void *want = check_buffer(c, bytes, CHECK_END);
                void *got = check_buffer(c, bytes, b % 2 ? CHECK_END : CHECK_BEGIN);
                check_fill_bytes(c, codes, (size_t)n);
                check_fill_wild(c, absmax, n_blocks, true);
                for (int64_t i = 0; i < n; i++)
                    codec_store(want, i, io, map[codes[i]] * absmax[i / blocksize]);
                c->kernels->codec.decode8[io](codes, n, map, blocksize, absmax, got, s % 2);
                codec_settle_nan(got, n, io);
                check_equal(c, got, want, bytes, "map8 decode %s n=%lld blocksize=%lld",
                            hb_dtype_name(io), (long long)n, (long long)blocksize);
                check_release(c);
            }
        if (!c->bench) continue;
        const int64_t n = 1 << 22;
        float map[256], *absmax = check_buffer(c, (size_t)n / 64, CHECK_BEGIN);
        uint8_t *codes = check_buffer(c, (size_t)n, CHECK_BEGIN);
        void *out = check_buffer(c, (size_t)n * hb_dtype_bytes(io), CHECK_BEGIN);
        hb_map8_fill(HB_MAP_DYNAMIC, map);
        check_fill_bytes(c, codes, (size_t)n);
        for (int64_t i = 0; i < n / 256; i++) absmax[i] = 1.0f;
        char name[64];
        snprintf(name, sizeof name, "dynamic8 dequantize %s", hb_dtype_name(io));
        CHECK_BENCH(c, b, name, (double)n * ((double)hb_dtype_bytes(io) + 1 + 4. / 256), 0)
        c->kernels->codec.decode8[io](codes, n, map, 256, absmax, out, true);
        check_release(c);
    }
}
