// What only a GPU of compute capability 9.0 has (sm_90a): barriers in shared memory that count
// bytes, copies of boxes by the copy engine, products of a group of four warps. Part of dev.cuh,
// with its twin in tests/cuda/host/hopper_host.h; compiled for another GPU these do nothing, and
// launchers must not choose such kernels there.
//
// Two views of shared memory ("proxies"): loads, stores and async_copy are the generic one, the
// copy engine and the products the asynchronous one. What a thread has stored, it must pass
// through fence_async_proxy before anybody is told that the asynchronous side may read or replace
// it.
#ifndef HB_CUDA_HOPPER_CUH
#define HB_CUDA_HOPPER_CUH

#include "dev.cuh"

// ---- index maps, the same on both (tests/cuda/test_async.py proves them) ------------------------

enum { HB_SWIZZLE_LINE = 128, HB_SWIZZLE_ATOM = 1024 };

// The 128-byte swizzle, of copies and operands alike: inside each 1024-byte atom (8 lines of 128
// bytes, aligned to 1024) the 16-byte piece c of line r lies at piece c ^ r. Eight lanes that touch
// the same piece of eight consecutive lines, or the eight pieces of one, thus meet all 32 banks.
HB_DEVICE constexpr uint32_t swizzle128(uint32_t offset)
{
    return offset ^ ((offset >> 3) & 0x70);
}

// Descriptor of an operand in shared memory (PTX ISA, "Matrix descriptor format"): bits 0-13
// address / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 62-63 = 1: 128-byte
// swizzle. With 16-bit elements the element (i, k), i a row of A or a column of B, is before the
// swizzle of the address bits at
//   K-major   start + (i % 8) * 128 + (i / 8) * stride + 2 k                       leading unused
//   MN-major  start + 2 (i % 64) + (i / 64) * leading + (k % 8) * 128 + (k / 8) * stride
HB_DEVICE constexpr uint64_t operand_bits(uint32_t address, uint32_t leading, uint32_t stride)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)((leading & 0x3ffff) >> 4) << 16 |
           (uint64_t)((stride & 0x3ffff) >> 4) << 32 | (uint64_t)1 << 62;
}

#ifndef HB_CUDA_HOST

#include <cuda.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HB_SM90(...) __VA_ARGS__
#else
#define HB_SM90(...)
#endif

// A matrix in global memory with the box that one copy moves; an argument of the kernel.
typedef CUtensorMap tensor_map;

// shared_memory() for tiles: 1024-byte aligned, as kernels have no static shared memory and dynamic
// begins at a multiple of that. A constant to the compiler, so that it goes into the instructions.
HB_DEVICE unsigned char *shared_tiles()
{
    extern __shared__ __align__(1024) unsigned char hb_shared_tiles[];
    return hb_shared_tiles;
}

// A value that is the same in all lanes of a full warp, so that the compiler knows it.
HB_DEVICE int warp_uniform(int value)
{
    return __shfl_sync(0xffffffffu, value, 0);
}

// Barriers in shared memory, 8-byte aligned. Each phase ends when `count` threads have arrived and
// the bytes that they announced have come; wait returns when the phase of this parity has ended
// (phases count 0, 1, 0, ...; before the first, parity 1 has). Arriving releases what the thread
// did, waiting acquires it.
HB_DEVICE void mbarrier_init(uint64_t *barrier, int count)
{
    HB_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                         "r"(count) : "memory");)
}
// By the thread that has initialised barriers, before the block_sync that tells the others: the
// copy engine sees them then.
HB_DEVICE void fence_mbarrier_init()
{
    HB_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory");
            asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
}
HB_DEVICE void mbarrier_arrive(uint64_t *barrier)
{
    HB_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(
        shared_address(barrier)) : "memory");)
}
HB_DEVICE void mbarrier_arrive_expect(uint64_t *barrier, int bytes)
{
    HB_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                             shared_address(barrier)),
                         "r"(bytes) : "memory");)
}
HB_DEVICE void mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    HB_SM90(asm volatile("{\n\t"
                         ".reg .pred done;\n\t"
                         "HB_again:\n\t"
                         "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                         "@!done bra HB_again;\n\t"
                         "}" ::"r"(shared_address(barrier)),
                         "r"(parity) : "memory");)
}

// Makes this thread's earlier stores visible to the asynchronous proxy.
HB_DEVICE void fence_async_proxy()
{
    HB_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
}

