// The short way to an 8-bit code of v = x / absmax, for maps like the dynamic ones.
//
// Floats between 2^-23 and 1 are cut into buckets by the upper bits of their patterns, so narrow
// that a bucket holds at most one threshold t of the map. Then with S low bits in a bucket
//
//   code = base of the bucket + (low bits of v > low bits of t)
//        = (bits(v) + entry of the bucket) >> S,
//   entry = (base << S) + (2^S - 1 - low bits of t) - (upper bits of the bucket << S)
//
// because the comparison is the carry into bit S: one load from a table, one addition, one shift,
// in place of the eight dependent steps of search8.cuh. Smaller magnitudes count as 2^-23, which
// is below every threshold.
//
// first states (signed_buckets): the map has 0 at code 127, and thresholds that mirror each other,
//   as the rule for ties makes them. Patterns count from 2^-23 on and are complemented for
//   negative v, so that the table has two halves that meet at index 0; entries of the negative half
//   count down. The sign of the state is kept: negative v begin at code 126.
// second states (unsigned_buckets): the map begins with 0 at code 0; v <= 0 has code 0.
//
// Both are made by a block of 256 threads from the search tree, and refused (fits = false) where a
// map is not so: then the tree decides. 23 octaves of 64 (signed) or 128 buckets are enough for the
// dynamic maps, whose steps are 0.9 / 64 and 0.9 / 128 below 1. The last bucket begins at 1, where
// a quotient may lie by its rounding.
#ifndef HB_CUDA_BUCKETS8_CUH
#define HB_CUDA_BUCKETS8_CUH

#include "search8.cuh"

enum : uint32_t { BUCKETS_FROM = 0x34000000u }; // 2^-23

struct signed_buckets {
    enum { SHIFT = 17, COUNT = 23 * 64 + 1, WORDS = 2 * COUNT };
};
struct unsigned_buckets {
    enum { SHIFT = 16, COUNT = 23 * 128 + 1, WORDS = COUNT };
};

HB_DEVICE float tree_threshold(const float *tree, int i)
{
    return shared_load(tree + search8_node(i));
}

// Marks the bucket of threshold number `count` (1..) with (count << SHIFT) + its low bits; false if
// it has none of its own. `earlier`: the threshold before, or 0. In `table` all is 0 before.
template <typename Kind>
HB_DEVICE bool mark_bucket(uint32_t *table, float threshold, float earlier, int count)
{
    enum : uint32_t { LOW = (1u << Kind::SHIFT) - 1 };
    const uint32_t at = float_bits(threshold) - BUCKETS_FROM;
    const uint32_t before = float_bits(earlier) - BUCKETS_FROM;
    if (!(threshold > 0.0f) || at >> Kind::SHIFT >= (uint32_t)Kind::COUNT) return false;
    if (earlier > 0.0f && before >> Kind::SHIFT >= at >> Kind::SHIFT) return false;
    shared_store(table + (at >> Kind::SHIFT), ((uint32_t)count << Kind::SHIFT) | (at & LOW));
    return true;
}

// The buckets of this thread: [first, end) of COUNT, an odd number (no bank conflicts) or the rest.
template <typename Kind> HB_DEVICE void own_buckets(int *first, int *end)
{
    const int each = ((int)Kind::COUNT + 255) / 256 | 1;
    *first = thread_index() * each;
    *end = *first + each < (int)Kind::COUNT ? *first + each : (int)Kind::COUNT;
}

// Whether all threads of the block say so; flags [8] words of shared memory. Ends with a barrier.
HB_DEVICE bool block_all(bool mine, uint32_t *flags)
{
    const uint32_t bad = warp_max(mine ? 0 : 1);
    if (lane_index() == 0) shared_store(flags + warp_index(), bad);
    block_sync();
    uint32_t any = 0;
    for (int w = 0; w < 8; w++) any |= shared_load(flags + w);
    block_sync();
    return any == 0;
}

