// Everything that kernels use of the GPU, in one place: indices, barriers, warp exchange, shared
// and global memory, conversions. Kernels call these and no intrinsic of their own; the test build
// compiles the same kernels as plain C++ against tests/cuda/host/dev_host.h, which gives every
// function here the same meaning on fibers, and checks bounds, alignment, races and barriers.
//
// Arithmetic that must equal the CPU's bit for bit goes through mul_rn, add_rn, div_rn: nvcc may
// contract plain a * b + c into one rounding.
#ifndef HB_CUDA_DEV_CUH
#define HB_CUDA_DEV_CUH

#include <stdint.h>

#ifndef HB_CUDA_HOST

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define HB_KERNEL(threads)                  __global__ void __launch_bounds__(threads)
// The same for a kernel of which `blocks` should fit on a multiprocessor: limits its registers, and
// gives it all that this leaves, which registers_take and registers_give (hopper.cuh) rely on.
#define HB_KERNEL_RESIDENT(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define HB_DEVICE                           static __device__ __forceinline__
#define HB_CONSTANT                         static __constant__
#define HB_ARGS                             const __grid_constant__

HB_DEVICE int thread_index()
{
    return (int)threadIdx.x;
}
HB_DEVICE int64_t block_index()
{
    return blockIdx.x;
}
// Blocks of this launch.
HB_DEVICE int64_t grid_blocks()
{
    return gridDim.x;
}
HB_DEVICE int lane_index()
{
    return (int)(threadIdx.x & 31);
}
HB_DEVICE int warp_index()
{
    return (int)(threadIdx.x >> 5);
}

HB_DEVICE void block_sync()
{
    __syncthreads();
}
// A barrier for the lanes of a full warp, also of what they did to memory.
HB_DEVICE void warp_sync()
{
    __syncwarp();
}
// Exchange within a full warp: every lane must arrive.
HB_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask)
{
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
HB_DEVICE double shuffle_xor(double value, int lane_mask)
{
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
// The largest of the values of a full warp, in every lane.
HB_DEVICE uint32_t warp_max(uint32_t value)
{
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, value);
#else
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, value, mask);
        value = other > value ? other : value;
    }
    return value;
#endif
}
// The value of lane `source` (0..31).
HB_DEVICE uint32_t shuffle(uint32_t value, int source)
{
    return __shfl_sync(0xffffffffu, value, source);
}

// Dynamic shared memory of the block, 16-byte aligned.
HB_DEVICE unsigned char *shared_memory()
{
    extern __shared__ uint4 hb_shared[];
    return (unsigned char *)hb_shared;
}
template <typename T> HB_DEVICE T shared_load(const T *p)
{
    return *p;
}
template <typename T> HB_DEVICE void shared_store(T *p, T value)
{
    *p = value;
}
// The same by 32-bit addresses: arithmetic on them is cheaper than on pointers.
HB_DEVICE uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
template <typename T> HB_DEVICE T shared_load_at(uint32_t address)
{
    return *(const T *)__cvta_shared_to_generic(address);
}
template <typename T> HB_DEVICE void shared_store_at(uint32_t address, T value)
{
    *(T *)__cvta_shared_to_generic(address) = value;
}

// Global memory. load: read-only data, cached; load_once: data that this kernel reads only once;
// store: written once. T is a scalar or uint2/uint4 (8- and 16-byte accesses, aligned so).
template <typename T> HB_DEVICE T load(const T *p)
{
    return __ldg(p);
}
template <typename T> HB_DEVICE T load_once(const T *p)
{
    return __ldcs(p);
}
template <typename T> HB_DEVICE void store(T *p, T value)
{
    *p = value;
}
template <typename T> HB_DEVICE void store_once(T *p, T value)
{
    __stcs(p, value);
}

// Sets a byte to 1, which any number of threads of the launch may do.
HB_DEVICE void store_mark(uint8_t *p)
{
    *(volatile uint8_t *)p = 1;
}

// Asynchronous copies from global to shared memory of 4, 8 or 16 bytes, both ends aligned so, of
// which the first source_bytes come from `source` and the others become 0 (source_bytes 0: source
// is not read). A thread closes a group of its copies with async_commit; async_wait<N> waits until
// at most the newest N groups of this thread are under way. Other threads see the data after a
// barrier that follows the wait. A GPU before sm_80 copies at once.
template <int BYTES>
HB_DEVICE void async_copy(void *shared, const void *source, int source_bytes = BYTES)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "sizes of cp.async");
#if __CUDA_ARCH__ >= 800
    const uint32_t target = (uint32_t)__cvta_generic_to_shared(shared);
    if (BYTES == 16) // past L1
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target),
                     "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target),
                     "l"(__cvta_generic_to_global(source)), "n"(BYTES), "r"(source_bytes)
                     : "memory");
