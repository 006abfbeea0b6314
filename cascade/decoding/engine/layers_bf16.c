/* Decoder layers with Llama's modules in bfloat16, bit for bit as PyTorch computes them.
 *
 * The order of every sum and the place of every rounding are those of PyTorch's own kernels (release
 * 2.13: `F.linear`, sums over a row, `scaled_dot_product_attention` of one query in blocks of 512
 * keys, with its approximation of the exponential). They depend on the processor: `bf16_tiles.h` has
 * the products of processors with AMX, `bf16_vectors.h` those of processors with AVX2 and without
 * instructions for bfloat16. Where PyTorch computes otherwise, tests find a difference, and these
 * layers are not used.
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

/* Keys that one block of attention holds. */
#define BLOCK 512

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
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

static inline float total(lanes sums)
{
    float part[LANES];
    memcpy(part, &sums, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "bf16_tiles.h"
#else
#include "bf16_vectors.h"
#endif

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

typedef float attention_lanes
    __attribute__((vector_size(4 * ATTENTION_LANES), aligned(4), may_alias));

static inline float attention_total(attention_lanes sums)
{
    float part[ATTENTION_LANES];
    memcpy(part, &sums, sizeof part);
    for (int width = ATTENTION_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
}

/* Attention of one query head of one row, in blocks of keys. */
static void attend(const element *query, const element *keys, const element *values, int64_t first,
                   int64_t base, const int64_t *others, int64_t more, int64_t size, float scaling,
                   float *scores, element *result)
{
    const int64_t past = base > first ? base - first : 0, count = past + more;
    float made[size], most = -INFINITY, sum = 0;
    const element *from[BLOCK];
    memset(made, 0, sizeof made);
#define COLUMN(i) ((i) < past ? first + (i) : others[(i) - past])
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t some = count - begin < BLOCK ? count - begin : BLOCK;
        float largest = -INFINITY;
        for (int64_t i = 0; i < some; i++)
            from[i] = keys + COLUMN(begin + i) * size;
        scores_of(query, from, some, size, scores);
        for (int64_t i = 0; i < some; i++) {
            scores[i] *= scaling;
            largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
        }
        largest = most > largest ? most : largest;
        attention_lanes sums[2] = {{0}};
        int64_t i = 0;
        for (; i + ATTENTION_LANES <= some; i += ATTENTION_LANES) {
            for (int k = 0; k < ATTENTION_LANES; k++)
                scores[i + k] = power(scores[i + k] - largest);
            sums[i / ATTENTION_LANES % ATTENTION_SUMS] += *(attention_lanes *)(scores + i);
        }
        float found = attention_total(sums[0] + sums[1]);
        for (; i < some; i++) {
            /* In double precision: expf is off by an ulp in one of some hundred cases. */
            scores[i] = (float)exp((double)(scores[i] - largest));
            found += scores[i];
        }
        const float factor = expf(most - largest);
        sum = fmaf(factor, sum, found);
        most = largest;
        for (int64_t d = 0; d < size && begin; d++)
            made[d] *= factor;
        for (i = 0; i < some; i++) {
            scores[i] = number(rounded(scores[i]));
            from[i] = values + COLUMN(begin + i) * size;
        }
        gather_all(from, scores, some, size, made);
    }
#undef COLUMN
    const float factor = 1.0f / sum;
    for (int64_t d = 0; d < size; d++)
        result[d] = rounded(made[d] * factor);
}

#include "pass.h"

/* --- For tests of rounding -------------------------------------------------------------------- */

/* Attention of one query for each of `heads` heads over `count` keys. */
void cascade_attention(const element *queries, const element *keys, const element *values,
                       int64_t heads, int64_t count, int64_t size, double scaling, float *scores,
                       element *results)
{
    for (int64_t h = 0; h < heads; h++)
        attend(queries + h * size, keys + h * count * size, values + h * count * size, 0, count, 0,
               0, size, (float)scaling, scores, results + h * size);
}

/* The norm of each of `count` rows. */
void cascade_norm(const element *weight, const element *inputs, int64_t count, int64_t size,
                  double epsilon, element *results)
{
    for (int64_t r = 0; r < count; r++)
        norm(weight, inputs + r * size, size, epsilon, results + r * size);
}
