/* Loaded before libc (LD_PRELOAD): the wall clock is WEFT_LAB_AHEAD seconds ahead. Other clocks are left alone. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *t)
{
    const char *ahead = getenv("WEFT_LAB_AHEAD");
    int failed = (int)syscall(SYS_clock_gettime, id, t);
    if (!failed && ahead && id == CLOCK_REALTIME) t->tv_sec += atol(ahead);
    return failed;
}
