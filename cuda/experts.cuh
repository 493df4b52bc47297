// Which rows of x meet which expert of a stack of weights: for products with `offsets`.
//
// Row r meets the expert e with offsets[e - 1] <= r < offsets[e], offsets[-1] = 0; rows from the
// last offset on meet nobody. Only the device knows the offsets: the grid has as many tiles of rows
// as there can be at most, and a block finds its own. Offsets that do not ascend, or leave 0..m,
// count as their running maximum, forced into that range.
//
// A is a struct of cuda_api.h with offsets, offsets_dtype, experts and m.
#ifndef HB_CUDA_EXPERTS_CUH
#define HB_CUDA_EXPERTS_CUH

#include "dev.cuh"

#include "core/cuda_api.h"
#include "core/formats.h"

// Tiles of `size` rows of x. Each expert, and the rows behind the last offset, may end with a
// partly filled tile; no more tiles have anything in them than there are rows.
template <typename A> static inline int64_t expert_tiles(const A &a, int64_t size)
{
    if (a.offsets == nullptr) return hb_ceil_div(a.m, size);
    const int64_t most = (a.m + (a.experts + 1) * (size - 1)) / size;
    return most < a.m ? most : a.m;
}

// Rows [begin, end) of x, all of which meet one expert; expert -1: their y is 0. Empty where the
// bound on the number of tiles was too high.
struct expert_rows {
    int64_t begin, end, expert;
};

// Offset e, forced between 0 and m; everything behind the last expert belongs to nobody.
template <typename A> HB_DEVICE int64_t expert_offset(const A &a, int64_t e)
{
    if (e >= a.experts) return a.m;
    const int64_t value = a.offsets_dtype == HB_I32 ? load((const int32_t *)a.offsets + e)
                                                    : load((const int64_t *)a.offsets + e);
    return value < 0 ? 0 : value > a.m ? a.m : value;
}

HB_DEVICE int64_t shuffle64(int64_t value, int lane)
{
    const uint32_t low = shuffle((uint32_t)value, lane);
    return (int64_t)((uint64_t)shuffle((uint32_t)((uint64_t)value >> 32), lane) << 32 | low);
}

// Tile `tile` of `size` rows of x without experts.
template <typename A> HB_DEVICE expert_rows plain_rows(const A &a, int64_t tile, int size)
{
    const int64_t begin = tile * size;
    return {begin, begin + size < a.m ? begin + size : a.m, 0};
}

// The same with or without. Each warp finds it for itself, all lanes together: 32 experts a round,
// running maxima of their offsets, running sums of their tiles.
template <typename A> HB_DEVICE expert_rows expert_find(const A &a, int64_t tile, int size)
{
    if (a.offsets == nullptr) return plain_rows(a, tile, size);
    const int lane = lane_index();
    int64_t offset_before = 0, tiles_before = 0;
    for (int64_t first = 0; first <= a.experts; first += HB_LANES) {
        int64_t end = expert_offset(a, first + lane);
        if (end < offset_before) end = offset_before;
        for (int step = 1; step < HB_LANES; step *= 2) {
            const int64_t other = shuffle64(end, lane >= step ? lane - step : lane);
            if (other > end) end = other;
        }
        int64_t begin = shuffle64(end, lane > 0 ? lane - 1 : 0);
        if (lane == 0) begin = offset_before;
        int64_t tiles = (end - begin + size - 1) / size;
        for (int step = 1; step < HB_LANES; step *= 2) {
            const int64_t other = shuffle64(tiles, lane >= step ? lane - step : lane);
            if (lane >= step) tiles += other;
        }
        uint32_t found = tiles_before + tiles > tile ? 0 : 1; // lanes before the one that has it
        for (int mask = 1; mask < HB_LANES; mask *= 2) found += shuffle_xor(found, mask);
        if (found < HB_LANES) {
            const int64_t earlier = shuffle64(tiles, found > 0 ? (int)found - 1 : 0);
            const int64_t before = tiles_before + (found > 0 ? earlier : 0);
            begin = shuffle64(begin, (int)found) + (tile - before) * size;
            end = shuffle64(end, (int)found);
            const int64_t expert = first + found;
            return {begin, begin + size < end ? begin + size : end,
                    expert < a.experts ? expert : -1};
        }
        offset_before = shuffle64(end, HB_LANES - 1);
        tiles_before += shuffle64(tiles, HB_LANES - 1);
    }
    return {0, 0, -1};
}

#endif
