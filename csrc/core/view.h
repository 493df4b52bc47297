// hb_view: somebody else's array, borrowed for the length of one call.
#ifndef HB_CORE_VIEW_H
#define HB_CORE_VIEW_H

#include "core/dtype.h"

#define HB_MAX_NDIM 8

typedef enum { HB_CPU = 1, HB_CUDA = 2 } hb_device_type; // DLPack's numbers

// Where memory lies, and for a call the stream that its work goes to: the caller's current one.
typedef struct {
    hb_device_type type;
    int32_t index;
    void *stream; // cudaStream_t; NULL is the legacy default stream, and what memory of the CPU has
} hb_device;

static inline bool hb_device_is_same(hb_device a, hb_device b)
{
    return a.type == b.type && a.index == b.index;
}

// data points at the first element (byte offsets already added); it may be NULL when there are no
// elements. Strides count elements and may be zero or negative.
typedef struct {
    void *data;
    hb_dtype dtype;
    hb_device device;
    int ndim;
    bool readonly;
    int64_t shape[HB_MAX_NDIM];
    int64_t stride[HB_MAX_NDIM];
} hb_view;

static inline int64_t hb_view_numel(const hb_view *view)
{
    int64_t numel = 1;
    for (int d = 0; d < view->ndim; d++) numel *= view->shape[d];
    return numel;
}

// Strides of elements in row-major order without gaps.
static inline void hb_contiguous_strides(int ndim, const int64_t *shape, int64_t *stride)
{
    int64_t next = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        stride[d] = next;
        next *= shape[d];
    }
}

// True when the elements lie in row-major order without gaps.
static inline bool hb_view_is_contiguous(const hb_view *view)
{
    int64_t expected = 1;
    bool in_order = true;
    for (int d = view->ndim - 1; d >= 0; d--) {
        if (view->shape[d] == 0) return true; // whatever the strides of the other dimensions
        if (view->shape[d] != 1 && view->stride[d] != expected) in_order = false;
        expected *= view->shape[d];
    }
    return in_order;
}

// Copies the elements of `source` (any strides) to `target` in row-major order, keeping the dtype.
void hb_view_gather(const hb_view *source, void *target);
// The reverse: row-major `source` into the strided `target`.
void hb_view_scatter(const void *source, const hb_view *target);
// The same for elements [first, first + n) of the row-major order only.
void hb_view_gather_range(const hb_view *source, int64_t first, int64_t n, void *target);
void hb_view_scatter_range(const void *source, const hb_view *target, int64_t first, int64_t n);

#endif
