/* The functions of the CUDA runtime that streamed's native readers call, for a machine without a GPU.

   Copies are made for real, as late as a device may make them: when somebody waits for an event that was recorded after
   them. A slot that is filled again too soon gives wrong bytes. With rates set, copies and reads sleep instead, as
   benchmarks/ring_simulation.py wants them, and move nothing. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

typedef struct queued {
    struct queued *next;
    uint64_t number;
    char *target;
    const char *source;
    size_t size;
} queued;

typedef struct {
    uint64_t number; /* the last copy before it */
    double ends;
} event;

static pthread_mutex_t stream = PTHREAD_MUTEX_INITIALIZER, driver = PTHREAD_MUTEX_INITIALIZER;
static queued *first, **last = &first;
static uint64_t queued_number;
static double link_free;

/* What tests and the benchmark set and read. Rates in bytes a second; 0 copies for real. */
double host_link_rate, host_read_rate, host_pin_s_per_byte;
int host_refuse_register, host_refuse_alloc, host_fail_copy_after = -1, host_registered, host_allocated, host_events;
/* When the first read began, by CLOCK_MONOTONIC; set it to 0 beforehand. */
double host_first_read_at;
/* Reads from this byte of a file on fail, or wait until the gate is open; -1 where none does. */
int64_t host_fail_read_at = -1, host_hold_read_at = -1;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void sleep_until(double end)
{
    struct timespec t = {(time_t)end, (long)((end - (double)(time_t)end) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

static void hold_driver(double seconds)
{
    if (seconds <= 0)
        return;
    pthread_mutex_lock(&driver);
    sleep_until(now() + seconds);
    pthread_mutex_unlock(&driver);
}

int host_set_device(int device) { return device < 0; }

int host_register(void *memory, size_t size, unsigned flags)
{
    (void)memory, (void)flags;
    if (host_refuse_register)
        return 801;
    hold_driver(host_pin_s_per_byte * (double)size);
    __atomic_add_fetch(&host_registered, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int host_unregister(void *memory)
{
    (void)memory;
    __atomic_sub_fetch(&host_registered, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int host_alloc(void **memory, size_t size, unsigned flags)
{
    (void)flags;
    if (host_refuse_alloc || posix_memalign(memory, 1 << 16, size))
        return 2;
    __atomic_add_fetch(&host_allocated, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int host_free(void *memory)
{
    free(memory);
    __atomic_sub_fetch(&host_allocated, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int host_event_create(void **made, unsigned flags)
{
    (void)flags;
    *made = calloc(1, sizeof(event));
    __atomic_add_fetch(&host_events, 1, __ATOMIC_SEQ_CST);
    return *made ? 0 : 2;
}

int host_event_destroy(void *made)
{
    free(made);
    __atomic_sub_fetch(&host_events, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int host_copy(void *target, const void *source, size_t size, int kind, void *handle)
{
    (void)kind, (void)handle;
    pthread_mutex_lock(&stream);
    if (host_fail_copy_after >= 0 && host_fail_copy_after-- == 0) {
        host_fail_copy_after = 0;
        pthread_mutex_unlock(&stream);
        return 700;
    }
    if (host_link_rate > 0) {
        double t = now();
        link_free = (link_free > t ? link_free : t) + (double)size / host_link_rate;
    } else {
        queued *one = malloc(sizeof(queued));
        *one = (queued){NULL, ++queued_number, target, source, size};
        *last = one;
        last = &one->next;
    }
    pthread_mutex_unlock(&stream);
    return 0;
}

int host_event_record(void *made, void *handle)
{
    (void)handle;
    event *own = made;
    pthread_mutex_lock(&stream);
    own->number = queued_number;
    own->ends = link_free;
    pthread_mutex_unlock(&stream);
    return 0;
}

int host_event_synchronize(void *made)
{
    event *own = made;
    if (host_link_rate > 0) {
        sleep_until(own->ends);
        return 0;
    }
    pthread_mutex_lock(&stream);
    while (first && first->number <= own->number) {
        queued *one = first;
        first = one->next;
        if (!first)
            last = &first;
        memcpy(one->target, one->source, one->size);
        free(one);
    }
    pthread_mutex_unlock(&stream);
    return 0;
}

int host_last_error(void) { return 0; }

ssize_t host_read(int descriptor, void *memory, size_t size, off_t offset)
{
    if (host_first_read_at == 0)
        host_first_read_at = now();
    if (host_fail_read_at >= 0 && offset >= host_fail_read_at) {
        errno = EIO;
        return -1;
    }
    while (__atomic_load_n(&host_hold_read_at, __ATOMIC_SEQ_CST) >= 0 && offset >= host_hold_read_at)
        usleep(1000);
    if (host_read_rate <= 0)
        return pread(descriptor, memory, size, offset);
    sleep_until(now() + (double)size / host_read_rate);
    return (ssize_t)size;
}
