// Implementation of check.h and main(). Options:
//   --list                 groups and ISAs that this binary can run here
//   --group=NAME --isa=NAME restrict (default: all); exit status 77 when the ISA is not available
//   --bench[=PART]         benchmarks whose name contains PART, as a table
//   --count[=PART]         instructions of the kernels whose name contains PART (x86-64)
//   --bench-ms=N           time spent on each (default 200), five samples at least
//   --json=FILE            the results of both also as JSON lines
//   --threads=N --seed=N
#include "check.h"

#include "core/sanitizer.h"
#if defined(HB_EMULATE_TILES)
#include "simde_tiles.h"
#endif

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_SKIPPED = 77, MAX_SHOWN = 10, CANARY = 0xa5 };

static check_group *groups;
static uint64_t random_state;
static uint64_t seed = 1;
static const char *filter = ""; // of benchmarks and counts
static FILE *json;
static char label[256]; // for the signal handler too
static char where[128];

void check_register(check_group *group)
{
    check_group **place = &groups; // sorted by name: the linker's order must not matter
    while (*place != NULL && strcmp((*place)->name, group->name) < 0) place = &(*place)->next;
    group->next = *place;
    *place = group;
}

// ---- verdicts -----------------------------------------------------------------------------------

void check_label(check *c, const char *format, ...)
{
    (void)c;
    va_list args;
    va_start(args, format);
    vsnprintf(label, sizeof label, format, args);
    va_end(args);
}

void check_print_place(void)
{
    printf("in %s [%s]\n", where, label);
}

static void report(check *c, const char *format, va_list args, const char *detail)
{
    if (c->failures++ >= MAX_SHOWN) return;
    printf("FAIL %s [%s] ", where, label);
    vprintf(format, args);
    printf("%s\n", detail);
    fflush(stdout);
}

void check_fail(check *c, const char *file, int line, const char *format, ...)
{
    char detail[160];
    const char *slash = strrchr(file, '/');
    snprintf(detail, sizeof detail, " (%s:%d)", slash ? slash + 1 : file, line);
    va_list args;
    va_start(args, format);
    report(c, format, args, detail);
    va_end(args);
}

bool check_equal(check *c, const void *got, const void *want, size_t bytes, const char *format, ...)
{
    if (bytes == 0 || memcmp(got, want, bytes) == 0) return true;
    const uint8_t *g = got, *w = want;
    size_t i = 0, different = 0;
    while (g[i] == w[i]) i++;
    for (size_t j = 0; j < bytes; j++) different += g[j] != w[j];
    char detail[160];
    snprintf(detail, sizeof detail, ": byte %zu of %zu is 0x%02x, expected 0x%02x (%zu differ)", i,
             bytes, g[i], w[i], different);
    va_list args;
    va_start(args, format);
    report(c, format, args, detail);
    va_end(args);
    return false;
}

static bool is_close(double got, double want, double bound)
{
    if (isnan(want)) return isnan(got);
    if (isinf(want)) return got == want;
    return fabs(got - want) <= bound; // false for NaN
}

bool check_close(check *c, const float *got, const double *want, const double *bound, int64_t n,
                 const char *format, ...)
{
    int64_t i = 0;
    while (i < n && is_close((double)got[i], want[i], bound[i])) i++;
    if (i == n) return true;
    int64_t bad = 0;
    for (int64_t j = 0; j < n; j++) bad += !is_close((double)got[j], want[j], bound[j]);
    char detail[200];
    snprintf(detail, sizeof detail,
             ": [%lld] of %lld is %.9g, expected %.12g +- %.3g (%lld outside)", (long long)i,
             (long long)n, (double)got[i], want[i], bound[i], (long long)bad);
    va_list args;
    va_start(args, format);
    report(c, format, args, detail);
    va_end(args);
    return false;
}

static void die(const char *what)
{
    printf("%s: %s\n", where, what);
    exit(2);
}

// A crash is nearly always a guard page; say which test touched it. Only async-signal-safe calls.
static void on_crash(int number)
{
    const char *parts[] = {"CRASH (signal) in ", where, " [", label, "]\n"};
    for (int i = 0; i < 5; i++) {
        ssize_t ignored = write(STDOUT_FILENO, parts[i], strlen(parts[i]));
        (void)ignored;
    }
    _exit(128 + number);
}

// ---- memory -------------------------------------------------------------------------------------

typedef struct buffer {
    uint8_t *map, *data;
    size_t map_bytes, room_bytes, bytes;
    struct buffer *next;
} buffer;

static buffer *buffers;

