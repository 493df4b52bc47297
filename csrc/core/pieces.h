// How the codec operations cut their work: chunks for the pool, and in each chunk pieces that stay
// in the L1 cache between two passes and bound the scratch that strided views need.
#ifndef HB_CORE_PIECES_H
#define HB_CORE_PIECES_H

#include "core/ops.h"

enum {
    HB_PIECE = 4096,          // elements; a multiple of every 4-bit block size
    HB_CHUNK = 16 * HB_PIECE, // elements given to a thread at once
    HB_PIECE_BYTES = HB_PIECE * 4
};

static inline int64_t hb_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// Elements [first, first + n) as dense memory: in place, or gathered into `scratch`.
static inline const void *hb_piece_in(const hb_view *x, bool contiguous, int64_t first, int64_t n,
                                      void *scratch)
{
    if (contiguous) return (const uint8_t *)x->data + (size_t)first * hb_dtype_bytes(x->dtype);
    hb_view_gather_range(x, first, n, scratch);
    return scratch;
}

// Where a kernel may write elements [first, ...) densely; when that is `scratch`, hb_piece_out_done
// spreads them.
static inline void *hb_piece_out(const hb_view *out, bool contiguous, int64_t first, void *scratch)
{
    if (!contiguous) return scratch;
    return (uint8_t *)out->data + (size_t)first * hb_dtype_bytes(out->dtype);
}

static inline void hb_piece_out_done(const hb_view *out, bool contiguous, int64_t first, int64_t n,
                                     const void *scratch)
{
    if (!contiguous) hb_view_scatter_range(scratch, out, first, n);
}

// True when an output of so many bytes would only push everything else out of the caches: then the
// kernels store past them.
bool hb_wants_streaming(int64_t bytes);

// The checks that every view argument of a codec operation shares.
hb_status hb_check_view(hb_error *error, const char *function, const char *argument,
                        const hb_view *view, bool written);

// The map of an 8-bit encoder: finite and ascending, otherwise "nearest" has no search.
hb_status hb_check_map8(hb_error *error, const char *function, const float *map);

#endif
