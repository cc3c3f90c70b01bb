/* Row and column sums of a tensor's words in one pass over memory; see sums.py for what they are.

   numpy needs two kernels for this, of which the second finds a chunk in the cache but computes all the same. Rows are
   taken one by one, because a processor fetches memory ahead where it is read in order: four rows side by side took a
   fifth longer, though the columns were then loaded and stored once for four words.

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
    for (size_t r = 0; r < height; r++) {
        const word *row = words + r * width;
        uint64_t sum = 0;
        for (size_t c = 0; c < width; c++) {
            sum += multipliers[c] * row[c];
            columns[c] += row[c];
        }
        rows[r] = sum;
    }
}
