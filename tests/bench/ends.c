/* Both ends of a measured connection, cheap enough not to be what is measured.
 *
 * usage: ends serve PORT
 *        ends bulk ADDRESS PORT STREAMS MILLISECONDS SERVER_PID [PID…]     what is read in that time, after half a second
 *        ends rtt|connect ADDRESS PORT COUNT [PID…]                        64 bytes there and back; connect and one byte
 *
 * The first byte of a connection is 'd' (send until the other closes) or 'e' (echo). Prints one JSON object; CPU seconds
 * are user and system time of the PIDs, and of the ends themselves; "user" is the former's share. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1 << 18, STREAMS = 64, WARM_MS = 500, WARM_TRIPS = 100, PATIENCE_S = 30 };

static char block[BLOCK];

static void fail(const char *what)
{
    fprintf(stderr, "ends: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void prompt(int s)
{
    int one = 1;
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static void *answer(void *arg)
{
    int s = (int)(intptr_t)arg;
    char buf[4096];
    ssize_t n = recv(s, buf, 1, 0);
    prompt(s);
    if (n == 1 && buf[0] == 'd')
        while (send(s, block, BLOCK, 0) > 0) {}
    else
        while ((n = recv(s, buf, sizeof buf, 0)) > 0 && send(s, buf, (size_t)n, 0) == n) {}
    close(s);
    return NULL;
}

_Noreturn static void serve(const char *port)
{
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(s, (struct sockaddr *)&at, sizeof at) || listen(s, 512)) fail("bind");
    for (;;) {
        int c = accept(s, NULL, NULL);
        pthread_t thread;
        if (c < 0 || pthread_create(&thread, NULL, answer, (void *)(intptr_t)c)) fail("accept");
        pthread_detach(thread);
    }
}

static int dial(const char *address, const char *port)
{
    int s = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    struct timeval patience = {.tv_sec = PATIENCE_S};
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1) fail(address);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(s, (struct sockaddr *)&at, sizeof at)) fail("connect");
    prompt(s);
    return s;
}

/* Of all these; in user mode, beside it. */
static double cpu(char **pids, double *in_user)
{
    double sum = 0;
    *in_user = 0;
    for (; *pids; pids++) {
        char path[64], text[1024] = "", *at;
        unsigned long user = 0, system = 0;
        snprintf(path, sizeof path, "/proc/%s/stat", *pids);
        FILE *f = fopen(path, "r");
        if (!f || !fread(text, 1, sizeof text - 1, f) || !(at = strrchr(text, ')'))) fail(path);
        fclose(f);
        sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
        sum += (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
        *in_user += (double)user / (double)sysconf(_SC_CLK_TCK);
    }
    return sum;
}

static double own(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) + (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1e-6;
}

static int bulk(const char *address, const char *port, int streams, double span, char **pids)
{
    struct pollfd p[STREAMS];
    char *server[] = {pids[0], NULL};
    double begin = now() + WARM_MS * 1e-3, count = 0, spent = 0, ends = 0, before = 0, user, none, t;
    int warm = 0;
    if (streams < 1 || streams > STREAMS) fail("streams");
    for (int i = 0; i < streams; i++) {
        p[i] = (struct pollfd){dial(address, port), POLLIN, 0};
        if (send(p[i].fd, "d", 1, 0) != 1) fail("send");
    }
    while ((t = now()) < begin + span || !warm) {
        if (!warm && t >= begin) {
            warm = 1, begin = t, count = 0;
            spent = cpu(pids + 1, &before), ends = cpu(server, &none) + own();
        }
        if (poll(p, (nfds_t)streams, 1000) < 0) fail("poll");
        for (int i = 0; i < streams; i++)
            if (p[i].revents) {
                /* MSG_TRUNC: the kernel throws the bytes away uncopied. */
                ssize_t n = recv(p[i].fd, NULL, BLOCK, MSG_TRUNC | MSG_DONTWAIT);
                if (n == 0 || (n < 0 && errno != EAGAIN)) fail("a stream ended");
                count += n > 0 ? (double)n : 0;
            }
    }
    spent = cpu(pids + 1, &user) - spent;
    printf("{\"gbit\": %.4f, \"gib\": %.6f, \"cpu\": %.3f, \"user\": %.3f, \"ends\": %.3f}\n", count * 8e-9 / (t - begin),
           count / (1 << 30), spent, user - before, cpu(server, &none) + own() - ends);
    return 0;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void trip(int s, char *buf, size_t len)
{
    if (send(s, buf, len, 0) != (ssize_t)len || recv(s, buf, len, MSG_WAITALL) != (ssize_t)len) fail("round trip");
}

static int times(const char *address, const char *port, int count, int connects, char **pids)
{
    double spent = 0, user;
    double *took = calloc((size_t)count, sizeof *took);
    char buf[64] = "e";
    int s = -1;
    if (!took || count < 1) fail("count");
    if (!connects && send(s = dial(address, port), "e", 1, 0) != 1) fail("send");
    for (int i = -WARM_TRIPS; i < count; i++) {
        if (i == 0) spent = cpu(pids, &user);
        double begin = now();
        if (connects) {
            s = dial(address, port);
            if (send(s, "ex", 2, 0) != 2 || recv(s, buf, 1, 0) != 1) fail("one byte");
            close(s);
        } else {
            trip(s, buf, sizeof buf);
        }
        if (i >= 0) took[i] = now() - begin;
    }
    spent = cpu(pids, &user) - spent;
    qsort(took, (size_t)count, sizeof *took, by_size);
    printf("{\"p50\": %.1f, \"p99\": %.1f, \"cpu\": %.3f}\n", took[count / 2] * 1e6, took[count * 99 / 100] * 1e6, spent);
    return 0;
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3 && !strcmp(argv[1], "serve")) serve(argv[2]);
    if (argc >= 7 && !strcmp(argv[1], "bulk")) return bulk(argv[2], argv[3], atoi(argv[4]), atof(argv[5]) * 1e-3, argv + 6);
    if (argc >= 5 && !strcmp(argv[1], "rtt")) return times(argv[2], argv[3], atoi(argv[4]), 0, argv + 5);
    if (argc >= 5 && !strcmp(argv[1], "connect")) return times(argv[2], argv[3], atoi(argv[4]), 1, argv + 5);
    fprintf(stderr, "usage: ends serve|bulk|rtt|connect …\n");
    return 2;
}
