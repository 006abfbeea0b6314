/* Decoder layers with Llama's modules in fp32, computed over a few rows in one parallel region.
 *
 * One row is one token of one sequence. All weights are read once per call, whatever the number of
 * rows, which is what makes drafts cheap. Weights are the model's own tensors, `[outputs, inputs]`.
 */

#include <math.h>

typedef float element;
#include "layers.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

static inline float total(lanes sums)
{
    float part[LANES];
    memcpy(part, &sums, sizeof part);
#pragma GCC unroll 4
    for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
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

/* Dot products of one weight vector with `count` inputs. */
static inline __attribute__((always_inline)) void
dots(const float *weight, const float *inputs, int64_t size, int64_t stride, int count,
     float *results)
{
    lanes sums[TOGETHER];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
        sums[r] = (lanes){0};
    int64_t at = 0;
    for (; at + LANES <= size; at += LANES) {
        lanes w = *(const lanes *)(weight + at);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            sums[r] += w * *(const lanes *)(inputs + r * stride + at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        float sum = total(sums[r]);
        for (int64_t i = at; i < size; i++)
            sum += weight[i] * inputs[r * stride + i];
        results[r] = sum;
    }
}

#define DOTS(count)                                                                             \
    case count:                                                                                 \
        dots(weight, inputs, size, stride, count, results);                                    \
        break;

static inline void products(const float *weight, const float *inputs, int64_t size, int64_t stride,
                            int count, float *results)
{
    switch (count) {
        DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8)
    }
}

/* results[r, o] (+)= weight[o] . inputs[r] + bias[o], for outputs begin..end-1. */
static void linear(const float *weight, const float *bias, const float *inputs, int64_t size,
                   int64_t count, int64_t begin, int64_t end, float *results, int64_t width,
                   int adds, float *unused)
{
    (void)unused;
    float found[TOGETHER];
    for (int64_t o = begin; o < end; o++)
        for (int64_t r = 0; r < count; r += TOGETHER) {
            int some = count - r < TOGETHER ? (int)(count - r) : TOGETHER;
            products(weight + o * size, inputs + r * size, size, size, some, found);
            for (int j = 0; j < some; j++) {
                float *result = results + (r + j) * width + o;
                float made = found[j] + (bias ? bias[o] : 0);
                *result = adds ? *result + made : made;
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
        products(keys + (first + i) * size, query, size, size, 1, scores + i);
    for (int64_t i = 0; i < more; i++)
        products(keys + others[i] * size, query, size, size, 1, scores + past + i);
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
