/* Decoder layers with Llama's modules in fp32, computed over a few rows in one parallel region.
 *
 * One row is one token of one sequence. All weights are read once per call, whatever the number of
 * rows, which is what makes drafts cheap. Weights are the model's own tensors, `[outputs, inputs]`.
 */

#include <math.h>

#if defined(__FMA__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <stdint.h>
#include <string.h>
typedef float element;
#define number_of(x) (x)
#define stored(x) (x)
#define half_step(x) (0.0f * (x))
#include "layers.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

/* Inputs whose products are summed together; more do not fit in the registers. */
#define TOGETHER 8

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

static inline float total_eight(eight sums)
{
#ifdef __AVX2__
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)sums),
                             _mm256_extractf128_ps((__m256)sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
#endif
}

static inline float total(lanes sums)
{
#if LANES == 8
    return total_eight((eight)sums);
#else
    eight halves[2];
    memcpy(halves, &sums, sizeof halves);
    return total_eight(halves[0] + halves[1]);
#endif
}

/* expf within an ulp or two, in a form that compilers vectorize. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t scale = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &scale, sizeof power);
    return p * power;
}

/* The dot product of two vectors, in several sums, because one addition waits for the one before. */
static inline float dot(const float *one, const float *other, int64_t size)
{
    lanes sums[4] = {0};
    int64_t at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            sums[k] += *(const lanes *)(one + at + k * LANES)
                       * *(const lanes *)(other + at + k * LANES);
    for (; at + LANES <= size; at += LANES)
        sums[0] += *(const lanes *)(one + at) * *(const lanes *)(other + at);
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; at < size; at++)
        sum += one[at] * other[at];
    return sum;
}

/* The dot products of the weights of a row of codes with `count` inputs. */
static inline __attribute__((always_inline)) void
coded_dots(const void *row, const float *inputs, int64_t size, int64_t bits, int count,
           float *results)
{
    /* Several sums for each input, because one addition waits for the one before. */
    const int several = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    eight sums[TOGETHER][4];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++)
            sums[r][k] = (eight){0};
    for (int64_t b = 0; b < size / CODED; b++) {
        eight weights[4];
        decode(row, b, bits, weights);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) {
                const float *input = inputs + r * size + CODED * b + 8 * k;
                sums[r][k % several]
                    = fused_eight(weights[k], *(const eight *)input, sums[r][k % several]);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        eight joined = sums[r][0];
#pragma GCC unroll 3
        for (int k = 1; k < several; k++)
            joined += sums[r][k];
        results[r] = total_eight(joined);
    }
}

#define CODED_DOTS(count)                                                                       \
    case count:                                                                                 \
        coded_dots(row, inputs, size, bits, count, results);                                   \
        break;

static inline __attribute__((always_inline)) void
coded_products(const void *row, const float *inputs, int64_t size, int64_t bits, int count,
               float *results)
{
    switch (count) {
        CODED_DOTS(1) CODED_DOTS(2) CODED_DOTS(3) CODED_DOTS(4)
        CODED_DOTS(5) CODED_DOTS(6) CODED_DOTS(7) CODED_DOTS(8)
    }
}

/* The dot products of a weight vector with `count` inputs. */
static inline __attribute__((always_inline)) void
dots(const float *weight, const float *inputs, int64_t size, int count, float *results)
{
    const int several = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    lanes sums[TOGETHER][4];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++)
            sums[r][k] = (lanes){0};
    int64_t at = 0;
    for (; at + several * LANES <= size; at += several * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++) {
            lanes w = *(const lanes *)(weight + at + k * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++)
                sums[r][k] += w * *(const lanes *)(inputs + r * size + at + k * LANES);
        }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        lanes joined = sums[r][0];
#pragma GCC unroll 3
        for (int k = 1; k < several; k++)
            joined += sums[r][k];
        float sum = total(joined);
        for (int64_t i = at; i < size; i++)
            sum += weight[i] * inputs[r * size + i];
        results[r] = sum;
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

