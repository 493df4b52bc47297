#ifndef _GNU_SOURCE
#define _GNU_SOURCE // dl_iterate_phdr, RTLD_DEFAULT, dladdr
#endif
#include "core/openmp.h"

#if defined(__linux__)

#include <dlfcn.h>
#include <link.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define USER "libtorch_cpu.so" // the part of torch with the parallel loops

static int count_libraries(struct dl_phdr_info *info, size_t size, void *adds)
{
    if (size >= offsetof(struct dl_phdr_info, dlpi_adds) + sizeof info->dlpi_adds)
        *(unsigned long long *)adds = info->dlpi_adds;
    return 1; // each call tells the same
}

unsigned long long hb_openmp_libraries(void)
{
    unsigned long long adds = 0;
    dl_iterate_phdr(count_libraries, &adds);
    return adds;
}

typedef struct {
    char path[4096];
} found_path;

static int find_user(struct dl_phdr_info *info, size_t size, void *arg)
{
    (void)size;
    found_path *found = arg;
    const char *slash = strrchr(info->dlpi_name, '/');
    if (slash == NULL || strcmp(slash + 1, USER) != 0) return 0;
    int written = snprintf(found->path, sizeof found->path, "%s", info->dlpi_name);
    return written > 0 && (size_t)written < sizeof found->path;
}

// PF_FORKNOEXEC of the kernel: a copy of another process, without its threads.
static bool is_forked_copy(void)
{
    char text[1024];
    FILE *file = fopen("/proc/self/stat", "re");
    if (file == NULL) return true; // not known: as if
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    unsigned flags;
    const char *rest = strrchr(text, ')'); // the name before it may contain anything
    if (rest == NULL || sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return true;
    return (flags & 0x40u) != 0;
}

static bool same_object(const void *a, const void *b)
{
    Dl_info of_a, of_b;
    return dladdr(a, &of_a) != 0 && dladdr(b, &of_b) != 0 && of_a.dli_fbase == of_b.dli_fbase;
}

bool hb_openmp_find(hb_openmp *openmp)
{
    const char *wish = getenv("HALFBYTE_OPENMP");
    if (wish != NULL && strcmp(wish, "0") == 0) return false;
    found_path user;
    if (dl_iterate_phdr(find_user, &user) == 0 || is_forked_copy()) return false;
    void *library = dlopen(user.path, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL) return false; // closed meanwhile

    static const char *const names[] = {"GOMP_parallel", "omp_get_thread_num",
                                        "omp_get_max_threads", "omp_in_parallel"};
    void *symbols[4];
    bool ok = true;
    for (int i = 0; i < 4 && ok; i++) {
        // As torch's own references are bound: to what is global (LD_PRELOAD) before what it was
        // linked with. All from one runtime.
        symbols[i] = dlsym(RTLD_DEFAULT, names[i]);
        if (symbols[i] == NULL) symbols[i] = dlsym(library, names[i]);
        ok = symbols[i] != NULL && same_object(symbols[i], symbols[0]);
    }
    if (!ok) {
        dlclose(library);
        return false;
    }
    // `library` is kept: it must not go while its runtime is in use.
    memcpy(&openmp->parallel, &symbols[0], sizeof symbols[0]); // ISO C has no cast for it
    memcpy(&openmp->thread_num, &symbols[1], sizeof symbols[1]);
    memcpy(&openmp->max_threads, &symbols[2], sizeof symbols[2]);
    memcpy(&openmp->in_parallel, &symbols[3], sizeof symbols[3]);
    openmp->always = wish != NULL && strcmp(wish, "always") == 0;
    return true;
}

#else

unsigned long long hb_openmp_libraries(void)
{
    return 0;
}

bool hb_openmp_find(hb_openmp *openmp)
{
    (void)openmp;
    return false;
}

#endif
