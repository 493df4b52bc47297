// Scratch memory that is kept: who gets which block, what is too large, threads that share a store.
#include "check.h"
#include "core/sanitizer.h"
#include "core/scratch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum { THREADS = 6, ROUNDS = 2000, OPEN_AT_ONCE = 3 };

static unsigned char *open_bytes(hb_scratch *scratch, hb_scratch_store *store, int64_t bytes)
{
    hb_error error;
    unsigned char *memory = NULL;
    *scratch = (hb_scratch){0};
    (void)hb_scratch_reserve(scratch, bytes);
    if (hb_scratch_open(scratch, store, NULL, 0, "test", &memory, &error) != HB_OK) return NULL;
    return (uintptr_t)memory % 64 == 0 ? memory : NULL;
}

typedef struct {
    hb_scratch_store *store;
    atomic_int *wrong;
    uint64_t seed;
} worker;

// Opens some at once, marks both ends of each, and looks whether anybody else wrote there.
static void *open_and_close(void *arg)
{
    worker *w = arg;
    for (int round = 0; round < ROUNDS; round++) {
        hb_scratch scratch[OPEN_AT_ONCE];
        unsigned char *memory[OPEN_AT_ONCE];
        int64_t bytes[OPEN_AT_ONCE];
        for (int i = 0; i < OPEN_AT_ONCE; i++) {
            w->seed = w->seed * 6364136223846793005u + 1442695040888963407u;
            bytes[i] = 64 + (int64_t)(w->seed >> 50);
            memory[i] = open_bytes(&scratch[i], w->store, bytes[i]);
            if (memory[i] != NULL) memory[i][0] = memory[i][bytes[i] - 1] = (unsigned char)w->seed;
        }
        uint64_t seed = w->seed;
        for (int i = OPEN_AT_ONCE - 1; i >= 0; i--) {
            const unsigned char mark = (unsigned char)seed;
            if (memory[i] == NULL || memory[i][0] != mark || memory[i][bytes[i] - 1] != mark)
                atomic_fetch_add(w->wrong, 1);
            hb_scratch_close(&scratch[i]);
            seed = (seed - 1442695040888963407u) * 13877824140714322085u; // one step back
        }
    }
    return NULL;
}

CHECK_GROUP_ONCE(scratch)
{
    hb_scratch_store *store = hb_scratch_store_create();
    hb_scratch a, b;
    hb_error error;

    _Alignas(64) unsigned char stack[256];
    unsigned char *memory = NULL;
    a = (hb_scratch){0};
    const int64_t first = hb_scratch_reserve(&a, 1), second = hb_scratch_reserve(&a, 0),
                  third = hb_scratch_reserve(&a, 65);
    CHECK(c, first == 0 && second == 64 && third == 64 && a.bytes == 192, "places of 64 bytes");
    CHECK(c,
          hb_scratch_open(&a, store, stack, sizeof stack, "test", &memory, &error) == HB_OK &&
              memory == stack,
          "the stack where it is enough");
    hb_scratch_close(&a);

    unsigned char *large = open_bytes(&a, store, 1 << 20);
    hb_scratch_close(&a);
    hb_scratch_close(&a); // closed already
    CHECK(c, large != NULL, "a megabyte");
    unsigned char *small = open_bytes(&b, store, 100000);
    CHECK(c, HB_ADDRESS_SANITIZER || small == large, "a smaller one gets the block that was kept");
    CHECK(c, open_bytes(&a, store, 1 << 20) != small, "which is not given twice");
    hb_scratch_close(&b);
    hb_scratch_close(&a);

    // More at once than are kept: each is somebody's own, and the store does not grow.
    enum { MANY = 2 * HB_SCRATCH_KEPT, MANY_BYTES = 3 << 20 };
    hb_scratch many[MANY];
    unsigned char *at[MANY];
    for (int i = 0; i < MANY; i++) {
        at[i] = open_bytes(&many[i], store, MANY_BYTES);
        CHECK(c, at[i] != NULL, "block %d", i);
        if (at[i] != NULL) memset(at[i], i, MANY_BYTES);
    }
    for (int i = 0; i < MANY; i++) {
        CHECK(c, at[i] == NULL || (at[i][0] == i && at[i][MANY_BYTES - 1] == i),
              "block %d is not its own", i);
        hb_scratch_close(&many[i]);
    }
    hb_scratch_store_destroy(store);

    store = hb_scratch_store_create();
    unsigned char *huge = open_bytes(&a, store, HB_SCRATCH_KEPT_BYTES + 1);
    CHECK(c, huge != NULL, "more than is kept");
    hb_scratch_close(&a);
#if !HB_ADDRESS_SANITIZER && !defined(__SANITIZE_THREAD__) // they end the process
    a = (hb_scratch){0};
    (void)hb_scratch_reserve(&a, INT64_MAX / 2);
    const hb_status status = hb_scratch_open(&a, store, NULL, 0, "test", &memory, &error);
    CHECK(c,
          status == HB_ERR_MEMORY && strstr(error.text, "test: no memory for 4611686018") != NULL,
          "no memory is an error: %d, %s", (int)status, error.text);
    hb_scratch_close(&a);
#endif

    atomic_int wrong = 0;
    pthread_t thread[THREADS];
    worker workers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker){store, &wrong, (uint64_t)i + 1};
        CHECK(c, pthread_create(&thread[i], NULL, open_and_close, &workers[i]) == 0, "thread");
    }
    for (int i = 0; i < THREADS; i++) pthread_join(thread[i], NULL);
    CHECK(c, wrong == 0, "%d blocks were somebody else's, too", atomic_load(&wrong));
    hb_scratch_store_destroy(store);
}