// table [WORDS] of shared memory; map [256] in shared memory, and its tree. Returns fits.
HB_DEVICE bool signed_buckets_fill(const float *map, const float *tree, uint32_t *table,
                                   uint32_t *flags)
{
    typedef signed_buckets kind;
    enum : uint32_t { LOW = (1u << kind::SHIFT) - 1 };
    const int t = thread_index();
    uint32_t *positive = table + kind::COUNT; // index 0; -1 and on are negative
    for (int k = t; k < kind::COUNT; k += 256) shared_store(positive + k, 0u);
    block_sync();
    bool good = shared_load(map + 127) == 0.0f && shared_load(map + 126) < 0.0f;
    if (t < 128) { // the threshold between codes 127 + t and 128 + t
        const float threshold = tree_threshold(tree, 127 + t);
        const float earlier = t > 0 ? tree_threshold(tree, 126 + t) : 0.0f;
        good = mark_bucket<kind>(positive, threshold, earlier, t + 1) && good;
        if (t < 127) good = good && float_below(-tree_threshold(tree, 126 - t)) == threshold;
    }
    block_sync();
    int first, end;
    own_buckets<kind>(&first, &end);
    if (first < end) {
        const float edge = bits_float(BUCKETS_FROM + ((uint32_t)first << kind::SHIFT));
        int count = (int)search8(tree, edge) - 127; // thresholds below this thread's buckets
        for (int k = first; k < end; k++) {
            const uint32_t mark = shared_load(positive + k);
            const uint32_t here = (uint32_t)k << kind::SHIFT, low = mark & LOW;
            const bool splits = mark != 0;
            uint32_t up = (uint32_t)(127 + count) << kind::SHIFT;
            if (splits) up += LOW - low;
            // Index -1 - k: patterns are ~(k << SHIFT | low bits), and codes go down from `down`
            // to the one below where the bucket splits; there is none below 0, and none above 126.
            const int down = count >= 127 ? 0 : 127 - count;
            uint32_t entry = (uint32_t)(count == 0 ? 126 : down) << kind::SHIFT;
            if (splits && count > 0 && down > 0)
                entry = ((uint32_t)(down - 1) << kind::SHIFT) + low + 1;
            shared_store(positive + k, up - here);
            shared_store(positive - 1 - k, entry + here + (1u << kind::SHIFT));
            count += splits;
        }
    }
    return block_all(good, flags);
}

HB_DEVICE bool unsigned_buckets_fill(const float *map, const float *tree, uint32_t *table,
                                     uint32_t *flags)
{
    typedef unsigned_buckets kind;
    enum : uint32_t { LOW = (1u << kind::SHIFT) - 1 };
    const int t = thread_index();
    for (int k = t; k < kind::COUNT; k += 256) shared_store(table + k, 0u);
    block_sync();
    bool good = shared_load(map) == 0.0f;
    if (t < 255) {
        const float threshold = tree_threshold(tree, t);
        const float earlier = t > 0 ? tree_threshold(tree, t - 1) : 0.0f;
        good = mark_bucket<kind>(table, threshold, earlier, t + 1) && good;
    }
    block_sync();
    int first, end;
    own_buckets<kind>(&first, &end);
    if (first < end) {
        const uint32_t edge = BUCKETS_FROM + ((uint32_t)first << kind::SHIFT);
        int count = (int)search8(tree, bits_float(edge));
        for (int k = first; k < end; k++) {
            const uint32_t mark = shared_load(table + k);
            const uint32_t here = BUCKETS_FROM + ((uint32_t)k << kind::SHIFT);
            uint32_t entry = (uint32_t)count << kind::SHIFT;
            if (mark != 0) entry += LOW - (mark & LOW);
            shared_store(table + k, entry - here);
            count += mark != 0;
        }
    }
    return block_all(good, flags);
}

// Whether v = x * inverse_scale(absmax) of a block's elements may be looked up: absmax is finite
// and its inverse is. (Below 2^-127 that is infinite, and what is NaN or infinite needs the tree.)
HB_DEVICE bool buckets_take(float absmax)
{
    const uint32_t bits = float_bits(absmax);
    return bits == 0 || bits - 0x00400000u < 0x7f800000u - 0x00400000u;
}

// x * inverse + 0 has the sign of x but for x = -0, which counts as 0; else it is the product.
HB_DEVICE uint32_t signed_code(const uint32_t *table, float x, float inverse)
{
    const float v = fma_rn(x, inverse, 0.0f);
    const uint32_t from = float_bits(magnitude_from(v, bits_float(BUCKETS_FROM))) - BUCKETS_FROM;
    const int32_t y = (int32_t)from ^ ((int32_t)float_bits(v) >> 31);
    const uint32_t entry =
        shared_load(table + signed_buckets::COUNT + (y >> signed_buckets::SHIFT));
    return ((uint32_t)y + entry) >> signed_buckets::SHIFT;
}

// The code is byte 2 of the sum.
HB_DEVICE uint32_t unsigned_sum(const uint32_t *table, float x, float inverse)
{
    enum { FIRST = BUCKETS_FROM >> unsigned_buckets::SHIFT };
    const uint32_t bits = float_bits(value_from(mul_rn(x, inverse), bits_float(BUCKETS_FROM)));
    return bits + shared_load(table + (int)(bits >> unsigned_buckets::SHIFT) - FIRST);
}

// Byte PLACE of each of four words.
template <int PLACE> HB_DEVICE uint32_t join_bytes(const uint32_t *word)
{
    enum : uint32_t { PAIR = (4 + PLACE) << 4 | PLACE };
    return merge_bytes(merge_bytes(word[0], word[1], PAIR), merge_bytes(word[2], word[3], PAIR),
                       0x5410);
}

#endif
