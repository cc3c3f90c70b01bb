// The CUDA driver's calls by which a kernel is loaded and launched, for kernels that run on the host: the kernel's own
// source is compiled into this library, and each of a block's threads is a fiber. What threads of a warp tell each other,
// and what a block waits for, is where a fiber lets the next one run.

#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(threads)

struct dim { unsigned x, y, z; };
struct ulonglong2 { unsigned long long x, y; };

static dim threadIdx, blockIdx;

namespace {
constexpr int MOST_THREADS = 1024, WARP = 32;
ucontext_t scheduler, fibers[MOST_THREADS];
std::vector<char> stacks[MOST_THREADS];
bool ended[MOST_THREADS];
uint64_t told[2][MOST_THREADS];
int rounds[MOST_THREADS];

void yield() { const unsigned thread = threadIdx.x; swapcontext(&fibers[thread], &scheduler); threadIdx.x = thread; }
}

static void __syncthreads() { yield(); }

static unsigned long long __shfl_down_sync(unsigned, unsigned long long value, int distance)
{
    const unsigned thread = threadIdx.x;
    uint64_t *round = told[rounds[thread]++ % 2]; // two, for some threads are a round ahead
    round[thread] = value;
    yield();
    const unsigned lane = thread % WARP;
    return lane + distance < WARP ? round[thread + distance] : value;
}

static ulonglong2 __ldcs(const ulonglong2 *place)
{
    ulonglong2 found;
    if ((uintptr_t)place % sizeof found) // a GPU faults
        __builtin_trap();
    std::memcpy(&found, place, sizeof found);
    return found;
}

static void atomicAdd(unsigned long long *place, unsigned long long value) { *place += value; }

#include KERNEL_SOURCE

namespace {
void **arguments;

void run()
{
    ladezeit_sums(*(const Part **)arguments[0], *(int *)arguments[1], *(const word **)arguments[2],
                  *(word **)arguments[3]);
    ended[threadIdx.x] = true;
}
}

extern "C" {
int launches = 0;

int cuModuleLoadData(void **module, const void *image)
{
    *module = (void *)image;
    if (std::memcmp(image, "toolarge", 8) == 0)
        return 2; // CUDA_ERROR_OUT_OF_MEMORY
    return std::memcmp(image, "emulated", 8) == 0 ? 0 : 200; // CUDA_ERROR_INVALID_IMAGE
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    *function = module;
    return std::strcmp(name, "ladezeit_sums") == 0 ? 0 : 500; // CUDA_ERROR_NOT_FOUND
}

int cuLaunchKernel(void *, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void *,
                   void **values, void **)
{
    arguments = values;
    launches++;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (unsigned thread = 0; thread < threads; thread++) {
            stacks[thread].resize(64 * 1024);
            ended[thread] = false;
            rounds[thread] = 0;
            getcontext(&fibers[thread]);
            fibers[thread].uc_stack = {stacks[thread].data(), 0, stacks[thread].size()};
            fibers[thread].uc_link = &scheduler;
            makecontext(&fibers[thread], run, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (unsigned thread = 0; thread < threads; thread++)
                if (!ended[thread]) {
                    threadIdx.x = thread;
                    swapcontext(&scheduler, &fibers[thread]);
                    running = true;
                }
        }
    }
    return 0;
}
}
