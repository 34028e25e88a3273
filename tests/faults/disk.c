/* A disk that fails, or a machine that dies, at the nth call that writes below a folder.
 *
 * FAULT_FOLDER  only files below it count
 * FAULT_AT      number of the first call that fails, counted from 1; 0: none, only count
 * FAULT_TIMES   how many calls fail from there on
 * FAULT_ERRNO   what they fail with; 0: the process ends there, before the call (as kill -9 does)
 * FAULT_COUNT   a file that gets the number of calls made, at the end of the process
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

static int below(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int counts(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}

/* Is this call one that fails? Sets errno, or does not return. */
static int fails(void) {
    long at = number("FAULT_AT"), call = __sync_add_and_fetch(&calls, 1);
    if (!at || call < at || call >= at + number("FAULT_TIMES")) return 0;
    if (!number("FAULT_ERRNO")) _exit(137);
    errno = (int)number("FAULT_ERRNO");
    return 1;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld\n", calls);
    fclose(file);
}

#define NEXT(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (counts(fd) && fails()) return -1;
    return NEXT(ssize_t, write, int, const void *, size_t)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    if (counts(fd) && fails()) return -1;
    return NEXT(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (counts(fd) && fails()) return -1;
    return NEXT(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, data, size, at);
}

int fsync(int fd) {
    if (counts(fd) && fails()) return -1;
    return NEXT(int, fsync, int)(fd);
}

int fdatasync(int fd) {
    if (counts(fd) && fails()) return -1;
    return NEXT(int, fdatasync, int)(fd);
}

int ftruncate(int fd, off_t size) {
    if (counts(fd) && fails()) return -1;
    return NEXT(int, ftruncate, int, off_t)(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    if (counts(fd) && fails()) return -1;
    return NEXT(int, ftruncate64, int, off64_t)(fd, size);
}

int rename(const char *from, const char *to) {
    if (below(to) && fails()) return -1;
    return NEXT(int, rename, const char *, const char *)(from, to);
}