void *check_buffer(check *c, size_t bytes, check_side side)
{
    (void)c;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    buffer *b = calloc(1, sizeof *b);
    if (b == NULL) die("out of memory");
    b->bytes = bytes;
    b->room_bytes = (bytes + page - 1) / page * page + (bytes == 0 ? page : 0);
    b->map_bytes = b->room_bytes + 2 * page;
    b->map = mmap(NULL, b->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->map == MAP_FAILED) die("mmap failed");
    if (mprotect(b->map + page, b->room_bytes, PROT_READ | PROT_WRITE) != 0) die("mprotect failed");
    memset(b->map + page, CANARY, b->room_bytes);
    b->data = b->map + page + (side == CHECK_END ? b->room_bytes - bytes : 0);
    b->next = buffers;
    buffers = b;
    return b->data;
}

void check_release(check *c)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    while (buffers != NULL) {
        buffer *b = buffers;
        buffers = b->next;
        for (uint8_t *p = b->map + page; p < b->map + page + b->room_bytes; p++) {
            if (p == b->data) p += b->bytes;
            if (p == b->map + page + b->room_bytes) break;
            if (*p == CANARY) continue;
            CHECK(c, false, "wrote outside a buffer of %zu bytes, at offset %td", b->bytes,
                  p - b->data);
            break;
        }
        munmap(b->map, b->map_bytes);
        free(b);
    }
}

// ---- random data --------------------------------------------------------------------------------

uint64_t check_random(check *c) // splitmix64 (Steele, Lea, Flood 2014)
{
    (void)c;
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t check_random_below(check *c, int64_t n)
{
    return (int64_t)(check_random(c) % (uint64_t)n);
}

float check_random_normal(check *c)
{
    double sum = 0.0; // eight uniforms: close enough to normal, tails to 4.9
    for (int i = 0; i < 4; i++) {
        uint64_t bits = check_random(c);
        sum += (double)(bits & 0xffffffffu) + (double)(bits >> 32);
    }
    return (float)((sum * 0x1p-32 - 4.0) * 1.2247448713915890);
}

void check_fill_bytes(check *c, void *data, size_t bytes)
{
    uint8_t *out = data;
    for (size_t i = 0; i < bytes; i++) out[i] = (uint8_t)(check_random(c) >> 56);
}

void check_fill_codes(check *c, int8_t *codes, int64_t n)
{
    check_fill_bytes(c, codes, (size_t)n);
    const int kind = (int)check_random_below(c, 5);
    for (int64_t i = 0; i < n; i++) {
        if (kind == 1) codes[i] = (int8_t)(codes[i] & 1 ? 127 : -128);
        if (kind == 2) codes[i] = -128;
        if (kind == 3) codes[i] = 127;
    }
}

void check_fill_normal(check *c, float *data, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i++) data[i] = check_random_normal(c) * scale;
}

void check_fill_wild(check *c, float *data, int64_t n, bool nonfinite)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)check_random(c);
        switch (check_random_below(c, 8)) {
        case 0: bits &= 0x80000000u; break; // zeros
        case 1: bits &= 0x807fffffu; break; // subnormals
        case 2:
            if (nonfinite) bits |= 0x7f800000u; // NaN
            if (bits & 1u) bits &= 0xff800000u; // infinity, or a power of two
            break;
        default: break; // any bits
        }
        if (!nonfinite && (bits & 0x7f800000u) == 0x7f800000u) bits &= 0xbfffffffu;
        data[i] = hb_f32_from_bits(bits);
    }
}

void check_convert(float *data, void *out, int64_t n, hb_dtype dtype)
{
    for (int64_t i = 0; i < n; i++) {
        hb_store_f32(out, i, dtype, data[i]);
        data[i] = hb_load_f32(out, i, dtype);
    }
}

// ---- benchmarks ---------------------------------------------------------------------------------

enum { MAX_SAMPLES = 2000 };
static const double SAMPLE_NS = 2e5;
static double bench_ns = 2e8; // measuring time per benchmark

double check_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

