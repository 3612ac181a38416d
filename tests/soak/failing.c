/* Makes calls on files fail, or kills the process at one, for whoever has this library preloaded.
 *
 *   FAIL_CALL   the kind of call, as below, or "any"
 *   FAIL_NAME   only files whose path has this in it
 *   FAIL_AFTER  so many such calls succeed first
 *   FAIL_TIMES  so many fail then; without it, all
 *   FAIL_ERRNO  the error that they give; 0: they do only half of what they are asked for; -1: the
 *               process is killed
 *   FAIL_LOG    a file that gets a line for each call on such files: its kind, "!" if it is one
 *               that failed, and the path
 *
 * The kinds are what SYSCALLS in calls.py says of each system call.
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
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

static void note(const char *call, const char *path, int fired) {
    const char *name = getenv("FAIL_LOG");
    char line[4400];
    if (!name) return;
    int length = snprintf(line, sizeof line, "%s %s%s\n", call, fired ? "!" : "", path);
    long fd = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) abort();
    if (syscall(SYS_write, fd, line, length) != length) abort();
    syscall(SYS_close, fd);
}

/* Whether this call is to fail, then errno says how; -1: to do half. */
static int fails(const char *call, const char *path) {
    const char *wanted = getenv("FAIL_CALL"), *name = getenv("FAIL_NAME");
    const char *after = getenv("FAIL_AFTER"), *times = getenv("FAIL_TIMES");
    const char *number = getenv("FAIL_ERRNO");
    int before = errno;
    if (!path || !(wanted || getenv("FAIL_LOG"))) return 0;
    if (name && !strstr(path, name)) return 0;
    if (!wanted || !number || (strcmp(wanted, call) && strcmp(wanted, "any"))) {
        note(call, path, 0);
        errno = before;
        return 0;
    }
    long at = atomic_fetch_add(&calls, 1) - (after ? atol(after) : 0);
    int fired = at >= 0 && (!times || at < atol(times));
    note(call, path, fired);
    errno = before;
    if (!fired) return 0;
    if (atoi(number) < 0) kill(getpid(), SIGKILL);
    if (atoi(number) == 0) return -1;
    errno = atoi(number);
    return 1;
}

static int fails_on(const char *call, int fd) {
    char link[64], path[4096];
    if (!getenv("FAIL_CALL") && !getenv("FAIL_LOG")) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))
#define HALF(count) ((count) > 1 ? (count) / 2 : (count))

