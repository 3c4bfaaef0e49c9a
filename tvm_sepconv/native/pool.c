/* A small persistent thread pool: one job at a time, claimed task by task.
 *
 * Workers wait for the next job by spinning for some tens of microseconds, because layers of a network follow
 * each other at once, and then sleep on a futex, so that an idle process uses no CPU. A caller that finds
 * the pool busy runs its tasks itself: several threads running layers never wait for each other. After
 * fork() the child starts a pool of its own when it first needs one.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tvm_sepconv.h"

enum { MAX_WORKERS = 255, SPINS = 4000 };

static struct {
  int owner;   /* pid whose threads these are; -1 while a forked child resets the pool */
  int busy;    /* 1 while a job runs */
  int workers; /* threads started; only the holder of `busy` changes it */
  int wanted;  /* threads a call may use, 0 = the default */
  int sleepers;
  void (*task)(void*, int);
  void* context;
  int count;
  /* Each on its own cache line: the first is polled, the second contended. */
  _Alignas(64) unsigned job;
  _Alignas(64) uint64_t next;     /* job number << 32 | next task */
  _Alignas(64) int pending;        /* tasks not finished */
} pool;

static void futex_wait(unsigned* word, unsigned seen) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void futex_wake(unsigned* word, int threads) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}
static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#endif
}

/* ---- how many threads ----------------------------------------------------------------------- */

static double cgroup_quota(void) {
  /* CPUs' worth of time the control group grants, or a large number: version 2, then version 1. */
  double quota = 0, period = 0, limit = 1e9;
  char path[512] = "/sys/fs/cgroup", line[400];
  FILE* file = fopen("/proc/self/cgroup", "re");
  if (file) {
    while (fgets(line, sizeof line, file)) {
      char* group = line[0] == '0' && line[1] == ':' && line[2] == ':' ? line + 3 : NULL;
      if (group) snprintf(path, sizeof path, "/sys/fs/cgroup%.*s", (int)strcspn(group, "\n"), group);
    }
    fclose(file);
  }
  for (char* end = path + strlen(path); end - path >= 14; *end = 0) { /* a parent may be the tighter */
    snprintf(end, (size_t)(path + sizeof path - end), "/cpu.max");
    if ((file = fopen(path, "re"))) {
      if (fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0 && quota / period < limit)
        limit = quota / period;
      fclose(file);
    }
    *end = 0;
    do --end;
    while (end > path && *end != '/');
  }
  FILE* quota_file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "re");
  FILE* period_file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "re");
  if (quota_file && period_file && fscanf(quota_file, "%lf", &quota) == 1 &&
      fscanf(period_file, "%lf", &period) == 1 && quota > 0 && period > 0 && quota / period < limit)
    limit = quota / period;
  if (quota_file) fclose(quota_file);
  if (period_file) fclose(period_file);
  return limit;
}

static int default_threads(void) {
  const char* value = getenv("TVM_SEPCONV_NUM_THREADS");
  if (value && atoi(value) > 0) return atoi(value);
  cpu_set_t set;
  int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  double quota = cgroup_quota();
  if (quota < cpus) cpus = quota < 1 ? 1 : (int)quota;
  return cpus;
}

int tvm_sepconv_num_threads(void) {
  int threads = __atomic_load_n(&pool.wanted, __ATOMIC_RELAXED);
  if (threads) return threads;
  threads = default_threads();
  if (threads > MAX_WORKERS + 1) threads = MAX_WORKERS + 1;
  __atomic_store_n(&pool.wanted, threads, __ATOMIC_RELAXED);
  return threads;
}

void tvm_sepconv_set_num_threads(int threads) {
  if (threads > MAX_WORKERS + 1) threads = MAX_WORKERS + 1;
  __atomic_store_n(&pool.wanted, threads < 1 ? 0 : threads, __ATOMIC_RELAXED);
}

/* ---- the pool ------------------------------------------------------------------------------- */

