/* Products in bfloat16 as PyTorch computes them on processors with AVX2 and without instructions for
 * bfloat16: `F.linear`, and the two products of attention. */

/* Inputs whose products are summed together; more do not fit in the registers. */
#define TOGETHER 8

/* Numbers of a vector of attention, and the vectors that weights are added up in. */
#define ATTENTION_LANES 8
#define ATTENTION_SUMS 2

typedef float quarters __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t quarter_bits __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t quarter_halves __attribute__((vector_size(8), aligned(2), may_alias));

static inline void enter(int64_t count)
{
    (void)count;
}

static inline void leave(void)
{
}

static inline __attribute__((always_inline)) void decode_all(const void *row, int64_t size,
                                                             int64_t bits, float *to)
{
    for (int64_t b = 0; b < size / CODED; b++) {
        fetch(row, b, bits);
        decode(row, b, bits, (eight *)(to + CODED * b));
    }
}

/* The weights of an output from its codes. */
static inline void decode_row(const Matrix *matrix, int64_t output, int64_t size, float *to)
{
    const void *row = row_of(matrix, output, size);
    if (matrix->bits == 4)
        decode_all(row, size, 4, to);
    else
        decode_all(row, size, 8, to);
}

static inline lanes fused(lanes one, lanes other, lanes sum)
{
    return (lanes)fused_eight((eight)one, (eight)other, (eight)sum);
}

/* The sum of eight registers, as a tree. */
static inline float joined(lanes *sums)
{
#pragma GCC unroll 3
    for (int half = 4; half; half /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return total(sums[0]);
}

/* What is left of a dot product behind the last 64 numbers. */
static float with_tail(float sum, const float *one, const float *other, int64_t size)
{
    int64_t at = 0;
    if (2 * LANES <= size) {
        lanes tail = {0};
        for (; at + 2 * LANES <= size; at += 2 * LANES) {
            tail = fused(*(const lanes *)(one + at), *(const lanes *)(other + at), tail);
            tail = fused(*(const lanes *)(one + at + LANES), *(const lanes *)(other + at + LANES),
                         tail);
        }
        sum += total(tail);
    }
    for (; at < size; at++)
        sum += one[at] * other[at];
    return sum;
}

/* The dot product of a weight vector with one input. */
static float dot(const element *weight, const float *input, int64_t size)
{
    lanes sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        sums[i] = (lanes){0};
    int64_t at = 0;
    for (; at + 64 <= size; at += 64)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            sums[i] = fused(numbers(weight + at + 8 * i), *(const lanes *)(input + at + 8 * i),
                            sums[i]);
    float sum = joined(sums);
    if (at == size)
        return sum;
    float rest[64];
    for (int64_t i = at; i < size; i++)
        rest[i - at] = number(weight[i]);
    return with_tail(sum, rest, input + at, size - at);
}

/* The dot product of the weights of a row of codes with one input. */
static inline __attribute__((always_inline)) float
coded_dot(const void *row, const float *input, int64_t size, int64_t bits)
{
    lanes sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        sums[i] = (lanes){0};
    int64_t at = 0;
    for (; at + 64 <= size; at += 64)
        /* One block after the other, so that all weights and sums stay in registers. */
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            eight weights[4];
            fetch(row, at / CODED + half, bits);
            decode(row, at / CODED + half, bits, weights);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                sums[4 * half + i]
                    = fused((lanes)weights[i], *(const lanes *)(input + at + 32 * half + 8 * i),
                            sums[4 * half + i]);
        }
    float sum = joined(sums);
    if (at == size)
        return sum;
    float rest[CODED];
    decode(row, at / CODED, bits, (eight *)rest);
    return with_tail(sum, rest, input + at, size - at);
}

/* The dot products of the weights of a row of codes with two inputs. Blocks take turns between the
 * first and the last four sums of an input, so that all sums of two inputs stay in registers. */
static inline __attribute__((always_inline)) void
coded_pair(const void *row, const float *inputs, int64_t size, int64_t bits, float *results)
{
    lanes parts[2][8];
    const int64_t blocks = size / 64 * 2;
    for (int turn = 0; turn < 2; turn++) {
        lanes sums[2][4] = {{{0}}};
        for (int64_t b = turn; b < blocks; b += 2) {
            eight weights[4];
            fetch(row, b, bits);
            decode(row, b, bits, weights);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++)
                    sums[r][i] = fused((lanes)weights[i],
                                       *(const lanes *)(inputs + r * size + CODED * b + 8 * i),
                                       sums[r][i]);
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                parts[r][4 * turn + i] = sums[r][i];
    }
    float rest[CODED];
    const int64_t whole = CODED * blocks;
    if (whole < size)
        decode(row, blocks, bits, (eight *)rest);
    for (int r = 0; r < 2; r++) {
        float sum = joined(parts[r]);
        const float *input = inputs + r * size + whole;
        results[r] = whole == size ? sum : with_tail(sum, rest, input, size - whole);
    }
}

