/* Many datagrams at a steady rate, and what counts or answers them.
 *
 * usage: blast send PORT ADDRESS PORT RATE MILLISECONDS FILE [NOISE [cheap]]
 *            bytes from NOISE on are random, anew each time; cheap: a batch by one call, where all are of one length
 *        blast sink PORT MILLISECONDS                                    counts what comes, until nothing more does
 *        blast echo PORT FILE                                            answers each datagram with the file's first
 *        blast trip PORT ADDRESS PORT COUNT FILE                         round trips, one at a time
 *
 * FILE: datagrams, each after its length as u16, big-endian; sent in turn. Prints one JSON object. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103 /* linux/udp.h */
#endif

enum { BATCH = 32, SIZE = 2048, FRAMES = 4096, BUFFER = 8 << 20, QUIET_MS = 500, NAP_NS = 500000 };

static unsigned char frames[FRAMES][SIZE], room[BATCH][SIZE];
static size_t lens[FRAMES];
static unsigned count;

static void fail(const char *what)
{
    fprintf(stderr, "blast: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void load(const char *path)
{
    FILE *f = fopen(path, "rb");
    int high, low;
    if (!f) fail(path);
    while (count < FRAMES && (high = getc(f)) != EOF && (low = getc(f)) != EOF) {
        lens[count] = (size_t)(high << 8 | low);
        if (lens[count] > SIZE || fread(frames[count], 1, lens[count], f) != lens[count]) fail("frames");
        count++;
    }
    fclose(f);
    if (!count) fail("no frames");
}

static int bound(const char *port, int wait_ms)
{
    int s = socket(AF_INET, SOCK_DGRAM, 0), size = BUFFER;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    struct timeval patience = {wait_ms / 1000, wait_ms % 1000 * 1000};
    if (bind(s, (struct sockaddr *)&at, sizeof at)) fail("bind");
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size)) fail("buffer");
    setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    return s;
}

static void aim(int s, const char *address, const char *port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    if (inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(s, (struct sockaddr *)&to, sizeof to)) fail(address);
}

static uint64_t dice(void) /* splitmix64 */
{
    static uint64_t state;
    uint64_t z = state ? (state += 0x9e3779b97f4a7c15u) : (state = (uint64_t)(now() * 1e9));
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double spent(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) + (double)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1e-6;
}

static void go(int s, double rate, double span, size_t noise, int cheap)
{
    struct mmsghdr m[BATCH];
    struct iovec v[BATCH];
    uint64_t sent = 0, bytes = 0, refused = 0, most = (uint64_t)(rate * span);
    double begin = now(), t = begin;
    memset(m, 0, sizeof m);
    for (int i = 0; i < BATCH; i++) m[i].msg_hdr.msg_iov = &v[i], m[i].msg_hdr.msg_iovlen = 1;
    prctl(PR_SET_TIMERSLACK, 1);
    if (cheap) {
        int len = (int)lens[0];
        if (setsockopt(s, SOL_UDP, UDP_SEGMENT, &len, sizeof len)) fail("segments");
        m[0].msg_hdr.msg_iov = v;
    }
    while (sent + refused < most && (t = now()) < begin + span * 2) {
        uint64_t due = (uint64_t)((t - begin) * rate) + 1, n = due > sent + refused ? due - sent - refused : 0;
        if (n > BATCH) n = BATCH;
        if (!n) {
            struct timespec nap = {0, 100000};
            nanosleep(&nap, NULL);
            continue;
        }
        for (unsigned i = 0; i < n; i++) {
            unsigned f = (unsigned)((sent + i) % count);
            v[i] = (struct iovec){frames[f], lens[f]};
            if (noise < lens[f]) {
                memcpy(room[i], frames[f], noise);
                for (size_t at = noise; at < lens[f]; at += 8) {
                    uint64_t r = dice();
                    memcpy(room[i] + at, &r, lens[f] - at < 8 ? lens[f] - at : 8);
                }
                v[i].iov_base = room[i];
            }
        }
        if (cheap) m[0].msg_hdr.msg_iovlen = n;
        int done = sendmmsg(s, m, cheap ? 1 : (unsigned)n, 0);
        if (cheap && done == 1) done = (int)n;
        if (done < 0) { refused++; continue; } /* ICMP's answer to an earlier one, or no room */
        for (int i = 0; i < done; i++) bytes += v[i].iov_len;
        sent += (unsigned)done;
    }
    printf("{\"sent\": %llu, \"refused\": %llu, \"bytes\": %llu, \"seconds\": %.4f, \"cpu\": %.3f}\n", (unsigned long long)sent,
           (unsigned long long)refused, (unsigned long long)bytes, now() - begin, spent());
}

