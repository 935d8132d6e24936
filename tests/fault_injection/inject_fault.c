/* Injects a fault into a process at its Nth operation that changes a folder: kills the process there, or makes the disk
 * appear full from there on.
 *
 * It is preloaded (LD_PRELOAD), so that it counts the operations of all threads in their order. A process that is killed
 * at a write has written the first half of it.
 *
 *   FAULT_FOLDER  the folder, an absolute path
 *   FAULT_AT      the number of the operation, from 1
 *   FAULT_HOW     kill, or full
 *   FAULT_MARK    a file that is created when the operation is reached
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_int operations;

static int is_inside(int folder, const char *path) {
  const char *watched = getenv("FAULT_FOLDER");
  if (watched == NULL) return 0;
  char link[64], target[PATH_MAX];
  if (path == NULL || path[0] != '/') { /* a descriptor, or a path relative to one */
    if (folder == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    path = target;
  }
  return strncmp(path, watched, strlen(watched)) == 0;
}

static int is_reached(int folder, const char *path) {
  if (!is_inside(folder, path)) return 0;
  int number = atomic_fetch_add(&operations, 1) + 1, at = atoi(getenv("FAULT_AT"));
  if (number == at) close(REAL(open)(getenv("FAULT_MARK"), O_CREAT | O_WRONLY, 0644));
  return number >= at;
}

static int kills(void) { return strcmp(getenv("FAULT_HOW"), "kill") == 0; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* True if an operation that needs space on the disk must fail. */
static int fails(int folder, const char *path) {
  if (!is_reached(folder, path)) return 0;
  if (kills()) die();
  errno = ENOSPC;
  return 1;
}

/* An operation that needs no space on the disk also succeeds on a full one. */
static void frees(int folder, const char *path) {
  if (is_reached(folder, path) && kills()) die();
}

#define WRITE(name, ...)                                                       \
  if (is_reached(file, NULL)) {                                                \
    if (kills()) {                                                             \
      size /= 2;                                                               \
      REAL(name)(__VA_ARGS__);                                                 \
      die();                                                                   \
    }                                                                          \
    errno = ENOSPC;                                                            \
    return -1;                                                                 \
  }                                                                            \
  return REAL(name)(__VA_ARGS__)

ssize_t write(int file, const void *bytes, size_t size) { WRITE(write, file, bytes, size); }
ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) { WRITE(pwrite, file, bytes, size, at); }
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) { WRITE(pwrite64, file, bytes, size, at); }
ssize_t writev(int file, const struct iovec *parts, int size) { WRITE(writev, file, parts, size); }

#define OPEN(name, folder, ...)                                                \
  va_list rest;                                                                \
  va_start(rest, flags);                                                       \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
  va_end(rest);                                                                \
  if (flags & (O_CREAT | O_TRUNC) && fails(folder, path)) return -1;           \
  return REAL(name)(__VA_ARGS__, flags, mode)

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path); }
int openat(int folder, const char *path, int flags, ...) { OPEN(openat, folder, folder, path); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(openat64, folder, folder, path); }

int mkdir(const char *path, mode_t mode) { return fails(AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
  return fails(folder, path) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int rename(const char *from, const char *to) { return fails(AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int folder, const char *from, int other, const char *to) {
  return fails(other, to) ? -1 : REAL(renameat)(folder, from, other, to);
}
int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
  return fails(other, to) ? -1 : REAL(renameat2)(folder, from, other, to, flags);
}
int link(const char *from, const char *to) { return fails(AT_FDCWD, to) ? -1 : REAL(link)(from, to); }
int symlink(const char *from, const char *to) { return fails(AT_FDCWD, to) ? -1 : REAL(symlink)(from, to); }
int ftruncate(int file, off_t size) { return fails(file, NULL) ? -1 : REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return fails(file, NULL) ? -1 : REAL(ftruncate64)(file, size); }
int fsync(int file) { return fails(file, NULL) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails(file, NULL) ? -1 : REAL(fdatasync)(file); }

int unlink(const char *path) {
  frees(AT_FDCWD, path);
  return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
  frees(folder, path);
  return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
  frees(AT_FDCWD, path);
  return REAL(rmdir)(path);
}
