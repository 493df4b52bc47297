// A CUDA library around another: it notes every launch (entry, device, stream), can make the n-th
// one fail, hide entries, and ask for workspaces. The other one is HALFBYTE_TEST_CUDA_LIBRARY.
#include "core/cuda_api.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static const hb_cuda_api *real;
static hb_cuda_api table;
static long fail_after = -1; // launches until one fails; -1: none
static int fail_status;
static int skip;                     // launches do nothing
static int64_t workspace_bytes = -1; // what workspaces are asked for; -1: what the kernels say
static int bad_workspace;            // one that was NULL, misaligned or too small to write to
static struct {
    char entry[32];
    int32_t device;
    void *stream;
} last;
static long launches;

static int note(const char *entry, const hb_cuda_queue *queue)
{
    strncpy(last.entry, entry, sizeof last.entry - 1);
    last.device = queue->device;
    last.stream = queue->stream;
    launches++;
    if (fail_after == 0) return fail_status;
    if (fail_after > 0) fail_after--;
    return 0;
}

static void use_workspace(void *workspace)
{
    if (workspace_bytes <= 0) return;
    if (workspace == NULL || (uintptr_t)workspace % 256 != 0)
        bad_workspace = 1;
    else
        memset(workspace, 0x77, (size_t)workspace_bytes);
}

#define WRAP(entry, type)                                                                          \
    static int my_##entry(const hb_cuda_queue *queue, const type *args)                            \
    {                                                                                              \
        int status = note(#entry, queue);                                                          \
        return status != 0 || skip ? status : real->entry(queue, args);                            \
    }
#define WRAP_WORKSPACE(entry, type)                                                                \
    static int64_t my_##entry##_workspace(const hb_cuda_queue *queue, const type *args)            \
    {                                                                                              \
        if (workspace_bytes >= 0) return workspace_bytes;                                          \
        return real->entry##_workspace == NULL ? 0 : real->entry##_workspace(queue, args);         \
    }                                                                                              \
    static int my_##entry(const hb_cuda_queue *queue, const type *args)                            \
    {                                                                                              \
        int status = note(#entry, queue);                                                          \
        use_workspace(args->workspace);                                                            \
        return status != 0 || skip ? status : real->entry(queue, args);                            \
    }
WRAP(copy, hb_cuda_copy)
WRAP(upload, hb_cuda_upload)
WRAP(expand4, hb_cuda_expand4)
WRAP(quantize4, hb_cuda_quantize4)
WRAP_WORKSPACE(nest4, hb_cuda_nest4)
WRAP(dequantize4, hb_cuda_dequantize4)
WRAP_WORKSPACE(linear4, hb_cuda_linear4)
WRAP(gather4, hb_cuda_gather4)
WRAP(quantize8, hb_cuda_quantize8)
WRAP(dequantize8, hb_cuda_dequantize8)
WRAP(quantize_rows8, hb_cuda_quantize_rows8)
WRAP(dequantize_rows8, hb_cuda_dequantize_rows8)
WRAP(matmul8, hb_cuda_matmul8)
WRAP_WORKSPACE(linear8, hb_cuda_linear8)
WRAP_WORKSPACE(optimizer, hb_cuda_optimizer)

#define ENTRIES(x)                                                                                 \
    x(copy) x(upload) x(expand4) x(quantize4) x(nest4) x(dequantize4) x(linear4) x(gather4)        \
        x(quantize8) x(dequantize8) x(quantize_rows8) x(dequantize_rows8) x(matmul8) x(linear8)    \
            x(optimizer)

#pragma GCC visibility push(default)
hb_cuda_api_get_fn hb_cuda_api_get;
const hb_cuda_api *hb_cuda_api_get(void)
{
    if (real != NULL) return &table;
    void *library = dlopen(getenv("HALFBYTE_TEST_CUDA_LIBRARY"), RTLD_NOW);
    hb_cuda_api_get_fn *get = NULL;
    void *symbol = library == NULL ? NULL : dlsym(library, HB_CUDA_SYMBOL);
    if (symbol == NULL) abort();
    memcpy(&get, &symbol, sizeof get);
    real = get();
    table = *real;
#define TAKE(entry)                                                                                \
    if (real->entry != NULL) table.entry = my_##entry;
    ENTRIES(TAKE)
    table.nest4_workspace = my_nest4_workspace;
    table.linear4_workspace = my_linear4_workspace;
    table.linear8_workspace = my_linear8_workspace;
    table.optimizer_workspace = my_optimizer_workspace;
    return &table;
}

// The launch `after` more launches from now fails with `status`, and all behind it; -1: none.
void recorder_fail(long after, int status)
{
    fail_after = after;
    fail_status = status;
}

// Launches are noted and succeed, and no kernel runs.
void recorder_skip(int on)
{
    skip = on;
}

void recorder_workspace(int64_t bytes)
{
    workspace_bytes = bytes;
    bad_workspace = 0;
}

int recorder_bad_workspace(void)
{
    return bad_workspace;
}

// Removes an entry (hide) or brings it back; 0 when the library has none.
int recorder_hide(const char *entry, int hide)
{
#define HIDE(name)                                                                                 \
    if (strcmp(entry, #name) == 0) {                                                               \
        if (real->name != NULL) table.name = hide ? NULL : my_##name;                              \
        return real->name != NULL;                                                                 \
    }
    ENTRIES(HIDE)
    return 0;
}

long recorder_launches(const char **entry, int32_t *device, void **stream)
{
    *entry = last.entry;
    *device = last.device;
    *stream = last.stream;
    return launches;
}
#pragma GCC visibility pop