#else
    uint32_t *target = (uint32_t *)shared;
    const uint32_t *words = (const uint32_t *)source;
#pragma unroll
    for (int i = 0; i < BYTES / 4; i++) {
        const int left = source_bytes - 4 * i; // bytes of this word, if below 4
        uint32_t word = 0;
        if (left >= 4)
            word = __ldg(words + i);
        else
            for (int b = 0; b < left; b++)
                word |= (uint32_t)__ldg((const uint8_t *)(words + i) + b) << (8 * b);
        target[i] = word;
    }
#endif
}
template <int BYTES>
HB_DEVICE void async_copy_at(uint32_t shared, const void *source, int source_bytes = BYTES)
{
    async_copy<BYTES>(__cvta_shared_to_generic(shared), source, source_bytes);
}
HB_DEVICE void async_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> HB_DEVICE void async_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

HB_DEVICE float mul_rn(float a, float b)
{
    return __fmul_rn(a, b);
}
HB_DEVICE float add_rn(float a, float b)
{
    return __fadd_rn(a, b);
}
HB_DEVICE float div_rn(float a, float b)
{
    return __fdiv_rn(a, b);
}
HB_DEVICE float sqrt_rn(float x)
{
    return __fsqrt_rn(x);
}
HB_DEVICE float fma_rn(float a, float b, float c)
{
    return __fmaf_rn(a, b, c);
}
HB_DEVICE double sqrt_rn(double x)
{
    return __dsqrt_rn(x);
}
HB_DEVICE double add_rn(double a, double b)
{
    return __dadd_rn(a, b);
}
HB_DEVICE double mul_rn(double a, double b)
{
    return __dmul_rn(a, b);
}
HB_DEVICE double div_rn(double a, double b)
{
    return __ddiv_rn(a, b);
}
HB_DEVICE float round_to_float(double x)
{
    return __double2float_rn(x);
}
// max(a, |b|), NaN where one of them is. a >= 0 or NaN.
HB_DEVICE float max_magnitude(float a, float b)
{
#if __CUDA_ARCH__ >= 800
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(fabsf(b)));
    return larger;
#else
    const uint32_t x = __float_as_uint(a), y = __float_as_uint(b) & 0x7fffffffu;
    return __uint_as_float(x > y ? x : y); // as patterns NaNs lie above infinity
#endif
}
// max(|x|, floor), floor where x is NaN.
HB_DEVICE float magnitude_from(float x, float floor)
{
    return fmaxf(fabsf(x), floor);
}
// max(x, floor), floor where x is NaN.
HB_DEVICE float value_from(float x, float floor)
{
    return fmaxf(x, floor);
}
HB_DEVICE float magnitude(float x)
{
    return fabsf(x);
}
// min(|x|, limit); limit where x is NaN.
HB_DEVICE float min_magnitude(float x, float limit)
{
    return fminf(fabsf(x), limit);
}
HB_DEVICE uint32_t float_bits(float x)
{
    return __float_as_uint(x);
}
HB_DEVICE float bits_float(uint32_t x)
{
    return __uint_as_float(x);
}
HB_DEVICE int count_leading_zeros(uint32_t x)
{
    return __clz((int)x);
}
// x * factor + term modulo 2^32, in the multiplier where the logic unit is the busier one.
HB_DEVICE uint32_t multiply_add(uint32_t x, uint32_t factor, uint32_t term)
{
    uint32_t result;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(factor), "r"(term));
    return result;
}
// The upper 32 bits of a * b.
HB_DEVICE uint32_t mul_high(uint32_t a, uint32_t b)
{
    return __umulhi(a, b);
}

// sum + the products of the four int8 of a and b.
HB_DEVICE int32_t dot4_int8(uint32_t a, uint32_t b, int32_t sum)
{
    return __dp4a((int)a, (int)b, sum);
}
// Bytes of `low` (0..3) and `high` (4..7): byte i of the result is the one that nibble i of
// `selector` (each 0..7) names.
HB_DEVICE uint32_t merge_bytes(uint32_t low, uint32_t high, uint32_t selector)
{
    return __byte_perm(low, high, selector);
}

HB_DEVICE float bf16_to_float(uint16_t x)
{
    return __uint_as_float((uint32_t)x << 16);
}
HB_DEVICE float f16_to_float(uint16_t x)
{
    return __half2float(__ushort_as_half(x));
}
// Round to nearest even; NaN becomes a quiet NaN.
HB_DEVICE uint32_t pack_bf16(float low, float high)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&pair;
}
HB_DEVICE uint32_t pack_f16(float low, float high)
{
    __half2 pair = __floats2half2_rn(low, high);
    return *(const uint32_t *)&pair;
}

