/* A wall clock that jumps for whoever preloads this: CLOCK_REALTIME is the machine's plus the nanoseconds in the file
   named by JUMPING_CLOCK, an int64 that may change at any time. CLOCK_MONOTONIC, and the times of files, stay.

   Waits until an absolute wall time end as they would in a kernel whose clock was set: at once after a jump forward,
   late after one back. They are waits of 1 ms at most, after each of which the clock is looked at again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) \
  ({ \
    static __typeof__(&name) found_; \
    found_ ? found_ : (found_ = (__typeof__(&name))dlsym(RTLD_NEXT, #name)); \
  })
static const int64_t SECOND = 1000000000, SLICE = 1000000;
static const int64_t* jump;

__attribute__((constructor)) static void map(void) {
  const char* path = getenv("JUMPING_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void* page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
  if (file >= 0) close(file);
  if (page != MAP_FAILED) jump = page;
}

static int64_t nanoseconds(const struct timespec* t) { return t->tv_sec * SECOND + t->tv_nsec; }

static struct timespec moment(int64_t ns) {
  int64_t rest = (ns % SECOND + SECOND) % SECOND;
  return (struct timespec){.tv_sec = (ns - rest) / SECOND, .tv_nsec = rest};
}

static int64_t machine_now(void) {
  struct timespec now;
  NEXT(clock_gettime)(CLOCK_REALTIME, &now);
  return nanoseconds(&now);
}

static int64_t wall_now(void) { return machine_now() + (jump ? __atomic_load_n(jump, __ATOMIC_RELAXED) : 0); }

int clock_gettime(clockid_t clock, struct timespec* found) {
  if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE) return NEXT(clock_gettime)(clock, found);
  *found = moment(wall_now());
  return 0;
}

int gettimeofday(struct timeval* restrict found, void* restrict zone) {
  struct timespec now = moment(wall_now());
  *found = (struct timeval){.tv_sec = now.tv_sec, .tv_usec = now.tv_nsec / 1000};
  return 0;
}

time_t time(time_t* found) {
  time_t now = wall_now() / SECOND;
  if (found) *found = now;
  return now;
}

/* One slice of a wait until the wall clock shows `due`: until when, by the machine's clock, and whether it is the last. */
typedef struct {
  struct timespec until;
  int is_last;
} Slice;

static Slice slice_of(const struct timespec* due) {
  int64_t left = nanoseconds(due) - wall_now();
  return (Slice){.until = moment(machine_now() + (left < SLICE ? left : SLICE)), .is_last = left <= SLICE};
}

/* The slice of a condition ends like a spurious wake-up, which its users must expect: to wait again here could miss a
   signal. Whether it was made for CLOCK_MONOTONIC is a flag in glibc's condition (nptl/pthread_cond_common.c). */
int pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock, const struct timespec* due) {
  if (clock != CLOCK_REALTIME) return NEXT(pthread_cond_clockwait)(cond, mutex, clock, due);
  Slice slice = slice_of(due);
  int result = NEXT(pthread_cond_clockwait)(cond, mutex, clock, &slice.until);
  return result == ETIMEDOUT && !slice.is_last ? 0 : result;
}

int pthread_cond_timedwait(pthread_cond_t* cond, pthread_mutex_t* mutex, const struct timespec* due) {
  clockid_t clock = cond->__data.__wrefs & 2 ? CLOCK_MONOTONIC : CLOCK_REALTIME;
  return pthread_cond_clockwait(cond, mutex, clock, due);
}

int pthread_mutex_timedlock(pthread_mutex_t* mutex, const struct timespec* due) {
  for (;;) {
    Slice slice = slice_of(due);
    int result = NEXT(pthread_mutex_clocklock)(mutex, CLOCK_REALTIME, &slice.until);
    if (result != ETIMEDOUT || slice.is_last) return result;
  }
}

int sem_timedwait(sem_t* semaphore, const struct timespec* due) {
  for (;;) {
    Slice slice = slice_of(due);
    int result = NEXT(sem_clockwait)(semaphore, CLOCK_REALTIME, &slice.until);
    if (result == 0 || errno != ETIMEDOUT || slice.is_last) return result;
  }
}

/* gRPC waits by the futex itself, and tries again when it was interrupted. */
long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
  va_end(list);
  const struct timespec* due = (const struct timespec*)a[3];
  if (number != SYS_futex || (a[1] & FUTEX_CMD_MASK) != FUTEX_WAIT_BITSET || !(a[1] & FUTEX_CLOCK_REALTIME) || !due)
    return NEXT(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  Slice slice = slice_of(due);
  long result = NEXT(syscall)(number, a[0], a[1], a[2], &slice.until, a[4], a[5]);
  if (result < 0 && errno == ETIMEDOUT && !slice.is_last) errno = EINTR;
  return result;
}
