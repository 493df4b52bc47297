// The pool: every chunk exactly once, lanes unique, nested and concurrent calls, changing the
// number of threads, forks while the pool is in use, no work when idle.
#include "check.h"
#include "core/thread_count.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#define HAVE_FORK 0 // ThreadSanitizer cannot follow threads made after fork()
#else
#define HAVE_FORK 1
#endif

enum { MAX_CHUNKS = 3000 };

typedef struct {
    atomic_int visits[MAX_CHUNKS];
    atomic_int in_lane[64];
    atomic_int bad_lanes;
    hb_pool *nested; // when set, each callback makes a call of its own
    atomic_int nested_chunks;
} tally;

static void count_nested(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    atomic_fetch_add(&((tally *)arg)->nested_chunks, (int)(end - begin));
}

static void count(void *arg, int64_t begin, int64_t end, int lane)
{
    tally *t = arg;
    if (lane < 0 || lane >= 64 || atomic_fetch_add(&t->in_lane[lane], 1) != 0)
        atomic_fetch_add(&t->bad_lanes, 1);
    for (int64_t i = begin; i < end; i++) atomic_fetch_add(&t->visits[i], 1);
    if (t->nested != NULL) hb_parallel_for(t->nested, 7, count_nested, t);
    atomic_fetch_sub(&t->in_lane[lane], 1);
}

static bool visited_once(const tally *t, int64_t n)
{
    for (int64_t i = 0; i < MAX_CHUNKS; i++)
        if (atomic_load(&t->visits[i]) != (i < n)) return false;
    return atomic_load(&t->bad_lanes) == 0;
}

static bool run_once(hb_pool *pool, int64_t n)
{
    tally *t = calloc(1, sizeof *t);
    hb_parallel_for(pool, n, count, t);
    bool ok = visited_once(t, n);
    free(t);
    return ok;
}

static void *caller(void *arg)
{
    int bad = 0;
    for (int i = 0; i < 300; i++) bad += !run_once(arg, 1 + i % 50);
    return (void *)(intptr_t)bad;
}

CHECK_GROUP_ONCE(parallel)
{
    for (int threads = 1; threads <= 5; threads++) {
        hb_pool *pool = hb_pool_create(threads);
        CHECK(c, hb_pool_threads(pool) == threads, "threads %d", threads);
        for (int64_t n = 0; n < 40; n++)
            CHECK(c, run_once(pool, n), "%d threads, %d", threads, (int)n);
        for (int i = 0; i < 200; i++) {
            int64_t n = check_random_below(c, MAX_CHUNKS);
            CHECK(c, run_once(pool, n), "%d threads, n %d", threads, (int)n);
        }
        hb_pool_destroy(pool);
    }
    CHECK(c, run_once(NULL, 10), "without a pool");
    hb_pool_destroy(NULL);
}

CHECK_GROUP_ONCE(parallel_nested)
{
    hb_pool *pool = hb_pool_create(3);
    for (int i = 0; i < 100; i++) {
        tally *t = calloc(1, sizeof *t);
        t->nested = pool;
        hb_parallel_for(pool, 100, count, t);
        CHECK(c, visited_once(t, 100), "outer");
        CHECK(c, atomic_load(&t->nested_chunks) % 7 == 0 && atomic_load(&t->nested_chunks) > 0,
              "inner");
        free(t);
    }
    pthread_t threads[4]; // several application threads share the pool
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, caller, pool);
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(threads[i], &bad);
        CHECK(c, bad == NULL, "concurrent caller %d: %d bad", i, (int)(intptr_t)bad);
    }
    hb_pool_destroy(pool);
}

CHECK_GROUP_ONCE(parallel_resize)
{
    hb_pool *pool = hb_pool_create(1);
    for (int i = 0; i < 60; i++) {
        int threads = 1 + (i * 7) % 6;
        hb_pool_set_threads(pool, threads);
        CHECK(c, hb_pool_threads(pool) == threads, "set_threads");
        CHECK(c, run_once(pool, 50 + i), "%d threads", threads);
    }
    hb_pool_set_threads(pool, 0);
    CHECK(c, hb_pool_threads(pool) >= 1, "automatic");
    hb_pool_destroy(pool);
}

// More chunks than 32 bits count: units of several chunks.
static void sum_range(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    atomic_fetch_add((atomic_llong *)arg, end - begin);
}

