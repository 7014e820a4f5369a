/* Products of a matrix with one vector, by rows, in fp32, bf16 and int8. Compiled on demand (build.py).

   A matrix is [rows, columns] with columns a multiple of 64; bf16 as its 16 bits, int8 with one fp32 scale a row. `chosen`: indices of the
   rows that count, in rising order, NULL: all of them.

   The order of every sum is fixed: it depends neither on the vector unit, nor on the number of threads, nor on which rows are left out.
   reference.py has the same sums in torch. So nothing here may be reassociated or contracted to a fused multiply-add.

   A thread takes pieces of the work until there is none. Workers wait for it actively for a moment, then asleep. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));

enum { FP32, BF16, INT8 };
static const int BYTES[] = {4, 2, 1};

static inline v16 load32(const void *at) { return *(const v16 *)at; }
static inline v16 load16(const void *at) {
    u16x32 wide = __builtin_convertvector(*(const h16 *)at, u16x32) << 16;
    v16 out;
    memcpy(&out, &wide, sizeof out);
    return out;
}
static inline v16 load8(const void *at) { return __builtin_convertvector(*(const b16 *)at, v16); }

/* Halves are added until one number is left. */
static inline float total(v16 a, v16 b, v16 c, v16 d) {
    v16 sum = (a + c) + (b + d);
    float lane[16];
    memcpy(lane, &sum, sizeof lane);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* What a thread reads a little later is fetched meanwhile: `ahead` bytes further in each row, then the rows that come next (rows that were
   chosen do not follow each other). Few enough bytes for the first cache to keep them, and enough for memory to answer in time. */
enum { PRODUCTS_AHEAD = 2048, SUMS_AHEAD = 1024 };

static inline void fetch(const char *const *rows, const char *const *next, int count, int64_t at, int64_t size, int64_t ahead, int64_t bytes) {
    int64_t later = at + (ahead < size ? ahead : size);
    const char *const *from = later < size ? rows : next;
    if (later >= size) later -= size;
    for (int r = 0; r < count; r++)
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from[r] + later + line);
}

/* Rows whose products are computed side by side, so that x is loaded once for them: as many as there are registers for. */
#ifdef __AVX512F__
enum { GROUP = 4 };
#else
enum { GROUP = 2 };
#endif

#define DOT(NAME, LOAD, SIZE)                                                                     \
    static void NAME(const char *const *rows, const char *const *next, const float *x, int64_t columns, float *out) { \
        v16 sum[GROUP][4] = {{{0}}};                                                              \
        for (int64_t i = 0; i < columns; i += 64) {                                               \
            fetch(rows, next, GROUP, i * SIZE, columns * SIZE, PRODUCTS_AHEAD, 64 * SIZE);        \
            for (int k = 0; k < 4; k++) {                                                         \
                v16 part = load32(x + i + 16 * k);                                                \
                for (int r = 0; r < GROUP; r++) sum[r][k] += LOAD(rows[r] + (i + 16 * k) * SIZE) * part; \
            }                                                                                     \
        }                                                                                         \
        for (int r = 0; r < GROUP; r++) out[r] = total(sum[r][0], sum[r][1], sum[r][2], sum[r][3]); \
    }
DOT(dot32, load32, 4)
DOT(dot16, load16, 2)
DOT(dot8, load8, 1)

