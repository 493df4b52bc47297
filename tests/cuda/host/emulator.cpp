// One fiber per CUDA thread on one OS thread. See dev_host.h for what is checked.
//
// The scheduler lets each thread of a block run until it waits at a barrier or an exchange, or
// ends, in the chosen order; when all wait, whoever is complete goes on: a block barrier when every
// living thread is there, a warp's exchange when all its lanes are. If nobody can go on, that is a
// fault. Blocks run one after the other, in the chosen order too.
#include "hopper.cuh"
#include "emulator.h"
#include "runtime_host.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace hb_host
{

thread_state *self;
void check_range(const void *p, size_t bytes, access kind);

namespace
{

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int CUDA_ERROR_LAUNCH_FAILURE = 719;

enum class state {
    ready,
    at_block_barrier,
    at_warp_barrier,
    at_exchange,
    at_mma,
    at_mbarrier,
    at_product,
    at_product_wait,
    ended
};
const char *const STATE_NAMES[] = {"ready",          "at block_sync",     "at warp_sync",
                                   "at an exchange", "at an mma",         "at an mbarrier",
                                   "at a product",   "at warpgroup_wait", "ended"};

// A copy under way; its data moved at its issue already (early) or will at the wait for it.
struct pending_copy {
    unsigned char *target;
    const unsigned char *source;
    size_t bytes, source_bytes;
    bool moved;
};

struct fiber : thread_state {
    state where;
    jmp_buf context;
    ucontext_t start;
    uint32_t given; // to the exchange that it waits at
    int source;
    uint32_t received;
    struct { // operands and result of the mma that it waits at
        int io;
        uint32_t a[4], b[2];
        float d[4];
    } mma;
    product given_product; // that it starts, with its registers
    float *given_d;
    bool product_fenced;                                // since accumulators were last its own
    std::map<float *, std::vector<float>> accumulators; // under way, and their values so far
    int groups_left;                                    // for which it waits
    size_t barrier;                                     // where it waits, and for what
    uint32_t parity;
    std::vector<pending_copy> open_copies;           // since the last async_commit
    std::deque<std::vector<pending_copy>> committed; // groups, the oldest first
};

struct buffer {
    size_t bytes;
    bool writable;
    std::vector<int64_t> writer; // global thread number + 1 of each byte in this launch
};

std::map<uintptr_t, buffer> buffers;
std::map<uintptr_t, size_t> managed;
std::string fault;
int order = 0, completion = 0;
std::mt19937 random_source;

std::vector<fiber> fibers;
char *stacks;
size_t stack_count;
const std::function<void()> *body;
jmp_buf scheduler;
std::vector<unsigned char> shared_bytes;
unsigned char *shared_start;
size_t shared_size;
int64_t launched_blocks;

[[noreturn]] void leave()
{
    _longjmp(scheduler, 1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void stop(const char *format, ...)
{
    if (fault.empty()) {
        char text[256];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        fault = text;
        fault += " (block " + std::to_string(self->block) + ", thread " +
                 std::to_string(self->index) + ")";
    }
    static_cast<fiber *>(self)->where = state::ended;
    leave();
}

#include "emulator_shared.h"

bool completes_early()
{
    return completion == 0 || (completion == 2 && random_source() % 2 == 0);
}

// Where the GPU has dynamic shared memory: behind 1024 bytes of its own.
size_t shared_skew()
{
    return 1024;
}

void wait_as(state where)
{
    fiber *me = static_cast<fiber *>(self);
    me->where = where;
    if (_setjmp(me->context) == 0) leave();
}

void enter()
{
    (*body)();
    fiber *me = static_cast<fiber *>(self);
    bool under_way = !me->open_copies.empty();
    for (const auto &group : me->committed) under_way = under_way || !group.empty();
    if (under_way) stop("ends with an asynchronous copy that it has not waited for");
    if (!me->accumulators.empty()) stop("ends with products that it has not waited for");
    me->where = state::ended;
    leave();
}

void resume(fiber *f, bool fresh)
{
    self = f;
    f->where = state::ready;
    if (_setjmp(scheduler) == 0) {
        if (fresh)
            setcontext(&f->start);
        else
            _longjmp(f->context, 1);
    }
}

std::vector<int64_t> in_order(int64_t n)
{
    std::vector<int64_t> list((size_t)n);
    std::iota(list.begin(), list.end(), 0);
    if (order == 1) std::reverse(list.begin(), list.end());
    if (order == 2) std::shuffle(list.begin(), list.end(), random_source);
    return list;
}

constexpr int INT8_MMA = 3; // in place of an io dtype; d holds the bits of integers

void run_mma_int8(fiber *warp)
{
    int8_t a[16][32], b[32][8];
    for (int lane = 0; lane < 32; lane++) {
        const auto &mma = warp[lane].mma;
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < 4; e++)
                a[g + 8 * (r % 2)][4 * t + 16 * (r / 2) + e] = (int8_t)(mma.a[r] >> (8 * e));
        for (int r = 0; r < 2; r++)
            for (int e = 0; e < 4; e++) b[4 * t + 16 * r + e][g] = (int8_t)(mma.b[r] >> (8 * e));
    }
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            uint32_t sum = hb_f32_bits(warp[lane].mma.d[r]);
            for (int k = 0; k < 32; k++)
                sum += (uint32_t)(a[g + 8 * (r / 2)][k] * b[k][2 * t + r % 2]);
            warp[lane].mma.d[r] = hb_f32_from_bits(sum);
        }
    }
}

// Assembles the warp's matrices from its fragments, multiplies, hands the result back.
void run_mma(fiber *warp)
{
    if (warp->mma.io == INT8_MMA) return run_mma_int8(warp);
    float a[16][16], b[16][8];
    auto part = [&](uint32_t pair, int which) {
        uint16_t bits = (uint16_t)(which ? pair >> 16 : pair);
        return warp->mma.io == 1 ? hb_f32_from_bf16(bits) : hb_f32_from_f16(bits);
    };
    for (int lane = 0; lane < 32; lane++) {
        const auto &mma = warp[lane].mma;
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < 2; e++)
                a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + e] = part(mma.a[r], e);
        for (int r = 0; r < 2; r++)
            for (int e = 0; e < 2; e++) b[2 * t + 8 * r + e][g] = part(mma.b[r], e);
    }
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            double sum = warp[lane].mma.d[r];
            for (int k = 0; k < 16; k++)
                sum += (double)a[g + 8 * (r / 2)][k] * (double)b[k][2 * t + r % 2];
            warp[lane].mma.d[r] = (float)sum;
        }
    }
}

