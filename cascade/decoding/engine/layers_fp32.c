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
#define TOGETHER LANES


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

/* The totals of four vectors at once, which takes a third of the instructions. */
static inline void four_totals(const lanes *sums, float *results)
{
#if LANES == 16
    const __m512 *four = (const __m512 *)sums;
    __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]),
                                 _mm512_unpackhi_ps(four[0], four[1]));
    __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]),
                                  _mm512_unpackhi_ps(four[2], four[3]));
    __m512d one = _mm512_castps_pd(first), other = _mm512_castps_pd(second);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(results,
                  _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    const __m256 *four = (const __m256 *)sums;
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
    _mm_storeu_ps(results,
                  _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < 4; i++)
        results[i] = total(sums[i]);
#endif
}

/* The totals of `count` vectors. */
static inline __attribute__((always_inline)) void totals(const lanes *sums, int count,
                                                         float *results)
{
    int at = 0;
#pragma GCC unroll 4
    for (; at + 4 <= count; at += 4)
        four_totals(sums + at, results + at);
#pragma GCC unroll 4
    for (; at < count; at++)
        results[at] = total(sums[at]);
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

/* The weights of a block of codes. */
#if LANES == 16
#define PARTS 2
static inline __attribute__((always_inline)) void decode_lanes(const void *row, int64_t number,
                                                               int64_t bits, lanes *to)
{
    if (bits == 4) {
        /* A block has sixteen different weights at most: compute these, then look them up. */
        const FourBits *block = (const FourBits *)row + number;
        const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512 values = _mm512_fmadd_ps(_mm512_set1_ps(block->scale), codes,
                                              _mm512_set1_ps(block->least));
        const __m512i both
            = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)block->codes));
        /* Only the last four bits of an index count. */
        to[0] = (lanes)_mm512_permutexvar_ps(both, values);
        to[1] = (lanes)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
    } else {
        const EightBits *block = (const EightBits *)row + number;
        const __m512 scale = _mm512_set1_ps(block->scale);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            const __m128i *codes = (const __m128i *)(block->codes + 16 * part);
            const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes));
            to[part] = (lanes)_mm512_mul_ps(scale, _mm512_cvtepi32_ps(wide));
        }
    }
}
#else
#define PARTS 4
static inline __attribute__((always_inline)) void decode_lanes(const void *row, int64_t number,
                                                               int64_t bits, lanes *to)
{
    decode(row, number, bits, (eight *)to);
}
#endif

/* The dot products of the weights of a row of codes with `count` inputs. */
static inline __attribute__((always_inline)) void
coded_dots(const void *row, const float *inputs, int64_t size, int64_t bits, int count,
           float *results)
{
    /* Several sums for each input, because one addition waits for the one before. */
    const int several = count <= 2 ? 4 : count <= 4 ? 2 : PARTS / 2;
    lanes sums[TOGETHER][4];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++)
            sums[r][k] = (lanes){0};
    const int64_t blocks = size / CODED;
    int64_t b = 0;
    for (; b + 4 / PARTS <= blocks; b += 4 / PARTS) {
        lanes weights[4];
        fetch(row, b, bits);
#pragma GCC unroll 2
        for (int next = 0; next < 4 / PARTS; next++)
            decode_lanes(row, b + next, bits, weights + next * PARTS);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
#pragma GCC unroll 16
            for (int r = 0; r < count; r++)
                sums[r][k % several] += weights[k]
                    * *(const lanes *)(inputs + r * size + CODED * b + LANES * k);
    }
    for (; b < blocks; b++) {
        lanes weights[4];
        decode_lanes(row, b, bits, weights);
#pragma GCC unroll 4
        for (int k = 0; k < PARTS; k++)
#pragma GCC unroll 16
            for (int r = 0; r < count; r++)
                sums[r][k % several] += weights[k]
                    * *(const lanes *)(inputs + r * size + CODED * b + LANES * k);
    }
    lanes joined[TOGETHER];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
        joined[r] = sums[r][0];
#pragma GCC unroll 3
        for (int k = 1; k < several; k++)
            joined[r] += sums[r][k];
    }
    totals(joined, count, results);
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
#if TOGETHER == 16
        CODED_DOTS(9) CODED_DOTS(10) CODED_DOTS(11) CODED_DOTS(12)
        CODED_DOTS(13) CODED_DOTS(14) CODED_DOTS(15) CODED_DOTS(16)
#endif
    }
}

/* The dot products of a weight vector with `count` inputs. */
static inline __attribute__((always_inline)) void
dots(const float *weight, const float *inputs, int64_t size, int count, float *results)
{
    const int several = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    lanes sums[TOGETHER][4];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++)
            sums[r][k] = (lanes){0};
    int64_t at = 0;
    for (; at + several * LANES <= size; at += several * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < several; k++) {
            lanes w = *(const lanes *)(weight + at + k * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < count; r++)
                sums[r][k] += w * *(const lanes *)(inputs + r * size + at + k * LANES);
        }
    lanes joined[TOGETHER];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) {
        joined[r] = sums[r][0];
#pragma GCC unroll 3
        for (int k = 1; k < several; k++)
            joined[r] += sums[r][k];
    }
    totals(joined, count, results);
    for (int r = 0; r < count; r++)
        for (int64_t i = at; i < size; i++)
            results[r] += weight[i] * inputs[r * size + i];
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
#if TOGETHER == 16
        DOTS(9) DOTS(10) DOTS(11) DOTS(12) DOTS(13) DOTS(14) DOTS(15) DOTS(16)
#endif
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

static inline void enter(int64_t count)
{
    (void)count;
}

static inline void leave(void)
{
}

#include "pass.h"
