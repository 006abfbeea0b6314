/* Products in bfloat16 as PyTorch computes them on processors with AMX: `F.linear` by tiles, the two
 * products of attention by dot products of pairs. Every row is summed in the same order, whatever
 * the number of rows. */

#include <sys/syscall.h>
#include <unistd.h>

/* Rows of a tile, and bfloat16 numbers of one of its rows. */
#define TILE 16
#define DEEP 32

/* Weights of an output that are prepared for the tiles at a time. */
#define CHUNK 128

/* Numbers of a vector of attention, and the vectors that weights are added up in. */
#define ATTENTION_LANES 16
#define ATTENTION_SUMS 2

/* Tiles. Their numbers become names of registers, so they are no constants of C. */
#define SUMS 0
#define MORE_SUMS 1 /* of the inputs behind the first TILE */
#define WEIGHTS 2
#define INPUTS 3
#define TILES 4

/* Ask the kernel for tiles; return 0 if the process may use them. */
int64_t cascade_permission(void)
{
    const long request = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data);
}

/* The columns of the tiles of inputs and sums, for a number of inputs. */
static inline int64_t columns_of(int64_t count)
{
    return count < TILE ? count : TILE;
}

static inline void enter(int64_t count)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        config.rows[tile] = TILE;
        config.bytes[tile] = tile == WEIGHTS ? sizeof(element) * DEEP : 4 * columns_of(count);
    }
    _tile_loadconfig(&config);
}

static inline void leave(void)
{
    _tile_release();
}

/* The weights of a block of codes, as bfloat16. The instruction that rounds takes denormal numbers for
 * 0; weights that are such numbers have no codes. */
static inline __attribute__((always_inline)) __m512i halves_of(const void *row, int64_t number,
                                                               int64_t bits)
{
    if (bits == 4) {
        /* A block has sixteen different weights at most: compute these, then look them up. */
        const FourBits *block = (const FourBits *)row + number;
        const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512 values = _mm512_fmadd_ps(_mm512_set1_ps(block->scale), codes,
                                              _mm512_set1_ps(block->least));
        const __m256i both
            = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)block->codes));
        const __m512i places = _mm512_inserti64x4(_mm512_castsi256_si512(both),
                                                  _mm256_srli_epi16(both, 4), 1);
        /* Only the last five bits of an index count, and the table is there twice. */
        return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(values, values));
    }
    const EightBits *block = (const EightBits *)row + number;
    const __m512 scale = _mm512_set1_ps(block->scale);
    __m512 part[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m128i *codes = (const __m128i *)(block->codes + 16 * i);
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes));
        part[i] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(wide));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]);
}

/* Weights `at` to `at + some` of the outputs `o` to `o + count`, in rows of CHUNK numbers. */
static inline void prepare(const Matrix *matrix, int64_t o, int64_t count, int64_t size, int64_t at,
                           int64_t some, element *to)
{
    for (int64_t i = 0; i < TILE; i++, to += CHUNK) {
        if (i >= count) {
            memset(to, 0, sizeof(element) * CHUNK);
        } else if (matrix->codes && matrix->coded[o + i]) {
            const char *row = row_of(matrix, o + i, size);
            /* The next TILE outputs are read next. */
            const int64_t bytes = block_size(matrix->bits), next = TILE * (size / CODED) * bytes;
            for (int64_t ahead = 0; ahead < CHUNK / CODED * bytes; ahead += 64)
                __builtin_prefetch(row + at / CODED * bytes + next + ahead);
            for (int64_t b = 0; b < some; b += CODED) {
                const __m512i found = matrix->bits == 4 ? halves_of(row, (at + b) / CODED, 4)
                                                        : halves_of(row, (at + b) / CODED, 8);
                _mm512_storeu_si512(to + b, found);
            }
        } else {
            memcpy(to, matrix->weight + (o + i) * size + at, sizeof(element) * some);
            memset(to + some, 0, sizeof(element) * (CHUNK - some));
        }
    }
}

/* Whether the tiles can read the weights of TILE outputs as they are. */
static inline int plain(const Matrix *matrix, int64_t o, int64_t count, int64_t size)
{
    int coded = 0;
    for (int64_t i = 0; i < count && matrix->codes; i++)
        coded |= matrix->coded[o + i];
    return !coded && count == TILE && size % DEEP == 0;
}

/* `count` inputs as the tiles need them: pairs of neighbouring numbers, `[whole / 2, columns, 2]`. */
static void in_pairs(const element *inputs, int64_t size, int64_t count, int64_t whole,
                     int64_t columns, element *to)
{
    if (whole > size || columns > count)
        memset(to, 0, sizeof(element) * whole * columns);
    for (int64_t r = 0; r < count; r++, inputs += size) {
        for (int64_t i = 0; i + 2 <= size; i += 2)
            memcpy(to + i * columns + 2 * r, inputs + i, 2 * sizeof(element));
        if (size % 2)
            to[(size - 1) * columns + 2 * r] = inputs[size - 1];
    }
}

/* Up to 16 numbers. */
static inline __m512 wide_part(const element *from, __mmask16 mask)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Sixteen numbers, rounded to bfloat16. Denormal numbers stay what they are. */
static inline __m256i rounded_sixteen(__m512 values)
{
    const __m512i whole = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(whole, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(whole, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 unknown = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), unknown, _mm512_set1_epi32(0x7fc0)));
}