CHECK_GROUP_ONCE(parallel_huge)
{
    hb_pool *pool = hb_pool_create(3);
    const int64_t sizes[] = {INT32_MAX - 1ll, INT32_MAX, INT32_MAX + 1ll, UINT32_MAX + 5ll,
                             INT64_MAX / 2};
    for (int i = 0; i < 5; i++) {
        atomic_llong sum = 0;
        hb_parallel_for(pool, sizes[i], sum_range, &sum);
        CHECK(c, atomic_load(&sum) == sizes[i], "n %lld", (long long)sizes[i]);
    }
    hb_pool_destroy(pool);
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

CHECK_GROUP_ONCE(parallel_idle)
{
    hb_pool *pool = hb_pool_create(4);
    run_once(pool, 100);
    usleep(20000); // a worker may need a time slice before it can fall asleep
    double before = cpu_seconds();
    usleep(200000);
    double used = cpu_seconds() - before;
    CHECK(c, used < 0.005, "an idle pool used %.1f ms of CPU in 200 ms", used * 1e3);
    hb_pool_destroy(pool);
}

#if HAVE_FORK
// True when a child that uses the pool and destroys it ends well within five seconds.
static bool child_succeeds(hb_pool *pool)
{
    pid_t child = fork();
    if (child == 0) {
        bool ok = true;
        for (int i = 0; i < 50; i++) ok = ok && run_once(pool, 100 + i);
        hb_pool_destroy(pool);
        _exit(ok ? 0 : 1);
    }
    for (int ms = 0; ms < 5000; ms++) {
        int status;
        if (waitpid(child, &status, WNOHANG) == child) return status == 0;
        usleep(1000);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return false;
}

typedef struct {
    hb_pool *pool;
    atomic_bool stop;
} background;

// Allocates nothing while it runs: the allocators of the sanitizers do not survive a fork in the
// middle of a call.
static void *use_pool(void *arg)
{
    background *b = arg;
    while (!atomic_load(&b->stop)) {
        atomic_llong sum = 0;
        hb_parallel_for(b->pool, 500, sum_range, &sum);
        if (atomic_load(&sum) != 500) return b;
    }
    return NULL;
}

CHECK_GROUP_ONCE(parallel_fork)
{
    hb_pool *pool = hb_pool_create(3);
    CHECK(c, child_succeeds(pool), "child of a process that never used the pool");
    run_once(pool, 100);
    CHECK(c, child_succeeds(pool), "child of a process that used the pool");
    background b = {.pool = pool};
    pthread_t thread;
    pthread_create(&thread, NULL, use_pool, &b);
    for (int i = 0; i < 20; i++) CHECK(c, child_succeeds(pool), "child made while the pool worked");
    atomic_store(&b.stop, true);
    void *bad;
    pthread_join(thread, &bad);
    CHECK(c, bad == NULL, "the thread that used the pool all the time");
    CHECK(c, run_once(pool, 1000), "the parent goes on");
    hb_pool_destroy(pool);
}
#endif

// ---- how many threads ---------------------------------------------------------------------------

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[600], *slash;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (slash = path + strlen(folder) + 1; (slash = strchr(slash, '/')) != NULL; slash++) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    fputs(text, file);
    fclose(file);
}

CHECK_GROUP_ONCE(thread_count)
{
    char folder[] = "/tmp/halfbyte-cgroup-XXXXXX", groups[64];
    if (mkdtemp(folder) == NULL) return;
    snprintf(groups, sizeof groups, "%s/groups", folder);
    CHECK(c, hb_thread_count_cgroup("/nonexistent", folder) == 0, "no file");

    write_text(folder, "groups", "0::/a/b\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 0, "no limit files");
    write_text(folder, "a/b/cpu.max", "max 100000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 0, "max");
    write_text(folder, "a/cpu.max", "250000 100000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 3, "the parent's 2.5 CPUs round up");
    write_text(folder, "a/b/cpu.max", "100000 100000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 1, "the tightest counts");
    write_text(folder, "cpu.max", "50000 100000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 1, "half a CPU is one");
    write_text(folder, "groups", "0::/\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 1, "the root");
    write_text(folder, "cpu.max", "rubbish\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 0, "rubbish");

    write_text(folder, "groups", "3:memory:/x\n4:cpu,cpuacct:/x/y\n1:name=systemd:/z\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 0, "version 1, no files");
    write_text(folder, "cpu,cpuacct/x/y/cpu.cfs_quota_us", "-1\n");
    write_text(folder, "cpu,cpuacct/x/y/cpu.cfs_period_us", "100000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 0, "version 1, no limit");
    write_text(folder, "cpu,cpuacct/x/y/cpu.cfs_quota_us", "400000\n");
    CHECK(c, hb_thread_count_cgroup(groups, folder) == 4, "version 1");

    setenv("HALFBYTE_NUM_THREADS", "7", 1);
    CHECK(c, hb_thread_count_auto() == 7, "HALFBYTE_NUM_THREADS");
    setenv("HALFBYTE_NUM_THREADS", "0", 1);
    setenv("OMP_NUM_THREADS", "3,2", 1);
    CHECK(c, hb_thread_count_auto() == 3, "OMP_NUM_THREADS list");
    const char *bad[] = {"", "-2", "many", "3x", "99999999999999999999"};
    unsetenv("OMP_NUM_THREADS");
    unsetenv("HALFBYTE_NUM_THREADS");
    int automatic = hb_thread_count_auto();
    CHECK(c, automatic >= 1 && automatic <= HB_MAX_THREADS, "automatic %d", automatic);
    for (int i = 0; i < 5; i++) {
        setenv("HALFBYTE_NUM_THREADS", bad[i], 1);
        CHECK(c, hb_thread_count_auto() == automatic, "'%s' is ignored", bad[i]);
    }
    unsetenv("HALFBYTE_NUM_THREADS");
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    CHECK(c, system(command) == 0, "clean up");
}