/* By the clock, not as soon as something comes: whoever sends to a sleeper pays for waking it, here the relay. */
static void sink(int s, double span)
{
    struct mmsghdr m[BATCH];
    struct iovec v[BATCH];
    uint64_t got = 0, bytes = 0;
    double last = now(), until = last + span;
    memset(m, 0, sizeof m);
    prctl(PR_SET_TIMERSLACK, 1);
    for (int i = 0; i < BATCH; i++) {
        v[i] = (struct iovec){room[i], SIZE};
        m[i].msg_hdr.msg_iov = &v[i], m[i].msg_hdr.msg_iovlen = 1;
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        int n = recvmmsg(s, m, BATCH, MSG_DONTWAIT, NULL);
        double t = now();
        for (int i = 0; i < n; i++) bytes += m[i].msg_len;
        if (n > 0) {
            got += (unsigned)n;
            last = t;
        } else if (t > until && t > last + QUIET_MS * 1e-3) {
            break;
        } else {
            struct timespec nap = {0, NAP_NS};
            nanosleep(&nap, NULL);
        }
    }
    printf("{\"got\": %llu, \"bytes\": %llu, \"cpu\": %.3f}\n", (unsigned long long)got, (unsigned long long)bytes, spent());
}

_Noreturn static void echo(int s)
{
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct sockaddr_in from;
        socklen_t len = sizeof from;
        if (recvfrom(s, room[0], SIZE, 0, (struct sockaddr *)&from, &len) > 0)
            sendto(s, frames[0], lens[0], 0, (struct sockaddr *)&from, len);
    }
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void trip(int s, int trips)
{
    double *took = calloc((size_t)trips, sizeof *took);
    int lost = 0, n = 0;
    if (!took || trips < 1) fail("count");
    for (int i = 0; i < trips; i++) {
        double begin = now();
        send(s, frames[0], lens[0], 0);
        if (recv(s, room[0], SIZE, 0) > 0) took[n++] = now() - begin;
        else lost++;
    }
    qsort(took, (size_t)n, sizeof *took, by_size);
    printf("{\"p50\": %.1f, \"p99\": %.1f, \"lost\": %d}\n", n ? took[n / 2] * 1e6 : 0, n ? took[n * 99 / 100] * 1e6 : 0, lost);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    int s = argc > 2 ? bound(argv[2], QUIET_MS) : -1;
    if (!strcmp(what, "send") && argc >= 8 && argc <= 10) {
        load(argv[7]);
        aim(s, argv[3], argv[4]);
        go(s, atof(argv[5]), atof(argv[6]) * 1e-3, argc >= 9 ? (size_t)atoi(argv[8]) : SIZE, argc == 10);
    } else if (!strcmp(what, "sink") && argc == 4) {
        sink(s, atof(argv[3]) * 1e-3);
    } else if (!strcmp(what, "echo") && argc == 4) {
        load(argv[3]);
        echo(s);
    } else if (!strcmp(what, "trip") && argc == 7) {
        load(argv[6]);
        aim(s, argv[3], argv[4]);
        trip(s, atoi(argv[5]));
    } else {
        fprintf(stderr, "usage: blast send|sink|echo|trip …\n");
        return 2;
    }
    return 0;
}
