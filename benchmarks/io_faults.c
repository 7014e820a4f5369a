/* Lets the n-th file operation below a folder fail. Preloaded (LD_PRELOAD) by io_faults.py; forked processes count together. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct shared {
    long count, at;
    int error;    /* an errno, or -1: the write takes only half of what it is given */
    int lasting;  /* all later operations that need room fail too */
    int armed;
    char prefix[PATH_MAX], hit[PATH_MAX + 32];
};
static struct shared *state;

__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void io_faults_arm(const char *prefix, long at, int error, int lasting) {
    snprintf(state->prefix, sizeof state->prefix, "%s", prefix);
    state->count = 0, state->at = at, state->error = error, state->lasting = lasting;
    state->hit[0] = 0, state->armed = 1;
}
void io_faults_disarm(void) { state->armed = 0; }
long io_faults_count(void) { return state->count; }
const char *io_faults_hit(void) { return state->hit; }

/* 0: go on; -1: half of the write; else the errno to give. needs_room: an operation that a full disk refuses. */
static int fault(const char *what, const char *path, int needs_room) {
    if (!state->armed || strncmp(path, state->prefix, strlen(state->prefix))) return 0;
    if (state->error < 0 && !strstr(what, "write")) return 0; /* what cannot be done by half */
    long n = __sync_add_and_fetch(&state->count, 1);
    if (n == state->at) snprintf(state->hit, sizeof state->hit, "%s %s", what, path + strlen(state->prefix));
    if (n == state->at || (state->lasting && n > state->at && state->at && needs_room)) return state->error;
    return 0;
}

static int fault_fd(const char *what, int fd, int needs_room) {
    char link[64], path[PATH_MAX];
    if (!state->armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fault(what, path, needs_room);
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
#define REFUSE(f) if ((f) > 0) { errno = (f); return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    int f = fault_fd("write", fd, 1);
    REFUSE(f);
    return REAL(write)(fd, data, f < 0 && size > 1 ? size / 2 : size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    int f = fault_fd("writev", fd, 1);
    REFUSE(f);
    return REAL(writev)(fd, parts, f < 0 && count > 1 ? 1 : count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    int f = fault_fd("pwrite", fd, 1);
    REFUSE(f);
    return REAL(pwrite64)(fd, data, f < 0 && size > 1 ? size / 2 : size, at);
}
ssize_t read(int fd, void *data, size_t size) {
    int f = fault_fd("read", fd, 0);
    REFUSE(f);
    return REAL(read)(fd, data, size);
}
int fsync(int fd) {
    int f = fault_fd("fsync", fd, 1);
    REFUSE(f);
    return REAL(fsync)(fd);
}
int rename(const char *from, const char *to) {
    int f = fault("rename", from, 1);
    REFUSE(f);
    return REAL(rename)(from, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    int f = fault("exchange", from, 1);
    REFUSE(f);
    return REAL(renameat2)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    int f = fault("mkdir", path, 1);
    REFUSE(f);
    return REAL(mkdir)(path, mode);
}
int unlink(const char *path) {
    int f = fault("unlink", path, 0);
    REFUSE(f);
    return REAL(unlink)(path);
}
#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list more;                                                  \
        va_start(more, flags);                                         \
        mode_t mode = va_arg(more, mode_t);                            \
        va_end(more);                                                  \
        int f = fault("open", path, (flags & O_CREAT) != 0);           \
        REFUSE(f);                                                     \
        return REAL(name)(path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)
