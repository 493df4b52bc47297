// The host twin of cuda/dev.cuh: one fiber per CUDA thread, kernels as plain C++.
//
// Every access to global and shared memory of a kernel goes through here and is checked:
//   global   inside one registered buffer, aligned to its size, writable if written, no byte
//   written
//            by two threads of a launch, none written twice when it was declared an output
//   shared   inside what the launch asked for; poisoned with 0xff; two threads touching a byte, one
//            of them writing, must have a barrier between (within a warp a warp-wide barrier)
//   async    nobody touches the target of a copy under way; after the wait the thread that issued
//            it has written it, so that others need a barrier; no copy outlives its thread
//   barriers every thread of the block (or lane of the warp) arrives, at the same one
// Threads run in ascending, descending or random order until they wait, so that a missing barrier
// shows. A fault is recorded as text and ends the launch; nothing is thrown, nothing exits.
#ifndef HB_TESTS_CUDA_DEV_HOST_H
#define HB_TESTS_CUDA_DEV_HOST_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "core/dtype.h"

#define HB_KERNEL(threads)                  static void
#define HB_KERNEL_RESIDENT(threads, blocks) static void
#define HB_DEVICE                           static inline
#define HB_CONSTANT                         static const
#define HB_ARGS                             const

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};

namespace hb_host
{

struct thread_state {
    int index;     // in the block
    int64_t block; // of the grid
};
extern thread_state *self; // the thread that runs now

enum class access { read, write };
void check_global(const void *p, size_t bytes, access kind);
void check_mark(const void *p); // a byte that any thread may set to the same value
int fill(void *p, int value, int64_t bytes);
void check_shared(const void *p, size_t bytes, access kind);
unsigned char *shared_base();
uint32_t shared_offset(const void *p); // as the GPU numbers shared memory
int64_t grid_blocks();
void block_barrier();
void warp_barrier();
// Every lane of the warp gives a value and gets that of lane `source` (0..31).
uint32_t exchange(uint32_t value, int source);
// d += A B over the warp's fragments (dev.cuh says which lane holds what).
void mma_16x8x16(int io, float *d, const uint32_t *a, const uint32_t *b);
void mma_int8(int32_t *d, const uint32_t *a, const uint32_t *b);
// A copy of `bytes`, the first source_bytes from global memory, zeros behind them.
void async_copy(void *shared, const void *source, int bytes, int source_bytes);
void async_commit();
void async_wait(int groups_left);
int launch(const std::function<void()> &body, int64_t blocks, int threads, size_t shared_bytes);

} // namespace hb_host

static inline int thread_index()
{
    return hb_host::self->index;
}
static inline int64_t block_index()
{
    return hb_host::self->block;
}
static inline int64_t grid_blocks()
{
    return hb_host::grid_blocks();
}
static inline int lane_index()
{
    return hb_host::self->index % 32;
}
static inline int warp_index()
{
    return hb_host::self->index / 32;
}
static inline void block_sync()
{
    hb_host::block_barrier();
}
static inline void warp_sync()
{
    hb_host::warp_barrier();
}
static inline uint32_t shuffle_xor(uint32_t value, int lane_mask)
{
    return hb_host::exchange(value, lane_index() ^ lane_mask);
}
static inline double shuffle_xor(double value, int lane_mask)
{
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint64_t low = shuffle_xor((uint32_t)bits, lane_mask);
    bits = low | (uint64_t)shuffle_xor((uint32_t)(bits >> 32), lane_mask) << 32;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}
static inline uint32_t warp_max(uint32_t value)
{
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}
static inline uint32_t shuffle(uint32_t value, int source)
{
    return hb_host::exchange(value, source);
}
static inline unsigned char *shared_memory()
{
    return hb_host::shared_base();
}

template <typename T> T shared_load(const T *p)
{
    hb_host::check_shared(p, sizeof *p, hb_host::access::read);
    return *p;
}
template <typename T> void shared_store(T *p, T value)
{
    hb_host::check_shared(p, sizeof *p, hb_host::access::write);
    *p = value;
}
static inline uint32_t shared_address(const void *p)
{
    return hb_host::shared_offset(p);
}
static inline void *shared_pointer(uint32_t address)
{
    unsigned char *base = hb_host::shared_base();
    return base + (address - hb_host::shared_offset(base));
}
template <typename T> T shared_load_at(uint32_t address)
{
    return shared_load((const T *)shared_pointer(address));
}
template <typename T> void shared_store_at(uint32_t address, T value)
{
    shared_store((T *)shared_pointer(address), value);
}
template <typename T> T load(const T *p)
{
    hb_host::check_global(p, sizeof *p, hb_host::access::read);
    return *p;
}
template <typename T> T load_once(const T *p)
{
    return load(p);
}
template <typename T> void store(T *p, T value)
{
    hb_host::check_global(p, sizeof *p, hb_host::access::write);
    *p = value;
}
template <typename T> void store_once(T *p, T value)
{
    store(p, value);
}

static inline void store_mark(uint8_t *p)
{
    hb_host::check_mark(p);
    *p = 1;
}
static inline int hb_cuda_fill(void *p, int value, int64_t bytes, void *)
{
    return hb_host::fill(p, value, bytes);
}

