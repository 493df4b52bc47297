// The OpenMP runtime of a torch that somebody else has loaded into this process.
//
// After each of its parallel loops torch's OpenMP threads spin for some milliseconds. A second set
// of threads has to share the processors with them and then does next to nothing; the same threads
// can go on at once. Nothing is linked or loaded here: what is found is what libtorch_cpu uses.
#ifndef HB_CORE_OPENMP_H
#define HB_CORE_OPENMP_H

#include <stdbool.h>

// The interface of GCC's libgomp, which the runtimes of LLVM and Intel also offer on Linux.
typedef struct {
    // Calls fn(data) on `threads` threads (fewer when the runtime has no more), the caller's
    // included, and returns when all of them have.
    void (*parallel)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread_num)(void);  // in fn: 0 for the caller
    int (*max_threads)(void); // that a loop of this thread would get
    int (*in_parallel)(void);
    bool always; // HALFBYTE_OPENMP=always: however long the waits at its barrier are
} hb_openmp;

// A number that changes when a library is loaded; looking for torch again is in vain before.
unsigned long long hb_openmp_libraries(void);

// Finds torch's runtime. False when there is none, when it is not certain which of two it is,
// when this process was forked without exec (the runtime's threads may then have stayed behind),
// or when HALFBYTE_OPENMP=0.
bool hb_openmp_find(hb_openmp *openmp);

#endif
