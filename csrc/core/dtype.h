// Element types, and the scalar conversions between float32 and the 16-bit floats.
//
// float32 -> bfloat16/float16 rounds to nearest even; NaN stays NaN (quiet); float16 overflows to
// infinity and keeps subnormals. All conversions here are exact functions of the bits, so that
// every ISA can be compared with them bit for bit.
#ifndef HB_CORE_DTYPE_H
#define HB_CORE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum {
    HB_F32 = 0, // the three "io" types come first: kernels that exist per io type are indexed by it
    HB_BF16 = 1,
    HB_F16 = 2,
    HB_IO_COUNT = 3,
    HB_F64 = 3,
    HB_U8,
    HB_I8,
    HB_I32,
    HB_I64,
    HB_BOOL,
    HB_DTYPE_COUNT
} hb_dtype;

static inline size_t hb_dtype_bytes(hb_dtype dtype)
{
    static const uint8_t bytes[HB_DTYPE_COUNT] = {4, 2, 2, 8, 1, 1, 4, 8, 1};
    return bytes[dtype];
}

static inline const char *hb_dtype_name(hb_dtype dtype)
{
    static const char *const names[HB_DTYPE_COUNT] = {
        "float32", "bfloat16", "float16", "float64", "uint8", "int8", "int32", "int64", "bool"};
    return names[dtype];
}

static inline bool hb_dtype_is_io(hb_dtype dtype)
{
    return dtype < HB_IO_COUNT;
}

static inline uint32_t hb_f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float hb_f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float hb_f32_from_bf16(uint16_t half)
{
    return hb_f32_from_bits((uint32_t)half << 16);
}

static inline uint16_t hb_bf16_from_f32(float value)
{
    uint32_t bits = hb_f32_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float hb_f32_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) { // infinity, or NaN made quiet
        uint32_t payload = (magnitude & 0x03ffu) << 13;
        return hb_f32_from_bits(sign | 0x7f800000u | payload | (payload ? 0x00400000u : 0u));
    }
    if (magnitude < 0x0400u) { // zero or subnormal: magnitude * 2^-24 is exact
        return hb_f32_from_bits(sign | hb_f32_bits((float)magnitude * 0x1p-24f));
    }
    return hb_f32_from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

static inline uint16_t hb_f16_from_f32(float value)
{
    uint32_t bits = hb_f32_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x03ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // >= 65520 rounds to infinity
    if (magnitude < 0x38800000u) { // below 2^-14: adding 0.5 puts the bits in their subnormal place
        float shifted = hb_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (hb_f32_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float hb_load_f32(const void *data, int64_t index, hb_dtype dtype)
{
    if (dtype == HB_F32) return ((const float *)data)[index];
    uint16_t half = ((const uint16_t *)data)[index];
    return dtype == HB_BF16 ? hb_f32_from_bf16(half) : hb_f32_from_f16(half);
}

static inline void hb_store_f32(void *data, int64_t index, hb_dtype dtype, float value)
{
    if (dtype == HB_F32)
        ((float *)data)[index] = value;
    else
        ((uint16_t *)data)[index] =
            dtype == HB_BF16 ? hb_bf16_from_f32(value) : hb_f16_from_f32(value);
}

#endif
