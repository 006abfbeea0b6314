/* A pass over several layers in one parallel region, for functions of a dtype defined before:
 * linear, norm, turn, attend and activate. A thread calls `enter` before them and `leave` behind. */

/* Vectors are read fastest from addresses that are multiples of this. */
#define ALIGNED 64

/* Bytes, rounded up so that what follows is aligned. */
static inline int64_t aligned(int64_t bytes)
{
    return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
}

/* Take bytes from scratch memory. */
static inline void *take(char **scratch, int64_t bytes)
{
    void *taken = *scratch;
    *scratch += aligned(bytes);
    return taken;
}

/* The floats that a product needs: all inputs and one weight vector, and what rounds them up. */
static inline int64_t product_scratch(int64_t count, int64_t size)
{
    return (count + 17) * (size + 32);
}

/* The same for the largest product of a layer. */
static int64_t wide_scratch(const Sizes *sizes, int64_t count)
{
    int64_t most = sizes->width > sizes->inner ? sizes->width : sizes->inner;
    int64_t queries = sizes->heads * sizes->head_dim;
    return product_scratch(count, most > queries ? most : queries);
}

/* The bytes of scratch memory of one thread. */
static int64_t own_scratch(const Sizes *sizes, int64_t count)
{
    return aligned(sizeof(float) * (sizes->capacity + MOST))
           + aligned(sizeof(float) * wide_scratch(sizes, count))
           + aligned(sizeof(element) * count * sizes->width)
           + aligned(sizeof(element) * count * sizes->inner)
           + aligned(sizeof(element) * 2 * sizes->head_dim);
}

/* The bytes of scratch memory that `cascade_layers` needs. */
int64_t cascade_scratch(const Sizes *sizes, int64_t count)
{
    const int64_t heads = sizes->heads + 2 * sizes->key_heads;
    return aligned(sizeof(element) * count * heads * sizes->head_dim)
           + aligned(sizeof(element) * count * sizes->heads * sizes->head_dim)
           + aligned(sizeof(element) * count * sizes->inner)
           + sizes->threads * own_scratch(sizes, count);
}

