/* Loaded before libc (LD_PRELOAD): fsync takes WEFT_LAB_FSYNC_MS longer, as on a flash that is tidying up. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int fsync(int file)
{
    const char *text = getenv("WEFT_LAB_FSYNC_MS");
    long ms = text ? atol(text) : 0;
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&left, NULL);
    return (int)syscall(SYS_fsync, file);
}
