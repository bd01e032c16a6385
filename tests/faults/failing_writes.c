/* Writes that fail: loaded before the C library (LD_PRELOAD), it counts every call that changes a file below one
 * directory, and has the call of one number, or all from it on, fail as a full disk or a broken one would. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long made;
static long at;
static int error_number, once;
static char below[PATH_MAX];
static atomic_int armed;

void fault_arm(const char *directory, long number, int error, int only_once) {
    strncpy(below, directory, sizeof below - 1);
    at = number, error_number = error, once = only_once, made = 0;
    armed = 1;
}

long fault_count(void) { return made; }

static int path_fails(const char *path) {
    if (!armed || strncmp(path, below, strlen(below))) return 0;
    long number = ++made;
    if (at <= 0 || number < at || (once && number != at)) return 0;
    errno = error_number;
    return 1;
}

static int fails(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path_fails(path);
}

#define NEXT(type, name, ...) \
    static type (*next)(__VA_ARGS__); \
    if (!next) next = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define ON_FILE(type, name, parameters, arguments, ...) \
    type name parameters { \
        NEXT(type, name, __VA_ARGS__); \
        return fails(fd) ? -1 : next arguments; \
    }

ON_FILE(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
ON_FILE(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
ON_FILE(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t, off64_t)
ON_FILE(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), int, const struct iovec *, int)
ON_FILE(int, fsync, (int fd), (fd), int)
ON_FILE(int, fdatasync, (int fd), (fd), int)
ON_FILE(int, ftruncate, (int fd, off_t n), (fd, n), int, off_t)
ON_FILE(int, ftruncate64, (int fd, off64_t n), (fd, n), int, off64_t)

int rename(const char *from, const char *to) {
    NEXT(int, rename, const char *, const char *);
    return path_fails(to) ? -1 : next(from, to);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(int, mkdir, const char *, mode_t);
    return path_fails(path) ? -1 : next(path, mode);
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        NEXT(int, name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return (flags & O_CREAT) && path_fails(path) ? -1 : next(path, flags, mode); \
    }

OPENS(open)
OPENS(open64)
