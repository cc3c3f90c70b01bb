/* Row and column sums of a tensor's words in one pass over memory; see sums.py for what they are.

   numpy needs two kernels for this, of which the second finds a chunk in the cache but computes all the same. Here four
   rows go side by side through one loop: each word is loaded once, the columns are loaded and stored once for four words.

   No Python in here: the function is called through ctypes, which lets go of the interpreter's lock. */

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* The compiler makes one function for each of these processors, and the right one is taken where it runs. */
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=skylake-avx512", "avx2", "default"), optimize("O3")))
#else
#define FOR_EACH_PROCESSOR
#endif

/* A tensor may begin anywhere in its file. */
typedef uint64_t word __attribute__((aligned(1), may_alias));

/* rows[r] = sum of multipliers[c] * words[r * width + c] over c; columns[c] += sum of words[r * width + c] over r. */
FOR_EACH_PROCESSOR
void ladezeit_sums(const word *words, size_t height, size_t width, const uint64_t *restrict multipliers,
                   uint64_t *restrict rows, uint64_t *restrict columns)
{
    size_t r = 0;
    for (; r + 4 <= height; r += 4) {
        const word *a = words + r * width, *b = a + width, *c = b + width, *d = c + width;
        uint64_t sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
        for (size_t i = 0; i < width; i++) {
            uint64_t m = multipliers[i];
            sum_a += m * a[i];
            sum_b += m * b[i];
            sum_c += m * c[i];
            sum_d += m * d[i];
            columns[i] += a[i] + b[i] + c[i] + d[i];
        }
        rows[r] = sum_a;
        rows[r + 1] = sum_b;
        rows[r + 2] = sum_c;
        rows[r + 3] = sum_d;
    }
    for (; r < height; r++) {
        const word *a = words + r * width;
        uint64_t sum = 0;
        for (size_t i = 0; i < width; i++) {
            sum += multipliers[i] * a[i];
            columns[i] += a[i];
        }
        rows[r] = sum;
    }
}