#include "emulator_hopper.h"

namespace
{

// Lets every complete barrier and exchange go on; false when none is.
bool release()
{
    bool any = false;
    int waiting = 0, alive = 0;
    for (fiber &f : fibers) {
        any = any || f.where == state::ready; // by a thread that came last to a product
        alive += f.where != state::ended;
        waiting += f.where == state::at_block_barrier;
    }
    if (alive > 0 && waiting == alive) {
        for (fiber &f : fibers)
            if (f.where == state::at_block_barrier) f.where = state::ready;
        clock_of.meet_everybody();
        return true;
    }
    for (size_t first = 0; first < fibers.size(); first += 32) {
        size_t lanes = std::min<size_t>(32, fibers.size() - first);
        for (state kind : {state::at_exchange, state::at_mma, state::at_warp_barrier}) {
            size_t there = 0;
            for (size_t l = 0; l < lanes; l++) there += fibers[first + l].where == kind;
            if (there != lanes || lanes != 32) continue;
            if (kind == state::at_mma) run_mma(&fibers[first]);
            for (size_t l = 0; l < lanes; l++) {
                fiber &f = fibers[first + l];
                if (kind == state::at_exchange) f.received = fibers[first + (size_t)f.source].given;
                f.where = state::ready;
            }
            if (kind == state::at_warp_barrier) {
                std::vector<int> threads(32);
                std::iota(threads.begin(), threads.end(), (int)first);
                clock_of.meet(threads);
            }
            any = true;
        }
    }
    if (completion == 2 && random_source() % 4 == 0) (void)land_one_late();
    for (int again = 0; again < 2; again++) {
        for (fiber &f : fibers)
            if (f.where == state::at_mbarrier && mbarriers[f.barrier].parity != f.parity) {
                f.where = state::ready;
                any = true;
            }
        while (!any && land_one_late()) // until that lets somebody go on
            for (fiber &f : fibers)
                any = any ||
                      (f.where == state::at_mbarrier && mbarriers[f.barrier].parity != f.parity);
    }
    return any;
}

void run_block(int64_t block, int threads)
{
    for (int t = 0; t < threads; t++) {
        fiber &f = fibers[(size_t)t];
        f.index = t;
        f.block = block;
        f.where = state::ready;
        f.product_fenced = false;
        f.accumulators.clear();
        f.open_copies.clear();
        f.committed.clear();
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = stacks + (size_t)t * STACK_BYTES;
        f.start.uc_stack.ss_size = STACK_BYTES;
        f.start.uc_link = nullptr;
        makecontext(&f.start, enter, 0);
    }
    std::memset(shared_start, 0xff, shared_size);
    shared_record.assign(shared_size, shared_byte());
    readers.clear();
    clock_of.reset(threads);
    mbarriers.clear();
    tensor_moves.clear();
    products_of.assign((size_t)threads / 32, {});
    std::vector<bool> fresh((size_t)threads, true);
    for (;;) {
        bool alive = false;
        for (int64_t t : in_order(threads)) {
            fiber &f = fibers[(size_t)t];
            if (f.where == state::ready) {
                resume(&f, fresh[(size_t)t]);
                fresh[(size_t)t] = false;
                if (!fault.empty()) return;
            }
            alive = alive || f.where != state::ended;
        }
        if (!alive) {
            if (!tensor_moves.empty())
                fault = "block " + std::to_string(block) + " ends with a tensor copy under way";
            return;
        }
        if (!release()) {
            fault = "barrier that not all threads reach:";
            for (int s = 1; s <= (int)state::ended; s++) {
                const auto there = std::count_if(fibers.begin(), fibers.end(),
                                                 [=](const fiber &f) { return (int)f.where == s; });
                if (there != 0) fault += " " + std::to_string(there) + " " + STATE_NAMES[s] + ",";
            }
            fault.back() = ' ';
            fault += "(block " + std::to_string(block) + ")";
            return;
        }
    }
}

} // namespace

