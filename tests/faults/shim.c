/* Count the file-system calls of a process below one folder; fail, shorten or kill at the k-th; record what they change.
 *
 * Preloaded (LD_PRELOAD), it does nothing until `shim_arm` is called. A call is below the folder if its path is, or the
 * path under which its descriptor was opened. Each call that counts leaves a line in the log: number, name, path, and
 * what it changes; with `records_data` also the bytes that are written.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL, SHORT, KILL };
#define FDS 4096
#define LONGEST 4096

static char folder[LONGEST];
static size_t folder_length;
static long first, last_one;
static int mode, error_number, records_data, only_changes, log_fd = -1;
static atomic_long calls;
static char *opened[FDS];
static atomic_flag busy = ATOMIC_FLAG_INIT;

#define REAL(type, name, ...)                                  \
  static type (*real)(__VA_ARGS__);                            \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

void shim_arm(const char *below, const char *log, long from, long to, int how, int number, int data, int changes) {
  snprintf(folder, sizeof folder, "%s", below);
  folder_length = strlen(folder);
  first = from, last_one = to, mode = how, error_number = number, records_data = data, only_changes = changes;
  atomic_store(&calls, 0);
  log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
}

/* Write the absolute path of `path` at `dir` to `into`; return whether it is below the folder. */
static int resolved(int dir, const char *path, char *into) {
  if (!folder_length || !path) return 0;
  if (path[0] == '/') {
    snprintf(into, LONGEST, "%s", path);
  } else if (dir == AT_FDCWD) {
    if (syscall(SYS_getcwd, into, LONGEST) < 0) return 0;
    size_t length = strlen(into);
    snprintf(into + length, LONGEST - length, "/%s", path);
  } else {
    if (dir < 0 || dir >= FDS || !opened[dir]) return 0;
    if (*path) snprintf(into, LONGEST, "%s/%s", opened[dir], path);
    else snprintf(into, LONGEST, "%s", opened[dir]);
  }
  return !strncmp(into, folder, folder_length) && (!into[folder_length] || into[folder_length] == '/');
}

static void keep(int fd, const char *path) {
  if (fd < 0 || fd >= FDS) return;
  free(opened[fd]);
  opened[fd] = path ? strdup(path) : NULL;
}

static const char *path_of(int fd) { return folder_length && fd >= 0 && fd < FDS ? opened[fd] : NULL; }

/* Log a call and return what becomes of it: 0 as usual, FAIL (errno is set), or SHORT, after which calls fail. */
static int counted(const char *name, const char *path, const char *other, long offset, const void *data, long size,
                   int changes) {
  if (only_changes && !changes) return 0;
  int saved = errno;
  long number = atomic_fetch_add(&calls, 1) + 1;
  int is_hit = mode != COUNT && number >= first && number <= last_one;
  char line[3 * LONGEST];
  int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\t%ld\t%d\t%s\n", number, name, path,
                        other ? other : "", offset, size, changes, is_hit ? "hit" : "");
  while (atomic_flag_test_and_set(&busy)) {}
  syscall(SYS_write, log_fd, line, length);
  if (records_data && data && size > 0) syscall(SYS_write, log_fd, data, size);
  atomic_flag_clear(&busy);
  errno = saved;
  if (!is_hit) return 0;
  if (mode == KILL) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = error_number;
  return mode == SHORT && number > first ? FAIL : mode;
}

