/* A small persistent thread pool: one job at a time, claimed task by task.
 *
 * Workers wait for the next job by spinning for some tens of microseconds, because layers of a network follow
 * each other at once, and then sleep on a futex, so that an idle process uses no CPU. A caller that finds
 * the pool busy runs its tasks itself: several threads running layers never wait for each other. After
 * fork() the child starts a pool of its own when it first needs one.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <dlfcn.h>
#include <limits.h>
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
  /* Each on its own cache line: the first is polled by all, the others are contended. */
  _Alignas(64) unsigned job;
  _Alignas(64) uint64_t next;     /* job number << 32 | number of tasks << 16 | next task */
  _Alignas(64) int pending;        /* tasks not finished */
} pool;

enum { MAX_BLOCKS = 16 };

/* Scratch memory of a thread: a stack of 64-byte aligned blocks. */
typedef struct {
  char* base;
  size_t capacity, used, most; /* bytes; `most`: what was in use at once at the highest */
  int depth;
  struct {
    char* pointer;
    size_t bytes;
  } blocks[MAX_BLOCKS]; /* kernels free in reverse order: their scratch is nested scopes */
} arena;

static struct {
  int thread;        /* its id, 0 until it runs */
  int asleep;        /* in the futex, or about to be */
  int barred;        /* from the CPU of a caller, until its next job; then it may run where `allowed` says */
  unsigned start;    /* the job before its first */
  cpu_set_t allowed; /* the caller's mask; written while `barred` is 0, read while it is 1 */
  arena* scratch;    /* its own, where pool_prepare finds it */
} workers[MAX_WORKERS];

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

/* The number in a string, 0 if there is none, moving `text` past it. The C library's own functions get another
 * name with each revision of the language (__isoc23_strtol), and an older system does not have the newest. */
static int64_t number(const char** text) {
  int64_t value = 0;
  while (**text == ' ') ++*text;
  for (; **text >= '0' && **text <= '9'; ++*text)
    if (value < INT64_MAX / 20) value = value * 10 + (**text - '0');
  return value;
}

static int read_line(const char* path, char* line, int size) {
  FILE* file = fopen(path, "re");
  if (!file) return 0;
  const int found = fgets(line, size, file) != NULL;
  fclose(file);
  return found;
}

static int64_t cgroup_quota(void) {
  /* Whole CPUs' worth of time that the control group grants, or a large number: version 2, then version 1. */
  int64_t limit = INT_MAX;
  char path[512] = "/sys/fs/cgroup", line[400], period_line[64];
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
    if (read_line(path, line, sizeof line)) { /* "150000 100000", or "max 100000" */
      const char* text = line;
      const int64_t quota = number(&text), period = number(&text);
      if (quota > 0 && period > 0 && quota / period < limit) limit = quota / period;
    }
    *end = 0;
    do --end;
    while (end > path && *end != '/');
  }
  if (read_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", line, sizeof line) &&
      read_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period_line, sizeof period_line)) {
    const char *text = line, *period_text = period_line;
    const int64_t quota = number(&text), period = number(&period_text); /* "-1": no limit */
    if (quota > 0 && period > 0 && quota / period < limit) limit = quota / period;
  }
  return limit < 1 ? 1 : limit;
}