// a - b for two bfloat16 (IO 1) or float16 (IO 2) at once, each rounded.
template <int IO> HB_DEVICE uint32_t sub_pair(uint32_t a, uint32_t b)
{
#if __CUDA_ARCH__ >= 800
    if (IO == 1) {
        const __nv_bfloat162 pair =
            __hsub2(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
        return *(const uint32_t *)&pair;
    }
#endif
    const __half2 pair = __hsub2(*(const __half2 *)&a, *(const __half2 *)&b);
    return *(const uint32_t *)&pair; // of bfloat16 only for kernels that do not run before sm_80
}

// d += A B for a warp: A 16 x 16 and B 16 x 8 of bfloat16 (IO 1) or float16 (IO 2), d 16 x 8
// float32. With g = lane / 4 and t = lane % 4, each register two elements of consecutive k, the
// first low:
//   a[0] row g, k 2t     a[1] row g + 8, k 2t     a[2] row g, k 2t + 8     a[3] row g + 8, k 2t + 8
//   b[0] k 2t, column g  b[1] k 2t + 8, column g
//   d[0] row g, column 2t   d[1] row g, column 2t + 1   d[2], d[3] the same of row g + 8
// Needs sm_80; does nothing on older GPUs, whose launchers never choose it.
template <int IO> HB_DEVICE void mma_16x8x16(float *d, const uint32_t *a, const uint32_t *b)
{
#if __CUDA_ARCH__ >= 800
    if (IO == 1)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 16 byte matrices from shared memory, by a whole warp: lane l gives the address (16-byte
// aligned) of row l % 8 of matrix l / 8, and gets of matrix i bytes 4t .. 4t + 3 of row g in r[i].
HB_DEVICE void load_matrices(const void *row, uint32_t *r)
{
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d += A B for a warp: A 16 x 32 and B 32 x 8 of int8, d 16 x 8 int32. Each register four elements
// of consecutive k, the first lowest:
//   a[0] row g, k 4t     a[1] row g + 8, k 4t   a[2] row g, k 4t + 16   a[3] row g + 8, k 4t + 16
//   b[0] k 4t, column g  b[1] k 4t + 16, column g                       d as above
HB_DEVICE void mma_int8(int32_t *d, const uint32_t *a, const uint32_t *b)
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Sets bytes of device memory in the order of the stream; a node of a graph when captured.
static inline int hb_cuda_fill(void *p, int value, int64_t bytes, void *stream)
{
    return (int)cudaMemsetAsync(p, value, (size_t)bytes, (cudaStream_t)stream);
}

// What is remembered of a kernel: on which devices it may use more shared memory than 48 KB.
struct hb_kernel_state {
    uint64_t allowed; // bit d: device d
};

// Lets `kernel` use all the shared memory that a block can have on the current device. The value
// is the same for every thread that comes here, so it does not matter who is last.
static inline int hb_allow_shared(const void *kernel, hb_kernel_state *state, int64_t bytes)
{
    if (bytes <= 48 * 1024) return 0;
    int device = 0, limit = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const uint64_t bit = (uint64_t)(device < 64) << (device & 63);
    if (__atomic_load_n(&state->allowed, __ATOMIC_RELAXED) & bit) return 0;
    status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    if (bytes > limit) return cudaErrorInvalidValue;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (status == cudaSuccess) __atomic_fetch_or(&state->allowed, bit, __ATOMIC_RELAXED);
    return status;
}

enum { HB_MAX_BLOCKS = 2147483647, HB_TOO_MANY_BLOCKS = cudaErrorInvalidConfiguration };

// kernel<<<...>>>(args) on the current device; the launch's status. More blocks than a grid can
// have are an error. Kernels have no static shared memory.
#define HB_LAUNCH(kernel, blocks, threads, shared_bytes, stream, args)                             \
    ([&](int64_t hb_blocks, int64_t hb_bytes) -> int {                                             \
        static hb_kernel_state hb_state;                                                           \
        if (hb_blocks > HB_MAX_BLOCKS) return HB_TOO_MANY_BLOCKS;                                  \
        const int hb_status = hb_allow_shared((const void *)kernel, &hb_state, hb_bytes);          \
        if (hb_status != 0) return hb_status;                                                      \
        kernel<<<(unsigned)hb_blocks, (threads), (size_t)hb_bytes, (cudaStream_t)(stream)>>>(      \
            args);                                                                                 \
        return (int)cudaPeekAtLastError();                                                         \
    }((blocks), (shared_bytes)))

#else
#include "dev_host.h"
#endif

// ---- built from the above: the same on both -----------------------------------------------------

enum { HB_LANES = 32 };

// Byte i (0 the lowest) of a word.
HB_DEVICE uint32_t byte_of(uint32_t word, int i)
{
    return merge_bytes(word, 0, 0x4440 + (uint32_t)i);
}

HB_DEVICE uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

// Two floats of io dtype `bits` (0 float32, 1 bfloat16, 2 float16: hb_dtype) held in 32 bits.
template <int IO> HB_DEVICE float unpack_low(uint32_t pair)
{
    return IO == 1 ? bf16_to_float((uint16_t)pair) : f16_to_float((uint16_t)pair);
}
template <int IO> HB_DEVICE float unpack_high(uint32_t pair)
{
    return IO == 1 ? bf16_to_float((uint16_t)(pair >> 16)) : f16_to_float((uint16_t)(pair >> 16));
}
template <int IO> HB_DEVICE uint32_t pack(float low, float high)
{
    return IO == 1 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Element i of an array of io dtype IO as float32, and back (rounded to nearest even).
template <int IO> HB_DEVICE float load_float(const void *p, int64_t i)
{
    if (IO == 0) return load((const float *)p + i);
    uint16_t bits = load((const uint16_t *)p + i);
    return IO == 1 ? bf16_to_float(bits) : f16_to_float(bits);
}
template <int IO> HB_DEVICE void store_float(void *p, int64_t i, float value)
{
    if (IO == 0)
        store((float *)p + i, value);
    else
        store((uint16_t *)p + i, (uint16_t)pack<IO>(value, 0.0f));
}

// Eight consecutive elements, from 16-byte aligned memory.
template <int IO> HB_DEVICE void load8(const void *p, int64_t i, float *value)
{
    if (IO == 0) {
        const uint4 *source = (const uint4 *)((const float *)p + i);
        uint4 a = load_once(source), b = load_once(source + 1);
        value[0] = bits_float(a.x), value[1] = bits_float(a.y);
        value[2] = bits_float(a.z), value[3] = bits_float(a.w);
        value[4] = bits_float(b.x), value[5] = bits_float(b.y);
        value[6] = bits_float(b.z), value[7] = bits_float(b.w);
    } else {
        uint4 a = load_once((const uint4 *)((const uint16_t *)p + i));
        value[0] = unpack_low<IO>(a.x), value[1] = unpack_high<IO>(a.x);
        value[2] = unpack_low<IO>(a.y), value[3] = unpack_high<IO>(a.y);
        value[4] = unpack_low<IO>(a.z), value[5] = unpack_high<IO>(a.z);
        value[6] = unpack_low<IO>(a.w), value[7] = unpack_high<IO>(a.w);
    }
}
// The same of data that is read again.
template <int IO> HB_DEVICE void load8_cached(const void *p, int64_t i, float *value)
{
    if (IO == 0) {
        const uint4 *source = (const uint4 *)((const float *)p + i);
        uint4 a = load(source), b = load(source + 1);
        value[0] = bits_float(a.x), value[1] = bits_float(a.y);
        value[2] = bits_float(a.z), value[3] = bits_float(a.w);
        value[4] = bits_float(b.x), value[5] = bits_float(b.y);
        value[6] = bits_float(b.z), value[7] = bits_float(b.w);
    } else {
        uint4 a = load((const uint4 *)((const uint16_t *)p + i));
        value[0] = unpack_low<IO>(a.x), value[1] = unpack_high<IO>(a.x);
        value[2] = unpack_low<IO>(a.y), value[3] = unpack_high<IO>(a.y);
        value[4] = unpack_low<IO>(a.z), value[5] = unpack_high<IO>(a.z);
        value[6] = unpack_low<IO>(a.w), value[7] = unpack_high<IO>(a.w);
    }
}
template <int IO> HB_DEVICE void store8(void *p, int64_t i, const float *value)
{
    if (IO == 0) {
        uint4 *target = (uint4 *)((float *)p + i);
        uint4 a = {float_bits(value[0]), float_bits(value[1]), float_bits(value[2]),
                   float_bits(value[3])};
        uint4 b = {float_bits(value[4]), float_bits(value[5]), float_bits(value[6]),
                   float_bits(value[7])};
        store_once(target, a);
        store_once(target + 1, b);
    } else {
        uint4 a = {pack<IO>(value[0], value[1]), pack<IO>(value[2], value[3]),
                   pack<IO>(value[4], value[5]), pack<IO>(value[6], value[7])};
        store_once((uint4 *)((uint16_t *)p + i), a);
    }
}

#endif
