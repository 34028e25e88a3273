/* A disk that fails, or a machine that dies, at the nth call that changes files below a folder;
 * and a record of all such calls, from which every state after a crash can be made.
 *
 * FAULT_FOLDER  only files below it count
 * FAULT_CALLS   "all" (default), or "fsync": only calls that sync count
 * FAULT_AT      number of the first call that fails, counted from 1; 0: none, only count
 * FAULT_TIMES   how many calls fail from there on
 * FAULT_ERRNO   what they fail with; 0: the process ends there, before the call (as kill -9 does)
 * FAULT_DIE     1: the process ends at the first call of any kind after those that failed
 * FAULT_COUNT   a file that gets the number of calls made, at the end of the process
 * FAULT_TRACE   a file to which each call is added, and each write to standard output:
 *               "name\tcall\toffset or size\tbytes\n" and then so many bytes
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define NEXT(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

static long calls;
static int failed; /* have all calls failed that shall? */
static int trace = -1;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER; /* the record has the order of the calls */

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

/* What path is called below the folder; NULL if it is elsewhere. The folder itself is ".". */
static const char *below(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    size_t length = folder ? strlen(folder) : 0;
    if (!length || strncmp(path, folder, length) != 0) return NULL;
    if (!path[length]) return ".";
    return path[length] == '/' ? path + length + 1 : NULL;
}

static const char *named(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0) return NULL;
    path[length] = 0;
    return below(path);
}

/* Is this call one that fails? Sets errno, or does not return. */
static int fails(int syncs) {
    if (failed && number("FAULT_DIE")) _exit(137);
    const char *which = getenv("FAULT_CALLS");
    if (which && !strcmp(which, "fsync") && !syncs) return 0;
    long at = number("FAULT_AT"), call = ++calls;
    if (!at || call < at || call >= at + number("FAULT_TIMES")) return 0;
    if (!number("FAULT_ERRNO")) _exit(137);
    failed = call == at + number("FAULT_TIMES") - 1;
    errno = (int)number("FAULT_ERRNO");
    return 1;
}

static void note(const char *name, const char *call, long long where, const void *data, size_t size) {
    const char *path = getenv("FAULT_TRACE");
    if (!path) return;
    int error = errno;
    if (trace < 0) trace = NEXT(int, open64, const char *, int, ...)(
        path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    char head[512];
    int length = snprintf(head, sizeof head, "%s\t%s\t%lld\t%zu\n", name, call, where, size);
    ssize_t (*put)(int, const void *, size_t) = NEXT(ssize_t, write, int, const void *, size_t);
    if (put(trace, head, length) != length || (size && put(trace, data, size) != (ssize_t)size)) abort();
    errno = error;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld\n", calls);
    fclose(file);
}

/* A call on a file below the folder: RESULT is what it returns, NOTE is said if it succeeded. */
#define CALL(type, fd, syncs, result, record)                              \
    char path_[4096];                                                      \
    const char *name = named(fd, path_, sizeof path_);                     \
    if (!name) return result;                                              \
    pthread_mutex_lock(&order);                                            \
    type done = -1;                                                        \
    if (!fails(syncs)) {                                                   \
        done = result;                                                     \
        if (done >= 0) record;                                             \
    } else if (syncs)                                                      \
        note(name, "fsync failed", 0, NULL, 0);                            \
    pthread_mutex_unlock(&order);                                          \
    return done

ssize_t write(int fd, const void *data, size_t size) {
    if (fd == 1) {
        pthread_mutex_lock(&order);
        note("-", "promise", 0, data, size);
        pthread_mutex_unlock(&order);
    }
    off_t at = lseek(fd, 0, SEEK_CUR);
    CALL(ssize_t, fd, 0, (NEXT(ssize_t, write, int, const void *, size_t)(fd, data, size)),
         note(name, "write", at, data, done));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    CALL(ssize_t, fd, 0, (NEXT(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, data, size, at)),
         note(name, "write", at, data, done));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    CALL(ssize_t, fd, 0, (NEXT(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, data, size, at)),
         note(name, "write", at, data, done));
}

int fsync(int fd) {
    CALL(int, fd, 1, (NEXT(int, fsync, int)(fd)), note(name, "fsync", 0, NULL, 0));
}

int fdatasync(int fd) {
    CALL(int, fd, 1, (NEXT(int, fdatasync, int)(fd)), note(name, "fsync", 0, NULL, 0));
}

int ftruncate(int fd, off_t size) {
    CALL(int, fd, 0, (NEXT(int, ftruncate, int, off_t)(fd, size)), note(name, "truncate", size, NULL, 0));
}

int ftruncate64(int fd, off64_t size) {
    CALL(int, fd, 0, (NEXT(int, ftruncate64, int, off64_t)(fd, size)),
         note(name, "truncate", size, NULL, 0));
}

int rename(const char *from, const char *to) {
    const char *old = below(from), *name = below(to);
    int (*next)(const char *, const char *) = NEXT(int, rename, const char *, const char *);
    if (!name) return next(from, to);
    pthread_mutex_lock(&order);
    int done = fails(0) ? -1 : next(from, to);
    if (!done) note(name, "rename", 0, old, strlen(old));
    pthread_mutex_unlock(&order);
    return done;
}

int unlink(const char *path) {
    const char *name = below(path);
    int (*next)(const char *) = NEXT(int, unlink, const char *);
    if (!name) return next(path);
    pthread_mutex_lock(&order);
    int done = fails(0) ? -1 : next(path);
    if (!done) note(name, "unlink", 0, NULL, 0);
    pthread_mutex_unlock(&order);
    return done;
}

static int opened(const char *path, int flags, mode_t mode) {
    int (*next)(const char *, int, ...) = NEXT(int, open64, const char *, int, ...);
    const char *name = below(path);
    if (!name || !(flags & (O_CREAT | O_TRUNC))) return next(path, flags, mode);
    pthread_mutex_lock(&order);
    int is_new = access(path, F_OK) != 0;
    int fd = (is_new || flags & O_TRUNC) && fails(0) ? -1 : next(path, flags, mode);
    if (fd >= 0 && is_new) note(name, "create", 0, NULL, 0);
    else if (fd >= 0 && flags & O_TRUNC) note(name, "truncate", 0, NULL, 0);
    pthread_mutex_unlock(&order);
    return fd;
}

#define OPEN(function)                                                     \
    int function(const char *path, int flags, ...) {                       \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;          \
        va_end(more);                                                      \
        return opened(path, flags, mode);                                  \
    }

OPEN(open)
OPEN(open64)
