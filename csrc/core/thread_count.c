#ifndef _GNU_SOURCE
#define _GNU_SOURCE // sched_getaffinity
#endif
#include "core/thread_count.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// A positive number at the start of the variable; "4,2" counts as 4. 0 when there is none.
static int threads_from_environment(const char *name)
{
    const char *text = getenv(name);
    if (text == NULL) return 0;
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || errno != 0 || value <= 0) return 0;
    if (*end != '\0' && *end != ',' && *end != ' ') return 0;
    return value < HB_MAX_THREADS ? (int)value : HB_MAX_THREADS;
}

static bool read_line(const char *path, char *line, int size)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) return false;
    bool ok = fgets(line, size, file) != NULL;
    fclose(file);
    return ok;
}

// CPUs allowed by the quota files in `folder` (0: no limit there).
static int quota_of_folder(const char *folder, int version)
{
    char path[1200], line[128];
    double quota = -1.0, period = 0.0;
    if (version == 2) {
        snprintf(path, sizeof path, "%s/cpu.max", folder);
        if (!read_line(path, line, sizeof line)) return 0;
        if (sscanf(line, "%lf %lf", &quota, &period) != 2) return 0; // "max 100000"
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lf", &quota) != 1) return 0;
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lf", &period) != 1) return 0;
    }
    if (!(quota > 0.0) || !(period > 0.0) || quota / period > (double)HB_MAX_THREADS) return 0;
    int cpus = (int)(quota / period);
    return (double)cpus * period < quota ? cpus + 1 : cpus;
}

// The tightest limit on the way from root + group up to root.
static int quota_of_group(const char *root, const char *group, int version)
{
    char folder[1100];
    int written = snprintf(folder, sizeof folder, "%s%s", root, group);
    if (written < 0 || (size_t)written >= sizeof folder) return 0;
    const size_t root_length = strlen(root);
    int best = 0;
    for (;;) {
        int cpus = quota_of_folder(folder, version);
        if (cpus > 0 && (best == 0 || cpus < best)) best = cpus;
        if (strlen(folder) <= root_length) return best;
        *strrchr(folder, '/') = '\0';
    }
}

// True when the comma-separated `list` has the word "cpu".
static bool names_cpu_controller(const char *list)
{
    while (*list != '\0') {
        size_t length = strcspn(list, ",");
        if (length == 3 && memcmp(list, "cpu", 3) == 0) return true;
        list += length + (list[length] == ',');
    }
    return false;
}

int hb_thread_count_cgroup(const char *proc_cgroup, const char *mount)
{
    FILE *file = fopen(proc_cgroup, "re");
    if (file == NULL) return 0;
    char line[1024];
    int best = 0;
    while (fgets(line, sizeof line, file) != NULL) { // "0::/group" or "4:cpu,cpuacct:/group"
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL || group[1] != '/') continue;
        *controllers++ = '\0';
        *group++ = '\0';
        if (group[1] == '\0') group++; // "/" is the root itself
        int cpus = 0;
        if (controllers[0] == '\0') {
            cpus = quota_of_group(mount, group, 2);
        } else if (names_cpu_controller(controllers)) {
            char root[512];
            snprintf(root, sizeof root, "%s/%.300s", mount, controllers);
            cpus = quota_of_group(root, group, 1);
            if (cpus == 0) cpus = quota_of_folder(root, 1); // the group's path is the host's
        }
        if (cpus > 0 && (best == 0 || cpus < best)) best = cpus;
    }
    fclose(file);
    return best;
}

#if defined(__linux__)

static bool openmp_binds(void)
{
    static const char *const names[] = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
                                        "KMP_AFFINITY"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (getenv(names[i]) != NULL) return true;
    return false;
}

void hb_thread_unbind(void)
{
    cpu_set_t mask;
    if (!openmp_binds() || sched_getaffinity(0, sizeof mask, &mask) != 0) return;
    if (CPU_COUNT(&mask) > 1) return;
    memset(&mask, 0xff, sizeof mask); // the kernel takes the intersection with the cpuset
    (void)sched_setaffinity(0, sizeof mask, &mask);
}

static int threads_from_affinity(void)
{
    cpu_set_t mask;
    int online = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return online;
    int count = CPU_COUNT(&mask);
    return count == 1 && openmp_binds() ? online : count;
}

#else

void hb_thread_unbind(void) {}

static int threads_from_affinity(void)
{
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

#endif

int hb_thread_count_auto(void)
{
    int threads = threads_from_environment("HALFBYTE_NUM_THREADS");
    if (threads == 0) threads = threads_from_environment("OMP_NUM_THREADS");
    if (threads > 0) return threads;
    threads = threads_from_affinity();
    int quota = hb_thread_count_cgroup("/proc/self/cgroup", "/sys/fs/cgroup");
    if (quota > 0 && quota < threads) threads = quota;
    if (threads < 1) threads = 1;
    return threads < HB_MAX_THREADS ? threads : HB_MAX_THREADS;
}