static int default_threads(void) {
  const char* value = getenv("TVM_SEPCONV_NUM_THREADS");
  const int64_t asked = value ? number(&value) : 0;
  if (asked > 0) return asked < INT_MAX ? (int)asked : INT_MAX;
  cpu_set_t set;
  const int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const int64_t quota = cgroup_quota();
  return quota < cpus ? (int)quota : cpus;
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
  /* A claim succeeds only while `next` still names an unclaimed task of the job whose fields were read before
   * it, so that job cannot have ended. The number of tasks is part of the word because, read by itself, it could
   * already be the next job's, and this job's end would look like a task of that one. */
  for (;;) {
    uint64_t next = __atomic_load_n(&pool.next, __ATOMIC_ACQUIRE);
    void (*task)(void*, int) = __atomic_load_n(&pool.task, __ATOMIC_RELAXED);
    void* context = __atomic_load_n(&pool.context, __ATOMIC_RELAXED);
    const int index = (int)(next & 0xffff), count = (int)(next >> 16 & 0xffff);
    if (index >= count) return;
    if (!__atomic_compare_exchange_n(&pool.next, &next, next + 1, 0, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
      continue;
    task(context, index);
    __atomic_sub_fetch(&pool.pending, 1, __ATOMIC_RELEASE);
  }
}

static __thread arena* scratch;

static void* worker(void* index) {
  const uintptr_t self = (uintptr_t)index;
  unsigned seen = workers[self].start;
  scratch = workers[self].scratch;
  __atomic_store_n(&workers[self].thread, (int)syscall(SYS_gettid), __ATOMIC_RELEASE);
  for (;;) {
    int spins = 0;
    while (__atomic_load_n(&pool.job, __ATOMIC_ACQUIRE) == seen && ++spins < SPINS) relax();
    if (spins >= SPINS) {
      __atomic_store_n(&workers[self].asleep, 1, __ATOMIC_SEQ_CST);
      __atomic_add_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
      while (__atomic_load_n(&pool.job, __ATOMIC_SEQ_CST) == seen) futex_wait(&pool.job, seen);
      __atomic_sub_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
      __atomic_store_n(&workers[self].asleep, 0, __ATOMIC_SEQ_CST);
    }
    if (__atomic_load_n(&workers[self].barred, __ATOMIC_ACQUIRE)) {
      sched_setaffinity(0, sizeof workers[self].allowed, &workers[self].allowed);
      __atomic_store_n(&workers[self].barred, 0, __ATOMIC_RELEASE);
    }
    seen = __atomic_load_n(&pool.job, __ATOMIC_ACQUIRE);
    take_tasks();
  }
  return NULL;
}

/* Threads run this code until the process ends, and end with it (free_arena): dlclose must not unmap it. */
static pthread_once_t resident_once = PTHREAD_ONCE_INIT;
static void stay_resident(void) {
  Dl_info self;
  if (dladdr((void*)stay_resident, &self)) dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

static void start_workers(int wanted) {
  /* Signals stay with the host's threads. A thread that cannot be had is done without. */
  if (pool.workers >= wanted) return;
  pthread_once(&resident_once, stay_resident);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.workers < wanted) {
    pthread_t thread;
    workers[pool.workers].thread = workers[pool.workers].asleep = workers[pool.workers].barred = 0;
    workers[pool.workers].start = pool.job;
    arena** own = &workers[pool.workers].scratch;
    if (!*own) *own = calloc(1, sizeof **own); /* without, the thread tries itself when it needs it */
    if (pthread_create(&thread, NULL, worker, (void*)(uintptr_t)pool.workers)) break;
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
    for (int i = 0; i < MAX_WORKERS; ++i) workers[i].scratch = NULL; /* it may have been growing right then */
    __atomic_store_n(&pool.owner, self, __ATOMIC_RELEASE);
  }
  return !__atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE);
}

/* Linux may wake a worker on the CPU of the caller, which is about to be busy, and leave it there for some
 * milliseconds while others idle: with 6.18 on two CPUs (a virtual EPYC, 2026-11-22) eight calls in a row took
 * twice their time after every pause of 20 ms. So sleeping workers are first barred from that CPU; at their next
 * job they take the caller's mask. */
static void steer_away(void) {
  enum { MOST = 15 }; /* with more CPUs than that, idle ones are found */
  cpu_set_t others;
  const int cpu = sched_getcpu();
  if (cpu < 0 || pool.workers > MOST || sched_getaffinity(0, sizeof others, &others)) return;
  if (CPU_COUNT(&others) < 2) return;
  const cpu_set_t allowed = others;
  CPU_CLR(cpu, &others);
  for (int i = 0; i < pool.workers; ++i) {
    const int thread = __atomic_load_n(&workers[i].thread, __ATOMIC_RELAXED);
    if (!thread || !__atomic_load_n(&workers[i].asleep, __ATOMIC_SEQ_CST) ||
        __atomic_load_n(&workers[i].barred, __ATOMIC_ACQUIRE))
      continue;
    workers[i].allowed = allowed;
    if (!sched_setaffinity(thread, sizeof others, &others))
      __atomic_store_n(&workers[i].barred, 1, __ATOMIC_RELEASE);
  }
}

void pool_run(void (*task)(void*, int), void* context, int count) {
  if (count < 2 || !acquire()) {
    for (int index = 0; index < count; ++index) task(context, index);
    return;
  }
  start_workers(count - 1);
  __atomic_store_n(&pool.task, task, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.context, context, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.pending, count, __ATOMIC_RELAXED);
  const uint64_t job = (uint64_t)(pool.job + 1) << 32 | (uint64_t)count << 16;
  __atomic_store_n(&pool.next, job, __ATOMIC_RELEASE);
  __atomic_add_fetch(&pool.job, 1, __ATOMIC_SEQ_CST);
  const int awake = pool.workers - __atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST);
  if (awake < count - 1 && awake < pool.workers) {
    steer_away();
    futex_wake(&pool.job, count - 1 - awake);
  }
  take_tasks();
  for (int spins = 0; __atomic_load_n(&pool.pending, __ATOMIC_ACQUIRE);)
    if (++spins < SPINS) relax();
    else sched_yield();
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
}

