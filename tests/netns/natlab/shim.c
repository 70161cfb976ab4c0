/* Delay, jitter, loss and rate for one direction of a link, for kernels without netem.
 *
 * usage: shim DEV TAP DELAY_US JITTER_US LOSS_PPM RATE_KBIT QUEUE_US LATE_PPM LATE_US     (in the namespace of DEV)
 *
 * tc redirects what would leave by DEV to TAP, a device of ours; we read each frame there, let it wait, and put it on
 * DEV by a packet socket that goes around the qdiscs, hence around the redirect. A TAP has no offloads, so the kernel
 * cuts bursts up and fills in checksums before we see them. Waiting frames form a ring, in which
 * order is kept; a second one holds those that come late by LATE_US, and so out of order. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    RING = 16384,  /* frames under way; 1 Gbit/s for 190 ms. A frame too many is dropped and counted. */
    FRAME = 2048,  /* longest frame: 1500 + headers */
    BATCH = 128,   /* frames read before those that are due are sent */
};

struct frame { uint64_t due; int len; };

static struct frame ring[RING];
static unsigned char *bytes;
static unsigned head, tail; /* head: next to send, tail: next free; equal: empty */
static uint64_t delay, jitter, queue, busy, last;
static uint64_t taken, sent, lost, full, errors;
static unsigned loss, late;
static uint64_t late_by;
static struct frame late_ring[RING];
static unsigned char *late_bytes;
static unsigned late_head, late_tail;
static double ns_per_byte;
static volatile sig_atomic_t over;

static void stop(int sig) { (void)sig; over = 1; }

static void fail(const char *what)
{
    fprintf(stderr, "shim: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t dice(void) /* splitmix64 */
{
    static uint64_t state;
    if (!state && getrandom(&state, sizeof state, 0) < 0) fail("getrandom");
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int open_tap(const char *name)
{
    struct ifreq r = {0};
    char path[128];
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK), s = socket(AF_INET, SOCK_DGRAM, 0), f;
    if (tap < 0) fail("/dev/net/tun");
    if (s < 0) fail("socket");
    snprintf(r.ifr_name, sizeof r.ifr_name, "%s", name);
    r.ifr_flags = IFF_TAP | IFF_NO_PI;
    if (ioctl(tap, TUNSETIFF, &r)) fail("TUNSETIFF");
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/disable_ipv6", name); /* else it speaks for itself */
    if ((f = open(path, O_WRONLY)) >= 0) {
        if (write(f, "1", 1) < 0) fail(path);
        close(f);
    }
    r.ifr_qlen = RING;
    if (ioctl(s, SIOCSIFTXQLEN, &r)) fail("txqueuelen");
    if (ioctl(s, SIOCGIFFLAGS, &r)) fail("flags");
    r.ifr_flags |= IFF_UP | IFF_NOARP;
    if (ioctl(s, SIOCSIFFLAGS, &r)) fail("up");
    close(s);
    return tap;
}

static int open_wire(const char *device)
{
    int one = 1, room = 8 << 20, s = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it never receives */
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(device)};
    if (s < 0 || !to.sll_ifindex) fail(device);
    if (bind(s, (struct sockaddr *)&to, sizeof to)) fail("bind");
    if (setsockopt(s, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one)) fail("PACKET_QDISC_BYPASS");
    setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    return s;
}

static void take(int len, uint64_t t) /* the frame is in the slot `tail` */
{
    uint64_t due = t;
    taken++;
    if (loss && dice() % 1000000 < loss) { lost++; return; }
    if (ns_per_byte > 0) {
        uint64_t begin = busy > t ? busy : t;
        if (begin - t > queue) { full++; return; }
        due = busy = begin + (uint64_t)(len * ns_per_byte);
    }
    due += delay;
    if (jitter) due += dice() % (jitter + 1);
    if (late && dice() % 1000000 < late && (late_tail + 1) % RING != late_head) {
        memcpy(late_bytes + (size_t)late_tail * FRAME, bytes + (size_t)tail * FRAME, (size_t)len);
        late_ring[late_tail] = (struct frame){due + late_by, len};
        late_tail = (late_tail + 1) % RING;
        return;
    }
    if (due < last) due = last;
    last = due;
    if ((tail + 1) % RING == head) { full++; return; }
    ring[tail] = (struct frame){due, len};
    tail = (tail + 1) % RING;
}

static unsigned put(int wire, uint64_t t, const struct frame *frames, const unsigned char *from, unsigned first, unsigned end)
{
    for (; first != end && frames[first].due <= t; first = (first + 1) % RING) {
        if (send(wire, from + (size_t)first * FRAME, (size_t)frames[first].len, 0) < 0) errors++;
        else sent++;
    }
    return first;
}

static void release(int wire, uint64_t t)
{
    head = put(wire, t, ring, bytes, head, tail);
    late_head = put(wire, t, late_ring, late_bytes, late_head, late_tail);
}

int main(int argc, char **argv)
{
    if (argc != 10) { fprintf(stderr, "usage: shim DEV TAP DELAY_US JITTER_US LOSS_PPM RATE_KBIT QUEUE_US LATE_PPM LATE_US\n"); return 2; }
    delay = strtoull(argv[3], NULL, 10) * 1000;
    jitter = strtoull(argv[4], NULL, 10) * 1000;
    loss = (unsigned)strtoul(argv[5], NULL, 10);
    unsigned long rate = strtoul(argv[6], NULL, 10);
    ns_per_byte = rate ? 8e6 / (double)rate : 0;
    queue = strtoull(argv[7], NULL, 10) * 1000;
    late = (unsigned)strtoul(argv[8], NULL, 10);
    late_by = strtoull(argv[9], NULL, 10) * 1000;
    if (!(bytes = malloc((size_t)RING * FRAME)) || !(late_bytes = malloc((size_t)RING * FRAME))) fail("memory");
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    prctl(PR_SET_TIMERSLACK, 1);
    struct sched_param first = {.sched_priority = 1};
    sched_setscheduler(0, SCHED_RR, &first); /* exact on a busy machine; where it is refused, less exact */
    int tap = open_tap(argv[2]), wire = open_wire(argv[1]);
    puts("ready");
    fflush(stdout);
    while (!over) {
        uint64_t t = now();
        release(wire, t);
        uint64_t wait = head == tail ? 200000000u : ring[head].due - t;
        if (late_head != late_tail && late_ring[late_head].due - t < wait) wait = late_ring[late_head].due - t;
        struct timespec span = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        struct pollfd p = {tap, POLLIN, 0};
        ppoll(&p, 1, &span, NULL);
        t = now();
        for (int i = 0; i < BATCH; i++) {
            ssize_t n = read(tap, bytes + (size_t)tail * FRAME, FRAME);
            if (n <= 0) break;
            take((int)n, t);
        }
    }
    fprintf(stderr, "taken=%lu sent=%lu lost=%lu full=%lu errors=%lu\n", (unsigned long)taken, (unsigned long)sent,
            (unsigned long)lost, (unsigned long)full, (unsigned long)errors);
    return 0;
}
