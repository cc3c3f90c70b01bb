/* Fills pinned memory from files and has a GPU copy it out, by threads that know no Python.

   What streamed's readers do for each extent (see device.py) costs Python 50 to 100 us, during which no other thread of
   the process runs Python: with thousands of tensors that is more than the link needs. Here it costs a few.

   The functions of the CUDA runtime come in a table from the library that torch has loaded, so nothing is linked against
   CUDA, and tests give functions that copy for real on the host. No Python in here: all is called through ctypes, which
   lets go of the interpreter's lock. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define LARGE_PAGE (2u << 20)
#define SLOTS 2
#define CACHESTAT 451 /* the same number on every architecture */
#define HOST_TO_DEVICE 1
#define EVENT_FLAGS 3 /* blocking wait: a wait that spins takes a processor from a thread that reads; no timing */

/* Raise it with every change of a function or a structure, here and in native_readers.py. */
const int32_t ladezeit_readers_version = 1;

enum { BUFFERED = 0, DIRECT = 1, BY_RESIDENCY = 2 };
enum { READ_FAILED = 1, FILE_SHORTER = 2, RUNTIME_FAILED = 3, NO_MEMORY = 4 };

typedef struct {
    int (*set_device)(int);
    int (*host_register)(void *, size_t, unsigned);
    int (*host_unregister)(void *);
    int (*host_alloc)(void **, size_t, unsigned);
    int (*host_free)(void *);
    int (*event_create)(void **, unsigned);
    int (*event_destroy)(void *);
    int (*copy)(void *, const void *, size_t, int, void *);
    int (*event_record)(void *, void *);
    int (*event_synchronize)(void *);
    int (*last_error)(void);
    ssize_t (*read)(int, void *, size_t, off_t);
} runtime;

typedef struct {
    int64_t begin, end; /* bytes of the file; begin is a multiple of a page */
    int32_t number;     /* its place among the flags that tell what has arrived */
    int32_t file, how;
    int32_t copies;     /* where its copies begin in the list of all; they end where the next extent's begin */
    int32_t copies_end, unused;
} extent;

typedef struct {
    uint64_t target; /* address on the device */
    uint32_t from, size; /* bytes of the extent */
} piece;

typedef struct {
    int32_t buffered, direct; /* descriptors; direct is -1 where there is none */
    _Atomic int32_t refused;  /* errno of a direct read that was refused, 0 where none was */
    int32_t unused;
    int64_t refused_at;
    _Atomic int64_t read_buffered, read_direct; /* bytes */
} shard;

typedef struct {
    int32_t kind, code, file, unused; /* kind 0: no error */
    int64_t offset;
} failure;

typedef struct readers readers;

typedef struct {
    void *memory;   /* what is filled */
    void *mapped;   /* our own mapping, to be unmapped */
    int registered, allocated;
    void *event;
    const extent *under_way;
} slot;

typedef struct {
    readers *of;
    pthread_t thread;
    slot slots[SLOTS];
} reader;

struct readers {
    runtime functions;
    int device, threads, may_register;
    void *stream;
    size_t slot_bytes, page;
    cpu_set_t near;
    int has_near;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int given;          /* 1 when the lists are there */
    int ended;          /* threads that have ended */
    _Atomic int stopped;
    int awaited_begin, awaited_end; /* flags that somebody waits for */
    const extent *extents;
    int count;
    _Atomic int next;
    const piece *pieces;
    shard *shards;
    _Atomic uint8_t *arrived;
    _Atomic int64_t done_bytes;
    _Atomic int64_t pinned_bytes;
    failure error;
    reader own_readers[];
};

