// The bundle that every operation takes: kernel table and thread pool.
#include "core/ops.h"

hb_status hb_context_init(hb_context *context, uint32_t cpu_flags, int threads, hb_error *error)
{
    context->cpu_flags = cpu_flags;
    hb_kernels_init(&context->kernels, cpu_flags);
    context->pool = hb_pool_create(threads);
    HB_CHECK(error, context->pool != NULL, HB_ERR_MEMORY, "context: no memory for the thread pool");
    return HB_OK;
}

void hb_context_clear(hb_context *context)
{
    hb_pool_destroy(context->pool);
    context->pool = NULL;
}