/* results[r, o] (+)= found + bias[o]. */
static inline void add_result(const Matrix *matrix, float found, int64_t o, float *result, int adds)
{
    float made = found + (matrix->bias ? matrix->bias[o] : 0);
    *result = adds ? *result + made : made;
}

/* results[r, o] (+)= weight[o] . inputs[r] + bias[o], for outputs begin..end-1. */
static void linear(const Matrix *matrix, const float *inputs, int64_t size, int64_t count,
                   int64_t begin, int64_t end, float *results, int64_t width, int adds,
                   float *unused)
{
    (void)unused;
    float found[TOGETHER];
    for (int64_t o = begin; o < end; o++) {
        const int coded = matrix->codes && matrix->coded[o];
        for (int64_t r = 0; r < count; r += TOGETHER) {
            const int some = count - r < TOGETHER ? (int)(count - r) : TOGETHER;
            const float *from = inputs + r * size;
            if (!coded)
                products(matrix->weight + o * size, from, size, some, found);
            else if (matrix->bits == 4)
                coded_products(row_of(matrix, o, size), from, size, 4, some, found);
            else
                coded_products(row_of(matrix, o, size), from, size, 8, some, found);
            for (int j = 0; j < some; j++)
                add_result(matrix, found[j], o, results + (r + j) * width + o, adds);
        }
    }
}

static void norm(const float *weight, const float *input, int64_t size, double epsilon,
                 float *result)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++)
        sum += input[i] * input[i];
    float factor = 1.0f / sqrtf(sum / size + (float)epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        result[i] = weight[i] * (input[i] * factor);
}

static void activate(const Sizes *sizes, float *gate, const float *up, int64_t size)
{
    const int64_t kind = sizes->activation;
    if (kind == SILU) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    } else if (kind == GELU_TANH) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float x = gate[i], inside = 0.7978845608028654f * (x + 0.044715f * x * x * x);
            gate[i] = x / (1.0f + exponential(-2.0f * inside)) * up[i];
        }
    } else if (kind == GELU) {
        for (int64_t i = 0; i < size; i++)
            gate[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.7071067811865476f)) * up[i];
    } else {
        for (int64_t i = 0; i < size; i++)
            gate[i] = (gate[i] > 0 ? gate[i] : 0) * up[i];
    }
}

/* Norm (optional) and rotate one head in place. */
static void turn(float *head, const float *weight, double epsilon, int64_t rotates,
                 const float *cosine, const float *sine, int64_t size, float *scratch)
{
    if (weight)
        norm(weight, head, size, epsilon, head);
    if (!rotates)
        return;
    int64_t half = size / 2;
    memcpy(scratch, head, sizeof(float) * size);
    for (int64_t i = 0; i < half; i++) {
        head[i] = scratch[i] * cosine[i] - scratch[i + half] * sine[i];
        head[i + half] = scratch[i + half] * cosine[i + half] + scratch[i] * sine[i + half];
    }
}

/* Attention of one query head of one row. `scores` has room for all columns and rows. */
static void attend(const float *query, const float *keys, const float *values, int64_t first,
                   int64_t base, const int64_t *others, int64_t more, int64_t size, float scaling,
                   float *scores, float *result)
{
    int64_t past = base > first ? base - first : 0, count = past + more;
    for (int64_t i = 0; i < past; i++)
        scores[i] = dot(keys + (first + i) * size, query, size);
    for (int64_t i = 0; i < more; i++)
        scores[past + i] = dot(keys + others[i] * size, query, size);
    float most = scores[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; i++)
        most = scores[i] > most ? scores[i] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        scores[i] = exponential(scaling * (scores[i] - most));
        sum += scores[i];
    }
    for (int64_t d = 0; d < size; d++)
        result[d] = 0;
    for (int64_t i = 0; i < count; i++) {
        const float *value = values + (i < past ? first + i : others[i - past]) * size;
        float weight = scores[i];
#pragma omp simd
        for (int64_t d = 0; d < size; d++)
            result[d] += weight * value[d];
    }
    float factor = 1.0f / sum;
    for (int64_t d = 0; d < size; d++)
        result[d] *= factor;
}

#include "pass.h"