// The map's box with corner (column, row) to shared memory, 1024-byte aligned, swizzled; what lies
// outside the matrix becomes 0. One thread starts it; all its bytes, those outside too, are counted
// by `barrier`. Reads the map where the launch's arguments lie.
HB_DEVICE void tensor_copy(void *shared, const tensor_map *map, int column, int row,
                           uint64_t *barrier)
{
    HB_SM90(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::"
                         "bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                         "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");)
}
HB_DEVICE void tensor_map_prefetch(const tensor_map *map)
{
    HB_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");)
}

// Registers of each thread of a warpgroup from here on: a multiple of 8, fewer or more than before.
// Those taken must be given by others of the block.
template <int REGISTERS> HB_DEVICE void registers_give()
{
    HB_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
}
template <int REGISTERS> HB_DEVICE void registers_take()
{
    HB_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
}

// Products of a warpgroup (four warps, the first a multiple of four): all its threads call them
// together. warpgroup_fence comes before the first product, and before the next one after
// accumulators were touched. Products run on their own until warpgroup_wait<N>: at most the newest
// N groups, as closed by warpgroup_commit, are then under way. Before that, nobody may touch the
// accumulators or overwrite the operands.
HB_DEVICE void warpgroup_fence()
{
    HB_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory");)
}
HB_DEVICE void warpgroup_commit()
{
    HB_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory");)
}
template <int N> HB_DEVICE void warpgroup_wait()
{
    HB_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");)
}

// The descriptor of an operand at p; see operand_bits.
HB_DEVICE uint64_t operand(const void *p, uint32_t leading, uint32_t stride)
{
    return operand_bits(shared_address(p), leading, stride);
}

#define HB_OUT4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HB_OUT16(i) HB_OUT4(i), HB_OUT4(i + 4), HB_OUT4(i + 8), HB_OUT4(i + 12)
#define HB_WGMMA_N128(type)                                                                        \
    asm volatile("{\n\t"                                                                           \
                 ".reg .pred add;\n\t"                                                             \
                 "setp.ne.b32 add, %66, 0;\n\t"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                  \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                         \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                \
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"               \
                 " %64, %65, add, 1, 1, 0, %67;\n\t"                                               \
                 "}"                                                                               \
                 : HB_OUT16(0), HB_OUT16(16), HB_OUT16(32), HB_OUT16(48)                           \
                 : "l"(a), "l"(b), "r"(add), "n"(MN_MAJOR_B))

// d = A B, or d += A B where `add` is not 0: A 64 x 16, K-major, B 16 x 128, K-major or (MN_MAJOR_B
// 1) MN-major, of bfloat16 (IO 1) or float16 (IO 2); d 64 x 128 float32. With w the warp of the
// group, g = lane / 4 and t = lane % 4, d[4 j + i] is
//   row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2
template <int IO, int MN_MAJOR_B>
HB_DEVICE void warpgroup_mma_64x128x16(float *d, uint64_t a, uint64_t b, int add)
{
    HB_SM90(if (IO == 1) HB_WGMMA_N128("bf16"); else HB_WGMMA_N128("f16");)
}

// The map of a row-major matrix of 16-bit elements [rows, columns] at p (16-byte aligned, columns a
// multiple of 8) for boxes of box_rows x 64 with the 128-byte swizzle; 0 or a cudaError_t. A pure
// function of the host; the driver's encoder is looked up once.
static inline int tensor_map_make(tensor_map *map, int io, const void *p, int64_t rows,
                                  int64_t columns, int box_rows)
{
    typedef CUresult encoder(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                             const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                             const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static encoder *encode; // every thread finds the same
    encoder *found = __atomic_load_n(&encode, __ATOMIC_RELAXED);
    if (found == nullptr) {
        void *entry = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                              12000, cudaEnableDefault, &result);
#else
        cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
        if (status != cudaSuccess) return status;
        if (result != cudaDriverEntryPointSuccess || entry == nullptr)
            return cudaErrorInsufficientDriver;
        found = (encoder *)entry;
        __atomic_store_n(&encode, found, __ATOMIC_RELAXED);
    }
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t row_bytes[1] = {(cuuint64_t)columns * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, step[2] = {1, 1};
    CUresult result =
        found(map, io == 1 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
              (void *)p, size, row_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? 0 : cudaErrorInvalidValue;
}

#else
#include "hopper_host.h"
#endif

#endif