/* y += w[0] row 0, then w[1] row 1, ... : four rows a pass, in order, so that y is read and written once for them. */
#define ADD(NAME, LOAD, SIZE)                                                                     \
    static void NAME(float *y, const char *const *rows, const char *const *next, const float *w, int count, int64_t columns) { \
        if (count == 4)                                                                           \
            for (int64_t i = 0; i < columns; i += 64) {                                           \
                fetch(rows, next, 4, i * SIZE, columns * SIZE, SUMS_AHEAD, 64 * SIZE);            \
                for (int64_t k = i; k < i + 64; k += 16) {                                        \
                    v16 sum = load32(y + k);                                                      \
                    sum += LOAD(rows[0] + k * SIZE) * w[0];                                       \
                    sum += LOAD(rows[1] + k * SIZE) * w[1];                                       \
                    sum += LOAD(rows[2] + k * SIZE) * w[2];                                       \
                    sum += LOAD(rows[3] + k * SIZE) * w[3];                                       \
                    *(v16 *)(y + k) = sum;                                                        \
                }                                                                                 \
            }                                                                                     \
        else                                                                                      \
            for (int r = 0; r < count; r++)                                                       \
                for (int64_t i = 0; i < columns; i += 16)                                         \
                    *(v16 *)(y + i) = load32(y + i) + LOAD(rows[r] + i * SIZE) * w[r];            \
    }
ADD(add32, load32, 4)
ADD(add16, load16, 2)
ADD(add8, load8, 1)

typedef struct {
    int kind, what;            /* what: the function below */
    const char *matrix;
    const float *scales;       /* of int8, by row */
    const float *x;            /* [columns] of products, [rows] of sums */
    const int32_t *chosen;
    int64_t count, columns, piece; /* count: rows that count; piece: rows or columns that a thread takes at once */
    float *out;
} Work;

static void products(const Work *w, int64_t from, int64_t to) {
    int64_t stride = w->columns * BYTES[w->kind], which[GROUP];
    const char *rows[GROUP], *next[GROUP];
    float found[GROUP];
    for (int64_t i = from; i < to; i += GROUP) {
        for (int r = 0; r < GROUP; r++) { /* a last group repeats its last row */
            int64_t here = i + r < to ? i + r : to - 1, ahead = here + GROUP < to ? here + GROUP : here;
            which[r] = w->chosen ? w->chosen[here] : here;
            rows[r] = w->matrix + which[r] * stride;
            next[r] = w->matrix + (w->chosen ? w->chosen[ahead] : ahead) * stride;
        }
        if (w->kind == FP32) dot32(rows, next, w->x, w->columns, found);
        else if (w->kind == BF16) dot16(rows, next, w->x, w->columns, found);
        else dot8(rows, next, w->x, w->columns, found);
        for (int r = 0; r < GROUP; r++) w->out[which[r]] = w->kind == INT8 ? found[r] * w->scales[which[r]] : found[r];
    }
}

static void sums(const Work *w, int64_t from, int64_t to) {
    int64_t size = BYTES[w->kind], stride = w->columns * size;
    const char *rows[4], *next[4];
    float weights[4];
    memset(w->out + from, 0, (to - from) * sizeof(float));
    for (int64_t i = 0; i < w->count; i += 4) {
        int count = w->count - i < 4 ? (int)(w->count - i) : 4;
        for (int r = 0; r < count; r++) {
            int64_t row = w->chosen ? w->chosen[i + r] : i + r, ahead = i + r + 4 < w->count ? i + r + 4 : i + r;
            rows[r] = w->matrix + row * stride + from * size;
            next[r] = w->matrix + (w->chosen ? w->chosen[ahead] : ahead) * stride + from * size;
            weights[r] = w->kind == INT8 ? w->x[row] * w->scales[row] : w->x[row];
        }
        if (w->kind == FP32) add32(w->out + from, rows, next, weights, count, to - from);
        else if (w->kind == BF16) add16(w->out + from, rows, next, weights, count, to - from);
        else add8(w->out + from, rows, next, weights, count, to - from);
    }
}

/* Reads all of it and writes one number a piece: how fast memory is. */
static void reading(const Work *w, int64_t from, int64_t to) {
    v16 a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t i = from; i < to; i += 64) {
        a += load32(w->x + i), b += load32(w->x + i + 16), c += load32(w->x + i + 32), d += load32(w->x + i + 48);
    }
    w->out[from / w->piece] = total(a, b, c, d);
}

enum { PRODUCTS, SUMS, READING };

