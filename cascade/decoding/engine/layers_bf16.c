/* Decoder layers with Llama's modules in bfloat16, bit for bit as PyTorch computes them.
 *
 * The order of every sum and the place of every rounding are those of PyTorch's own kernels for
 * processors with AVX2 and without instructions for bfloat16 (release 2.13: `F.linear`, sums over a
 * row, `scaled_dot_product_attention` of one query in blocks of 512 keys, with its approximation of
 * the exponential). Where PyTorch computes otherwise, the self-test of the engine finds a
 * difference, and these layers are not used.
 *
 * All weights are read once per call, whatever the number of rows. Products of two bfloat16 numbers
 * are exact in fp32, so fusing them with an addition changes nothing.
 */

#include <math.h>

#if defined(__FMA__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <stdint.h>
#include <string.h>
typedef uint16_t element;

#define LANES 8

/* Inputs whose products are summed together; more do not fit in the registers. */
#define TOGETHER 8

/* Keys that one block of attention holds. */
#define BLOCK 512

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float quarters __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t quarter_bits __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t quarter_halves __attribute__((vector_size(8), aligned(2), may_alias));

static inline float number(element half)
{
    uint32_t whole = (uint32_t)half << 16;
    float found;
    memcpy(&found, &whole, sizeof found);
    return found;
}

static inline lanes numbers(const element *from)
{
    return (lanes)(__builtin_convertvector(*(const halves *)from, bits) << 16);
}

