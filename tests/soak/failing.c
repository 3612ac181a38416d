/* Makes calls on files fail, for a process that has this library preloaded.
 *
 *   FAIL_CALL   pread, pwrite, fallocate, fsync, read, link, rename or open
 *   FAIL_NAME   only files whose path has this in it
 *   FAIL_AFTER  so many such calls succeed first
 *   FAIL_ERRNO  the error that the others give; 0: they do only half of what they are asked for
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

/* Whether this call is to fail; -1: to do half. */
static int fails(const char *call, const char *path) {
    const char *wanted = getenv("FAIL_CALL"), *name = getenv("FAIL_NAME");
    const char *after = getenv("FAIL_AFTER"), *number = getenv("FAIL_ERRNO");
    if (!wanted || !number || strcmp(wanted, call)) return 0;
    if (name && (!path || !strstr(path, name))) return 0;
    if (atomic_fetch_add(&calls, 1) < (after ? atol(after) : 0)) return 0;
    errno = atoi(number);
    return errno ? 1 : -1;
}

static int fails_on(const char *call, int fd) {
    char link[64], path[4096];
    if (!getenv("FAIL_CALL") || strcmp(getenv("FAIL_CALL"), call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))
#define HALF(count) ((count) > 1 ? (count) / 2 : (count))

#define PREADV(name)                                                                    \
    ssize_t name(int fd, const struct iovec *into, int count, off_t offset) {           \
        typedef ssize_t (*call)(int, const struct iovec *, int, off_t);                 \
        int failing = fails_on("pread", fd);                                            \
        if (failing > 0) return -1;                                                     \
        if (failing < 0 && count == 1) {                                                \
            struct iovec half = {into->iov_base, HALF(into->iov_len)};                  \
            return REAL(#name, call)(fd, &half, 1, offset);                             \
        }                                                                               \
        return REAL(#name, call)(fd, into, count, offset);                              \
    }
PREADV(preadv)
PREADV(preadv64)

#define PWRITE(name)                                                                    \
    ssize_t name(int fd, const void *from, size_t count, off_t offset) {                \
        typedef ssize_t (*call)(int, const void *, size_t, off_t);                      \
        int failing = fails_on("pwrite", fd);                                           \
        if (failing > 0) return -1;                                                     \
        return REAL(#name, call)(fd, from, failing < 0 ? HALF(count) : count, offset);  \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t read(int fd, void *into, size_t count) {
    typedef ssize_t (*call)(int, void *, size_t);
    int failing = fails_on("read", fd);
    if (failing > 0) return -1;
    return REAL("read", call)(fd, into, failing < 0 ? HALF(count) : count);
}

#define FALLOCATE(name)                                                                 \
    int name(int fd, off_t offset, off_t length) {                                      \
        typedef int (*call)(int, off_t, off_t);                                         \
        if (fails_on("fallocate", fd)) return errno;                                    \
        return REAL(#name, call)(fd, offset, length);                                   \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

#define FSYNC(name)                                                                     \
    int name(int fd) {                                                                  \
        typedef int (*call)(int);                                                       \
        return fails_on("fsync", fd) ? -1 : REAL(#name, call)(fd);                      \
    }
FSYNC(fsync)
FSYNC(fdatasync)

#define TWO_NAMES(name, kind)                                                           \
    int name(const char *from, const char *to) {                                        \
        typedef int (*call)(const char *, const char *);                                \
        return fails(kind, to) ? -1 : REAL(#name, call)(from, to);                      \
    }
TWO_NAMES(link, "link")
TWO_NAMES(rename, "rename")

int linkat(int a, const char *from, int b, const char *to, int flags) {
    typedef int (*call)(int, const char *, int, const char *, int);
    return fails("link", to) ? -1 : REAL("linkat", call)(a, from, b, to, flags);
}

#define OPEN(name)                                                                      \
    int name(const char *path, int flags, ...) {                                        \
        typedef int (*call)(const char *, int, ...);                                    \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;         \
        va_end(more);                                                                   \
        return fails("open", path) ? -1 : REAL(#name, call)(path, flags, mode);         \
    }
OPEN(open)
OPEN(open64)
