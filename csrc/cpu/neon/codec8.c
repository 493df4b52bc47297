// 8-bit block-wise format with NEON. Formula, layout, source: ref/codec8.c.
//
// Encode: eight steps down the search tree; the thresholds of levels 0..5 are byte tables in
// sixteen registers, the last two levels are looked up in memory, lane by lane. Decode: a load per
// element. Accuracy: bit-equal to the reference.
#include "cpu/neon/io.h"

typedef struct {
    uint8x16x4_t top;       // levels 0..3, nodes 1..15
    uint8x16x4_t level4;    // nodes 16..31
    uint8x16x4_t level5[2]; // nodes 32..63
    const float *rest;
} tree;

static inline uint8x16x4_t load_sixteen(const float *threshold)
{
    uint8x16x4_t table;
    for (int k = 0; k < 4; k++) table.val[k] = vreinterpretq_u8_f32(vld1q_f32(threshold + 4 * k));
    return table;
}

static inline tree load_tree(const hb_search8 *search)
{
    const float *t = search->tree;
    return (tree){
        load_sixteen(t), load_sixteen(t + 16), {load_sixteen(t + 32), load_sixteen(t + 48)}, t};
}

// Codes + 256. A byte index outside of 0..63 yields 0 (tbl) or leaves what was there (tbx).
static inline void code_of(const tree *t, float32x4_t v, uint32_t code[4])
{
    uint32x4_t node = vdupq_n_u32(1);
    for (int level = 0; level < 4; level++)
        node = descend(node, v, vreinterpretq_f32_u8(vqtbl4q_u8(t->top, float_index(node))));
    uint8x16_t index = float_index(vsubq_u32(node, vdupq_n_u32(16)));
    node = descend(node, v, vreinterpretq_f32_u8(vqtbl4q_u8(t->level4, index)));
    index = float_index(vsubq_u32(node, vdupq_n_u32(32)));
    uint8x16_t threshold = vqtbl4q_u8(t->level5[0], index);
    threshold = vqtbx4q_u8(threshold, t->level5[1], vsubq_u8(index, vdupq_n_u8(64)));
    node = descend(node, v, vreinterpretq_f32_u8(threshold));
    float values[4];
    vst1q_f32(values, v);
    vst1q_u32(code, node);
    for (int l = 0; l < 4; l++) {
        uint32_t k = code[l];
        k = 2 * k + (values[l] > t->rest[k]);
        code[l] = 2 * k + (values[l] > t->rest[k]);
    }
}

static inline void encode_blocks(const void *x, int64_t n, const hb_search8 *search,
                                 int64_t blocksize, const float *absmax, uint8_t *codes,
                                 hb_dtype io)
{
    const tree t = load_tree(search);
    for (int64_t i = 0; i < n; absmax++) {
        const float inverse = hb_inverse_scale(*absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 4) {
            uint32_t code[4];
            code_of(&t, vmulq_n_f32(load_upto_f32x4(x, i, end, io), inverse), code);
            for (int l = 0; l < 4 && i + l < end; l++) codes[i + l] = (uint8_t)code[l];
        }
        i = end;
    }
}

static inline void decode_blocks(const uint8_t *codes, int64_t n, const float *map,
                                 int64_t blocksize, const float *absmax, void *out, hb_dtype io)
{
    for (int64_t i = 0; i < n; absmax++) {
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 4) {
            float value[4] = {0};
            for (int l = 0; l < 4 && i + l < end; l++) value[l] = map[codes[i + l]];
            store_upto_f32x4(out, i, end, vmulq_n_f32(vld1q_f32(value), *absmax), io);
        }
        i = end;
    }
}

#define CODEC8(io, dtype)                                                                          \
    void hb_map8_encode_##io##_neon(const void *x, int64_t n, const hb_search8 *search,            \
                                    int64_t blocksize, const float *absmax, uint8_t *codes)        \
    {                                                                                              \
        encode_blocks(x, n, search, blocksize, absmax, codes, dtype);                              \
    }                                                                                              \
    void hb_map8_decode_##io##_neon(const uint8_t *codes, int64_t n, const float *map,             \
                                    int64_t blocksize, const float *absmax, void *out,             \
                                    bool stream)                                                   \
    {                                                                                              \
        (void)stream;                                                                              \
        decode_blocks(codes, n, map, blocksize, absmax, out, dtype);                               \
    }
CODEC8(f32, HB_F32)
CODEC8(bf16, HB_BF16)
CODEC8(f16, HB_F16)
