// dx of a few rows of dy: W is walked by rows, as it lies, and added to sums of its columns.
//
// Panels, whose columns are 8 to 32 bytes of each row, touch a page for each of them, and fill a
// tile of one to four rows only in part. Here a chunk takes up to 512 bytes of each row.
#include "core/linear4.h"

// Rows [step, step + n_steps) of W, columns [begin, end), times dy, added to sums. In blocks wider
// than a chunk's unit columns may begin within one: the rest of it is a matrix of its own.
static void add_steps(const hb_product4 *p, int64_t step, int64_t n_steps, int64_t begin,
                      int64_t end, float *sums)
{
    const hb_linear4_set *set = p->set;
    const unsigned char *packed = p->packed + hb_linear4_tile_bytes(set, step);
    const float *scales = p->expand ? p->all_scales + step * (p->outputs / p->blocksize) : NULL;
    int64_t column = begin;
    while (column < end) {
        const int64_t aligned = hb_round_up(column, p->blocksize);
        const int64_t stop = aligned > column ? hb_least(aligned, end) : end;
        const hb_matrix4 block = hb_product4_block(p, step, column, scales);
        set->add_rows(&block, n_steps, stop - column, packed, (int)p->m_count,
                      sums + (column - begin), p->group);
        column = stop;
    }
}

static void store_columns(const hb_product4 *p, int64_t begin, int64_t end, const float *totals)
{
    for (int64_t t = 0; t < p->m_count; t++, totals += p->group)
        for (int64_t c = begin; c < end; c += HB_LINEAR4_ADD_GROUP) {
            _Alignas(64) float natural[HB_LINEAR4_ADD_GROUP];
            for (int i = 0; i < HB_LINEAR4_ADD_GROUP; i++)
                natural[p->set->add_order[i]] = totals[c - begin + i];
            hb_product4_store(p, p->m_begin + t, c, hb_least(HB_LINEAR4_ADD_GROUP, end - c),
                              natural);
        }
}

void hb_product4_add_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    float *const totals = (float *)scratch, *const sums = (float *)(scratch + p->sums_at);
    const int64_t n_sums = p->m_count * p->group;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t column = chunk * p->group;
        const int64_t column_end = hb_least(column + p->group, p->outputs);
        memset(totals, 0, (size_t)n_sums * sizeof *totals);
        for (int64_t step = 0; step < p->steps; step += p->set->panel_steps) {
            const int64_t n_steps = hb_least(p->set->panel_steps, p->steps - step);
            memset(sums, 0, (size_t)n_sums * sizeof *sums);
            add_steps(p, step, n_steps, column, column_end, sums);
            for (int64_t i = 0; i < n_sums; i++) totals[i] += sums[i];
        }
        store_columns(p, column, column_end, totals);
    }
}
