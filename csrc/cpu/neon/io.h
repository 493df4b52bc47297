// Four elements of any io dtype from and to float32 lanes. Parts of a unit go through padded
// buffers. `io` is a constant at every call, so that the compiler keeps one branch.
#ifndef HB_CPU_NEON_IO_H
#define HB_CPU_NEON_IO_H

#include "core/kernels.h"
#include "cpu/simd.h"

static inline float32x4_t load_f32x4(const void *x, int64_t i, hb_dtype io)
{
    if (io == HB_F32) return vld1q_f32((const float *)x + i);
    uint16x4_t half = vld1_u16((const uint16_t *)x + i);
    if (io == HB_F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// The first `count` <= 4 lanes; no others are read, and they hold 0.
static inline float32x4_t load_part_f32x4(const void *x, int64_t i, int64_t count, hb_dtype io)
{
    uint32_t part[4] = {0};
    const size_t bytes = hb_dtype_bytes(io);
    memcpy(part, (const uint8_t *)x + (size_t)i * bytes, (size_t)count * bytes);
    return load_f32x4(part, 0, io);
}

// A whole vector, the rest before `end`, or zeros.
static inline float32x4_t load_upto_f32x4(const void *x, int64_t i, int64_t end, hb_dtype io)
{
    if (i + 4 <= end) return load_f32x4(x, i, io);
    return i < end ? load_part_f32x4(x, i, end - i, io) : vdupq_n_f32(0.0f);
}

// float32 -> bfloat16, half to even, NaN made quiet.
static inline uint16x4_t bf16_from_f32x4(float32x4_t value)
{
    uint32x4_t bits = vreinterpretq_u32_f32(value);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
}

static inline uint16x4_t narrow_f32x4(float32x4_t value, hb_dtype io)
{
    if (io == HB_F16) return vreinterpret_u16_f16(vcvt_f16_f32(value));
    return bf16_from_f32x4(value);
}

static inline void store_f32x4(void *out, int64_t i, float32x4_t value, hb_dtype io)
{
    if (io == HB_F32)
        vst1q_f32((float *)out + i, value);
    else
        vst1_u16((uint16_t *)out + i, narrow_f32x4(value, io));
}

static inline void store_upto_f32x4(void *out, int64_t i, int64_t end, float32x4_t value,
                                    hb_dtype io)
{
    if (i + 4 <= end) {
        store_f32x4(out, i, value, io);
    } else if (i < end) {
        uint32_t part[4];
        const size_t bytes = hb_dtype_bytes(io);
        store_f32x4(part, 0, value, io);
        memcpy((uint8_t *)out + (size_t)i * bytes, part, (size_t)(end - i) * bytes);
    }
}

static inline uint32x4_t magnitude_bits(float32x4_t value)
{
    return vandq_u32(vreinterpretq_u32_f32(value), vdupq_n_u32(0x7fffffff));
}

// The largest of four magnitudes, or NaN: their bit patterns order like the numbers.
static inline float largest_of_magnitudes(uint32x4_t bits)
{
    uint32_t largest = vmaxvq_u32(bits);
    return hb_f32_from_bits(largest > 0x7f800000u ? HB_NAN_BITS : largest);
}

// Bytes 4 i .. 4 i + 3 for each lane's number i: the index of a table of floats.
static inline uint8x16_t float_index(uint32x4_t lane)
{
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), lane, vdupq_n_u32(0x04040404)));
}

// 2 node + 1 where v > threshold (a true comparison is -1), else 2 node; NaN is not greater.
static inline uint32x4_t descend(uint32x4_t node, float32x4_t v, float32x4_t threshold)
{
    return vsubq_u32(vaddq_u32(node, node), vcgtq_f32(v, threshold));
}

#endif
