// The host twin of cuda/hopper.cuh. Checked beside what dev_host.h says:
//   barriers  used only after everybody knows of their initialisation; never more arrivals or bytes
//             than a phase expects; only through these functions
//   copies    aligned; read or overwritten by nobody before the wait of their barrier
//   proxies   what was stored passes fence_async_proxy before a product reads or a copy replaces it
//   products  all 128 threads together, with one descriptor; operands neither overwritten before
//             the wait nor read before they are there; accumulators hold NaN until the wait, and
//             whoever writes them before is found; warpgroup_fence where it must be
//   ends      no thread ends with products under way, no block with copies
// Copies and products complete early (at issue), late (copies: when nobody can go on without them;
// operands of products: at the wait) or at random, as hb_host_async says.
#ifndef HB_TESTS_CUDA_HOPPER_HOST_H
#define HB_TESTS_CUDA_HOPPER_HOST_H

#include "dev_host.h"

struct alignas(64) tensor_map {
    const uint16_t *start;
    int64_t rows, columns;
    int box_rows;
};

namespace hb_host
{

void barrier_init(uint64_t *barrier, int count);
void barrier_fence_init();
void barrier_arrive(uint64_t *barrier, int bytes);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void fence_async_proxy();
void tensor_copy(void *shared, const tensor_map *map, int column, int row, uint64_t *barrier);
void product_fence();
void product_commit();
void product_wait(int groups_left);
struct product {
    int io, columns, mn_major_b, add;
    uint64_t a, b; // descriptors
};
void product_start(const product &what, float *d);

} // namespace hb_host

static inline unsigned char *shared_tiles()
{
    return shared_memory();
}
static inline int warp_uniform(int value)
{
    return value;
}
static inline void mbarrier_init(uint64_t *barrier, int count)
{
    hb_host::barrier_init(barrier, count);
}
static inline void fence_mbarrier_init()
{
    hb_host::barrier_fence_init();
}
static inline void mbarrier_arrive(uint64_t *barrier)
{
    hb_host::barrier_arrive(barrier, 0);
}
static inline void mbarrier_arrive_expect(uint64_t *barrier, int bytes)
{
    hb_host::barrier_arrive(barrier, bytes);
}
static inline void mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    hb_host::barrier_wait(barrier, parity);
}
static inline void fence_async_proxy()
{
    hb_host::fence_async_proxy();
}
static inline void tensor_copy(void *shared, const tensor_map *map, int column, int row,
                               uint64_t *barrier)
{
    hb_host::tensor_copy(shared, map, column, row, barrier);
}
static inline void tensor_map_prefetch(const tensor_map *) {}
template <int REGISTERS> void registers_give()
{
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "setmaxnreg");
}
template <int REGISTERS> void registers_take()
{
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "setmaxnreg");
}
static inline void warpgroup_fence()
{
    hb_host::product_fence();
}
static inline void warpgroup_commit()
{
    hb_host::product_commit();
}
template <int N> void warpgroup_wait()
{
    hb_host::product_wait(N);
}
static inline uint64_t operand(const void *p, uint32_t leading, uint32_t stride)
{
    return operand_bits(hb_host::shared_offset(p), leading, stride);
}
template <int IO, int MN_MAJOR_B>
void warpgroup_mma_64x128x16(float *d, uint64_t a, uint64_t b, int add)
{
    hb_host::product_start({IO, 128, MN_MAJOR_B, add, a, b}, d);
}
static inline int tensor_map_make(tensor_map *map, int, const void *p, int64_t rows,
                                  int64_t columns, int box_rows)
{
    // What cuTensorMapEncodeTiled refuses.
    if ((uintptr_t)p % 16 != 0 || columns % 8 != 0 || rows < 1 || columns < 1 || box_rows < 1 ||
        box_rows > 256 || rows > (int64_t)1 << 32 || columns > (int64_t)1 << 32)
        return 1; // cudaErrorInvalidValue
    *map = {(const uint16_t *)p, rows, columns, box_rows};
    return 0;
}

#endif