/* A call with these parameters, which fails with `bad`; `on` is fails or fails_on. */
#define CALL(type, name, kind, on, what, bad, parameters, arguments)                    \
    type name parameters {                                                              \
        if (on(kind, what) > 0) return bad;                                             \
        return ((type(*) parameters)dlsym(RTLD_NEXT, #name))arguments;                  \
    }

#define PREADV(name, more, passed)                                                      \
    ssize_t name(int fd, const struct iovec *into, int count, off_t offset more) {      \
        typedef ssize_t (*call)(int, const struct iovec *, int, off_t more);            \
        int failing = fails_on("pread", fd);                                            \
        if (failing > 0) return -1;                                                     \
        if (failing < 0 && count == 1) {                                                \
            struct iovec half = {into->iov_base, HALF(into->iov_len)};                  \
            return REAL(#name, call)(fd, &half, 1, offset passed);                      \
        }                                                                               \
        return REAL(#name, call)(fd, into, count, offset passed);                       \
    }
#define FLAGS , int flags
#define PASSED , flags
PREADV(preadv, , )
PREADV(preadv64, , )
PREADV(preadv2, FLAGS, PASSED)
PREADV(preadv64v2, FLAGS, PASSED)

#define SOME(name, kind, into)                                                          \
    ssize_t name(int fd, into buffer, size_t count, off_t offset) {                     \
        typedef ssize_t (*call)(int, into, size_t, off_t);                              \
        int failing = fails_on(kind, fd);                                               \
        if (failing > 0) return -1;                                                     \
        return REAL(#name, call)(fd, buffer, failing < 0 ? HALF(count) : count, offset); \
    }
SOME(pread, "pread", void *)
SOME(pread64, "pread", void *)
SOME(pwrite, "pwrite", const void *)
SOME(pwrite64, "pwrite", const void *)

#define NEXT(name, into)                                                                \
    ssize_t name(int fd, into buffer, size_t count) {                                   \
        typedef ssize_t (*call)(int, into, size_t);                                     \
        int failing = fails_on(#name, fd);                                              \
        if (failing > 0) return -1;                                                     \
        return REAL(#name, call)(fd, buffer, failing < 0 ? HALF(count) : count);        \
    }
NEXT(read, void *)
NEXT(write, const void *)

#define FALLOCATE(name)                                                                 \
    int name(int fd, off_t offset, off_t length) {                                      \
        typedef int (*call)(int, off_t, off_t);                                         \
        if (fails_on("fallocate", fd) > 0) return errno;                                \
        return REAL(#name, call)(fd, offset, length);                                   \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

CALL(int, ftruncate, "truncate", fails_on, fd, -1, (int fd, off_t to), (fd, to))
CALL(int, ftruncate64, "truncate", fails_on, fd, -1, (int fd, off_t to), (fd, to))
CALL(int, fsync, "fsync", fails_on, fd, -1, (int fd), (fd))
CALL(int, fdatasync, "fsync", fails_on, fd, -1, (int fd), (fd))
CALL(int, flock, "flock", fails_on, fd, -1, (int fd, int how), (fd, how))
CALL(int, link, "link", fails, to, -1, (const char *from, const char *to), (from, to))
CALL(int, linkat, "link", fails, to, -1,
     (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
CALL(int, rename, "rename", fails, to, -1, (const char *from, const char *to), (from, to))
CALL(int, renameat, "rename", fails, to, -1,
     (int a, const char *from, int b, const char *to), (a, from, b, to))
CALL(int, unlink, "unlink", fails, path, -1, (const char *path), (path))
CALL(int, unlinkat, "unlink", fails, path, -1, (int a, const char *path, int how), (a, path, how))
CALL(int, mkdir, "mkdir", fails, path, -1, (const char *path, mode_t mode), (path, mode))
CALL(int, mkdirat, "mkdir", fails, path, -1, (int a, const char *path, mode_t m), (a, path, m))
CALL(int, rmdir, "rmdir", fails, path, -1, (const char *path), (path))
CALL(DIR *, opendir, "list", fails, path, NULL, (const char *path), (path))
CALL(int, stat, "stat", fails, path, -1, (const char *path, struct stat *to), (path, to))
CALL(int, stat64, "stat", fails, path, -1, (const char *path, struct stat64 *to), (path, to))
CALL(int, lstat, "stat", fails, path, -1, (const char *path, struct stat *to), (path, to))
CALL(int, lstat64, "stat", fails, path, -1, (const char *path, struct stat64 *to), (path, to))
CALL(int, fstat, "fstat", fails_on, fd, -1, (int fd, struct stat *to), (fd, to))
CALL(int, fstat64, "fstat", fails_on, fd, -1, (int fd, struct stat64 *to), (fd, to))
CALL(int, fstatat, "stat", fails, path, -1,
     (int a, const char *path, struct stat *to, int how), (a, path, to, how))
CALL(int, fstatat64, "stat", fails, path, -1,
     (int a, const char *path, struct stat64 *to, int how), (a, path, to, how))
CALL(ssize_t, copy_file_range, "copy", fails_on, to, -1,
     (int from, off64_t *at, int to, off64_t *start, size_t count, unsigned flags),
     (from, at, to, start, count, flags))

#define OPEN(name)                                                                      \
    int name(const char *path, int flags, ...) {                                        \
        typedef int (*call)(const char *, int, ...);                                    \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;         \
        va_end(more);                                                                   \
        return fails("open", path) > 0 ? -1 : REAL(#name, call)(path, flags, mode);     \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                    \
    int name(int at, const char *path, int flags, ...) {                                \
        typedef int (*call)(int, const char *, int, ...);                               \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;         \
        va_end(more);                                                                   \
        return fails("open", path) > 0 ? -1 : REAL(#name, call)(at, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