/* Round to the nearest bfloat16, ties to even. */
static inline element rounded(float value)
{
    uint32_t whole;
    memcpy(&whole, &value, sizeof whole);
    return value != value ? 0x7fc0 : (element)((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
}

/* Eight numbers, rounded to bfloat16. */
static inline lanes rounded_all(lanes values)
{
    bits whole = (bits)values;
    return (lanes)((whole + 0x7fff + (whole >> 16 & 1)) & 0xffff0000);
}

/* The largest distance from which numbers are rounded to a value. */
static inline float half_step(float value)
{
    uint32_t whole;
    memcpy(&whole, &value, sizeof whole);
    whole &= 0x7f800000;
    memcpy(&value, &whole, sizeof value);
    return value / 256;
}

#define number_of number
#define stored(x) ((eight)rounded_all((lanes)(x)))
#include "layers.h"

static inline __attribute__((always_inline)) void decode_all(const void *row, int64_t size,
                                                             int64_t bits, float *to)
{
    for (int64_t b = 0; b < size / CODED; b++)
        decode(row, b, bits, (eight *)(to + CODED * b));
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

static inline float total(lanes sums)
{
    float part[LANES];
    memcpy(part, &sums, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
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

/* The sum of squares: four sums over every fourth vector, gathered every 16 vectors so that errors
 * stay small, as PyTorch's cascade sum does. */
static float squares(const element *input, int64_t size)
{
    const int64_t vectors = size / LANES, quarter = vectors / 4, step = 16;
    lanes sums[4][4];
    memset(sums, 0, sizeof sums);
    int64_t i = 0;
    while (i + step <= quarter) {
        for (int64_t end = i + step; i < end; i++)
            for (int k = 0; k < 4; k++) {
                lanes x = numbers(input + LANES * (4 * i + k));
                sums[0][k] += x * x;
            }
        for (int level = 1; level < 4; level++) {
            for (int k = 0; k < 4; k++) {
                sums[level][k] += sums[level - 1][k];
                sums[level - 1][k] = (lanes){0};
            }
            if (i & (step - 1) << (4 * level))
                break;
        }
    }
    for (; i < quarter; i++)
        for (int k = 0; k < 4; k++) {
            lanes x = numbers(input + LANES * (4 * i + k));
            sums[0][k] += x * x;
        }
    for (int level = 1; level < 4; level++)
        for (int k = 0; k < 4; k++)
            sums[0][k] += sums[level][k];
    for (i = 4 * quarter; i < vectors; i++) {
        lanes x = numbers(input + LANES * i);
        sums[0][0] += x * x;
    }
    for (int k = 1; k < 4; k++)
        sums[0][0] += sums[0][k];
    float part[LANES], sum = 0;
    memcpy(part, &sums[0][0], sizeof part);
    for (i = LANES * vectors; i < size; i++)
        sum += number(input[i]) * number(input[i]);
    for (int k = 0; k < LANES; k++)
        sum += part[k];
    return sum;
}

static void norm(const element *weight, const element *input, int64_t size, double epsilon,
                 element *result)
{
    float factor = 1.0f / sqrtf(squares(input, size) / (float)size + (float)epsilon);
    for (int64_t i = 0; i < size; i++)
        result[i] = rounded(number(weight[i]) * number(rounded(number(input[i]) * factor)));
}

static void activate(const Sizes *sizes, element *gate, const element *up, int64_t size)
{
    for (int64_t i = 0; i < size; i++)
        gate[i] = rounded(number(sizes->activations[gate[i]]) * number(up[i]));
}

/* Norm (optional) and rotate one head in place. */
static void turn(element *head, const element *weight, double epsilon, int64_t rotates,
                 const element *cosine, const element *sine, int64_t size, element *scratch)
{
    memcpy(scratch, head, sizeof(element) * size);
    if (weight)
        norm(weight, scratch, size, epsilon, head);
    if (!rotates)
        return;
    memcpy(scratch, head, sizeof(element) * size);
    int64_t half = size / 2;
    for (int64_t i = 0; i < size; i++) {
        float other = i < half ? -number(scratch[i + half]) : number(scratch[i - half]);
        element one = rounded(number(scratch[i]) * number(cosine[i]));
        head[i] = rounded(number(one) + number(rounded(other * number(sine[i]))));
    }
}

/* PyTorch's approximation of the exponential for attention in half precision: the bits of 2^x are
 * computed as an integer, after a polynomial has corrected the mantissa (Malossi et al. 2015). */
static inline float power(float x)
{
    float scaled = x * 1.44269502f, part = scaled - floorf(scaled);
    float correction = fmaf(part, -0.079204240219773236f, -0.22433836478672356f);
    correction = fmaf(part, correction, 0.30354260500649682f);
    correction = fmaf(part, correction, 0.00010703434948458272f);
    int32_t whole = (int32_t)fmaf(8388608.0f, scaled - correction, 8388608.0f * 127.0f);
    float found;
    memcpy(&found, &whole, sizeof found);
    return x < -87.3365479f ? 0.0f : x != x ? x : found;
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

/* Attention of one query head of one row, in blocks of keys. */
static void attend(const element *query, const element *keys, const element *values, int64_t first,
                   int64_t base, const int64_t *others, int64_t more, int64_t size, float scaling,
                   float *scores, element *result)
{
    const int64_t past = base > first ? base - first : 0, count = past + more;
    float wide[size], made[size], most = -INFINITY, sum = 0;
    widen(query, size, wide);
    memset(made, 0, sizeof made);
#define COLUMN(i) ((i) < past ? first + (i) : others[(i) - past])
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t some = count - begin < BLOCK ? count - begin : BLOCK;
        float largest = -INFINITY;
        for (int64_t i = 0; i < some; i++) {
            scores[i] = score(keys + COLUMN(begin + i) * size, wide, size) * scaling;
            largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
        }
        largest = most > largest ? most : largest;
        lanes sums[2] = {{0}, {0}};
        int64_t i = 0;
        for (; i + LANES <= some; i += LANES) {
            for (int k = 0; k < LANES; k++)
                scores[i + k] = power(scores[i + k] - largest);
            sums[i / LANES % 2] += *(lanes *)(scores + i);
        }
        float found = total(sums[0] + sums[1]);
        for (; i < some; i++) {
            scores[i] = expf(scores[i] - largest);
            found += scores[i];
        }
        const float factor = expf(most - largest);
        sum = fmaf(factor, sum, found);
        most = largest;
        for (int64_t d = 0; d < size && begin; d++)
            made[d] *= factor;
        for (i = 0; i < some; i++)
            scores[i] = number(rounded(scores[i]));
        const element *from[4];
        for (i = 0; i + 4 <= some; i += 4) {
            for (int k = 0; k < 4; k++)
                from[k] = values + COLUMN(begin + i + k) * size;
            gather(made, from, scores + i, size, 4);
        }
        for (int64_t last = some - 1; last >= i; last--) {
            from[0] = values + COLUMN(begin + last) * size;
            gather(made, from, scores + last, size, 1);
        }
    }
#undef COLUMN
    const float factor = 1.0f / sum;
    for (int64_t d = 0; d < size; d++)
        result[d] = rounded(made[d] * factor);
}

#include "pass.h"
