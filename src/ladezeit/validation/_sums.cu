/* Row and column sums of many tensors' words in one pass over a GPU's memory; see sums.py for what they are.

   A block takes ROWS rows of one tensor, a thread the same four words of each of them. A warp's loads are of 512 bytes
   that follow each other, and row sums are added up within warps, so that memory is read once, in one launch for all
   tensors, and the arithmetic is hidden behind it. Compiled where it is used, by the compiler that torch brings along. */

typedef unsigned long long word;

#define WIDTH 1024
#define ROW_BYTES (WIDTH * 8)
#define ROWS 64
#define THREADS 256
#define WARPS (THREADS / 32)

/* One tensor: where it lies and how long it is, in bytes; where its row sums and its column sums begin, in words from
   `sums` on; the first block that works on it. */
struct Part {
    word address, size, rows, columns, first_block;
};

/* The word at an offset of bytes that may begin anywhere; what lies behind their end is zero. */
__device__ word word_at(const unsigned char *bytes, word offset, word size)
{
    word found = 0;
    for (int byte = 0; byte < 8; byte++)
        if (offset + byte < size)
            found |= (word)bytes[offset + byte] << (8 * byte);
    return found;
}

/* Writes the row sums of all parts, and adds their column sums to what is there. */
extern "C" __global__ void __launch_bounds__(THREADS)
    ladezeit_sums(const Part *parts, int count, const word *multipliers, word *sums)
{
    __shared__ word of_warp[WARPS][ROWS];
    const int thread = threadIdx.x;
    int number = 0;
    for (int end = count; end - number > 1;) {
        const int middle = (number + end) / 2;
        if (parts[middle].first_block <= blockIdx.x)
            number = middle;
        else
            end = middle;
    }
    const Part part = parts[number];
    const word first = (blockIdx.x - part.first_block) * ROWS;
    const word left = part.size - first * ROW_BYTES; /* bytes from this block's first row on */
    const word height = (left + ROW_BYTES - 1) / ROW_BYTES;
    const int here = height < ROWS ? (int)height : ROWS;
    const unsigned char *bytes = (const unsigned char *)part.address + first * ROW_BYTES;
    const bool aligned = part.address % 16 == 0;

    /* Two words at the thread's place in each half of a row. */
    const int place[4] = {2 * thread, 2 * thread + 1, WIDTH / 2 + 2 * thread, WIDTH / 2 + 2 * thread + 1};
    word factor[4], column[4] = {0, 0, 0, 0};
    for (int k = 0; k < 4; k++)
        factor[k] = multipliers[place[k]];

    for (int row = 0; row < here; row++) {
        const word start = (word)row * ROW_BYTES;
        word found[4];
        if (aligned && start + ROW_BYTES <= left) {
            const ulonglong2 *pairs = (const ulonglong2 *)(bytes + start);
            const ulonglong2 one = __ldcs(pairs + thread), other = __ldcs(pairs + THREADS + thread);
            found[0] = one.x, found[1] = one.y, found[2] = other.x, found[3] = other.y;
        } else {
            for (int k = 0; k < 4; k++)
                found[k] = word_at(bytes, start + 8 * (word)place[k], left);
        }
        word sum = 0;
        for (int k = 0; k < 4; k++) {
            sum += factor[k] * found[k];
            column[k] += found[k];
        }
        for (int distance = 16; distance > 0; distance /= 2)
            sum += __shfl_down_sync(0xffffffffu, sum, distance);
        if (thread % 32 == 0)
            of_warp[thread / 32][row] = sum;
    }
    __syncthreads();
    if (thread < here) {
        word sum = 0;
        for (int warp = 0; warp < WARPS; warp++)
            sum += of_warp[warp][thread];
        sums[part.rows + first + thread] = sum;
    }
    for (int k = 0; k < 4; k++)
        atomicAdd(sums + part.columns + place[k], column[k]);
}