void block_barrier()
{
    wait_as(state::at_block_barrier);
}

void warp_barrier()
{
    wait_as(state::at_warp_barrier);
}

uint32_t exchange(uint32_t value, int source)
{
    fiber *me = static_cast<fiber *>(self);
    if (source < 0 || source > 31) stop("exchange with lane %d", source);
    me->given = value;
    me->source = source;
    wait_as(state::at_exchange);
    return me->received;
}

void mma_16x8x16(int io, float *d, const uint32_t *a, const uint32_t *b)
{
    auto &mma = static_cast<fiber *>(self)->mma;
    mma.io = io;
    std::copy_n(a, 4, mma.a);
    std::copy_n(b, 2, mma.b);
    std::copy_n(d, 4, mma.d);
    wait_as(state::at_mma);
    std::copy_n(mma.d, 4, d);
}

void mma_int8(int32_t *d, const uint32_t *a, const uint32_t *b)
{
    float bits[4];
    std::memcpy(bits, d, sizeof bits);
    mma_16x8x16(INT8_MMA, bits, a, b);
    std::memcpy(d, bits, sizeof bits);
}

int64_t grid_blocks()
{
    return launched_blocks;
}

unsigned char *shared_base()
{
    return shared_start;
}

static void move_data(pending_copy &copy)
{
    std::memcpy(copy.target, copy.source, copy.source_bytes);
    std::memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    copy.moved = true;
}