enum { MOST = 256, PATIENCE = 2000 };
static struct {
    pthread_mutex_t lock;
    pthread_cond_t come, done;
    pid_t owner;
    int workers;
    atomic_int round, busy;
    atomic_llong next;
    int64_t end;
    Work work;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .come = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void take(void) {
    const Work *w = &pool.work;
    for (;;) {
        int64_t from = atomic_fetch_add(&pool.next, w->piece);
        if (from >= pool.end) return;
        int64_t to = from + w->piece < pool.end ? from + w->piece : pool.end;
        if (w->what == PRODUCTS) products(w, from, to);
        else if (w->what == SUMS) sums(w, from, to);
        else reading(w, from, to);
    }
}

static inline void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void *serve(void *first) {
    int seen = (int)(intptr_t)first;
    for (;;) {
        for (int i = 0; i < PATIENCE && atomic_load(&pool.round) == seen; i++) rest();
        if (atomic_load(&pool.round) == seen) {
            pthread_mutex_lock(&pool.lock);
            while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.come, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.round);
        take();
        if (atomic_fetch_sub(&pool.busy, 1) == 1) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

/* Have this many workers; a forked child has none of its parent's. */
static void staff(int workers) {
    if (pool.owner != getpid()) {
        pthread_mutex_init(&pool.lock, NULL);
        pthread_cond_init(&pool.come, NULL);
        pthread_cond_init(&pool.done, NULL);
        pool.owner = getpid(), pool.workers = 0, pool.busy = 0;
    }
    while (pool.workers < workers && pool.workers < MOST) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)atomic_load(&pool.round))) break;
        pthread_detach(thread);
        pool.workers++;
    }
}

static void run(int64_t end, int threads) {
    pool.end = end;
    atomic_store(&pool.next, 0);
    if (threads <= 1 || end <= pool.work.piece) {
        take();
        return;
    }
    staff(threads - 1);
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.busy, pool.workers);
    atomic_fetch_add(&pool.round, 1);
    pthread_cond_broadcast(&pool.come);
    pthread_mutex_unlock(&pool.lock);
    take();
    for (int i = 0; i < PATIENCE && atomic_load(&pool.busy); i++) rest();
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.busy)) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

/* out[row] = matrix[row] . x for the chosen rows; the others are left as they are. */
void row_products(int kind, const void *matrix, const float *scales, const float *x, const int32_t *chosen, int64_t count,
                  int64_t columns, float *out, int threads) {
    int64_t large = (1 << 20) / (columns * BYTES[kind]), fair = count / (4 * (threads < 1 ? 1 : threads));
    int64_t piece = large < fair ? large : fair;
    pool.work = (Work){kind, PRODUCTS, matrix, scales, x, chosen, count, columns, piece < GROUP ? GROUP : piece, out};
    run(count, threads);
}

/* out[columns] = sum over the chosen rows of weights[row] * matrix[row], in their order. */
void row_sums(int kind, const void *matrix, const float *scales, const float *weights, const int32_t *chosen, int64_t count,
              int64_t columns, float *out, int threads) {
    int64_t piece = 8192 / BYTES[kind];
    pool.work = (Work){kind, SUMS, matrix, scales, weights, chosen, count, columns, piece, out};
    run(columns, threads);
}

/* Read numbers, a multiple of 64; out has one for each 65536. */
void read_all(const float *numbers, int64_t count, float *out, int threads) {
    pool.work = (Work){FP32, READING, NULL, NULL, numbers, NULL, 1, count, 65536, out};
    run(count, threads);
}

/* Ask for large pages, before they are first written: with small ones the processor waits for their addresses. */
void large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = 1 << 12, from = ((uintptr_t)memory + page - 1) & ~(page - 1);
    if (bytes > (1 << 22)) madvise((void *)from, ((uintptr_t)memory + bytes - from) & ~(page - 1), MADV_HUGEPAGE);
#endif
}
