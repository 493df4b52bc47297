// The 4-bit codebooks of core/formats.def as constant tables, and the encoder's buckets.
//
// The rank of v is the number of thresholds t with v > t. Neighbouring thresholds are at least 0.08
// apart, but for FP4's around zero; so on each side of zero |v| falls into one of 16 buckets,
//
//   bucket(v) = floor(15.75 * min(|v|, 1), rounded to quarters)
//
// with at most one threshold in each, and one comparison more decides:
//
//   code = |v| <= limit[side, bucket] ? near[side, bucket] : far[side, bucket]
//
// Negative v have the buckets 16 to 31, where v > t is |v| < -t, or |v| <= the float below -t. Zero
// of either sign is positive, and FP4's threshold of -2^-149 then lies below every negative v. A
// NaN goes to bucket 15 (the minimum is 1), where no threshold is, and is not <= infinity: `far`
// there is its code. buckets_are_right proves at compile time what is said here of distances.
#ifndef HB_CUDA_CODEBOOKS_CUH
#define HB_CUDA_CODEBOOKS_CUH

#include "dev.cuh"

#include "core/formats.h"

// As in core/formats.c, for constant expressions of C++.
#define HB_BELOW(t)  ((t) == 0.0f ? -0x1p-149f : (float)((double)(t) * (1.0 + 0x1.4p-24)))
#define HB_LIST(...) {__VA_ARGS__}

struct codebook_tables {
    float value[16];
    float threshold[15];
    uint8_t code_of_rank[16];
    uint32_t nan_code;
};

constexpr codebook_tables codebook_list[HB_CODEBOOK_COUNT] = {
#define HB_CODEBOOK(id, label, values, ranks, thresholds, nan) {values, thresholds, ranks, nan},
#include "core/formats.def"
#undef HB_CODEBOOK
};

enum { BUCKETS = 32, FAR = 32 }; // of both sides; code[bucket + FAR] is far

// As the kernels copy it to shared memory: 32 words lie in 32 banks, so any mix of lanes is one
// access.
struct encoder4 {
    float limit[BUCKETS];
    uint32_t code[2 * BUCKETS];
};

// The bucket of a magnitude, whether product and sum are rounded once (contracted) or twice.
constexpr int bucket_of(float magnitude, bool contracted)
{
    const double exact = (double)magnitude * 15.75 * 4; // 24 + 6 bits: exact
    const double quarters = contracted ? exact : (double)(float)exact;
    const int below = (int)quarters;
    const double rest = quarters - below;
    return (below + (rest > 0.5 || (rest == 0.5 && below % 2 == 1))) / 4;
}

// The float below a positive one.
constexpr float float_below(float x)
{
    return (float)((double)x * (1.0 - 0x1.4p-24));
}

constexpr encoder4 encoder_of(const codebook_tables &book)
{
    encoder4 e = {};
    for (int i = 0; i < BUCKETS; i++) {
        const bool negative = i >= BUCKETS / 2;
        int near = 0, far = 0; // ranks
        e.limit[i] = __builtin_huge_valf();
        for (int t = 0; t < 15; t++) {
            const float threshold = book.threshold[t];
            if (!negative && threshold < 0.0f) near++, far++;
            if ((threshold < 0.0f) != negative || threshold == -0x1p-149f) continue;
            const int bucket = bucket_of(negative ? -threshold : threshold, false);
            const int mine = i % (BUCKETS / 2);
            if (bucket == mine) {
                e.limit[i] = negative ? float_below(-threshold) : threshold;
                near += negative, far += !negative;
            } else if ((bucket > mine) == negative) {
                near++, far++;
            }
        }
        e.code[i] = book.code_of_rank[near];
        e.code[i + FAR] = book.code_of_rank[far];
    }
    e.code[BUCKETS / 2 - 1 + FAR] = book.nan_code;
    return e;
}

constexpr bool buckets_are_right(const codebook_tables &book)
{
    for (int t = 0; t < 15; t++) {
        const float threshold = book.threshold[t];
        if (threshold == -0x1p-149f) continue;
        const float magnitude = threshold < 0.0f ? -threshold : threshold;
        const int bucket = bucket_of(magnitude, false);
        if (bucket != bucket_of(magnitude, true) || bucket >= BUCKETS / 2 - 1) return false;
        for (int other = 0; other < t; other++) {
            const float second = book.threshold[other];
            const float size = second < 0.0f ? -second : second;
            if (second == -0x1p-149f || (second < 0.0f) != (threshold < 0.0f)) continue;
            if (bucket_of(size, false) == bucket) return false;
        }
    }
    return true;
}
static_assert(HB_CODEBOOK_COUNT == 2, "the two lists below");
static_assert(buckets_are_right(codebook_list[0]) && buckets_are_right(codebook_list[1]),
              "two thresholds in one bucket");

HB_CONSTANT codebook_tables codebooks[HB_CODEBOOK_COUNT] = {codebook_list[0], codebook_list[1]};
HB_CONSTANT encoder4 encoders[HB_CODEBOOK_COUNT] = {encoder_of(codebook_list[0]),
                                                    encoder_of(codebook_list[1])};

// The 16 values into shared memory, where 16 words lie in 16 banks: any mix of codes is one access.
// To be followed by block_sync.
HB_DEVICE void codebook_fill(float *value, int format)
{
    int t = thread_index();
    if (t < 16) shared_store(value + t, codebooks[format].value[t]);
}

// To be followed by block_sync; by a block of at least 32 threads.
HB_DEVICE void encoder4_fill(encoder4 *shared, int format)
{
    const int t = thread_index();
    if (t >= BUCKETS) return;
    shared_store(&shared->limit[t], encoders[format].limit[t]);
    shared_store(&shared->code[t], encoders[format].code[t]);
    shared_store(&shared->code[t + FAR], encoders[format].code[t + FAR]);
}

// Where v's entry is in a table like encoder4's `code`, in bytes.
HB_DEVICE uint32_t encoder4_offset(const encoder4 *shared, float v)
{
    const float magic = 0x1p21f; // a sum with it has quarters in its last bits: bits 2.. are words
    const float scaled = min_magnitude(v, 1.0f) * 15.75f + (v < 0.0f ? magic + 16.0f : magic);
    const uint32_t offset = float_bits(scaled) & 4 * (BUCKETS - 1);
    const unsigned char *limit = (const unsigned char *)shared->limit + offset;
    return magnitude(v) <= shared_load((const float *)limit) ? offset : offset + 4 * FAR;
}

HB_DEVICE uint32_t encode4(const encoder4 *shared, float v)
{
    const unsigned char *code = (const unsigned char *)shared->code + encoder4_offset(shared, v);
    return shared_load((const uint32_t *)code);
}

#endif
