#ifndef _GNU_SOURCE
#define _GNU_SOURCE // madvise
#endif
#include "core/large_pages.h"

#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

void hb_advise_large_pages(void *data, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < HB_LARGE_OUTPUT_BYTES) return;
    const char *wish = getenv("HALFBYTE_HUGE_PAGES");
    if (wish != NULL && strcmp(wish, "0") == 0) return;
    // Whole large pages only: the memory beside them is somebody else's.
    const uintptr_t page = (uintptr_t)2 << 20;
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    if (begin < end) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE); // advice only
#else
    (void)data, (void)bytes;
#endif
}
