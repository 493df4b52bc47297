// Barriers in shared memory, tensor copies and products of warpgroups: part of emulator.cpp, the
// other side of hopper_host.h.

struct mbarrier {
    size_t offset;
    int count, pending;
    int64_t bytes; // announced and not here yet (or here and not announced: negative)
    uint32_t parity;
    int initialiser;
    uint32_t init_time;
    bool fenced;                              // the copy engine may see it
    std::vector<uint32_t> gathering, visible; // clocks of this phase's arrivals; of all before
};
std::vector<mbarrier> mbarriers;

struct tensor_move { // under way
    unsigned char *target;
    const tensor_map *map;
    int column, row, barrier;
};
std::vector<tensor_move> tensor_moves;

// One product of a warpgroup: its operands as they were when they were read.
struct running_product {
    product what;
    int group;    // warpgroup
    bool read;    // operands are in a and b
    int finished; // warps, as bits
    std::vector<float> a, b;
    std::vector<size_t> pieces; // offsets of the 16-byte pieces that it reads
    float *d[128];
};
typedef std::shared_ptr<running_product> product_ptr;

// Of each warp: products since the last commit, and groups, the oldest first.
struct warp_products {
    std::vector<product_ptr> open;
    std::deque<std::vector<product_ptr>> groups;
};
std::vector<warp_products> products_of;

uint32_t poison_bits(int lane_register)
{
    return 0x7fbad000u + (uint32_t)lane_register; // a NaN that no arithmetic gives
}

mbarrier &barrier_at(const uint64_t *p, const char *verb)
{
    const size_t offset = (size_t)((const unsigned char *)p - shared_start);
    for (mbarrier &b : mbarriers)
        if (b.offset == offset) {
            if (!clock_of.knows(self->index, b.initialiser, b.init_time))
                stop("%s a barrier whose initialisation may not be done", verb);
            return b;
        }
    stop("%s shared byte %zu, where no barrier is", verb, offset);
}

void phase_check(mbarrier &b)
{
    if (b.pending != 0 || b.bytes != 0) return;
    const size_t me = (size_t)clock_of.barrier((int)(&b - mbarriers.data()));
    clocks::join(b.visible, b.gathering);
    b.visible.resize(2 * (size_t)clock_of.size, 0);
    b.visible[me] = clock_of.time[me]++;
    b.parity ^= 1;
    b.pending = b.count;
}

// A copy's bytes arrive.
void tensor_land(const tensor_move &move)
{
    const tensor_map &map = *move.map;
    const size_t start = (size_t)(move.target - shared_start);
    const uint32_t address = shared_offset(move.target);
    const int who = clock_of.barrier(move.barrier);
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < 64; c++) {
            const int64_t row = move.row + (int64_t)r, column = move.column + (int64_t)c;
            const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
            const uint16_t value = inside ? map.start[row * map.columns + column] : 0;
            // The swizzle is one of address bits.
            const uint32_t at = swizzle128(address + (uint32_t)(r * 128 + c * 2));
            std::memcpy(move.target + (at - address), &value, 2);
        }
    for (size_t i = 0; i < (size_t)map.box_rows * 128; i++) {
        shared_record[start + i].copier = NO_THREAD;
        record_write(start + i, who, clock_of.time[(size_t)who], false);
    }
    mbarrier &b = mbarriers[(size_t)move.barrier];
    b.bytes -= map.box_rows * 128;
    phase_check(b);
}

bool land_one_late()
{
    if (tensor_moves.empty()) return false;
    const size_t which = order == 2 ? random_source() % tensor_moves.size() : 0;
    const tensor_move move = tensor_moves[which];
    tensor_moves.erase(tensor_moves.begin() + (ptrdiff_t)which);
    tensor_land(move);
    return true;
}

// ---- products -----------------------------------------------------------------------------------

