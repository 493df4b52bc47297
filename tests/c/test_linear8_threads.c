// An int8 layer with few float32 rows is shared among the threads of the pool: what time cannot
// tell on a busy machine, a kernel that sleeps can.
#include "check.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

// A kernel that takes long and remembers who calls it: with one thread busy another must come.
static struct {
    pthread_mutex_t lock;
    pthread_t first;
    int calls, by_others;
} callers = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void slow_dot(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const float *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    (void)w, (void)w_stride, (void)depth, (void)x, (void)x_stride, (void)n_x, (void)y_stride;
    memset(y, 0, (size_t)n_rows * sizeof *y);
    pthread_mutex_lock(&callers.lock);
    if (callers.calls++ == 0) callers.first = pthread_self();
    callers.by_others += !pthread_equal(callers.first, pthread_self());
    pthread_mutex_unlock(&callers.lock);
    usleep(2000);
}

CHECK_GROUP_ONCE(linear8_exact_threads)
{
    enum { ROWS = 2048, DEPTH = 512 };
    int8_t *codes = check_buffer(c, ROWS * DEPTH, CHECK_BEGIN);
    float *scale = check_buffer(c, ROWS * 4, CHECK_BEGIN),
          *x = check_buffer(c, DEPTH * 4, CHECK_END);
    float *y = check_buffer(c, ROWS * 4, CHECK_BEGIN);
    memset(codes, 1, ROWS * DEPTH);
    memset(scale, 0, ROWS * 4);
    memset(x, 0, DEPTH * 4);
    hb_view a = {x, HB_F32, {HB_CPU, 0, NULL}, 2, false, {1, DEPTH}, {DEPTH, 1}};
    hb_view b = {y, HB_F32, {HB_CPU, 0, NULL}, 2, false, {1, ROWS}, {ROWS, 1}};
    hb_context mine = *c->context;
    mine.kernels.linear8.dot_f32 = slow_dot;
    hb_error error;
    callers.calls = callers.by_others = 0;
    hb_status status = hb_linear_8bit(&mine, &a, codes, scale, ROWS, DEPTH, NULL, HB_INT8_EXACT, 0,
                                      &b, NULL, &error);
    CHECK(c, status == HB_OK, "%s", error.text);
    CHECK(c, hb_pool_threads(mine.pool) < 2 || callers.by_others > 0,
          "%d calls, all by one of %d threads", callers.calls, hb_pool_threads(mine.pool));
}