static void fail(readers *p, int kind, int code, int file, int64_t offset)
{
    pthread_mutex_lock(&p->lock);
    if (!p->error.kind)
        p->error = (failure){kind, code, file, 0, offset};
    p->stopped = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* Find and pin the memory of a slot: registered, or else the driver's own, or else as it is. Returns 0 or -1 after
   `fail`. */
static int make_slot(readers *p, slot *s)
{
    const runtime *f = &p->functions;
    s->mapped = mmap(NULL, p->slot_bytes + LARGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->mapped == MAP_FAILED) {
        s->mapped = NULL;
        fail(p, NO_MEMORY, errno, 0, 0);
        return -1;
    }
    s->memory = (void *)(((uintptr_t)s->mapped + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE);
    madvise(s->memory, p->slot_bytes, MADV_HUGEPAGE);
    if (p->may_register) {
        /* The driver takes several times as long to find pages as to pin them. */
        for (size_t at = 0; at < p->slot_bytes; at += LARGE_PAGE)
            ((volatile char *)s->memory)[at] = 0;
        if (f->host_register(s->memory, p->slot_bytes, 0) == 0) {
            s->registered = 1;
        } else {
            p->may_register = 0;
            f->last_error(); /* or it would be taken for that of the next call */
        }
    }
    if (!s->registered) {
        void *memory = NULL;
        if (f->host_alloc(&memory, p->slot_bytes, 0) == 0 && memory && (uintptr_t)memory % p->page == 0) {
            s->memory = memory;
            s->allocated = 1;
        } else {
            f->last_error();
            if (memory)
                f->host_free(memory);
        }
    }
    if (s->registered || s->allocated)
        p->pinned_bytes += p->slot_bytes;
    int code = f->event_create(&s->event, EVENT_FLAGS);
    if (code) {
        s->event = NULL;
        fail(p, RUNTIME_FAILED, code, 0, 0);
    }
    return code ? -1 : 0;
}

static int is_refusal(int code)
{
    return code == EINVAL || code == EOPNOTSUPP || code == EFAULT || code == ENOSYS;
}

/* All but one page in fifty: the kernel fetches so few sooner than a direct read brings all of them again. */
static int is_resident(const readers *p, int descriptor, const extent *e)
{
    uint64_t range[2] = {(uint64_t)e->begin, (uint64_t)(e->end - e->begin)}, found[5] = {0};
    if (syscall(CACHESTAT, descriptor, range, found, 0) != 0)
        return 0;
    uint64_t pages = (range[1] + p->page - 1) / p->page;
    return found[0] * 50 >= pages * 49;
}

/* Read an extent to the start of `memory`, past the page cache or through it. Returns 0 or -1 after `fail`. */
static int fill(readers *p, const extent *e, char *memory)
{
    shard *file = &p->shards[e->file];
    int64_t page = (int64_t)p->page, size = e->end - e->begin, whole = (size + page - 1) / page * page, done = 0;
    int direct = e->how == DIRECT || (e->how == BY_RESIDENCY && !is_resident(p, file->buffered, e));
    /* After a read that did not end on a page the next would be misaligned: the rest is left to a buffered one. */
    while (direct && file->direct >= 0 && !file->refused && done < size && done % page == 0) {
        ssize_t count = p->functions.read(file->direct, memory + done, (size_t)(whole - done), e->begin + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && is_refusal(errno)) {
            file->refused_at = e->begin + done;
            file->refused = errno;
            break;
        }
        if (count <= 0) {
            fail(p, count < 0 ? READ_FAILED : FILE_SHORTER, errno, e->file, e->begin + done);
            return -1;
        }
        done += count;
    }
    if (done > size)
        done = size;
    file->read_direct += done;
    file->read_buffered += size - done;
    while (done < size) {
        ssize_t count = p->functions.read(file->buffered, memory + done, (size_t)(size - done), e->begin + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0) {
            fail(p, count < 0 ? READ_FAILED : FILE_SHORTER, errno, e->file, e->begin + done);
            return -1;
        }
        done += count;
    }
    return 0;
}

/* Wait for the copies out of a slot. Returns 0 or -1 after `fail`. */
static int empty(readers *p, slot *s)
{
    const extent *e = s->under_way;
    if (!e)
        return 0;
    s->under_way = NULL;
    int code = p->functions.event_synchronize(s->event);
    if (code) {
        fail(p, RUNTIME_FAILED, code, e->file, e->begin);
        return -1;
    }
    p->done_bytes += e->end - e->begin;
    p->arrived[e->number] = 1;
    pthread_mutex_lock(&p->lock);
    if (p->awaited_begin <= e->number && e->number < p->awaited_end)
        pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    return 0;
}

static int send(readers *p, const extent *e, slot *s)
{
    const runtime *f = &p->functions;
    for (int i = e->copies; i < e->copies_end; i++) {
        const piece *c = &p->pieces[i];
        int code = f->copy((void *)(uintptr_t)c->target, (char *)s->memory + c->from, c->size, HOST_TO_DEVICE, p->stream);
        if (code) {
            fail(p, RUNTIME_FAILED, code, e->file, e->begin);
            s->under_way = e; /* copies before it may be under way */
            f->event_record(s->event, p->stream);
            return -1;
        }
    }
    s->under_way = e;
    int code = f->event_record(s->event, p->stream);
    if (code)
        fail(p, RUNTIME_FAILED, code, e->file, e->begin);
    return code ? -1 : 0;
}

static void work(readers *p, reader *own)
{
    int turn = 0, code = p->functions.set_device(p->device);
    if (code)
        fail(p, RUNTIME_FAILED, code, 0, 0);
    if (code || make_slot(p, &own->slots[0]))
        return;
    pthread_mutex_lock(&p->lock);
    while (!p->given && !p->stopped)
        pthread_cond_wait(&p->changed, &p->lock);
    pthread_mutex_unlock(&p->lock);
    while (!p->stopped) {
        int number = p->next++;
        if (number >= p->count)
            break;
        slot *s = &own->slots[turn];
        const extent *e = &p->extents[number];
        if ((!s->event && make_slot(p, s)) || empty(p, s) || fill(p, e, s->memory) || send(p, e, s))
            break;
        turn = (turn + 1) % SLOTS;
    }
    for (int i = 0; i < SLOTS; i++) /* the older one first */
        empty(p, &own->slots[(turn + i) % SLOTS]);
}

static void *run(void *argument)
{
    reader *own = argument;
    readers *p = own->of;
    if (p->has_near) /* a sandbox may forbid it, and loads without it */
        pthread_setaffinity_np(pthread_self(), sizeof p->near, &p->near);
    work(p, own);
    pthread_mutex_lock(&p->lock);
    p->ended++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* Start the threads, which pin their first slots and wait for what to read. Fewer may start than were asked for; NULL
   where none does. `near` are the numbers of processors to run on, none of which leaves the threads where they are. */
readers *ladezeit_readers_start(const runtime *functions, int threads, size_t slot_bytes, int device, void *stream,
                          const int32_t *near, int near_count)
{
    readers *p = calloc(1, sizeof(readers) + (size_t)threads * sizeof(reader));
    if (!p)
        return NULL;
    p->functions = *functions;
    if (!p->functions.read)
        p->functions.read = pread;
    p->page = (size_t)sysconf(_SC_PAGESIZE);
    p->device = device, p->stream = stream, p->slot_bytes = slot_bytes, p->may_register = 1;
    CPU_ZERO(&p->near);
    for (int i = 0; i < near_count; i++)
        if (near[i] < CPU_SETSIZE)
            CPU_SET(near[i], &p->near);
    p->has_near = near_count > 0;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&p->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < threads; i++) {
        p->own_readers[i].of = p;
        if (pthread_create(&p->own_readers[i].thread, NULL, run, &p->own_readers[i]))
            break;
        p->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!p->threads) {
        free(p);
        return NULL;
    }
    return p;
}

/* Say what to read, in order. The lists belong to the caller and have to stay until all threads have ended. */
void ladezeit_readers_give(readers *p, const extent *extents, int count, const piece *pieces, shard *shards, uint8_t *arrived)
{
    pthread_mutex_lock(&p->lock);
    p->extents = extents, p->count = count, p->pieces = pieces, p->shards = shards;
    p->arrived = (_Atomic uint8_t *)arrived;
    p->given = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* Have the threads end soon. */
void ladezeit_readers_stop(readers *p)
{
    pthread_mutex_lock(&p->lock);
    p->stopped = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

static int missing(const readers *p, int begin, int end)
{
    for (int i = begin; i < end; i++)
        if (!p->arrived[i])
            return 1;
    return 0;
}

static struct timespec from_now(int milliseconds)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += milliseconds % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L)
        until.tv_sec++, until.tv_nsec -= 1000000000L;
    return until;
}

/* Wait at most so long until the extents of numbers `begin` to `end` have arrived: 1 when they have, 0 where they will
   not, -1 where the time is over. One thread at a time may wait. */
int ladezeit_readers_wait(readers *p, int begin, int end, int milliseconds)
{
    struct timespec until = from_now(milliseconds);
    int over = 0;
    pthread_mutex_lock(&p->lock);
    p->awaited_begin = begin, p->awaited_end = end;
    while (missing(p, begin, end) && p->ended < p->threads && !p->stopped && !over)
        over = pthread_cond_timedwait(&p->changed, &p->lock, &until) == ETIMEDOUT;
    p->awaited_begin = p->awaited_end = 0;
    int there = !missing(p, begin, end), ends = p->ended == p->threads || p->stopped;
    pthread_mutex_unlock(&p->lock);
    return there ? 1 : ends ? 0 : -1;
}

/* Wait at most so long for all threads to end; returns whether they have. */
int ladezeit_readers_join(readers *p, int milliseconds)
{
    struct timespec until = from_now(milliseconds);
    int over = 0;
    pthread_mutex_lock(&p->lock);
    while (p->ended < p->threads && !over)
        over = pthread_cond_timedwait(&p->changed, &p->lock, &until) == ETIMEDOUT;
    int all = p->ended == p->threads;
    pthread_mutex_unlock(&p->lock);
    return all;
}

int64_t ladezeit_readers_done_bytes(readers *p) { return p->done_bytes; }

int64_t ladezeit_readers_pinned_bytes(readers *p) { return p->pinned_bytes; }

failure ladezeit_readers_error(readers *p) { return p->error; }

/* Give everything back, once all threads have ended: the driver must not read what is gone. */
void ladezeit_readers_free(readers *p)
{
    const runtime *f = &p->functions;
    f->set_device(p->device);
    for (int i = 0; i < p->threads; i++) {
        pthread_join(p->own_readers[i].thread, NULL);
        for (int n = 0; n < SLOTS; n++) {
            slot *s = &p->own_readers[i].slots[n];
            if (s->event)
                f->event_destroy(s->event);
            if (s->registered)
                f->host_unregister(s->memory);
            if (s->allocated)
                f->host_free(s->memory);
            if (s->mapped)
                munmap(s->mapped, p->slot_bytes + LARGE_PAGE);
        }
    }
    pthread_cond_destroy(&p->changed);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