// Offset of element (i, k) of an operand, from its descriptor as the PTX ISA defines it. All four
// swizzles; T is 8 elements of 16 bits.
size_t operand_address(uint64_t descriptor, bool mn_major, int i, int k)
{
    const auto field = [&](int shift) { return (size_t)((descriptor >> shift & 0x3fff) << 4); };
    const size_t start = field(0), leading = field(16), stride = field(32);
    const int mode = (int)(descriptor >> 62);         // 0 none, 1 128, 2 64, 3 32 bytes
    const size_t line = (size_t)16 << (4 - mode) % 4; // bytes of a line of the atom
    size_t at = start;
    if (!mn_major) {
        at += (size_t)(i % 8) * line + (size_t)(i / 8) * stride;
        at += mode == 0 ? (size_t)(k / 8) * leading + (size_t)(k % 8) * 2 : (size_t)k * 2;
    } else if (mode == 0) {
        at += (size_t)(i % 8) * 2 + (size_t)(i / 8) * stride;
        at += (size_t)(k % 8) * 16 + (size_t)(k / 8) * leading;
    } else {
        const int wide = (int)line / 2;
        at += (size_t)(i % wide) * 2 + (size_t)(i / wide) * leading;
        at += (size_t)(k % 8) * line + (size_t)(k / 8) * stride;
    }
    // Bits 7.. of the address into the bits of the piece's number.
    return (at ^ (at >> 3 & (line - 16))) - shared_skew();
}

void read_operands(running_product &p)
{
    const auto value = [&](size_t at) {
        uint16_t bits;
        std::memcpy(&bits, shared_start + at, 2);
        return p.what.io == HB_BF16 ? hb_f32_from_bf16(bits) : hb_f32_from_f16(bits);
    };
    p.a.resize(64 * 16);
    p.b.resize((size_t)p.what.columns * 16);
    for (int i = 0; i < 64; i++)
        for (int k = 0; k < 16; k++)
            p.a[(size_t)(16 * i + k)] = value(operand_address(p.what.a, false, i, k));
    for (int i = 0; i < p.what.columns; i++)
        for (int k = 0; k < 16; k++)
            p.b[(size_t)(16 * i + k)] = value(operand_address(p.what.b, p.what.mn_major_b, i, k));
    p.read = true;
}

// The pieces of 16 bytes that a product reads; every one must be there, in every thread's view.
void check_operands(running_product &p)
{
    std::set<size_t> pieces;
    const auto add = [&](uint64_t descriptor, bool mn_major, int rows) {
        if ((descriptor >> 49 & 7) != 0) stop("descriptor with a base offset");
        for (int i = 0; i < rows; i++)
            for (int k = 0; k < 16; k++) {
                const size_t at = operand_address(descriptor, mn_major, i, k);
                if (at > shared_size - 2)
                    stop("operand at shared byte %zd of %zu", at, shared_size);
                pieces.insert(at / 16 * 16);
            }
    };
    add(p.what.a, false, 64);
    add(p.what.b, p.what.mn_major_b, p.what.columns);
    p.pieces.assign(pieces.begin(), pieces.end());
    std::set<std::pair<int, uint32_t>> seen; // (writer, time) known to all
    for (size_t piece : p.pieces)
        for (size_t at = piece; at < piece + 16; at++) {
            shared_byte &byte = shared_record[at];
            byte.products++;
            // Bytes that nobody wrote are the poison, which shows in the result.
            if (byte.copier == NO_THREAD &&
                (byte.writer == NO_THREAD || seen.count({byte.writer, byte.write_time})))
                continue;
            for (int t = 128 * p.group; t < 128 * (p.group + 1); t++) {
                check_settled(at, t, "product reads");
                if (byte.generic && !clock_of.knows_fenced(t, byte.writer, byte.write_time))
                    stop("shared byte %zu: a product reads what thread %d wrote without "
                         "fence_async_proxy",
                         at, byte.writer);
            }
            seen.insert({byte.writer, byte.write_time});
        }
}