check_bench check_bench_begin(check *c, const char *name, double bytes, double operations)
{
    check_bench b = {.c = c, .name = name, .bytes = bytes, .operations = operations};
    char full[256];
    snprintf(full, sizeof full, "%s %s", where, name);
    if (!c->bench || strstr(full, filter) == NULL) return b; // samples NULL: never runs
    b.samples = malloc(MAX_SAMPLES * sizeof *b.samples);
    b.repeat = 0;
    return b;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench_end(check_bench *b)
{
    qsort(b->samples, (size_t)b->n_samples, sizeof *b->samples, compare_doubles);
    double p10 = b->samples[b->n_samples / 10], median = b->samples[b->n_samples / 2];
    printf("%-34s %-38s %2dT %11.2f us %11.2f", where, b->name,
           hb_pool_threads(b->c->context->pool), p10 * 1e-3, median * 1e-3);
    if (b->bytes > 0) printf("  %8.2f GB/s", b->bytes / p10);
    if (b->operations > 0) printf("  %8.1f GFLOP/s", b->operations / p10);
    printf("\n");
    fflush(stdout);
    if (json != NULL)
        fprintf(json,
                "{\"group\": \"%s\", \"name\": \"%s\", \"threads\": %d, \"p10_us\": %.4f, "
                "\"median_us\": %.4f, \"bytes\": %.0f, \"operations\": %.0f, \"samples\": %d}\n",
                where, b->name, hb_pool_threads(b->c->context->pool), p10 * 1e-3, median * 1e-3,
                b->bytes, b->operations, b->n_samples);
    free(b->samples);
    b->samples = NULL;
}

// Phases: repeat 0 -> 1, a first call that warms up and finds how often to repeat, then samples.
bool check_bench_next(check_bench *b)
{
    if (b->samples == NULL) return false;
    double now = check_now_ns();
    if (b->repeat == 0) {
        b->repeat = 1;
        b->n_samples = -2;
    } else if (b->n_samples < 0) {
        double once = (now - b->started_ns) / b->repeat;
        if (++b->n_samples == 0 && once < SAMPLE_NS) b->repeat = (int)(SAMPLE_NS / (once + 1)) + 1;
    } else {
        b->samples[b->n_samples++] = (now - b->started_ns) / b->repeat;
        double sum = 0;
        for (int i = 0; i < b->n_samples; i++) sum += b->samples[i] * b->repeat;
        if (b->n_samples == MAX_SAMPLES || (sum > bench_ns && b->n_samples >= 5)) {
            bench_end(b);
            return false;
        }
    }
    b->started_ns = check_now_ns();
    return true;
}

// ---- instruction counts -------------------------------------------------------------------------

void check_count_name(const check_count *count, char *name, size_t bytes)
{
    snprintf(name, bytes, "%s %s", where, count->name);
}

bool check_count_wanted(const check_count *count)
{
    char name[256];
    check_count_name(count, name, sizeof name);
    return strstr(name, filter) != NULL;
}

void check_count_report(const check_count *count, int64_t instructions)
{
    printf("%-34s %-38s %9lld  %9.4f per %s\n", where, count->name, (long long)instructions,
           (double)instructions / count->work, count->unit);
    fflush(stdout);
    if (json != NULL)
        fprintf(json,
                "{\"isa\": \"%s\", \"name\": \"%s\", \"unit\": \"%s\", \"work\": %.0f, "
                "\"instructions\": %lld}\n",
                count->c->isa, count->name, count->unit, count->work, (long long)instructions);
}

// ---- main ---------------------------------------------------------------------------------------

static const char *const isa_names[] = {
    "ref", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16", "amx", "neon"};
// The flags of each, and the step below it.
static const uint32_t isa_flags[] = {0,  1,          HB_CPU_AVX2 | HB_CPU_AVXVNNI, 3, 7, 15, 31,
                                     63, HB_CPU_NEON};
static const int isa_below[] = {0, 0, 1, 1, 3, 4, 5, 6, 0};
enum { ISA_COUNT = sizeof isa_names / sizeof *isa_names };

// What this binary can run: the processor's flags, or everything that was compiled for emulation.
static uint32_t available_flags(void)
{
#if defined(HB_SIMDE) && defined(HB_SIMDE_NEON)
    return HB_CPU_NEON;
#elif defined(HB_SIMDE)
    return HB_CPU_AVX2 | HB_CPU_AVX512 | HB_CPU_AVX512VNNI | HB_CPU_AVX512VBMI | HB_CPU_AVX512BF16 |
           HB_CPU_AMX | HB_CPU_AVXVNNI;
#else
    static int tiles = -1; // asked for once
    uint32_t flags = hb_cpu_detect();
#if defined(HB_EMULATE_TILES)
    if (flags & HB_CPU_AVX512VNNI) flags |= HB_CPU_AVXVNNI;
    return (flags & HB_CPU_AVX512BF16) ? flags | HB_CPU_AMX : flags;
#endif
    if (flags & HB_CPU_AMX && tiles < 0) tiles = hb_cpu_request_tiles();
    return tiles == 1 ? flags : flags & ~(uint32_t)HB_CPU_AMX;
#endif
}

// The flags of the ISA at `step`, cumulative as hb_cpu_detect() gives them.
static uint32_t flags_of(int step)
{
    return isa_flags[step];
}

static bool is_available(int step)
{
    return (flags_of(step) & ~available_flags()) == 0;
}

static int best_step(void)
{
    int best = 0;
    for (int step = 0; step < ISA_COUNT; step++)
        if (is_available(step)) best = step;
    return best;
}

// Runs the group at one step of the ladder; returns the number of failures.
static int run_group(const check_group *group, int step, bool bench, int threads)
{
    static hb_kernels previous, reference; // static: zero, and large
    static hb_context context;
    hb_error error;
    check c = {.previous = &previous,
               .reference = &reference,
               .context = &context,
               .flags = flags_of(step),
               .isa = isa_names[step],
               .bench = bench};
#ifdef HB_SIMDE
    c.emulated = true;
#endif
    snprintf(where, sizeof where, "%s %s", group->name, group->when == CHECK_ONCE ? "-" : c.isa);
    label[0] = '\0';
    random_state = seed;
    memset(&reference, 0, sizeof reference);
    memset(&previous, 0, sizeof previous);
    memset(&context, 0, sizeof context);
    hb_kernels_init(&reference, 0);
    if (step > 0) hb_kernels_init(&previous, flags_of(isa_below[step]));
    if (hb_context_init(&context, c.flags, threads, &error) != HB_OK) die(error.text);
    c.kernels = &context.kernels;
    group->run(&c);
    check_release(&c);
#if defined(HB_EMULATE_TILES)
    CHECK(&c, tiles_configured() == 0, "%d threads were left with tiles", tiles_configured());
#endif
    hb_context_clear(&context);
    if (c.failures > MAX_SHOWN) printf("FAIL %s: %d failures in all\n", where, c.failures);
    if (!bench) printf("%s %s\n", c.failures ? "FAILED" : "ok", where);
    fflush(stdout);
    return c.failures;
}

static const char *option(const char *arg, const char *name)
{
    size_t length = strlen(name);
    if (strncmp(arg, name, length) != 0) return NULL;
    if (arg[length] == '=') return arg + length + 1;
    return arg[length] == '\0' ? "" : NULL;
}

int main(int argc, char **argv)
{
    const char *only_group = NULL, *only_isa = NULL, *value;
    bool list = false, bench = false, count = false;
    int threads = 2, failures = 0, ran = 0;
    for (int i = 1; i < argc; i++) {
        if (option(argv[i], "--list"))
            list = true;
        else if ((value = option(argv[i], "--group")))
            only_group = value;
        else if ((value = option(argv[i], "--isa")))
            only_isa = value;
        else if ((value = option(argv[i], "--bench"))) {
            bench = true;
            filter = value;
        } else if ((value = option(argv[i], "--count"))) {
            count = true;
            filter = value;
        } else if ((value = option(argv[i], "--bench-ms"))) {
            bench_ns = atof(value) * 1e6;
        } else if ((value = option(argv[i], "--json"))) {
            json = fopen(value, "w");
            if (json == NULL) die("cannot write the JSON file");
        } else if ((value = option(argv[i], "--threads")))
            threads = atoi(value);
        else if ((value = option(argv[i], "--seed")))
            seed = strtoull(value, NULL, 0);
        else {
            fprintf(stderr, "unknown option %s\n", argv[i]);
            return 2;
        }
    }
#if !HB_ADDRESS_SANITIZER && !defined(__SANITIZE_THREAD__) // they report crashes better
    signal(SIGSEGV, on_crash);
    signal(SIGBUS, on_crash);
    signal(SIGILL, on_crash);
    signal(SIGFPE, on_crash);
#else
    (void)on_crash;
#endif
    for (const check_group *g = groups; g != NULL; g = g->next) {
        if (only_group != NULL && strcmp(only_group, g->name) != 0) continue;
        if (count != (g->when == CHECK_COUNTED) || (count && !check_can_count())) continue;
        if ((g->when == CHECK_BEST && !bench) || (g->when == CHECK_ONCE && bench)) continue;
        for (int step = 0; step < (g->when == CHECK_ONCE ? 1 : ISA_COUNT); step++) {
            const char *isa = g->when == CHECK_ONCE ? "-" : isa_names[step];
            if (only_isa != NULL && strcmp(only_isa, isa) != 0) continue;
            if (count && step == 0) continue; // the reference is written to be believed
            if (!is_available(step) || (g->when == CHECK_BEST && step != best_step())) continue;
            if (list)
                printf("%s %s\n", g->name, isa);
            else
                failures += run_group(g, step, bench || count, threads);
            ran++;
        }
    }
    if (json != NULL) fclose(json);
    if (ran == 0) {
        printf("nothing to run here: group %s, isa %s\n", only_group ? only_group : "any",
               only_isa ? only_isa : "any");
        return EXIT_SKIPPED;
    }
    return failures != 0;
}
