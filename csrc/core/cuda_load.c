#ifndef _GNU_SOURCE
#define _GNU_SOURCE // dladdr
#endif
#include "core/cuda_load.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LIBRARY_NAME "libhalfbyte_cuda.so"

static pthread_once_t load_once = PTHREAD_ONCE_INIT, ready_once = PTHREAD_ONCE_INIT;
// Written inside pthread_once, constant afterwards.
static const hb_cuda_api *loaded;
static hb_status load_status, ready_status;
static hb_error load_error, ready_error;

// Path of the library into `path`; false when it does not fit or this code's own path is unknown.
static bool library_path(char *path, size_t size)
{
    const char *wish = getenv("HALFBYTE_CUDA_LIBRARY");
    if (wish != NULL && *wish != '\0') {
        int written = snprintf(path, size, "%s", wish);
        return written > 0 && (size_t)written < size;
    }
    Dl_info self;
    // Any object of this file tells where the shared object lies that holds it.
    if (dladdr((const void *)&load_once, &self) == 0 || self.dli_fname == NULL) return false;
    const char *slash = strrchr(self.dli_fname, '/');
    int folder = slash == NULL ? 0 : (int)(slash - self.dli_fname) + 1;
    int written = snprintf(path, size, "%.*s%s", folder, self.dli_fname, LIBRARY_NAME);
    return written > 0 && (size_t)written < size;
}

static hb_status load(void)
{
    char path[4096];
    hb_error *error = &load_error;
    HB_CHECK(error, library_path(path, sizeof path), HB_ERR_CUDA,
             "cuda: the path of " LIBRARY_NAME " cannot be determined");
    HB_CHECK(error, access(path, F_OK) == 0, HB_ERR_CUDA,
             "cuda: this halfbyte was built without its CUDA library (build_info says why); "
             "expected %.120s",
             path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); // stays open
    if (library == NULL) {
        const char *reason = dlerror();
        return hb_fail(error, HB_ERR_CUDA, "cuda: %.230s", reason == NULL ? path : reason);
    }
    hb_cuda_api_get_fn *get = NULL;
    void *symbol = dlsym(library, HB_CUDA_SYMBOL);
    memcpy(&get, &symbol, sizeof get); // ISO C has no cast from object to function pointers
    HB_CHECK(error, get != NULL, HB_ERR_CUDA, "cuda: %.120s has no symbol " HB_CUDA_SYMBOL, path);
    const hb_cuda_api *api = get();
    HB_CHECK(error, api->abi == HB_CUDA_ABI && api->size == sizeof *api, HB_ERR_CUDA,
             "cuda: %.120s has ABI %u (%u bytes), expected %u (%u bytes); reinstall halfbyte", path,
             (unsigned)api->abi, (unsigned)api->size, (unsigned)HB_CUDA_ABI, (unsigned)sizeof *api);
    loaded = api;
    return HB_OK;
}

static hb_status check_device(void)
{
    hb_error *error = &ready_error;
    const hb_cuda_api *api = NULL;
    HB_TRY(hb_cuda_load(&api, error));
    int version = 0, count = 0;
    if (api->driver_version(&version) != 0) version = 0;
    HB_CHECK(error, version != 0, HB_ERR_CUDA, "cuda: no NVIDIA driver is installed");
    const int needed =
        api->runtime_version / 1000 * 1000; // a driver serves its whole major version
    HB_CHECK(error, version >= needed, HB_ERR_CUDA,
             "cuda: the NVIDIA driver is for CUDA %d.%d, this build needs %d.0 or later: update "
             "the driver",
             version / 1000, version % 1000 / 10, needed / 1000);
    int status = api->device_count(&count);
    HB_CHECK(error, status == 0, HB_ERR_CUDA, "cuda: %s", api->error_text(status));
    HB_CHECK(error, count > 0, HB_ERR_CUDA, "cuda: no CUDA device is visible");
    return HB_OK;
}

static void run_load(void)
{
    load_status = load();
}

static void run_check_device(void)
{
    ready_status = check_device();
}

static hb_status answer(hb_status status, const hb_error *kept, const hb_cuda_api **api,
                        hb_error *error)
{
    if (status != HB_OK) return hb_fail(error, status, "%s", kept->text);
    *api = loaded;
    return HB_OK;
}

hb_status hb_cuda_load(const hb_cuda_api **api, hb_error *error)
{
    pthread_once(&load_once, run_load);
    return answer(load_status, &load_error, api, error);
}

hb_status hb_cuda_ready(const hb_cuda_api **api, hb_error *error)
{
    pthread_once(&ready_once, run_check_device);
    return answer(ready_status, &ready_error, api, error);
}

hb_status hb_cuda_check(const hb_cuda_api *api, const char *function, int status, hb_error *error)
{
    HB_CHECK(error, status == 0, HB_ERR_CUDA, "%s: %s (CUDA error %d)", function,
             api->error_text(status), status);
    return HB_OK;
}
