/* Raw TCP ping-pong over loopback between two processes: the floor that a small one-sided write is held against.
 *
 *   pingpong block|spin OUT BACK SECONDS
 *
 * The parent sends OUT bytes, the child answers with BACK bytes once it has them all; TCP_NODELAY on both ends. `block`
 * waits in read(2), parent and child on a core each; `spin` polls a non-blocking socket on both ends, wherever they run.
 * Prints one JSON line with p50 and p99 of the round trip in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *call) {
    perror(call);
    exit(1);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec * 1e-3;
}

/* Returns 0 at end of stream. */
static int read_all(int fd, char *at, size_t left) {
    while (left) {
        ssize_t n = read(fd, at, left);
        if (n == 0) return 0;
        if (n < 0) {
            if (errno == EAGAIN || errno == EINTR) continue;
            if (errno == ECONNRESET) return 0;
            die("read");
        }
        at += n;
        left -= (size_t)n;
    }
    return 1;
}

static int write_all(int fd, const char *at, size_t left) {
    while (left) {
        ssize_t n = write(fd, at, left);
        if (n < 0) {
            if (errno == EAGAIN || errno == EINTR) continue;
            if (errno == EPIPE || errno == ECONNRESET) return 0;
            die("write");
        }
        at += n;
        left -= (size_t)n;
    }
    return 1;
}

/* Confines the caller to the n-th core that it may use, if there are that many. */
static void use_core(int n) {
    cpu_set_t allowed, chosen;
    CPU_ZERO(&chosen);
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed) || n-- > 0) continue;
        CPU_SET(cpu, &chosen);
        sched_setaffinity(0, sizeof chosen, &chosen);
        return;
    }
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: pingpong block|spin OUT BACK SECONDS\n");
        return 2;
    }
    int spin = strcmp(argv[1], "spin") == 0;
    size_t out = strtoull(argv[2], NULL, 0), back = strtoull(argv[3], NULL, 0), larger = out > back ? out : back;
    double limit_us = atof(argv[4]) * 1e6;
    signal(SIGPIPE, SIG_IGN);

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) die("listen");
    if (getsockname(listener, (void *)&address, &length)) die("getsockname");

    char *buffer = calloc(1, larger ? larger : 1);
    if (!buffer || !out || !back) die("sizes");
    pid_t child = fork();
    if (child < 0) die("fork");
    int one = 1;
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (!spin) use_core(1);
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) die("accept");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (spin) fcntl(fd, F_SETFL, O_NONBLOCK);
        while (read_all(fd, buffer, out) && write_all(fd, buffer, back)) {}
        _exit(0);
    }
    if (!spin) use_core(0);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (void *)&address, sizeof address)) die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (spin) fcntl(fd, F_SETFL, O_NONBLOCK);

    size_t capacity = 4u << 20, count = 0;
    double *times = malloc(capacity * sizeof *times);
    if (!times) die("malloc");
    for (int i = 0; i < 1000; i++)
        if (!write_all(fd, buffer, out) || !read_all(fd, buffer, back)) die("warm-up");
    double begin = now_us(), then = begin;
    while (then - begin < limit_us && count < capacity) {
        if (!write_all(fd, buffer, out) || !read_all(fd, buffer, back)) die("round trip");
        double now = now_us();
        times[count++] = now - then;
        then = now;
    }
    close(fd);
    waitpid(child, NULL, 0);
    qsort(times, count, sizeof *times, ascending);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"count\": %zu}\n", times[count / 2], times[(size_t)(count * 0.99)], count);
    return 0;
}
