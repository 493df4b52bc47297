#include "core/view.h"

// Calls copy(strided element, dense element) for every element in row-major order.
static void walk(const hb_view *view, unsigned char *dense, bool to_dense)
{
    const size_t bytes = hb_dtype_bytes(view->dtype);
    const int64_t numel = hb_view_numel(view);
    int64_t index[HB_MAX_NDIM] = {0};
    int64_t offset = 0;
    for (int64_t i = 0; i < numel; i++) {
        unsigned char *strided = (unsigned char *)view->data + offset * (int64_t)bytes;
        unsigned char *packed = dense + (size_t)i * bytes;
        if (to_dense)
            memcpy(packed, strided, bytes);
        else
            memcpy(strided, packed, bytes);
        for (int d = view->ndim - 1; d >= 0; d--) {
            offset += view->stride[d];
            if (++index[d] < view->shape[d]) break;
            offset -= view->stride[d] * view->shape[d];
            index[d] = 0;
        }
    }
}

void hb_view_gather(const hb_view *source, void *target)
{
    if (hb_view_is_contiguous(source)) {
        size_t bytes = (size_t)hb_view_numel(source) * hb_dtype_bytes(source->dtype);
        if (bytes > 0) memcpy(target, source->data, bytes);
        return;
    }
    walk(source, target, true);
}

void hb_view_scatter(const void *source, const hb_view *target)
{
    // walk() only reads `dense` in this direction.
    walk(target, (unsigned char *)(uintptr_t)source, false);
}
