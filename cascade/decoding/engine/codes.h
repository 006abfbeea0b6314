/* Weights as exact codes. Weights that were quantized once, as those of a GGUF file, have few values
 * in each block of 32. Codes of 4 or 8 bits, a scale and a least value for each block give the same
 * weights, bit for bit, and are a fifth or a third of the size in fp32. So a pass reads less memory.
 *
 * Rows of a matrix whose weights cannot be reproduced to the bit are read as they are.
 *
 * For functions of a dtype defined before: `number_of`, the value of an element; `stored`, eight
 * values rounded to the dtype; `half_step`, how far from a value numbers are rounded to it at most.
 */

/* Weights of a block. */
#define CODED 32

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t eight_ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t eight_bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef int8_t eight_signed __attribute__((vector_size(8), aligned(1), may_alias));

/* Weight = least + scale * code. Byte i has the codes of weights i and i + 16. */
typedef struct {
    float scale, least;
    uint8_t codes[CODED / 2];
} FourBits;

/* Weight = scale * code. */
typedef struct {
    float scale;
    int8_t codes[CODED];
} EightBits;

/* A projection, `[outputs, inputs]`. */
typedef struct {
    const element *weight, *bias;
    const uint8_t *codes; /* [outputs, inputs / 32] blocks, or null */
    const uint8_t *coded; /* [outputs], whether an output is read from its codes */
    int64_t bits;
} Matrix;

static inline int64_t block_size(int64_t bits)
{
    return bits == 4 ? sizeof(FourBits) : sizeof(EightBits);
}

static inline eight fused_eight(eight one, eight other, eight sum)
{
#ifdef __FMA__
    return (eight)_mm256_fmadd_ps((__m256)one, (__m256)other, (__m256)sum);
#else
    return sum + one * other;
#endif
}

/* Eight bytes as whole numbers. */
static inline eight_ints wide_bytes(const uint8_t *from)
{
#ifdef __AVX2__
    return (eight_ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(*(const eight_bytes *)from, eight_ints);
#endif
}

static inline eight_ints wide_signed(const int8_t *from)
{
#ifdef __AVX2__
    return (eight_ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return __builtin_convertvector(*(const eight_signed *)from, eight_ints);
#endif
}

static inline eight all_eight(float value)
{
    return (eight){value, value, value, value, value, value, value, value};
}

static inline __attribute__((always_inline)) void decode_four(const FourBits *block, eight *to)
{
    eight scale = all_eight(block->scale), least = all_eight(block->least);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        eight_ints both = wide_bytes(block->codes + 8 * half);
        eight low = __builtin_convertvector(both & 15, eight);
        eight high = __builtin_convertvector(both >> 4, eight);
        to[half] = stored(fused_eight(scale, low, least));
        to[half + 2] = stored(fused_eight(scale, high, least));
    }
}

static inline __attribute__((always_inline)) void decode_eight(const EightBits *block, eight *to)
{
    eight scale = all_eight(block->scale);
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        eight_ints codes = wide_signed(block->codes + 8 * part);
        to[part] = stored(scale * __builtin_convertvector(codes, eight));
    }
}

/* Block `number` of a row of codes. */
static inline __attribute__((always_inline)) void decode(const void *row, int64_t number, int64_t bits,
                                                         eight *to)
{
    if (bits == 4)
        decode_four((const FourBits *)row + number, to);
    else
        decode_eight((const EightBits *)row + number, to);
}

/* Bytes from codes that are read now to codes that are fetched from memory. Measured on a Xeon with
 * AVX-512: in fp32, a pass over one row takes 9 ms without, 5.5 ms with 3,000 to 8,000; built for
 * AVX2, 15 and 5.2 ms. */
#define AHEAD 4096

/* Fetch the codes that are read some time after block `number` of a row. */
static inline __attribute__((always_inline)) void fetch(const void *row, int64_t number, int64_t bits)
{
    __builtin_prefetch((const char *)row + number * block_size(bits) + AHEAD);
}

/* The codes of an output. */
static inline const void *row_of(const Matrix *matrix, int64_t output, int64_t size)
{
    return matrix->codes + output * (size / CODED) * block_size(matrix->bits);
}

/* --- Finding codes ---------------------------------------------------------------------------
 *
 * Scales and least values are numbers of 11 bits, as in fp16. They include all that files store.
 */

/* The number of 11 bits that is `steps` above the nearest one. */
static inline float eleven(float value, int steps)
{
    int32_t whole;
    memcpy(&whole, &value, sizeof whole);
    whole = (whole + 0xfff + (whole >> 13 & 1)) & ~0x1fff;
    whole += steps * 0x2000;
    memcpy(&value, &whole, sizeof value);
    return value;
}

static int same(const float *one, const float *other)
{
    int different = 0;
    for (int i = 0; i < CODED; i++)
        different |= one[i] != other[i];
    return !different;
}

/* How many numbers of 11 bits around `value` are within an error. */
static inline int steps_within(float value, float error)
{
    float step = fabsf(value) / 2048;
    int steps = step > 0 ? (int)ceilf(fminf(error / step, 64)) : 0;
    return steps < 1 ? 1 : steps;
}

/* Put a code of 4 bits into a block whose codes are 0. */
static inline void put_four(FourBits *block, int place, float code)
{
    block->codes[place % 16] |= (uint8_t)code << (place / 16 * 4);
}

