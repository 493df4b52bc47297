// Pages of 2 MiB for large outputs.
#ifndef HB_CORE_LARGE_PAGES_H
#define HB_CORE_LARGE_PAGES_H

#include <stdint.h>

// Asks the system to back memory that is about to be written for the first time with pages of
// 2 MiB, where it has such pages and gives them to who asks; otherwise nothing happens. 64 MiB are
// then 32 page faults instead of 16,384, which take longer than computing what goes there. Memory
// below HB_LARGE_OUTPUT_BYTES is left alone, and so is all memory when HALFBYTE_HUGE_PAGES is 0.
enum { HB_LARGE_OUTPUT_BYTES = 4 << 20 };
void hb_advise_large_pages(void *data, int64_t bytes);

#endif
