/* What the layers of all dtypes share. `element` is the type of weights and states. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

/* The most rows of a call. */
#define MOST 32

#include "codes.h"

typedef struct {
    int64_t width;      /* of the hidden state */
    int64_t inner;      /* of the MLP */
    int64_t heads;      /* of queries */
    int64_t key_heads;  /* of keys and values */
    int64_t head_dim;
    int64_t activation;
    int64_t capacity;   /* columns of the KV cache */
    int64_t threads;
    const element *activations; /* in half precision, the activation of every number */
} Sizes;

typedef struct {
    Matrix query, key, value, out, gate, up, down;
    const element *attention_norm, *mlp_norm, *query_norm, *key_norm;
    element *keys, *values; /* [sequences, key_heads, capacity, head_dim] */
    double attention_epsilon, mlp_epsilon, head_epsilon, scaling;
    int64_t rotates;
    int64_t window; /* columns that a query sees, itself included; 0 for all */
} Layer;

typedef struct {
    int64_t count;
    const int64_t *sequence; /* of each row */
    const int64_t *column;   /* where its keys and values are written */
    const int64_t *first;    /* the first column that it sees */
    const int64_t *base;     /* it sees all columns from there to the one before this */
    const int64_t *position; /* for sliding windows */
    const uint32_t *sees;    /* bit t: it sees the column of row t of this call, too */
    const element *cosine, *sine; /* [count, head_dim] */
} Rows;

/* Part `thread` of `threads` of `size` things. */
static inline void share(int64_t size, int64_t threads, int64_t thread, int64_t *begin,
                         int64_t *end)
{
    *begin = size * thread / threads;
    *end = size * (thread + 1) / threads;
}