/* ---- scratch --------------------------------------------------------------------------------- */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_arena(void* pointer) {
  arena* a = pointer;
  free(a->base);
  free(a);
  scratch = NULL; /* a destructor that runs later may run a layer */
}
static int have_key;
static void make_key(void) { have_key = !pthread_key_create(&scratch_key, free_arena); }

static arena* this_thread(void) {
  if (scratch) return scratch;
  pthread_once(&resident_once, stay_resident);
  pthread_once(&scratch_once, make_key);
  arena* a = calloc(1, sizeof *a);
  if (a && (!have_key || pthread_setspecific(scratch_key, a))) {
    free(a);
    a = NULL;
  }
  return scratch = a;
}

void* pool_alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  arena* a = this_thread();
  if (!a || a->depth == MAX_BLOCKS || bytes > SIZE_MAX / 4) return NULL;
  const size_t size = ((size_t)bytes + 63) & ~(size_t)63, before = a->most;
  if (a->used + size > a->most) a->most = a->used + size;
  void *base = NULL, *block = NULL;
  if (!a->used && a->capacity < a->most && !posix_memalign(&base, 64, a->most)) {
    free(a->base); /* nothing was in use: the block grew to the high-water mark */
    a->base = base;
    a->capacity = a->most;
  }
  if (a->used + size <= a->capacity) block = a->base + a->used;
  else if (posix_memalign(&block, 64, size)) {
    a->most = before; /* what could not be had now must not be asked for again by smaller calls */
    return NULL;
  }
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

void pool_drop_workspace(void) {
  while (scratch && scratch->depth) pool_free_workspace(0, 0, scratch->blocks[scratch->depth - 1].pointer);
}

static int grow(arena* a, size_t bytes) {
  if (!a) return 0;
  void* base = NULL;
  if (a->capacity >= bytes) return 1;
  if (posix_memalign(&base, 64, bytes)) return 0;
  free(a->base);
  a->base = base;
  a->capacity = a->most = bytes;
  return 1;
}

int pool_prepare(int threads) {
  arena* own = this_thread();
  if (!own) return 0;
  int complete = grow(own, own->most);
  while (!acquire()) sched_yield();
  start_workers(threads - 1);
  for (int i = 0; i < pool.workers; ++i) { /* all idle, as the pool is ours */
    while (!__atomic_load_n(&workers[i].thread, __ATOMIC_ACQUIRE)) sched_yield();
    complete &= grow(workers[i].scratch, own->most);
  }
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
  return complete;
}