void cascade_layers(const Sizes *sizes, const Layer *layers, int64_t number, const Rows *rows,
                    element *hidden, char *scratch)
{
    const int64_t width = sizes->width, inner = sizes->inner, size = sizes->head_dim;
    const int64_t heads = sizes->heads, key_heads = sizes->key_heads, count = rows->count;
    const int64_t all = (heads + 2 * key_heads) * size, threads = sizes->threads;
    const int64_t queries = heads * size, known = key_heads * size;
    element *mixed = take(&scratch, sizeof(element) * count * all);
    element *attended = take(&scratch, sizeof(element) * count * queries);
    element *activated = take(&scratch, sizeof(element) * count * inner);
    const int64_t owned = own_scratch(sizes, count);

#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        char *own = scratch + thread * owned;
        float *scores = take(&own, sizeof(float) * (sizes->capacity + MOST));
        float *wide = take(&own, sizeof(float) * wide_scratch(sizes, count));
        element *normed = take(&own, sizeof(element) * count * width);
        element *ups = take(&own, sizeof(element) * count * inner);
        element *small = take(&own, sizeof(element) * 2 * size);
        int64_t begin, end;
        enter(count);
        for (int64_t n = 0; n < number; n++) {
            const Layer *layer = layers + n;
            for (int64_t r = 0; r < count; r++)
                norm(layer->attention_norm, hidden + r * width, width, layer->attention_epsilon,
                     normed + r * width);
            share(queries, team, thread, &begin, &end);
            linear(&layer->query, normed, width, count, begin, end, mixed, all, 0,
                   wide);
            share(known, team, team - 1 - thread, &begin, &end);
            linear(&layer->key, normed, width, count, begin, end, mixed + queries,
                   all, 0, wide);
            share(known, team, thread, &begin, &end);
            linear(&layer->value, normed, width, count, begin, end,
                   mixed + queries + known, all, 0, wide);
#pragma omp barrier
            /* Every head of every row: rotate; keys and values go to the cache. */
            share(count * (heads + 2 * key_heads), team, thread, &begin, &end);
            for (int64_t i = begin; i < end; i++) {
                int64_t r = i / (heads + 2 * key_heads), h = i % (heads + 2 * key_heads);
                element *head = mixed + r * all + h * size;
                const element *cosine = rows->cosine + r * size, *sine = rows->sine + r * size;
                if (h < heads) {
                    turn(head, layer->query_norm, layer->head_epsilon, layer->rotates, cosine,
                         sine, size, small);
                    continue;
                }
                int is_key = h < heads + key_heads;
                const int64_t k = h - heads - (is_key ? 0 : key_heads);
                if (is_key)
                    turn(head, layer->key_norm, layer->head_epsilon, layer->rotates, cosine, sine,
                         size, small);
                element *to = is_key ? layer->keys : layer->values;
                to += ((rows->sequence[r] * key_heads + k) * sizes->capacity + rows->column[r]) * size;
                memcpy(to, head, sizeof(element) * size);
            }
#pragma omp barrier
            share(count * heads, team, thread, &begin, &end);
            for (int64_t i = begin; i < end; i++) {
                int64_t r = i / heads, h = i % heads, more = 0;
                int64_t others[MOST], first = rows->first[r];
                if (layer->window && rows->position[r] + 1 > layer->window) {
                    /* Columns of a sequence follow its positions. */
                    int64_t shift = rows->position[r] + 1 - layer->window;
                    first += shift;
                }
                for (int64_t t = 0; t < count; t++)
                    if (rows->sees[r] >> t & 1) {
                        int64_t distance = rows->position[r] - rows->position[t];
                        if (!layer->window || distance < layer->window)
                            others[more++] = rows->column[t];
                    }
                int64_t at = (rows->sequence[r] * key_heads + h / (heads / key_heads))
                             * sizes->capacity * size;
                attend(mixed + r * all + h * size, layer->keys + at, layer->values + at, first,
                       rows->base[r], others, more, size, (float)layer->scaling, scores,
                       attended + r * queries + h * size);
            }
#pragma omp barrier
            share(width, team, thread, &begin, &end);
            linear(&layer->out, attended, queries, count, begin, end, hidden, width,
                   1, wide);
#pragma omp barrier
            for (int64_t r = 0; r < count; r++)
                norm(layer->mlp_norm, hidden + r * width, width, layer->mlp_epsilon,
                     normed + r * width);
            share(inner, team, thread, &begin, &end);
            linear(&layer->gate, normed, width, count, begin, end, activated,
                   inner, 0, wide);
            linear(&layer->up, normed, width, count, begin, end, ups, inner, 0,
                   wide);
            for (int64_t r = 0; r < count; r++)
                activate(sizes, activated + r * inner + begin, ups + r * inner + begin,
                         end - begin);
#pragma omp barrier
            share(width, team, thread, &begin, &end);
            linear(&layer->down, activated, inner, count, begin, end, hidden,
                   width, 1, wide);
#pragma omp barrier
        }
        leave();
    }
}

/* The floats of scratch memory that `cascade_linear` needs. */
int64_t cascade_linear_scratch(int64_t size, int64_t count, int64_t threads)
{
    return threads * product_scratch(count, size);
}

/* results[r, o] = weight[o] . inputs[r] + bias[o]. */
void cascade_linear(const Matrix *matrix, const element *inputs, int64_t size, int64_t outputs,
                    int64_t count, element *results, int64_t threads, float *scratch)
{
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t begin, end;
        share(outputs, team, thread, &begin, &end);
        enter(count);
        linear(matrix, inputs, size, count, begin, end, results, outputs, 0,
               scratch + thread * product_scratch(count, size));
        leave();
    }
}
