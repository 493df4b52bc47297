// The C test harness: each kernel, at every step of the instruction-set ladder, in one process.
//
// A test file registers one group and needs no list anywhere:
//
//     CHECK_GROUP(codec4)               // static void codec4(check *c) follows
//     {
//         if (!CHECK_NEW(c, codec.quantize4[0])) return;       // same pointer as one ISA below
//         float *x = check_buffer(c, n * sizeof *x, CHECK_END); // ends at an unreadable page
//         ...
//         check_equal(c, got, want, n, "packed, n=%d", n);
//         CHECK_BENCH(c, b, "quantize nf4 f32", bytes, 0) kernel(...);
//     }
//
// The harness calls the group once per ISA with the tables of this ISA, of the one below, and of
// the reference. In test mode the body of CHECK_BENCH does not run, so one function is both.
#ifndef HB_TESTS_CHECK_H
#define HB_TESTS_CHECK_H

#include "core/cpu.h"
#include "core/ops.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const hb_kernels *kernels;   // of the ISA under test
    const hb_kernels *previous;  // one step below; all zero for the reference
    const hb_kernels *reference; // the plain C kernels
    hb_context *context;         // the same kernels and a pool, for operations of ops.h
    uint32_t flags;              // HB_CPU_* of the ISA
    const char *isa;
    bool bench;    // measuring: run the CHECK_BENCH bodies, test less
    bool emulated; // compiled against SIMDe: slow, use fewer sizes
    int failures;  // so far
} check;

typedef void (*check_group_fn)(check *c);

// ---- registration -------------------------------------------------------------------------------

typedef struct check_group {
    const char *name;
    check_group_fn run;
    enum { CHECK_EACH_ISA, CHECK_ONCE, CHECK_BEST, CHECK_COUNTED } when;
    struct check_group *next;
} check_group;

void check_register(check_group *group);

#define CHECK_REGISTER_(name, when)                                                                \
    static void name##_group(check *c);                                                            \
    __attribute__((constructor)) static void name##_register(void)                                 \
    {                                                                                              \
        static check_group group = {#name, name##_group, when, NULL};                              \
        check_register(&group);                                                                    \
    }                                                                                              \
    static void name##_group(check *c)
#define CHECK_GROUP(name) CHECK_REGISTER_(name, CHECK_EACH_ISA) // once per ISA
#define CHECK_GROUP_ONCE(name)                                                                     \
    CHECK_REGISTER_(name, CHECK_ONCE)                       // once per process (threads, detection)
#define BENCH_GROUP(name) CHECK_REGISTER_(name, CHECK_BEST) // with --bench only, best ISA only
#define COUNT_GROUP(name) CHECK_REGISTER_(name, CHECK_COUNTED) // with --count only, per ISA

// ---- verdicts -----------------------------------------------------------------------------------

#define CHECK(c, condition, ...)                                                                   \
    do {                                                                                           \
        if (!(condition)) check_fail((c), __FILE__, __LINE__, __VA_ARGS__);                        \
    } while (0)

// True when this ISA brings a kernel of its own in `member` of hb_kernels. NULL counts as not new.
#define CHECK_NEW(c, member)                                                                       \
    ((c)->kernels->member != NULL && (c)->kernels->member != (c)->previous->member)

void check_fail(check *c, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
// What is being tested now; shown with failures and crashes until the next call.
void check_label(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
void check_print_place(void); // group, ISA and label

// Bit for bit; reports the first difference.
bool check_equal(check *c, const void *got, const void *want, size_t bytes, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
// |got[i] - want[i]| <= bound[i], NaN where want is NaN, the same infinity where want is infinite.
bool check_close(check *c, const float *got, const double *want, const double *bound, int64_t n,
                 const char *format, ...) __attribute__((format(printf, 6, 7)));

// ---- memory -------------------------------------------------------------------------------------

typedef enum {
    CHECK_END,  // the byte behind the buffer is unreadable (any alignment results)
    CHECK_BEGIN // the byte before the buffer is unreadable (page-aligned start)
} check_side;

// `bytes` bytes of 0xa5 with an unreadable page on the given side; what is written into the rest of
// the page on the other side is found when the buffer is released. Never fails (exits the test
// program).
void *check_buffer(check *c, size_t bytes, check_side side);
// Releases all buffers of the group; the harness does so at its end. Call it inside long loops.
void check_release(check *c);

// ---- random data (same in each run; --seed=N changes it)
// ------------------------------------------

uint64_t check_random(check *c);
int64_t check_random_below(check *c, int64_t n); // uniform in 0..n-1
float check_random_normal(check *c);             // about N(0, 1)
void check_fill_bytes(check *c, void *data, size_t bytes);
// Codes of int8 weights or x: any bytes; often the extremes, so that sums of instructions that
// saturate or wrap around would go wrong.
void check_fill_codes(check *c, int8_t *codes, int64_t n);
void check_fill_normal(check *c, float *data, int64_t n, float scale);
// Normal numbers of all magnitudes, zeros of both signs, subnormals; with `nonfinite` also inf,
// NaN.
void check_fill_wild(check *c, float *data, int64_t n, bool nonfinite);
// data[i] rounded to `dtype` into `out`, and back into `data` (so that both hold the same values).
void check_convert(float *data, void *out, int64_t n, hb_dtype dtype);

// ---- benchmarks ---------------------------------------------------------------------------------

typedef struct {
    check *c;
    const char *name;
    double bytes, operations;
    int repeat, copy; // copy counts up from 0: rotate data with it to stay out of the cache
    int n_samples;
    double started_ns, *samples;
} check_bench;

check_bench check_bench_begin(check *c, const char *name, double bytes, double operations);
bool check_bench_next(check_bench *b);

// Measures the statement that follows. bytes: moved by one execution; operations: multiply-adds
// count two; 0 when the number has no meaning. b.copy may be used to rotate buffers.
#define CHECK_BENCH(c, b, name, bytes, operations)                                                 \
    for (check_bench b = check_bench_begin(c, name, (double)(bytes), (double)(operations));        \
         check_bench_next(&b);)                                                                    \
        for (int b##_i = 0; b##_i < b.repeat; b##_i++, b.copy++)

double check_now_ns(void);

// ---- instruction counts -------------------------------------------------------------------------

typedef struct {
    check *c;
    const char *name; // "linear4 f32 dot, 1 row"
    const char *unit; // of work: "weight", "element", ...
    double work;
    enum { CHECK_COUNT_FIRST, CHECK_COUNT_WARM, CHECK_COUNT_TRAPPED, CHECK_COUNT_DONE } state;
    int64_t nothing; // what counting an empty statement counts
} check_count;

bool check_can_count(void);
bool check_count_next(check_count *count);
// Is its name asked for; its full name; its result.
bool check_count_wanted(const check_count *count);
void check_count_name(const check_count *count, char *name, size_t bytes);
void check_count_report(const check_count *count, int64_t instructions);

// Counts the instructions of the statement that follows, which does `work` units of work. Runs it
// twice.
#define CHECK_COUNT(c, name, work, unit)                                                           \
    for (check_count count_ = {(c), (name), (unit), (double)(work), CHECK_COUNT_FIRST, 0};         \
         check_count_next(&count_);)

#endif
