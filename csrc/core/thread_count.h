// How many threads this process may use.
#ifndef HB_CORE_THREAD_COUNT_H
#define HB_CORE_THREAD_COUNT_H

enum { HB_MAX_THREADS = 1024 };

// HALFBYTE_NUM_THREADS, else the first number of OMP_NUM_THREADS, else the smaller of the CPUs in
// the affinity mask and the cgroup quota (rounded up). A variable that is no positive number is
// ignored. 1..HB_MAX_THREADS.
int hb_thread_count_auto(void);

// CPUs that the cgroup quota allows, rounded up; 0 when there is no limit. `proc_cgroup` has the
// format of /proc/self/cgroup, `mount` stands for /sys/fs/cgroup. Version 2 (cpu.max) and 1
// (cpu.cfs_quota_us); the tightest limit between the group and the root counts.
int hb_thread_count_cgroup(const char *proc_cgroup, const char *mount);

// Undoes a binding to one CPU that an OpenMP runtime made (OMP_PROC_BIND and its like); an affinity
// that the user chose stays. For threads that inherit the mask of the thread that starts them.
void hb_thread_unbind(void);

#endif