/* Find codes of a block around 0, as Q4_0 has them: the largest weight is -8 times the scale. */
static int encode_four_around_zero(const float *weights, FourBits *block)
{
    float most = 0, made[CODED];
    for (int i = 0; i < CODED; i++)
        most = fabsf(weights[i]) > fabsf(most) ? weights[i] : most;
    if (!(fabsf(most) > 0 && fabsf(most) < INFINITY))
        return 0;
    const float about = most / -8;
    const int steps = steps_within(about, half_step(most) / 8);
    for (int step = -steps; step <= steps; step++) {
        memset(block->codes, 0, sizeof block->codes);
        block->scale = eleven(about, step);
        block->least = -8 * block->scale;
        for (int i = 0; i < CODED; i++) {
            float code = floorf(weights[i] / block->scale + 8.5f);
            put_four(block, i, code < 0 ? 0 : code > 15 ? 15 : code);
        }
        decode_four(block, (eight *)made);
        if (same(made, weights))
            return 1;
    }
    return 0;
}

/* Find codes of a block with a least value, as Q4_1; return whether they give its weights. */
static int encode_four(const float *weights, FourBits *block)
{
    float low = weights[0], high = weights[0], error = 0;
    for (int i = 0; i < CODED; i++) {
        low = weights[i] < low ? weights[i] : low;
        high = weights[i] > high ? weights[i] : high;
    }
    if (!(high - low < INFINITY))
        return 0;
    memset(block, 0, sizeof *block);
    float codes[CODED], made[CODED];
    if (low == high) {
        block->least = low;
        decode_four(block, (eight *)made);
        return same(made, weights);
    }
    error = half_step(low) + half_step(high);
    /* The bounds below are computed with rounding, too. */
    const float slack = (fabsf(low) + fabsf(high)) * 0x1p-22f;
    for (int most = 15; most > 0; most--) {
        const float about = (high - low) / most;
        for (int i = 0; i < CODED; i++)
            codes[i] = floorf((weights[i] - low) / about + 0.5f);
        memset(block->codes, 0, sizeof block->codes);
        for (int i = 0; i < CODED; i++)
            put_four(block, i, codes[i]);
        const int steps = steps_within(about, error / most);
        for (int step = -steps; step <= steps; step++) {
            block->scale = eleven(about, step);
            /* The least values for which every weight is rounded to what it is. */
            float from = -INFINITY, to = INFINITY;
            for (int i = 0; i < CODED; i++) {
                float rest = weights[i] - block->scale * codes[i], half = half_step(weights[i]);
                from = rest - half > from ? rest - half : from;
                to = rest + half < to ? rest + half : to;
            }
            from -= slack;
            to += slack;
            if (from > to)
                continue;
            for (int near = -1; near <= 4; near++) {
                block->least = eleven(from, from < 0 ? -near : near);
                if (near > 0 && block->least > to)
                    break;
                decode_four(block, (eight *)made);
                if (same(made, weights))
                    return 1;
            }
        }
    }
    return 0;
}

/* Find codes of a block without a least value; return whether they give its weights. */
static int encode_eight(const float *weights, EightBits *block)
{
    float most = 0, made[CODED];
    for (int i = 0; i < CODED; i++)
        most = fabsf(weights[i]) > most ? fabsf(weights[i]) : most;
    if (!(most < INFINITY))
        return 0;
    const float about = most / 127;
    const int steps = steps_within(about, half_step(most) / 127);
    for (int step = -steps; step <= steps; step++) {
        block->scale = most > 0 ? eleven(about, step) : 0;
        for (int i = 0; i < CODED; i++) {
            float code = most > 0 ? floorf(weights[i] / block->scale + 0.5f) : 0;
            block->codes[i] = (int8_t)(code < -127 ? -127 : code > 127 ? 127 : code);
        }
        decode_eight(block, (eight *)made);
        if (same(made, weights))
            return 1;
    }
    return 0;
}

/* Whether a block has numbers so small that some instructions take them for 0. */
static int any_denormal(const float *weights)
{
    int any = 0;
    for (int i = 0; i < CODED; i++)
        any |= weights[i] != 0 && fabsf(weights[i]) < 0x1p-126f;
    return any;
}

/* Encode the outputs of a matrix; `coded` says which of them have codes. Return their number. */
int64_t cascade_encode(const element *weight, int64_t outputs, int64_t size, int64_t bits,
                       uint8_t *codes, uint8_t *coded, int64_t threads)
{
    const int64_t blocks = size / CODED, bytes = block_size(bits);
    int64_t found = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : found)
    for (int64_t o = 0; o < outputs; o++) {
        coded[o] = 1;
        for (int64_t b = 0; b < blocks && coded[o]; b++) {
            float weights[CODED];
            uint8_t *block = codes + (o * blocks + b) * bytes;
            for (int i = 0; i < CODED; i++)
                weights[i] = number_of(weight[o * size + b * CODED + i]);
            coded[o] = !any_denormal(weights) && (bits == 4 ? encode_four_around_zero(weights, (FourBits *)block)
                                       || encode_four(weights, (FourBits *)block)
                                 : encode_eight(weights, (EightBits *)block));
        }
        found += coded[o];
    }
    return found;
}
