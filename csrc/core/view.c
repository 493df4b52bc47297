#include "core/view.h"

// Copies elements [first, first + n) between the strided view and dense memory, one run along the
// last dimension at a time.
static void walk(const hb_view *view, int64_t first, int64_t n, unsigned char *dense, bool to_dense)
{
    const size_t bytes = hb_dtype_bytes(view->dtype);
    const int last = view->ndim - 1;
    const int64_t width = last < 0 ? 1 : view->shape[last];
    const int64_t step = (last < 0 ? 0 : view->stride[last]) * (int64_t)bytes;
    while (n > 0) {
        int64_t rest = first;
        int64_t offset = 0; // of element `first`, in elements
        for (int d = last; d >= 0; d--) {
            offset += rest % view->shape[d] * view->stride[d];
            rest /= view->shape[d];
        }
        int64_t run = width - first % width;
        if (run > n) run = n;
        unsigned char *strided = (unsigned char *)view->data + offset * (int64_t)bytes;
        if (step == (int64_t)bytes) {
            memcpy(to_dense ? dense : strided, to_dense ? strided : dense, (size_t)run * bytes);
        } else {
            for (int64_t i = 0; i < run; i++) {
                unsigned char *at = strided + i * step;
                unsigned char *packed = dense + (size_t)i * bytes;
                memcpy(to_dense ? packed : at, to_dense ? at : packed, bytes);
            }
        }
        dense += (size_t)run * bytes;
        first += run;
        n -= run;
    }
}

void hb_view_gather_range(const hb_view *source, int64_t first, int64_t n, void *target)
{
    if (n > 0 && hb_view_is_contiguous(source)) {
        size_t bytes = hb_dtype_bytes(source->dtype);
        memcpy(target, (const unsigned char *)source->data + (size_t)first * bytes,
               (size_t)n * bytes);
        return;
    }
    walk(source, first, n, target, true);
}

void hb_view_scatter_range(const void *source, const hb_view *target, int64_t first, int64_t n)
{
    // walk() only reads `dense` in this direction.
    walk(target, first, n, (unsigned char *)(uintptr_t)source, false);
}

void hb_view_gather(const hb_view *source, void *target)
{
    hb_view_gather_range(source, 0, hb_view_numel(source), target);
}

void hb_view_scatter(const void *source, const hb_view *target)
{
    hb_view_scatter_range(source, target, 0, hb_view_numel(target));
}
