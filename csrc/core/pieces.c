#include "core/pieces.h"

#ifdef __linux__
#include <unistd.h>
#endif

bool hb_wants_streaming(int64_t bytes)
{
    if (bytes <= (int64_t)4 << 20) return false; // no cache is asked on the fast path
    int64_t level3 = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    level3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return bytes > (level3 > 0 ? level3 / 2 : (int64_t)16 << 20);
}

hb_status hb_check_view(hb_error *error, const char *function, const char *argument,
                        const hb_view *view, bool written)
{
    HB_CHECK(error, hb_dtype_is_io(view->dtype), HB_ERR_TYPE,
             "%s: %s has dtype %s, expected float32, bfloat16 or float16", function, argument,
             hb_dtype_name(view->dtype));
    HB_CHECK(error, view->device.type == HB_CPU || view->device.type == HB_CUDA, HB_ERR_DEVICE,
             "%s: %s is on device type %d, expected the CPU or CUDA", function, argument,
             (int)view->device.type);
    HB_CHECK(error, view->device.type == HB_CPU || hb_view_is_contiguous(view), HB_ERR_VALUE,
             "%s: %s is strided, expected contiguous memory on CUDA", function, argument);
    HB_CHECK(error, !written || !view->readonly, HB_ERR_BUFFER,
             "%s: %s is read-only, expected a writable array", function, argument);
    HB_CHECK(error, view->data != NULL || hb_view_numel(view) == 0, HB_ERR_BUFFER,
             "%s: %s has no memory, expected %lld elements", function, argument,
             (long long)hb_view_numel(view));
    return HB_OK;
}