void async_copy(void *shared, const void *source, int bytes, int source_bytes)
{
    fiber *me = static_cast<fiber *>(self);
    const size_t size = (size_t)bytes;
    if (source_bytes < 0 || source_bytes > bytes)
        stop("asynchronous copy of %d of %d bytes", source_bytes, bytes);
    if ((uintptr_t)source % size != 0)
        stop("asynchronous copy of %d bytes from a multiple of %zu only", bytes,
             (uintptr_t)source & -(uintptr_t)source);
    if (source_bytes > 0) check_range(source, (size_t)source_bytes, access::read);
    check_shared(shared, size, access::write);
    const size_t offset = (size_t)((unsigned char *)shared - shared_start);
    for (size_t i = 0; i < size; i++) shared_record[offset + i].copier = me->index;
    pending_copy copy = {(unsigned char *)shared, (const unsigned char *)source, size,
                         (size_t)source_bytes, false};
    if (completes_early()) move_data(copy);
    me->open_copies.push_back(copy);
}

void async_commit()
{
    fiber *me = static_cast<fiber *>(self);
    me->committed.push_back(std::move(me->open_copies));
    me->open_copies.clear();
}

void async_wait(int groups_left)
{
    fiber *me = static_cast<fiber *>(self);
    while (me->committed.size() > (size_t)groups_left) {
        for (pending_copy &copy : me->committed.front()) {
            if (!copy.moved) move_data(copy);
            const size_t offset = (size_t)(copy.target - shared_start);
            for (size_t i = 0; i < copy.bytes; i++) shared_record[offset + i].copier = NO_THREAD;
            check_shared(copy.target, copy.bytes, access::write); // written now, by this thread
        }
        me->committed.pop_front();
    }
}

void check_global(const void *p, size_t bytes, access kind)
{
    if ((uintptr_t)p % bytes != 0)
        stop("%s of %zu bytes at a multiple of %zu only", kind == access::write ? "write" : "read",
             bytes, (uintptr_t)p & -(uintptr_t)p);
    check_range(p, bytes, kind);
}

void check_range(const void *p, size_t bytes, access kind)
{
    uintptr_t address = (uintptr_t)p;
    const char *verb = kind == access::write ? "write" : "read";
    auto after = buffers.upper_bound(address);
    if (after == buffers.begin()) stop("%s of %zu bytes outside every buffer", verb, bytes);
    auto &[start, found] = *std::prev(after);
    if (address - start + bytes > found.bytes)
        stop("%s of %zu bytes at offset %zu of a buffer of %zu", verb, bytes, address - start,
             found.bytes);
    if (kind == access::read) return;
    if (!found.writable) stop("write to an input, at offset %zu", address - start);
    for (size_t i = 0; i < bytes; i++) {
        int64_t &writer = found.writer[address - start + i];
        int64_t me = self->block * block_threads + self->index + 1;
        if (writer != 0) stop("byte %zu of an output is written twice", address - start + i);
        writer = me;
    }
}

// -1 in place of a writer: marked, by anybody.
void check_mark(const void *p)
{
    uintptr_t address = (uintptr_t)p;
    auto after = buffers.upper_bound(address);
    if (after == buffers.begin()) stop("mark outside every buffer");
    auto &[start, found] = *std::prev(after);
    if (address - start >= found.bytes)
        stop("mark at offset %zu of a buffer of %zu", address - start, found.bytes);
    if (!found.writable) stop("mark in an input, at offset %zu", address - start);
    int64_t &writer = found.writer[address - start];
    if (writer > 0) stop("byte %zu of an output is written and marked", address - start);
    writer = -1;
}

int fill(void *p, int value, int64_t bytes)
{
    if (!fault.empty()) return CUDA_ERROR_LAUNCH_FAILURE;
    uintptr_t address = (uintptr_t)p;
    auto after = buffers.upper_bound(address);
    if (after == buffers.begin()) {
        fault = "fill outside every buffer";
        return 1;
    }
    auto &[start, found] = *std::prev(after);
    if (bytes < 0 || address - start + (size_t)bytes > found.bytes || !found.writable) {
        fault = "fill of " + std::to_string(bytes) + " bytes at offset " +
                std::to_string(address - start) + " of a buffer of " + std::to_string(found.bytes);
        return 1;
    }
    std::memset(p, value, (size_t)bytes);
    return 0;
}

