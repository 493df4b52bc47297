// NF4 and FP4 dequantize of a matrix [rows, columns] to its transpose [columns, rows], the bits of
// the CPU's: out[c, r] = value[code of (r, c)] * absmax of its block, rounded once.
//
// Tiles of 64 x 64 go through shared memory as float32, so that codes are read along rows and
// results written along columns of the matrix. A thread decodes 16 neighbours of a row, which lie
// in one block: 8 bytes. The lanes of a warp do so in 32 rows, one word further each (pitch 65):
// no bank conflict; the sector of a row's 32 bytes is used by four warps. A thread writes 8 results
// of a column, 16 bytes of 16-bit floats. Where shapes or addresses are not aligned so, both sides
// go element by element.
//
// Floor at block size 64, bfloat16 out: 2.56 bytes a weight.
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, TILE = 64, PITCH = TILE + 1, EACH = 16, STORED = 8 };
enum { TABLE_BYTES = 16 * 4, TILE_BYTES = TILE * PITCH * 4 };

struct transpose_args {
    hb_cuda_dequantize4 a;
    int64_t rows, tiles; // tiles: across the columns
};

// ALIGNED: start and columns are multiples of 16 and packed of 8 bytes; rows are a multiple of 8
// and out of 16 bytes.
template <int IO, bool ALIGNED>
HB_KERNEL_RESIDENT(THREADS, 4)
transpose4_kernel(HB_ARGS transpose_args args)
{
    const hb_cuda_dequantize4 &a = args.a;
    float *tile = (float *)shared_memory(), *table = tile + TILE * PITCH, *map = table + 16;
    const int t = thread_index();
    codebook_fill(table, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    const float offset = scale_offset(a.scales);
    // A grid has fewer than 2^31 blocks: a division of 32 bits.
    const uint32_t tiles = (uint32_t)args.tiles, down = (uint32_t)block_index() / tiles;
    const int64_t first_row = (int64_t)down * TILE;
    const int64_t first_column = (block_index() - (int64_t)down * tiles) * TILE;

    const int r = t % TILE, c = t / TILE * EACH;
    const int64_t row = first_row + r, column = first_column + c;
    const int64_t element = a.start + row * a.columns + column;
    const int64_t left = row < args.rows ? a.columns - column : 0;
    if (ALIGNED && left >= EACH) {
        const float scale = scale_of(a.scales, map, offset, block_of(element, a.blocksize));
        float value[EACH];
        decode16(table, load((const uint2 *)(a.packed + element / 2)), scale, value);
#pragma unroll
        for (int j = 0; j < EACH; j++) shared_store(tile + (c + j) * PITCH + r, value[j]);
    } else {
        for (int j = 0; j < EACH && j < left; j++) {
            const int64_t i = element + j;
            const float scale = scale_of(a.scales, map, offset, block_of(i, a.blocksize));
            const uint32_t byte = load(a.packed + i / 2), code = i % 2 ? byte & 15 : byte >> 4;
            shared_store(tile + (c + j) * PITCH + r, mul_rn(shared_load(table + code), scale));
        }
    }
    block_sync();

    const int64_t columns_left = a.columns - first_column, rows_left = args.rows - first_row;
    if constexpr (ALIGNED) {
        for (int k = t; k < TILE * TILE / STORED; k += THREADS) {
            const int from = k % (TILE / STORED) * STORED, line = k / (TILE / STORED);
            if (line >= columns_left || from >= rows_left) continue;
            float value[STORED];
#pragma unroll
            for (int j = 0; j < STORED; j++) value[j] = shared_load(tile + line * PITCH + from + j);
            store8<IO>(a.out, (first_column + line) * args.rows + first_row + from, value);
        }
    } else {
        for (int k = t; k < TILE * TILE; k += THREADS) {
            const int from = k % TILE, line = k / TILE;
            if (line < columns_left && from < rows_left)
                store_float<IO>(a.out, (first_column + line) * args.rows + first_row + from,
                                shared_load(tile + line * PITCH + from));
        }
    }
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_dequantize4 &a)
{
    const transpose_args args = {a, a.n / a.columns, hb_ceil_div(a.columns, TILE)};
    const int64_t blocks = hb_ceil_div(args.rows, TILE) * args.tiles;
    const int bytes = TILE_BYTES + TABLE_BYTES + scale_map_bytes(a.scales);
    const bool aligned = a.start % EACH == 0 && a.columns % EACH == 0 &&
                         ((uintptr_t)a.packed & 7) == 0 && args.rows % STORED == 0 &&
                         ((uintptr_t)a.out & 15) == 0;
    if (aligned)
        return HB_LAUNCH((transpose4_kernel<IO, true>), blocks, THREADS, bytes, queue->stream,
                         args);
    return HB_LAUNCH((transpose4_kernel<IO, false>), blocks, THREADS, bytes, queue->stream, args);
}

} // namespace

int hb_cuda_launch_transpose4(const hb_cuda_queue *queue, const hb_cuda_dequantize4 *args)
{
    switch (args->out_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
