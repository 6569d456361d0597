/* A full disk for whoever preloads this: while the file named by FULL_DISK_FLAG exists, writes to files under the folder
   FULL_DISK fail with ENOSPC, and so does making folders there. No mount, no quota, no root. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_full(void) {
  const char* flag = getenv("FULL_DISK_FLAG");
  return flag && access(flag, F_OK) == 0;
}

static int is_under(const char* path) {
  const char* folder = getenv("FULL_DISK");
  return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int fails_on(int fd) {
  char link[64], path[PATH_MAX];
  if (fd < 0 || !is_full()) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_under(path);
}

#define FAIL_IF(condition) \
  do { \
    if (condition) { \
      errno = ENOSPC; \
      return -1; \
    } \
  } while (0)
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* data, size_t size) {
  FAIL_IF(fails_on(fd));
  return NEXT(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec* parts, int count) {
  FAIL_IF(fails_on(fd));
  return NEXT(writev)(fd, parts, count);
}

ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  FAIL_IF(fails_on(fd));
  return NEXT(pwrite64)(fd, data, size, at);
}

int mkdir(const char* path, mode_t mode) {
  FAIL_IF(is_full() && is_under(path));
  return NEXT(mkdir)(path, mode);
}

ssize_t sendfile64(int out, int in, off64_t* at, size_t size) {
  FAIL_IF(fails_on(out));
  return NEXT(sendfile64)(out, in, at, size);
}