static inline void coded_products(const Matrix *matrix, int64_t output, const float *inputs,
                                  int64_t size, int count, float *results)
{
    const void *row = row_of(matrix, output, size);
    if (matrix->bits == 4 && count == 1)
        results[0] = coded_dot(row, inputs, size, 4);
    else if (matrix->bits == 4)
        coded_pair(row, inputs, size, 4, results);
    else if (count == 1)
        results[0] = coded_dot(row, inputs, size, 8);
    else
        coded_pair(row, inputs, size, 8, results);
}

/* The dot products of a weight vector, already wide, with `count` inputs. */
static inline __attribute__((always_inline)) void
dots(const float *weight, const float *inputs, int64_t size, int count, float *results)
{
    lanes parts[TOGETHER][8];
    int64_t whole = size / 64 * 64;
    for (int i = 0; i < 8; i++) {
        lanes sums[TOGETHER];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            sums[r] = (lanes){0};
        for (int64_t at = 8 * i; at < whole; at += 64) {
            lanes w = *(const lanes *)(weight + at);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++)
                sums[r] = fused(w, *(const lanes *)(inputs + r * size + at), sums[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            parts[r][i] = sums[r];
    }
    for (int r = 0; r < count; r++) {
        float sum = joined(parts[r]);
        const float *input = inputs + r * size + whole;
        results[r] = whole == size ? sum : with_tail(sum, weight + whole, input, size - whole);
    }
}

#define DOTS(count)                                                                             \
    case count:                                                                                 \
        dots(weight, inputs, size, count, results);                                            \
        break;

static inline void products(const float *weight, const float *inputs, int64_t size, int count,
                            float *results)
{
    switch (count) {
        DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8)
    }
}

static void widen(const element *from, int64_t size, float *to)
{
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        *(lanes *)(to + i) = numbers(from + i);
    for (; i < size; i++)
        to[i] = number(from[i]);
}

/* results[r, o] (+)= weight[o] . inputs[r] + bias[o], for outputs begin..end-1. */
static void linear(const Matrix *matrix, const element *inputs, int64_t size, int64_t count,
                   int64_t begin, int64_t end, element *results, int64_t width, int adds,
                   float *wide)
{
    float found[MOST], *row = wide + count * size;
    const element *bias = matrix->bias;
    /* Fewer inputs at a time where more do not fit in the first cache. */
    const int most = size > 1024 ? TOGETHER / 2 : TOGETHER;
    widen(inputs, count * size, wide);
    for (int64_t o = begin; o < end; o++) {
        const int coded = matrix->codes && matrix->coded[o];
        if (coded && count <= 2) {
            coded_products(matrix, o, wide, size, (int)count, found);
        } else if (count == 1) {
            found[0] = dot(matrix->weight + o * size, wide, size);
        } else {
            if (coded)
                decode_row(matrix, o, size, row);
            else
                widen(matrix->weight + o * size, size, row);
            for (int64_t r = 0; r < count; r += most)
                products(row, wide + r * size, size, count - r < most ? (int)(count - r) : most,
                         found + r);
        }
        for (int64_t r = 0; r < count; r++) {
            element *result = results + r * width + o;
            element made = rounded(bias ? found[r] + number(bias[o]) : found[r]);
            *result = adds ? rounded(number(*result) + number(made)) : made;
        }
    }
}

/* The dot product of a key with a query: four sums over every fourth number. */
static inline float score(const element *key, const float *query, int64_t size)
{
    quarters sums = {0};
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
        sums += (quarters)(__builtin_convertvector(*(const quarter_halves *)(key + i), quarter_bits)
                           << 16)
                * *(const quarters *)(query + i);
    for (; i < size; i++)
        sums[0] += number(key[i]) * query[i];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/* made += the values of up to four keys, weighted. */
static inline __attribute__((always_inline)) void
gather(float *made, const element *const *from, const float *weights, int64_t size, int count)
{
    int64_t d = 0;
#define TERM(i) (numbers(from[i] + d) * weights[i])
    for (; d + LANES <= size; d += LANES)
        *(lanes *)(made + d)
            += count == 4 ? (TERM(0) + TERM(2)) + (TERM(1) + TERM(3)) : TERM(0);
#undef TERM
#define TERM(i) (number(from[i][d]) * weights[i])
    for (; d < size; d++)
        made[d] += count == 4 ? (TERM(0) + TERM(2)) + (TERM(1) + TERM(3)) : TERM(0);
#undef TERM
}

/* scores[i] = keys[i] . query. */
static void scores_of(const element *query, const element *const *keys, int64_t count, int64_t size,
                      float *scores)
{
    float wide[size];
    widen(query, size, wide);
    for (int64_t i = 0; i < count; i++)
        scores[i] = score(keys[i], wide, size);
}

/* made += the values, weighted. */
static void gather_all(const element *const *values, const float *weights, int64_t count,
                       int64_t size, float *made)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        gather(made, values + i, weights + i, size, 4);
    for (int64_t last = count - 1; last >= i; last--)
        gather(made, values + last, weights + last, size, 1);
}
