// The bundle that every operation takes: kernel table, thread pool, scratch memory.
#include "core/ops.h"

hb_status hb_context_init(hb_context *context, uint32_t cpu_flags, int threads, hb_error *error)
{
    context->cpu_flags = cpu_flags;
    hb_kernels_init(&context->kernels, cpu_flags);
    for (int format = 0; format < HB_CODEBOOK_COUNT; format++) {
        const float *value = hb_codebook4_get((hb_format4)format)->value;
        hb_codebook_round(value, HB_INT16_LIMIT, &context->rounded[format][0]);
        hb_codebook_round(value, HB_INT8_LIMIT, &context->rounded[format][1]);
    }
    context->pool = hb_pool_create(threads);
    context->scratch = hb_scratch_store_create();
    if (context->pool != NULL && context->scratch != NULL) return HB_OK;
    hb_context_clear(context);
    return hb_fail(error, HB_ERR_MEMORY, "context: no memory for the thread pool");
}

void hb_context_clear(hb_context *context)
{
    hb_pool_destroy(context->pool);
    hb_scratch_store_destroy(context->scratch);
    context->pool = NULL;
    context->scratch = NULL;
}