/* The sums of `count` outputs, `columns` numbers apart, go to one row of results. */
static inline void put(const float *sums, int64_t columns, const element *bias, int64_t count,
                       int adds, element *result)
{
    const __mmask16 mask = 0xffff >> (TILE - count);
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32((int)columns));
    __m512 found = _mm512_i32gather_ps(places, sums, sizeof(float));
    if (bias)
        found = _mm512_add_ps(found, wide_part(bias, mask));
    __m256i made = (__m256i)_mm512_cvtneps_pbh(found);
    if (adds) {
        const __m512 wide
            = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(made), 16));
        made = rounded_sixteen(_mm512_add_ps(wide_part(result, mask), wide));
    }
    _mm256_mask_storeu_epi16(result, mask, made);
}

/* results[r, o] (+)= weight[o] . inputs[r] + bias[o], for outputs begin..end-1. */
static void linear(const Matrix *matrix, const element *inputs, int64_t size, int64_t count,
                   int64_t begin, int64_t end, element *results, int64_t width, int adds,
                   float *wide)
{
    const int64_t whole = (size + DEEP - 1) / DEEP * DEEP;
    const int64_t columns = columns_of(count), stride = 4 * columns;
    const int more = count > TILE;
    element *pairs = (element *)wide, *others = pairs + whole * columns;
    element weights[TILE * CHUNK];
    float found[2][TILE * TILE];
    in_pairs(inputs, size, columns, whole, columns, pairs);
    if (more)
        in_pairs(inputs + TILE * size, size, count - TILE, whole, columns, others);
    for (int64_t o = begin; o < end; o += TILE) {
        const int64_t some = end - o < TILE ? end - o : TILE;
        const int as_they_are = plain(matrix, o, some, size);
        _tile_zero(SUMS);
        _tile_zero(MORE_SUMS);
        for (int64_t at = 0; at < size; at += CHUNK) {
            const int64_t deep = size - at < CHUNK ? size - at : CHUNK;
            if (!as_they_are)
                prepare(matrix, o, some, size, at, deep, weights);
            /* The compiler does not know that tiles read memory. */
            __asm__ volatile("" ::: "memory");
            for (int64_t i = 0; i < deep; i += DEEP) {
                if (as_they_are)
                    _tile_loadd(WEIGHTS, matrix->weight + o * size + at + i, sizeof(element) * size);
                else
                    _tile_loadd(WEIGHTS, weights + i, sizeof(element) * CHUNK);
                _tile_loadd(INPUTS, pairs + (at + i) * columns, stride);
                _tile_dpbf16ps(SUMS, WEIGHTS, INPUTS);
                if (more) {
                    _tile_loadd(INPUTS, others + (at + i) * columns, stride);
                    _tile_dpbf16ps(MORE_SUMS, WEIGHTS, INPUTS);
                }
            }
        }
        _tile_stored(SUMS, found[0], stride);
        _tile_stored(MORE_SUMS, found[1], stride);
        for (int64_t r = 0; r < count; r++)
            put(found[r / TILE] + r % TILE, columns, matrix->bias ? matrix->bias + o : 0, some,
                adds, results + r * width + o);
    }
}

/* Up to DEEP numbers of a vector; what is behind its end is 0. */
static inline __m512bh part_of(const element *from, int64_t at, int64_t size)
{
    const int64_t left = size - at;
    const __mmask32 mask = left >= DEEP ? 0xffffffff : ((__mmask32)1 << left) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from + at);
}

/* scores[i] = keys[i] . query. */
static void scores_of(const element *query, const element *const *keys, int64_t count, int64_t size,
                      float *scores)
{
    for (int64_t i = 0; i < count; i++) {
        __m512 sums = _mm512_setzero_ps();
        for (int64_t at = 0; at < size; at += DEEP)
            sums = _mm512_dpbf16_ps(sums, part_of(keys[i], at, size), part_of(query, at, size));
        __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
        half = _mm256_hadd_ps(half, half);
        half = _mm256_hadd_ps(half, half);
        scores[i] = _mm_cvtss_f32(
            _mm_add_ss(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
}

/* made += the values, weighted: eight keys at a time, in pairs. */
static void gather_all(const element *const *values, const float *weights, int64_t count,
                       int64_t size, float *made)
{
    for (int64_t d = 0; d < size; d += 16) {
        const __mmask16 mask = size - d >= 16 ? 0xffff : ((__mmask16)1 << (size - d)) - 1;
        __m512 result = _mm512_maskz_loadu_ps(mask, made + d);
        for (int64_t begin = 0; begin < count; begin += 8) {
            __m512 sums = _mm512_setzero_ps();
            for (int64_t i = begin; i < begin + 8 && i < count; i += 2) {
                const int both = i + 1 < count;
                const __m512i even
                    = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values[i] + d));
                const __m512i odd = both ? _mm512_cvtepu16_epi32(
                                               _mm256_maskz_loadu_epi16(mask, values[i + 1] + d))
                                         : _mm512_setzero_si512();
                const uint32_t pair = (uint32_t)rounded(weights[i])
                                      | (both ? (uint32_t)rounded(weights[i + 1]) << 16 : 0);
                sums = _mm512_dpbf16_ps(
                    sums, (__m512bh)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)),
                    (__m512bh)_mm512_set1_epi32((int)pair));
            }
            result = _mm512_add_ps(result, sums);
        }
        _mm512_mask_storeu_ps(made + d, mask, result);
    }
}