// All 128 threads have come with their registers.
void start_product(fiber *threads)
{
    thread_state *last = self;
    auto p = std::make_shared<running_product>();
    p->what = threads[0].given_product;
    p->group = threads[0].index / 128;
    p->finished = 0;
    p->read = false;
    for (int t = 0; t < 128; t++) {
        fiber &f = threads[t];
        self = &f;
        const product &mine = f.given_product;
        if (std::memcmp(&mine, &p->what, sizeof mine) != 0)
            stop("threads of a warpgroup with different products");
        p->d[t] = f.given_d;
        auto &values = f.accumulators[f.given_d];
        const size_t n = (size_t)p->what.columns / 2;
        if (values.empty()) {
            if (!f.product_fenced) stop("product without warpgroup_fence before");
            values.assign(f.given_d, f.given_d + n);
        } else {
            for (size_t i = 0; i < n; i++)
                if (hb_f32_bits(f.given_d[i]) != poison_bits((int)i))
                    stop("accumulators written before the wait");
        }
        for (size_t i = 0; i < n; i++) {
            const uint32_t bits = poison_bits((int)i);
            std::memcpy(&f.given_d[i], &bits, 4);
        }
    }
    self = last;
    check_operands(*p);
    if (completes_early()) read_operands(*p);
    for (int w = 0; w < 4; w++) products_of[(size_t)(4 * p->group + w)].open.push_back(p);
}

// One warp waits: its part of the products in its older groups.
void finish_products(fiber *lanes)
{
    thread_state *last = self;
    const int warp = lanes[0].index / 32;
    auto &mine = products_of[(size_t)warp];
    const size_t keep = (size_t)lanes[0].groups_left;
    while (mine.groups.size() > keep) {
        for (product_ptr &p : mine.groups.front()) {
            if (!p->read) read_operands(*p);
            const int rows = 16 * (warp % 4);
            for (int lane = 0; lane < 32; lane++) {
                auto &values = lanes[lane].accumulators[p->d[32 * (warp % 4) + lane]];
                for (int r = 0; r < p->what.columns / 2; r++) {
                    const int row = rows + lane / 4 + 8 * (r / 2 % 2);
                    const int column = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
                    double sum = p->what.add ? values[(size_t)r] : 0.0;
                    for (int k = 0; k < 16; k++)
                        sum += (double)p->a[(size_t)(16 * row + k)] *
                               (double)p->b[(size_t)(16 * column + k)];
                    values[(size_t)r] = (float)sum;
                }
            }
            p->finished |= 1 << warp % 4;
            const int who = clock_of.warp(warp);
            for (size_t piece : p->pieces)
                for (size_t at = piece; at < piece + 16; at++) {
                    record_read(at, who, clock_of.time[(size_t)who]);
                    if (p->finished == 15) shared_record[at].products--;
                }
        }
        mine.groups.pop_front();
    }
    const size_t who = (size_t)clock_of.warp(warp);
    const uint32_t now = clock_of.time[who]++;
    for (int lane = 0; lane < 32; lane++) {
        fiber &f = lanes[lane];
        self = &f;
        clock_of.own(f.index)[who] = now;
        std::set<float *> under_way;
        for (auto &group : mine.groups)
            for (product_ptr &p : group) under_way.insert(p->d[32 * (warp % 4) + lane]);
        for (product_ptr &p : mine.open) under_way.insert(p->d[32 * (warp % 4) + lane]);
        for (auto it = f.accumulators.begin(); it != f.accumulators.end();) {
            auto &[d, values] = *it;
            for (size_t i = 0; i < values.size(); i++)
                if (hb_f32_bits(d[i]) != poison_bits((int)i))
                    stop("accumulators written before the wait");
            if (under_way.count(d)) {
                ++it;
                continue;
            }
            std::copy(values.begin(), values.end(), d);
            it = f.accumulators.erase(it);
            f.product_fenced = false;
        }
    }
    self = last;
}

} // namespace

void barrier_init(uint64_t *barrier, int count)
{
    const size_t offset = (size_t)((unsigned char *)barrier - shared_start);
    check_shared(barrier, 8, access::write);
    if (count < 1 || count > 0xfffff) stop("barrier for %d arrivals", count);
    if (mbarriers.size() == BARRIERS) stop("more than %d barriers", BARRIERS);
    for (size_t i = 0; i < 8; i++) shared_record[offset + i].is_barrier = true;
    mbarriers.push_back({offset,
                         count,
                         count,
                         0,
                         0,
                         self->index,
                         clock_of.time[(size_t)self->index],
                         false,
                         {},
                         {}});
}

void barrier_fence_init()
{
    for (mbarrier &b : mbarriers)
        if (b.initialiser == self->index) b.fenced = true;
}