static void take_tasks(void) {
  /* A claim succeeds only while `next` still names the job whose fields were read before it. */
  for (;;) {
    uint64_t next = __atomic_load_n(&pool.next, __ATOMIC_ACQUIRE);
    void (*task)(void*, int) = __atomic_load_n(&pool.task, __ATOMIC_RELAXED);
    void* context = __atomic_load_n(&pool.context, __ATOMIC_RELAXED);
    int index = (int)(uint32_t)next;
    if (index >= __atomic_load_n(&pool.count, __ATOMIC_RELAXED)) return;
    if (!__atomic_compare_exchange_n(&pool.next, &next, next + 1, 0, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
      continue;
    task(context, index);
    __atomic_sub_fetch(&pool.pending, 1, __ATOMIC_RELEASE);
  }
}

static void* worker(void* start) {
  unsigned seen = (unsigned)(uintptr_t)start;
  for (;;) {
    int spins = 0;
    while (__atomic_load_n(&pool.job, __ATOMIC_ACQUIRE) == seen && ++spins < SPINS) relax();
    if (spins >= SPINS) {
      __atomic_add_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
      while (__atomic_load_n(&pool.job, __ATOMIC_SEQ_CST) == seen) futex_wait(&pool.job, seen);
      __atomic_sub_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
    }
    seen = __atomic_load_n(&pool.job, __ATOMIC_ACQUIRE);
    take_tasks();
  }
  return NULL;
}

static void start_workers(int wanted) {
  /* Signals stay with the host's threads. A thread that cannot be had is done without. */
  if (pool.workers >= wanted) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.workers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void*)(uintptr_t)pool.job)) break;
    pthread_detach(thread);
    ++pool.workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int acquire(void) {
  int self = getpid(), owner = __atomic_load_n(&pool.owner, __ATOMIC_ACQUIRE);
  if (owner != self) { /* the first call of this process: a forked child inherits no threads */
    if (owner == -1 || !__atomic_compare_exchange_n(&pool.owner, &owner, -1, 0, __ATOMIC_ACQ_REL,
                                                    __ATOMIC_RELAXED))
      return 0;
    pool.busy = pool.workers = pool.sleepers = 0;
    __atomic_store_n(&pool.owner, self, __ATOMIC_RELEASE);
  }
  return !__atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE);
}

void pool_run(void (*task)(void*, int), void* context, int count) {
  if (count < 2 || !acquire()) {
    for (int index = 0; index < count; ++index) task(context, index);
    return;
  }
  start_workers(count - 1);
  __atomic_store_n(&pool.task, task, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.context, context, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.count, count, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.pending, count, __ATOMIC_RELAXED);
  uint64_t job = (uint64_t)(pool.job + 1) << 32;
  __atomic_store_n(&pool.next, job, __ATOMIC_RELEASE);
  __atomic_add_fetch(&pool.job, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST)) futex_wake(&pool.job, count - 1);
  take_tasks();
  for (int spins = 0; __atomic_load_n(&pool.pending, __ATOMIC_ACQUIRE);)
    if (++spins < SPINS) relax();
    else sched_yield();
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
}

/* ---- scratch: a stack of 64-byte aligned blocks for each thread ------------------------------ */

enum { MAX_BLOCKS = 16 };

typedef struct {
  char* base;
  size_t capacity, used, most; /* bytes; `most`: what was in use at once at the highest */
  int depth;
  struct {
    char* pointer;
    size_t bytes;
  } blocks[MAX_BLOCKS]; /* kernels free in reverse order: their scratch is nested scopes */
} arena;

static __thread arena* scratch;
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_arena(void* pointer) {
  arena* a = pointer;
  free(a->base);
  free(a);
}
static void make_key(void) { pthread_key_create(&scratch_key, free_arena); }

static arena* this_thread(void) {
  if (scratch) return scratch;
  pthread_once(&scratch_once, make_key);
  arena* a = calloc(1, sizeof *a);
  if (a && pthread_setspecific(scratch_key, a)) {
    free(a);
    a = NULL;
  }
  return scratch = a;
}

void* pool_alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  arena* a = this_thread();
  if (!a || a->depth == MAX_BLOCKS) return NULL;
  size_t size = ((size_t)bytes + 63) & ~(size_t)63;
  if (a->used + size > a->most) a->most = a->used + size;
  if (!a->used && a->capacity < a->most) { /* nothing is in use: grow to the high-water mark */
    void* base = NULL;
    if (posix_memalign(&base, 64, a->most)) return NULL;
    free(a->base);
    a->base = base;
    a->capacity = a->most;
  }
  void* block = a->base + a->used;
  if (a->used + size > a->capacity && posix_memalign(&block, 64, size)) return NULL;
  a->blocks[a->depth].pointer = block;
  a->blocks[a->depth++].bytes = size;
  a->used += size;
  return block;
}

int pool_free_workspace(int device_type, int device_id, void* pointer) {
  (void)device_type, (void)device_id;
  arena* a = scratch;
  if (!a || !a->depth || a->blocks[a->depth - 1].pointer != pointer) return -1;
  char* block = pointer;
  a->used -= a->blocks[--a->depth].bytes;
  if (block < a->base || block >= a->base + a->capacity) free(block);
  return 0;
}
