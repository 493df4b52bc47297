// Kernels that gates.py must find fault with: each is correct, and bad in one way.
#include "dev.cuh"

struct bad_args {
    const float *x;
    float *y;
    const uint8_t *bytes;
    int64_t n;
    int index;
};

// An array indexed by a value that the compiler does not know: it goes to local memory.
HB_KERNEL(128) bad_stack_kernel(HB_ARGS bad_args a)
{
    float part[32] = {0.0f};
    for (int64_t i = thread_index(); i < a.n; i += 128)
        part[(int)load(a.bytes + i) & 31] += load(a.x + i);
    a.y[thread_index()] = part[a.index & 31];
}

// More values alive than 1024 threads leave registers for.
HB_KERNEL(1024) bad_spill_kernel(HB_ARGS bad_args a)
{
    float value[96];
#pragma unroll
    for (int j = 0; j < 96; j++) value[j] = load_once(a.x + thread_index() + j * a.n);
    for (int64_t i = 0; i < a.n; i++)
#pragma unroll
        for (int j = 0; j < 96; j++) value[j] = value[j] * value[(j + 1) % 96] + load(a.x + i);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 96; j++) sum += value[j];
    store(a.y + thread_index(), sum);
}

// Loads byte by byte what one access of 16 bytes would bring.
HB_KERNEL(128) bad_bytes_kernel(HB_ARGS bad_args a)
{
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t i = 16 * thread_index(); i < a.n; i += 16 * 128)
        for (int j = 0; j < 16; j++) sum += (float)load(a.bytes + i + j);
    store(a.y + thread_index(), sum);
}

// The same with one access: nothing to find fault with.
HB_KERNEL(128) good_kernel(HB_ARGS bad_args a)
{
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t i = 16 * thread_index(); i < a.n; i += 16 * 128) {
        uint4 word = load((const uint4 *)(a.bytes + i));
        sum += (float)(word.x + word.y + word.z + word.w);
    }
    store(a.y + thread_index(), sum);
}

// A division of 64 bits for each element.
HB_KERNEL(128) bad_division_kernel(HB_ARGS bad_args a)
{
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t i = 16 * thread_index(); i < a.n; i += 16 * 128) {
        uint4 word = load((const uint4 *)(a.bytes + i));
        sum += (float)(word.x + word.y + word.z + word.w) * load(a.x + i / a.index);
    }
    store(a.y + thread_index(), sum);
}