void barrier_arrive(uint64_t *barrier, int bytes)
{
    mbarrier &b = barrier_at(barrier, "arrival at");
    if (bytes < 0 || bytes > 0xfffff) stop("barrier for %d bytes", bytes);
    if (b.pending == 0) stop("more arrivals at a barrier than its %d", b.count);
    clock_of.release(self->index, b.gathering);
    b.bytes += bytes;
    b.pending--;
    phase_check(b);
}

void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    if (parity > 1) stop("wait for parity %u", parity);
    const size_t index = (size_t)(&barrier_at(barrier, "wait at") - mbarriers.data());
    fiber *me = static_cast<fiber *>(self);
    me->barrier = index;
    me->parity = parity;
    while (mbarriers[index].parity == parity) wait_as(state::at_mbarrier);
    clock_of.acquire(me->index, mbarriers[index].visible);
}

void fence_async_proxy()
{
    clock_of.fence(self->index);
}

void tensor_copy(void *shared, const tensor_map *map, int column, int row, uint64_t *barrier)
{
    mbarrier &b = barrier_at(barrier, "copy counted by");
    if (!b.fenced) stop("copy counted by a barrier without fence_mbarrier_init");
    if ((uintptr_t)map % 64 != 0) stop("tensor map that is not 64-byte aligned");
    const size_t bytes = (size_t)map->box_rows * 128, offset = shared_offset(shared);
    if (offset % 1024 != 0) stop("copy of a box to shared address %zu", offset);
    const tensor_move move = {(unsigned char *)shared, map, column, row,
                              (int)(&b - mbarriers.data())};
    const size_t start = (size_t)(move.target - shared_start);
    if (start > shared_size || start + bytes > shared_size)
        stop("copy of %zu bytes to shared byte %zu of %zu", bytes, start, shared_size);
    for (int r = 0; r < map->box_rows; r++) {
        const int64_t inside = std::min<int64_t>(64, map->columns - column);
        if (row + r >= 0 && row + r < map->rows && column >= 0 && inside > 0)
            check_range(map->start + (row + (int64_t)r) * map->columns + column, (size_t)inside * 2,
                        access::read);
    }
    for (size_t at = start; at < start + bytes; at++) {
        check_settled(at, self->index, "copy overwrites");
        check_write(at, self->index);
        shared_byte &byte = shared_record[at];
        if (byte.generic && !clock_of.knows_fenced(self->index, byte.writer, byte.write_time))
            stop("shared byte %zu: a copy replaces what thread %d wrote without fence_async_proxy",
                 at, byte.writer);
        byte.copier = (int16_t)clock_of.barrier(move.barrier);
    }
    if (completes_early())
        tensor_land(move);
    else
        tensor_moves.push_back(move);
}

void product_fence()
{
    static_cast<fiber *>(self)->product_fenced = true;
}

// The last of the warpgroup does it for all.
void product_start(const product &what, float *d)
{
    fiber *me = static_cast<fiber *>(self);
    const size_t first = (size_t)me->index / 128 * 128;
    if (first + 128 > fibers.size()) stop("product of an incomplete warpgroup");
    me->given_product = what;
    me->given_d = d;
    me->where = state::at_product;
    for (size_t t = first; t < first + 128; t++)
        if (fibers[t].where != state::at_product) {
            wait_as(state::at_product);
            return;
        }
    start_product(&fibers[first]);
    for (size_t t = first; t < first + 128; t++) fibers[t].where = state::ready;
}

void product_commit()
{
    if (self->index % 32 != 0) return;
    auto &mine = products_of[(size_t)self->index / 32];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

// The last of the warp does it for all.
void product_wait(int groups_left)
{
    fiber *me = static_cast<fiber *>(self);
    const size_t first = (size_t)me->index / 32 * 32;
    me->groups_left = groups_left;
    me->where = state::at_product_wait;
    for (size_t t = first; t < first + 32; t++)
        if (fibers[t].where != state::at_product_wait) {
            wait_as(state::at_product_wait);
            return;
        }
    finish_products(&fibers[first]);
    for (size_t t = first; t < first + 32; t++) fibers[t].where = state::ready;
}

uint32_t shared_offset(const void *p)
{
    return (uint32_t)((const unsigned char *)p - shared_start) + (uint32_t)shared_skew();
}
