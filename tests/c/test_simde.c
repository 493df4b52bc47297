// The portable intrinsics of the emulated build against the instructions: bit for bit, on any
// bytes. What the processor lacks is not compared (the NaN that an operation makes counts as one
// value).
#include "check.h"
#include "simde_ops.h"

#if defined(__x86_64__) && defined(HB_SIMDE) && !defined(HB_SIMDE_NEON)
#include "cpu/simd.h"

#include <string.h>

#define REINTERPRET(name, from, to)                                                                \
    static to name(from x)                                                                         \
    {                                                                                              \
        to y;                                                                                      \
        memcpy(&y, &x, sizeof y);                                                                  \
        return y;                                                                                  \
    }
REINTERPRET(BH512_SI, __m512bh, __m512i)
REINTERPRET(BH256_SI, __m256bh, __m256i)
REINTERPRET(BH128_SI, __m128bh, __m128i)
REINTERPRET(SI_BH512, __m512i, __m512bh)
REINTERPRET(SI_BH256, __m256i, __m256bh)

#define OP(name, expression)                                                                       \
    static void emulated_##name(const uint8_t in[3][64], uint64_t m, uint8_t p[64],                \
                                uint8_t out[64])                                                   \
    {                                                                                              \
        __m512i a, b, d, r;                                                                        \
        memcpy(&a, in[0], 64), memcpy(&b, in[1], 64), memcpy(&d, in[2], 64);                       \
        (void)a, (void)b, (void)d, (void)m, (void)p;                                               \
        r = expression;                                                                            \
        memcpy(out, &r, 64);                                                                       \
    }
#include "simde/intrinsics.def"
#undef OP

static const simde_entry entries[] = {
#define OP(name, expression) {#name, emulated_##name},
#include "simde/intrinsics.def"
#undef OP
};

// Bytes of the kinds that kernels meet: any, small integers, floats of ordinary size, special
// floats.
static void fill(check *c, uint8_t *data, int kind)
{
    check_fill_bytes(c, data, 64);
    float values[16];
    switch (kind) {
    case 0: return;
    case 1:
        for (int i = 0; i < 64; i++) data[i] = (uint8_t)(data[i] & 3);
        return;
    case 2: check_fill_normal(c, values, 16, 100.0f); break;
    default: check_fill_wild(c, values, 16, false); break;
    }
    memcpy(data, values, 64);
}

CHECK_GROUP_ONCE(simde)
{
    const uint32_t flags = hb_cpu_detect();
    for (size_t op = 0; op < sizeof entries / sizeof *entries; op++) {
        const simde_entry *native = &simde_native_ops[op];
        CHECK(c, strcmp(native->name, entries[op].name) == 0, "same order");
        const bool bf16 =
            strstr(native->name, "pbh") != NULL || strstr(native->name, "bf16") != NULL;
        if (!(flags & (bf16 ? HB_CPU_AVX512BF16 : HB_CPU_AVX512VBMI))) continue;
        for (int round = 0; round < 400; round++) {
            uint8_t in[3][64], memory[2][64], out[2][64];
            for (int i = 0; i < 3; i++) fill(c, in[i], (round + (round >> 2) * i) % 4);
            fill(c, memory[0], round % 4);
            memcpy(memory[1], memory[0], 64);
            uint64_t mask = check_random(c);
            check_label(c, "%s round %d", native->name, round);
            entries[op].run(in, mask, memory[0], out[0]);
            native->run(in, mask, memory[1], out[1]);
            if (bf16) { // NaN payloads of a sum are the instruction's own business
                for (int i = 0; i < 16; i++) {
                    float *g = (float *)(void *)out[0] + i, *w = (float *)(void *)out[1] + i;
                    if (*g != *g && *w != *w) *g = *w;
                }
            }
            check_equal(c, out[0], out[1], 64, "result");
            check_equal(c, memory[0], memory[1], 64, "memory");
        }
    }
}
#endif
