// Detection, the override, and that each flag implies what its folder's compiler flags need.
#include "check.h"

#include <stdio.h>
#include <stdlib.h>

CHECK_GROUP_ONCE(cpu)
{
    static const struct {
        const char *name;
        uint32_t all;
    } ladder[] = {{"ref", 0},         {"avx2", 1},        {"avx512", 3}, {"avx512vnni", 7},
                  {"avx512vbmi", 15}, {"avx512bf16", 31}, {"neon", 32}};
    const uint32_t detected = hb_cpu_detect();
    bool known = false;
    for (int i = 0; i < 7; i++) known = known || detected == ladder[i].all;
    CHECK(c, known, "detected 0x%x is no step of the ladder", detected);
    for (int i = 0; i < 7; i++) {
        int unknown = -1;
        setenv("HALFBYTE_CPU", ladder[i].name, 1);
        CHECK(c, hb_cpu_flags(&unknown) == (detected & ladder[i].all) && unknown == 0, "%s",
              ladder[i].name);
        CHECK(c, strcmp(hb_cpu_name(ladder[i].all), ladder[i].name) == 0, "name of 0x%x",
              ladder[i].all);
    }
    int unknown = 0;
    setenv("HALFBYTE_CPU", "pentium", 1);
    CHECK(c, hb_cpu_flags(&unknown) == detected && unknown == 1, "unknown name");
    CHECK(c, hb_cpu_flags(NULL) == detected, "unknown may be NULL");
    setenv("HALFBYTE_CPU", "", 1);
    CHECK(c, hb_cpu_flags(&unknown) == detected && unknown == 0, "empty");
    unsetenv("HALFBYTE_CPU");

#if defined(__linux__) && defined(__x86_64__)
    // The kernel's own opinion (it hides what it does not save).
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (file == NULL) return;
    static char line[8192];
    while (fgets(line, sizeof line, file) != NULL)
        if (strncmp(line, "flags", 5) == 0) break;
    fclose(file);
    CHECK(c, (strstr(line, " avx2 ") != NULL) == ((detected & HB_CPU_AVX2) != 0), "avx2");
    CHECK(c, (strstr(line, " avx512vl ") != NULL) == ((detected & HB_CPU_AVX512) != 0), "avx512");
#endif
}