void check_shared(const void *p, size_t bytes, access kind)
{
    uintptr_t address = (uintptr_t)p, base = (uintptr_t)shared_start;
    const char *verb = kind == access::write ? "write" : "read";
    if (address < base || address - base + bytes > shared_size)
        stop("shared %s of %zu bytes at offset %td of %zu", verb, bytes,
             (ptrdiff_t)(address - base), shared_size);
    if (address % bytes != 0) stop("shared %s of %zu bytes, misaligned", verb, bytes);
    const int me = self->index;
    for (size_t offset = address - base; offset < address - base + bytes; offset++) {
        check_settled(offset, me, verb);
        if (kind == access::write) {
            check_write(offset, me);
            record_write(offset, me, clock_of.time[(size_t)me], true);
        } else {
            record_read(offset, me, clock_of.time[(size_t)me]);
        }
    }
}

int launch(const std::function<void()> &kernel, int64_t blocks, int threads, size_t bytes)
{
    if (!fault.empty()) return CUDA_ERROR_LAUNCH_FAILURE;
    if (blocks > HB_MAX_BLOCKS) return HB_TOO_MANY_BLOCKS;
    if (blocks < 1 || threads < 1 || threads > 1024 || threads % 32 != 0 || bytes > 227 * 1024) {
        fault = "launch with " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                " threads and " + std::to_string(bytes) + " bytes of shared memory";
        return 1; // cudaErrorInvalidValue
    }
    if (stack_count < (size_t)threads) {
        if (stacks != nullptr) munmap(stacks, stack_count * STACK_BYTES);
        stack_count = (size_t)threads;
        stacks = (char *)mmap(nullptr, stack_count * STACK_BYTES, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) {
            stacks = nullptr;
            stack_count = 0;
            return 2; // cudaErrorMemoryAllocation
        }
    }
    for (auto &[start, found] : buffers) found.writer.assign(found.writable ? found.bytes : 0, 0);
    shared_bytes.resize(bytes + 16);
    shared_start = (unsigned char *)(((uintptr_t)shared_bytes.data() + 15) & ~(uintptr_t)15);
    shared_size = bytes;
    block_threads = threads;
    launched_blocks = blocks;
    body = &kernel;
    fibers.resize((size_t)threads);
    for (int64_t block : in_order(blocks)) {
        run_block(block, threads);
        if (!fault.empty()) return CUDA_ERROR_LAUNCH_FAILURE;
    }
    return 0;
}

void *managed_new(size_t bytes)
{
    const size_t rounded = (bytes + 255) / 256 * 256;
    void *memory = aligned_alloc(256, rounded);
    if (memory == nullptr) return nullptr;
    std::memset(memory, 0xa5, rounded);
    managed[(uintptr_t)memory] = bytes;
    buffers[(uintptr_t)memory] = {bytes, true, {}};
    return memory;
}

bool managed_free(void *memory)
{
    if (managed.erase((uintptr_t)memory) == 0) return false;
    buffers.erase((uintptr_t)memory);
    free(memory);
    return true;
}

place place_of(const void *memory)
{
    auto after = buffers.upper_bound((uintptr_t)memory);
    if (after == buffers.begin()) return place::host;
    auto &[start, found] = *std::prev(after);
    if ((uintptr_t)memory - start >= found.bytes) return place::host;
    return managed.count(start) != 0 ? place::managed : place::device;
}

} // namespace hb_host

// ---- emulator.h: for the tests ------------------------------------------------------------------

void hb_host_reset(int order, uint32_t seed)
{
    hb_host::buffers.clear();
    for (auto [start, bytes] : hb_host::managed) hb_host::buffers[start] = {bytes, true, {}};
    hb_host_restart(order, seed);
}

void hb_host_restart(int order, uint32_t seed)
{
    hb_host::fault.clear();
    hb_host::order = order;
    hb_host::completion = order;
    hb_host::random_source.seed(seed);
}

void hb_host_async(int completion)
{
    hb_host::completion = completion;
}

void hb_host_register(const void *start, int64_t bytes, int writable)
{
    hb_host::buffers[(uintptr_t)start] = {(size_t)bytes, writable != 0, {}};
}

void hb_host_forget(const void *start)
{
    hb_host::buffers.erase((uintptr_t)start);
}

const char *hb_host_fault(void)
{
    return hb_host::fault.c_str();
}
