// Kernels with one fault each: the emulator must find every one (test_emulator.py).
#include "dev.cuh"

struct broken_args {
    const float *in;
    float *out;
    int64_t n;
};

HB_KERNEL(64) fine(HB_ARGS broken_args a)
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    shared_store(table + t, load(a.in + t));
    block_sync();
    store(a.out + t, shared_load(table + 63 - t));
}

HB_KERNEL(64) missing_barrier(HB_ARGS broken_args a)
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    shared_store(table + t, load(a.in + t));
    store(a.out + t, shared_load(table + 63 - t));
}

HB_KERNEL(64) uneven_barrier(HB_ARGS broken_args a)
{
    if (thread_index() < 40) block_sync();
    if (thread_index() >= 40) shuffle_xor(0u, 1);
    store(a.out + thread_index(), 0.0f);
}

HB_KERNEL(64) reads_behind(HB_ARGS broken_args a)
{
    store(a.out + thread_index(), load(a.in + thread_index() + 1));
}

HB_KERNEL(64) writes_twice(HB_ARGS broken_args a)
{
    store(a.out + thread_index() / 2, 1.0f);
}

HB_KERNEL(64) writes_input(HB_ARGS broken_args a)
{
    store((float *)a.in + thread_index(), 1.0f);
}

HB_KERNEL(64) misaligned(HB_ARGS broken_args a)
{
    store(a.out + thread_index(), bits_float(load((const uint2 *)(a.in + 1)).x));
}

HB_KERNEL(64) shared_overflow(HB_ARGS broken_args a)
{
    shared_store((float *)shared_memory() + thread_index() + 1, 1.0f);
    (void)a;
}

HB_KERNEL(64) poisoned(HB_ARGS broken_args a) // not a fault: what it reads must be NaN
{
    store(a.out + thread_index(), shared_load((float *)shared_memory() + thread_index()));
}

// ---- asynchronous copies ------------------------------------------------------------------------

HB_KERNEL(64) async_fine(HB_ARGS broken_args a) // in[63 - t], but 0 for the last eight
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    if (t < 16) async_copy<16>(table + 4 * t, t < 14 ? a.in + 4 * t : a.in, t < 14 ? 16 : 0);
    async_commit();
    async_wait<0>();
    block_sync();
    store(a.out + t, shared_load(table + 63 - t));
}

HB_KERNEL(64) async_no_wait(HB_ARGS broken_args a)
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    async_copy<4>(table + t, a.in + t);
    async_commit();
    block_sync();
    store(a.out + t, shared_load(table + t));
    async_wait<0>();
}

HB_KERNEL(64) async_wrong_wait(HB_ARGS broken_args a) // lets the group run that it needs
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    async_copy<4>(table + t, a.in + t);
    async_commit();
    async_wait<1>();
    block_sync();
    store(a.out + t, shared_load(table + t));
    async_wait<0>();
}

HB_KERNEL(64) async_no_barrier(HB_ARGS broken_args a)
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    async_copy<4>(table + t, a.in + t);
    async_commit();
    async_wait<0>();
    store(a.out + t, shared_load(table + 63 - t));
}

HB_KERNEL(64) async_overwrites(HB_ARGS broken_args a)
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    async_copy<4>(table + t, a.in + t);
    async_commit();
    shared_store(table + t, 1.0f);
    async_wait<0>();
    store(a.out + t, shared_load(table + t));
}

HB_KERNEL(64) async_overtakes(HB_ARGS broken_args a) // refills what others may still read
{
    float *table = (float *)shared_memory();
    int t = thread_index();
    shared_store(table + t, load(a.in + t));
    block_sync();
    store(a.out + t, shared_load(table + 63 - t));
    async_copy<4>(table + t, a.in + t);
    async_commit();
    async_wait<0>();
}

HB_KERNEL(64) async_left_behind(HB_ARGS broken_args a)
{
    async_copy<4>((float *)shared_memory() + thread_index(), a.in + thread_index());
    async_commit();
}

HB_KERNEL(64) async_misaligned(HB_ARGS broken_args a)
{
    if (thread_index() == 0) async_copy<16>(shared_memory(), a.in + 1);
    async_commit();
    async_wait<0>();
}

#define BROKEN(name)                                                                               \
    extern "C" __attribute__((visibility("default"))) int broken_##name(const float *in,           \
                                                                        float *out, int64_t n)     \
    {                                                                                              \
        broken_args args = {in, out, n};                                                           \
        return HB_LAUNCH(name, 1, 64, 64 * 4, nullptr, args);                                      \
    }
BROKEN(fine)
BROKEN(missing_barrier)
BROKEN(uneven_barrier)
BROKEN(reads_behind)
BROKEN(writes_twice)
BROKEN(writes_input)
BROKEN(misaligned)
BROKEN(shared_overflow)
BROKEN(poisoned)
BROKEN(async_fine)
BROKEN(async_no_wait)
BROKEN(async_wrong_wait)
BROKEN(async_no_barrier)
BROKEN(async_overwrites)
BROKEN(async_overtakes)
BROKEN(async_left_behind)
BROKEN(async_misaligned)
