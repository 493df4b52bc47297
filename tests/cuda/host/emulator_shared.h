// Who touched which byte of shared memory, and whether that was in order: part of emulator.cpp.
//
// Order is that of vector clocks. Every thread counts its own releases; what it knows of another
// thread is the count up to which that one's accesses lie behind it. Barriers exchange this
// knowledge. An access is a race when the one before it (a write, or for a write any read) lies
// beyond what the thread knows. Beside the threads, the barriers in shared memory (whose "accesses"
// are the bytes that the copy engine brought) and the warps (whose products read operands) have
// counts of their own.
//
// A second clock of the same shape holds what has passed through fence_async_proxy.
enum { BARRIERS = 64 };

constexpr int NO_THREAD = -1, MANY = -2;

int block_threads;

struct clocks {
    int size = 0;                            // threads, barriers, warps
    std::vector<uint32_t> time, fenced;      // [size] own count of each, and its count at the fence
    std::vector<uint32_t> base, base_fenced; // what everybody knows since the last block_sync
    std::vector<std::vector<uint32_t>> beyond; // per thread [2 * size]: knows more than that; or {}

    void reset(int threads)
    {
        size = threads + BARRIERS + threads / 32;
        time.assign((size_t)size, 1);
        fenced.assign((size_t)size, 0);
        base.assign((size_t)size, 0);
        base_fenced.assign((size_t)size, 0);
        beyond.resize((size_t)threads);
        for (auto &more : beyond) more.clear();
    }
    int barrier(int index) const { return block_threads + index; }
    int warp(int index) const { return block_threads + BARRIERS + index; }
    bool knows(int me, int other, uint32_t count) const
    {
        if (me == other) return true;
        const auto &more = beyond[(size_t)me];
        return count <= (more.empty() ? base[(size_t)other] : more[(size_t)other]);
    }
    bool knows_fenced(int me, int other, uint32_t count) const
    {
        if (me == other) return count <= fenced[(size_t)me];
        const auto &more = beyond[(size_t)me];
        return count <= (more.empty() ? base_fenced[(size_t)other] : more[(size_t)(size + other)]);
    }
    std::vector<uint32_t> &own(int me)
    {
        auto &more = beyond[(size_t)me];
        if (more.empty()) {
            more = base;
            more.insert(more.end(), base_fenced.begin(), base_fenced.end());
        }
        more[(size_t)me] = time[(size_t)me];
        more[(size_t)(size + me)] = fenced[(size_t)me];
        return more;
    }
    static void join(std::vector<uint32_t> &into, const std::vector<uint32_t> &from)
    {
        if (into.size() < from.size()) into.resize(from.size(), 0);
        for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
    }
    void fence(int me) { fenced[(size_t)me] = time[(size_t)me]++; }
    void release(int me, std::vector<uint32_t> &into)
    {
        join(into, own(me));
        time[(size_t)me]++;
    }
    void acquire(int me, const std::vector<uint32_t> &from) { join(own(me), from); }
    // Among threads that all arrive at the same barrier.
    void meet(const std::vector<int> &threads)
    {
        std::vector<uint32_t> all;
        for (int t : threads) release(t, all);
        for (int t : threads) beyond[(size_t)t] = all;
    }
    void meet_everybody()
    {
        for (auto &more : beyond)
            for (size_t i = 0; i < (more.empty() ? 0 : (size_t)size); i++) {
                base[i] = std::max(base[i], more[i]);
                base_fenced[i] = std::max(base_fenced[i], more[(size_t)size + i]);
            }
        for (size_t t = 0; t < beyond.size(); t++) {
            base[t] = time[t]++;
            base_fenced[t] = fenced[t];
            beyond[t].clear();
        }
    }
};
clocks clock_of;

// The last access of each kind to one byte.
struct shared_byte {
    uint32_t write_time = 0, read_time = 0;
    int16_t writer = NO_THREAD; // thread, or barrier that counted the copy
    int16_t reader = NO_THREAD; // thread or warp of products, or MANY: look into `readers`
    int16_t copier = NO_THREAD; // whose asynchronous copy (thread or barrier) to here is under way
    uint16_t products = 0;      // how many that are under way read it
    bool is_barrier = false;
    bool generic = false; // written by stores or async_copy
};
std::vector<shared_byte> shared_record;

// Of bytes with several readers since the last write: per warp (and per warp's products) the last.
struct reading {
    int who;
    uint32_t time;
};
std::unordered_map<size_t, std::vector<reading>> readers;

int reader_key(int who)
{
    return who < block_threads ? who / 32 : who;
}

void record_read(size_t offset, int who, uint32_t time)
{
    shared_byte &byte = shared_record[offset];
    if (byte.reader == NO_THREAD || byte.reader == who) {
        byte.reader = (int16_t)who;
        byte.read_time = time;
        return;
    }
    auto &list = readers[offset];
    if (byte.reader != MANY) list.assign(1, {byte.reader, byte.read_time});
    byte.reader = MANY;
    for (reading &r : list)
        if (reader_key(r.who) == reader_key(who)) {
            r = {who, time};
            return;
        }
    list.push_back({who, time});
}

// Thread `me` writes, or starts what will: nobody may be in the way.
void check_write(size_t offset, int me)
{
    shared_byte &byte = shared_record[offset];
    if (byte.products != 0)
        stop("shared byte %zu: write while products that read it are under way", offset);
    if (byte.reader == NO_THREAD) return;
    bool race = false;
    if (byte.reader != MANY)
        race = !clock_of.knows(me, byte.reader, byte.read_time);
    else
        for (const reading &r : readers[offset]) race = race || !clock_of.knows(me, r.who, r.time);
    if (race) stop("shared byte %zu: write races with a read", offset);
}

void record_write(size_t offset, int who, uint32_t time, bool generic)
{
    shared_byte &byte = shared_record[offset];
    byte.writer = (int16_t)who;
    byte.write_time = time;
    byte.generic = generic;
    if (byte.reader == MANY) readers.erase(offset);
    byte.reader = NO_THREAD;
}

// Before any access of thread `me`.
void check_settled(size_t offset, int me, const char *verb)
{
    const shared_byte &byte = shared_record[offset];
    if (byte.is_barrier) stop("shared byte %zu: %s in a barrier", offset, verb);
    if (byte.copier != NO_THREAD)
        stop("shared byte %zu: %s before the wait for the asynchronous copy of %s %d", offset, verb,
             byte.copier < block_threads ? "thread" : "barrier",
             byte.copier < block_threads ? byte.copier : byte.copier - block_threads);
    if (byte.writer == NO_THREAD || clock_of.knows(me, byte.writer, byte.write_time)) return;
    if (byte.writer >= block_threads)
        stop("shared byte %zu: %s before the wait for the asynchronous copy of barrier %d", offset,
             verb, byte.writer - block_threads);
    stop("shared byte %zu: %s races with the write of thread %d", offset, verb, byte.writer);
}