template <int BYTES> void async_copy(void *shared, const void *source, int source_bytes = BYTES)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "sizes of cp.async");
    hb_host::async_copy(shared, source, BYTES, source_bytes);
}
template <int BYTES>
void async_copy_at(uint32_t shared, const void *source, int source_bytes = BYTES)
{
    async_copy<BYTES>(shared_pointer(shared), source, source_bytes);
}
static inline void async_commit()
{
    hb_host::async_commit();
}
template <int N> void async_wait()
{
    hb_host::async_wait(N);
}

// The host build uses -ffp-contract=off: plain operations round once, as the intrinsics do.
static inline float mul_rn(float a, float b)
{
    return a * b;
}
static inline float add_rn(float a, float b)
{
    return a + b;
}
static inline float div_rn(float a, float b)
{
    return a / b;
}
static inline float sqrt_rn(float x)
{
    return std::sqrt(x);
}
static inline float fma_rn(float a, float b, float c)
{
    return std::fma(a, b, c);
}
static inline double sqrt_rn(double x)
{
    return std::sqrt(x);
}
static inline float max_magnitude(float a, float b)
{
    return a != a || b != b ? hb_f32_from_bits(0x7fffffff) : std::fmax(a, std::fabs(b));
}
static inline float magnitude_from(float x, float floor)
{
    return std::fmax(std::fabs(x), floor);
}
static inline float value_from(float x, float floor)
{
    return std::fmax(x, floor);
}
static inline double add_rn(double a, double b)
{
    return a + b;
}
static inline double mul_rn(double a, double b)
{
    return a * b;
}
static inline double div_rn(double a, double b)
{
    return a / b;
}
static inline float round_to_float(double x)
{
    return (float)x;
}
inline float magnitude(float x)
{
    return std::fabs(x);
}
inline float min_magnitude(float x, float limit)
{
    return std::fabs(x) < limit ? std::fabs(x) : limit;
}
static inline uint32_t float_bits(float x)
{
    return hb_f32_bits(x);
}
static inline float bits_float(uint32_t x)
{
    return hb_f32_from_bits(x);
}
static inline int count_leading_zeros(uint32_t x)
{
    return x == 0 ? 32 : __builtin_clz(x);
}
static inline uint32_t mul_high(uint32_t a, uint32_t b)
{
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline int32_t dot4_int8(uint32_t a, uint32_t b, int32_t sum)
{
    for (int i = 0; i < 4; i++)
        sum = (int32_t)((uint32_t)sum + (uint32_t)((int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i)));
    return sum;
}
static inline uint32_t merge_bytes(uint32_t low, uint32_t high, uint32_t selector)
{
    const uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t merged = 0;
    for (int i = 0; i < 4; i++)
        merged |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return merged;
}
static inline uint32_t multiply_add(uint32_t x, uint32_t factor, uint32_t term)
{
    return x * factor + term;
}
static inline float bf16_to_float(uint16_t x)
{
    return hb_f32_from_bf16(x);
}
static inline float f16_to_float(uint16_t x)
{
    return hb_f32_from_f16(x);
}
// The GPU's conversions give 0x7fff for every NaN.
static inline uint32_t pack_bf16(float low, float high)
{
    uint32_t a = low != low ? 0x7fff : hb_bf16_from_f32(low);
    uint32_t b = high != high ? 0x7fff : hb_bf16_from_f32(high);
    return a | b << 16;
}
static inline uint32_t pack_f16(float low, float high)
{
    uint32_t a = low != low ? 0x7fff : hb_f16_from_f32(low);
    uint32_t b = high != high ? 0x7fff : hb_f16_from_f32(high);
    return a | b << 16;
}

static inline void load_matrices(const void *row, uint32_t *r)
{
    const unsigned char *base = hb_host::shared_base();
    hb_host::check_shared(row, 16, hb_host::access::read);
    const uint32_t mine = (uint32_t)((const unsigned char *)row - base);
    for (int i = 0; i < 4; i++) {
        const uint32_t theirs = hb_host::exchange(mine, 8 * i + lane_index() / 4);
        r[i] = shared_load((const uint32_t *)(base + theirs) + lane_index() % 4);
    }
}
static inline void mma_int8(int32_t *d, const uint32_t *a, const uint32_t *b)
{
    hb_host::mma_int8(d, a, b);
}
template <int IO> uint32_t sub_pair(uint32_t a, uint32_t b)
{
    uint32_t pair = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const uint16_t x = (uint16_t)(a >> shift), y = (uint16_t)(b >> shift);
        const float difference =
            IO == 1 ? bf16_to_float(x) - bf16_to_float(y) : f16_to_float(x) - f16_to_float(y);
        pair |= (IO == 1 ? pack_bf16(difference, 0.0f) : pack_f16(difference, 0.0f)) << shift;
    }
    return pair;
}
template <int IO> void mma_16x8x16(float *d, const uint32_t *a, const uint32_t *b)
{
    hb_host::mma_16x8x16(IO, d, a, b);
}

enum { HB_MAX_BLOCKS = 2147483647, HB_TOO_MANY_BLOCKS = 9 }; // cudaErrorInvalidConfiguration

// The template arguments' commas need parentheses around the kernel's name, as in dev.cuh.
#define HB_LAUNCH(kernel, blocks, threads, shared_bytes, stream, args)                             \
    ((void)(stream),                                                                               \
     hb_host::launch([&] { (kernel)(args); }, (blocks), (threads), (size_t)(shared_bytes)))

#endif