static int begin_open(int dir, const char *path, int flags, char *whole) {
  if (!resolved(dir, path, whole)) return 2;
  int changes = !!(flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY;
  int exists = syscall(SYS_faccessat, dir, path, F_OK) == 0;
  const char *name = !changes ? "open" : flags & O_TRUNC ? "truncate" : !exists && flags & O_CREAT ? "create" : "append";
  return counted(name, whole, NULL, 0, NULL, 0, changes) == FAIL ? 1 : 0;
}

#define OPENS(function)                                                                    \
  int function(const char *path, int flags, ...) {                                         \
    va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    REAL(int, #function, const char *, int, ...)                                           \
    char whole[LONGEST];                                                                   \
    int is = begin_open(AT_FDCWD, path, flags, whole);                                     \
    if (is == 1) return -1;                                                                \
    int fd = real(path, flags, bits);                                                      \
    if (fd >= 0) keep(fd, is == 0 ? whole : NULL);                                         \
    return fd;                                                                             \
  }
#define OPENS_AT(function)                                                                 \
  int function(int dir, const char *path, int flags, ...) {                                \
    va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    REAL(int, #function, int, const char *, int, ...)                                      \
    char whole[LONGEST];                                                                   \
    int is = begin_open(dir, path, flags, whole);                                          \
    if (is == 1) return -1;                                                                \
    int fd = real(dir, path, flags, bits);                                                 \
    if (fd >= 0) keep(fd, is == 0 ? whole : NULL);                                         \
    return fd;                                                                             \
  }
OPENS(open) OPENS(open64) OPENS_AT(openat) OPENS_AT(openat64)

/* C++ streams (torch.save) open files by these, and write to their descriptors. */
#define FOPENS(function)                                                                   \
  FILE *function(const char *path, const char *how) {                                      \
    REAL(FILE *, #function, const char *, const char *)                                    \
    char whole[LONGEST];                                                                   \
    int flags = *how == 'r' ? (strchr(how, '+') ? O_RDWR : O_RDONLY)                       \
                            : O_CREAT | O_WRONLY | (*how == 'w' ? O_TRUNC : O_APPEND);     \
    int is = begin_open(AT_FDCWD, path, flags, whole);                                     \
    if (is == 1) return NULL;                                                              \
    FILE *file = real(path, how);                                                          \
    if (file) keep(fileno(file), is == 0 ? whole : NULL);                                  \
    return file;                                                                           \
  }
FOPENS(fopen) FOPENS(fopen64)

int fclose(FILE *file) {
  REAL(int, "fclose", FILE *)
  keep(fileno(file), NULL);
  return real(file);
}

int close(int fd) { /* not counted: Linux closes also where it reports an error */
  REAL(int, "close", int)
  keep(fd, NULL);
  return real(fd);
}

int dup(int fd) {
  REAL(int, "dup", int)
  int copy = real(fd);
  if (copy >= 0) keep(copy, path_of(fd));
  return copy;
}

/* Python duplicates descriptors with fcntl, and locks with it. */
#define FCNTL(function)                                                                    \
  int function(int fd, int command, ...) {                                                 \
    va_list rest; va_start(rest, command); void *value = va_arg(rest, void *); va_end(rest); \
    REAL(int, #function, int, int, ...)                                                    \
    int is_lock = command == F_SETLK || command == F_SETLKW;                               \
    if (is_lock && path_of(fd) && counted("lock", path_of(fd), NULL, 0, NULL, 0, 0) == FAIL) return -1; \
    int result = real(fd, command, value);                                                 \
    if (result >= 0 && (command == F_DUPFD || command == F_DUPFD_CLOEXEC)) keep(result, path_of(fd)); \
    return result;                                                                         \
  }
FCNTL(fcntl) FCNTL(fcntl64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t)
  if (path_of(fd)) {
    int is_appending = syscall(SYS_fcntl, fd, F_GETFL) & O_APPEND;
    long at = is_appending ? -1 : syscall(SYS_lseek, fd, 0, SEEK_CUR);
    int fate = counted("write", path_of(fd), NULL, at, data, size, 1);
    if (fate == FAIL) return -1;
    if (fate == SHORT) return real(fd, data, size / 2);
  }
  return real(fd, data, size);
}

/* Taken for one write of its first part. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int)
  if (path_of(fd) && count > 0) {
    int fate = counted("write", path_of(fd), NULL, -1, NULL, parts[0].iov_len, 1);
    if (fate == FAIL) return -1;
    if (fate == SHORT) return real(fd, parts, 1);
  }
  return real(fd, parts, count);
}

#define WRITES_AT(function, offset_type)                                                   \
  ssize_t function(int fd, const void *data, size_t size, offset_type at) {                \
    REAL(ssize_t, #function, int, const void *, size_t, offset_type)                       \
    if (path_of(fd)) {                                                                     \
      int fate = counted("write", path_of(fd), NULL, at, data, size, 1);                   \
      if (fate == FAIL) return -1;                                                         \
      if (fate == SHORT) return real(fd, data, size / 2, at);                              \
    }                                                                                      \
    return real(fd, data, size, at);                                                       \
  }
WRITES_AT(pwrite, off_t) WRITES_AT(pwrite64, off64_t)

ssize_t read(int fd, void *data, size_t size) {
  REAL(ssize_t, "read", int, void *, size_t)
  if (path_of(fd)) {
    int fate = counted("read", path_of(fd), NULL, 0, NULL, 0, 0);
    if (fate == FAIL) return -1;
    if (fate == SHORT && size > 1) return real(fd, data, size / 2);
  }
  return real(fd, data, size);
}

#define ON_DESCRIPTOR(function, name, changes)                                             \
  int function(int fd) {                                                                   \
    REAL(int, #function, int)                                                              \
    if (path_of(fd) && counted(name, path_of(fd), NULL, 0, NULL, 0, changes) == FAIL) return -1; \
    return real(fd);                                                                       \
  }
ON_DESCRIPTOR(fsync, "fsync", 1) ON_DESCRIPTOR(fdatasync, "fsync", 1)

#define TRUNCATES(function, offset_type)                                                   \
  int function(int fd, offset_type size) {                                                 \
    REAL(int, #function, int, offset_type)                                                 \
    if (path_of(fd) && counted("resize", path_of(fd), NULL, size, NULL, 0, 1) == FAIL) return -1; \
    return real(fd, size);                                                                 \
  }
TRUNCATES(ftruncate, off_t) TRUNCATES(ftruncate64, off64_t)

#define ON_PATH(function, name, changes)                                                   \
  int function(const char *path) {                                                         \
    REAL(int, #function, const char *)                                                     \
    char whole[LONGEST];                                                                   \
    if (resolved(AT_FDCWD, path, whole) && counted(name, whole, NULL, 0, NULL, 0, changes) == FAIL) return -1; \
    return real(path);                                                                     \
  }
ON_PATH(unlink, "unlink", 1) ON_PATH(rmdir, "rmdir", 1)

int unlinkat(int dir, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int)
  char whole[LONGEST];
  const char *name = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
  if (resolved(dir, path, whole) && counted(name, whole, NULL, 0, NULL, 0, 1) == FAIL) return -1;
  return real(dir, path, flags);
}

int mkdir(const char *path, mode_t bits) {
  REAL(int, "mkdir", const char *, mode_t)
  char whole[LONGEST];
  if (resolved(AT_FDCWD, path, whole) && counted("mkdir", whole, NULL, 0, NULL, 0, 1) == FAIL) return -1;
  return real(path, bits);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *)
  char whole[LONGEST], other[LONGEST];
  if (resolved(AT_FDCWD, from, whole) && resolved(AT_FDCWD, to, other) &&
      counted("rename", whole, other, 0, NULL, 0, 1) == FAIL)
    return -1;
  return real(from, to);
}

#define STATS(function, type)                                                              \
  int function(const char *path, type *into) {                                             \
    REAL(int, #function, const char *, type *)                                             \
    char whole[LONGEST];                                                                   \
    if (resolved(AT_FDCWD, path, whole) && counted("stat", whole, NULL, 0, NULL, 0, 0) == FAIL) return -1; \
    return real(path, into);                                                               \
  }
STATS(stat, struct stat) STATS(stat64, struct stat64) STATS(lstat, struct stat) STATS(lstat64, struct stat64)
STATS(statvfs, struct statvfs) STATS(statvfs64, struct statvfs64)

#define STATS_OPEN(function, type)                                                         \
  int function(int fd, type *into) {                                                       \
    REAL(int, #function, int, type *)                                                      \
    if (path_of(fd) && counted("stat", path_of(fd), NULL, 0, NULL, 0, 0) == FAIL) return -1; \
    return real(fd, into);                                                                 \
  }
STATS_OPEN(fstat, struct stat) STATS_OPEN(fstat64, struct stat64)

#define STATS_AT(function, type)                                                           \
  int function(int dir, const char *path, type *into, int flags) {                         \
    REAL(int, #function, int, const char *, type *, int)                                   \
    char whole[LONGEST];                                                                   \
    if (resolved(dir, path, whole) && counted("stat", whole, NULL, 0, NULL, 0, 0) == FAIL) return -1; \
    return real(dir, path, into, flags);                                                   \
  }
STATS_AT(fstatat, struct stat) STATS_AT(fstatat64, struct stat64)

int access(const char *path, int how) {
  REAL(int, "access", const char *, int)
  char whole[LONGEST];
  if (resolved(AT_FDCWD, path, whole) && counted("stat", whole, NULL, 0, NULL, 0, 0) == FAIL) return -1;
  return real(path, how);
}

DIR *opendir(const char *path) {
  REAL(DIR *, "opendir", const char *)
  char whole[LONGEST];
  if (resolved(AT_FDCWD, path, whole) && counted("list", whole, NULL, 0, NULL, 0, 0) == FAIL) return NULL;
  return real(path);
}

DIR *fdopendir(int fd) {
  REAL(DIR *, "fdopendir", int)
  if (path_of(fd) && counted("list", path_of(fd), NULL, 0, NULL, 0, 0) == FAIL) return NULL;
  return real(fd);
}

int closedir(DIR *stream) {
  REAL(int, "closedir", DIR *)
  keep(dirfd(stream), NULL);
  return real(stream);
}
