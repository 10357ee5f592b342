// The parts of a network in C; c_writing.py takes those that the network calls, and what they need ("part NAME: …").
// Words in capitals are replaced: types, FIELD and AT (one number, or one for each channel), SIZES, EACH (the loop over
// neurons), LIMIT. A line that ends in "//? NAME" is for networks that call NAME. What has a $ in its name is also written
// with states of 16 bits.

// part spread
/* Write a list of active indices as zeros and ones; list[0] is how many there are. */
static void spread(const INDEX *list, NUMBER *out, int size)
{
    memset(out, 0, (size_t)size * sizeof *out);
    for (int k = 1; k <= list[0]; k++)
        out[list[k]] = 1;
}
// part active
/* List the inputs that are not 0. */
static void active(const NUMBER *in, INDEX *list, int size)
{
    int count = 0;

    for (int i = 0; i < size; i++) {
        list[count + 1] = (INDEX)i; /* stays if it is active */
        count += in[i] != 0;
    }
    list[0] = (INDEX)count;
}
// part rows
/* Add a row of weights, times a value. */
static void add_row$(const WEIGHT *restrict a, VALUE s, NUMBER *restrict out, int size)
{
    for (int k = 0; k < size; k++)
        out[k] += s * a[k];
}

/* Add four rows: each sum is read and written once for all of them. */
static void add_four$(const WEIGHT *restrict a, const WEIGHT *restrict b, const WEIGHT *restrict c,
                     const WEIGHT *restrict d, NUMBER *restrict out, int size)
{
    for (int k = 0; k < size; k++)
        out[k] += a[k] + b[k] + c[k] + d[k];
}

static void add_four_values$(const WEIGHT *restrict a, const WEIGHT *restrict b, const WEIGHT *restrict c,
                            const WEIGHT *restrict d, VALUE s, VALUE t, VALUE u, VALUE v, NUMBER *restrict out, int size)
{
    for (int k = 0; k < size; k++)
        out[k] += s * a[k] + t * b[k] + u * c[k] + v * d[k];
}

/* Add the rows of the inputs in a list, each times its value; rows[0] is of the input `first`. */
static void add_rows$(const WEIGHT *rows, int first, const INDEX *list, int count, const INPUT *values, NUMBER *out,
                     int size)
{
    for (; count >= 4; list += 4, count -= 4) {
        const WEIGHT *a = rows + (list[0] - first) * size, *b = rows + (list[1] - first) * size;
        const WEIGHT *c = rows + (list[2] - first) * size, *d = rows + (list[3] - first) * size;
        if (values)
            add_four_values$(a, b, c, d, (VALUE)values[list[0]], (VALUE)values[list[1]], (VALUE)values[list[2]],
                            (VALUE)values[list[3]], out, size);
        else
            add_four$(a, b, c, d, out, size);
    }
    for (; count > 0; list++, count--)
        add_row$(rows + (list[0] - first) * size, values ? (VALUE)values[list[0]] : 1, out, size);
}
// part conv: rows
typedef struct {
    int channels, height, width;             /* of the input, [height][width][channels] */
    int outputs, out_height, out_width;      /* of the output */
    int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x;
    int dilation_y, dilation_x, groups;
    const WEIGHT *weights;                   /* [kernel_height][kernel_width][channels][outputs / groups] */
    const NUMBER *bias;                      /* [outputs] */
} conv_layer$;

/* Add the weights of active inputs. Those that an output pixel reads of a row stand together in the list. */
static void conv$(const conv_layer$ *l, const INDEX *list, const INPUT *values, NUMBER *out)
{
    const int inside = l->channels / l->groups, size = l->outputs / l->groups, row = l->width * l->channels;
    const int together = l->dilation_x == 1 ? l->kernel_width : 1; /* pixels of a row */
    const int end = list[0] + 1;
    int top = 1;                             /* where the inputs of a row of outputs begin in the list */

    for (int y = 0; y < l->out_height; y++, out += l->out_width * l->outputs) {
        for (int x = 0; x < l->out_width; x++)
            memcpy(out + x * l->outputs, l->bias, (size_t)l->outputs * sizeof *out);
        for (int ky = 0, start = top; ky < l->kernel_height; ky++) {
            const int above = y * l->stride_y - l->padding_y + ky * l->dilation_y, left = above * row;
            if (above < 0 || above >= l->height)
                continue;
            while (start < end && list[start] < left)
                start++;
            top = ky == 0 ? start : top;
            for (int kx = 0; kx < l->kernel_width; kx += together)
                for (int x = 0, from = start, to = start; x < l->out_width; x++) {
                    const int first = left + (x * l->stride_x - l->padding_x + kx * l->dilation_x) * l->channels;
                    const int behind = first + together * l->channels;
                    while (from < end && list[from] < first)
                        from++;
                    to = to < from ? from : to;
                    while (to < end && list[to] < behind && list[to] < left + row)
                        to++;
                    for (int k = from, next; k < to; k = next) {
                        const int group = l->groups == 1 ? 0 : list[k] / inside; /* counted from the first pixel */
                        next = l->groups == 1 ? to : k + 1;
                        while (next < to && list[next] / inside == group)
                            next++;
                        add_rows$(l->weights + (ky * l->kernel_width + kx) * l->channels * size, first, list + k, next - k,
                                 values, out + x * l->outputs + group % l->groups * size, size);
                    }
                }
        }
    }
}
// part linear: rows
typedef struct {
    int outputs;
    const WEIGHT *weights;                   /* [inputs][outputs] */
    const NUMBER *bias;                      /* [outputs] */
} linear_layer$;

/* Add the weights of active inputs. */
static void linear$(const linear_layer$ *l, const INDEX *list, const INPUT *values, NUMBER *out)
{
    memcpy(out, l->bias, (size_t)l->outputs * sizeof *out);
    add_rows$(l->weights, 0, list + 1, list[0], values, out, l->outputs);
}
// part pool
typedef struct {
    int channels, height, width, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x;
    NUMBER factor;                           /* of a sum over a window */
} pool_layer;
// part average: pool
/* Add active inputs to every window that they lie in; those of one pixel stand beside each other in the list. */
static void average(const pool_layer *l, const INDEX *list, const NUMBER *values, NUMBER *out)
{
    int count;

    memset(out, 0, (size_t)(l->out_height * l->out_width * l->channels) * sizeof *out);
    for (int k = 1; k <= list[0]; k += count) {
        const int pixel = list[k] / l->channels, first = pixel * l->channels;
        const int bottom = pixel / l->width + l->padding_y, right = pixel % l->width + l->padding_x;

        for (count = 1; k + count <= list[0] && list[k + count] < first + l->channels;)
            count++;
        for (int y = bottom / l->stride_y; y >= 0 && bottom - y * l->stride_y < l->kernel_height; y--)
            for (int x = right / l->stride_x; x >= 0 && right - x * l->stride_x < l->kernel_width; x--)
                if (y < l->out_height && x < l->out_width) {
                    NUMBER *sums = out + (y * l->out_width + x) * l->channels;
                    for (int i = k; i < k + count; i++)
                        sums[list[i] - first] += values ? values[list[i]] * l->factor : l->factor;
                }
    }
}
// part largest: pool
static void largest(const pool_layer *l, const NUMBER *in, NUMBER *out)
{
    for (int y = 0; y < l->out_height; y++)
        for (int x = 0; x < l->out_width; x++)
            for (int c = 0; c < l->channels; c++, out++) {
                int found = 0;
                for (int ky = 0; ky < l->kernel_height; ky++)
                    for (int kx = 0; kx < l->kernel_width; kx++) {
                        const int top = y * l->stride_y - l->padding_y + ky, left = x * l->stride_x - l->padding_x + kx;
                        if (top < 0 || top >= l->height || left < 0 || left >= l->width)
                            continue;
                        const NUMBER one = in[(top * l->width + left) * l->channels + c];
                        *out = found && *out > one ? *out : one;
                        found = 1;
                    }
            }
}
// part affine
/* out = gain * in + shift, each of a channel; in and out may be the same. */
static void affine(const NUMBER *in, const WEIGHT *gain, const NUMBER *shift, NUMBER *out, int size, int channels)
{
    for (int i = 0; i < size;)
        for (int c = 0; c < channels; c++, i++)
            out[i] = gain[c] * in[i] + shift[c];
}
// part add
/* Add what another path gives; in and out may be the same. */
static void add(const NUMBER *in, NUMBER *out, int size)
{
    for (int i = 0; i < size; i++)
        out[i] += in[i];
}
// part scaled
/* factor / 2^14 of a value, to the nearest integer; compilers shift the sign in, as all known ones do. */
static int32_t scaled(int32_t factor, int32_t value)
{
    return (int32_t)(((int64_t)factor * value + (1 << 13)) >> 14);
}
// part scale: scaled
/* Bring a path to the unit of a sum, channel by channel; in and out may be the same. */
static void scale(const NUMBER *in, const int32_t *factor, NUMBER *out, int size, int channels)
{
    for (int i = 0; i < size;)
        for (int c = 0; c < channels; c++, i++)
            out[i] = scaled(factor[c], in[i]);
}
// part add_scaled: scaled
static void add_scaled(const NUMBER *in, const int32_t *factor, NUMBER *out, int size, int channels)
{
    for (int i = 0; i < size;)
        for (int c = 0; c < channels; c++, i++)
            out[i] += scaled(factor[c], in[i]);
}
// part charge float32
/* What stays of a state, and a current. */
static float charge(float decay, float state, float current)
{
    return decay * state + current;
}
// part charge int8: scaled
/* What stays of a state, and a current, within limits that no sum of two leaves 32 bits from. */
static int32_t charge(int32_t decay, int32_t state, int32_t current)
{
    const int32_t sum = scaled(decay, state) + current;

    return sum > LIMIT ? LIMIT : sum < -LIMIT ? -LIMIT : sum;
}
// part charge int16
/* What stays of a state, and a current, in a layer whose states all fit in 16 bits. */
static int16_t charge_16(int16_t decay, int16_t state, int16_t current)
{
    return (int16_t)(((decay * state + (1 << 13)) >> 14) + current);
}
// part neuron
typedef struct {
    SIZES
    FIELD(FACTOR, decay);                    /* what stays of a potential */
    FIELD(NUMBER, threshold);
    int hard;                                /* a spike sets the potential to 0, else takes the threshold off */
    FIELD(FACTOR, synapse);                  /* what stays of a synaptic current */  //? cuba_lif
    FIELD(FACTOR, adaptation);               /* what stays of a raise of the threshold */  //? alif
    FIELD(NUMBER, rise);                     /* what a spike adds to it */  //? alif
} neuron_layer$;
// part lif: charge neuron
/* Charge the potentials v with the currents in; list the neurons that reach their threshold, and reset them. */
static void lif$(const neuron_layer$ *l, NUMBER *restrict v, const NUMBER *restrict in, INDEX *restrict list)
{
    int count = 0;

    EACH
        v[i] = charge$(l->AT(decay, c), v[i], in[i]);
    EACH {
        list[count + 1] = (INDEX)i; /* stays if it fires */
        count += v[i] >= l->AT(threshold, c);
    }
    list[0] = (INDEX)count;
    for (int k = 1; k <= count; k++)
        v[list[k]] = l->hard ? 0 : v[list[k]] - l->AT(threshold, list[k] % l->channels);
}
// part cuba_lif: lif
/* Charge the synaptic currents i_syn, then the potentials with these. */
static void cuba_lif$(const neuron_layer$ *l, NUMBER *i_syn, NUMBER *v, const NUMBER *in, INDEX *list)
{
    EACH
        i_syn[i] = charge$(l->AT(synapse, c), i_syn[i], in[i]);
    lif$(l, v, i_syn, list);
}
// part alif: charge neuron
/* As lif, with thresholds that each spike raises by a. */
static void alif$(const neuron_layer$ *l, NUMBER *a, NUMBER *v, const NUMBER *in, INDEX *list)
{
    int count = 0;

    EACH {
        const NUMBER u = charge$(l->AT(decay, c), v[i], in[i]);
        const int fires = u >= l->AT(threshold, c) + a[i];
        v[i] = fires ? u - l->AT(threshold, c) : u;
        a[i] = charge$(l->AT(adaptation, c), a[i], fires ? l->AT(rise, c) : 0);
        list[count + 1] = (INDEX)i; /* stays if it fires */
        count += fires;
    }
    list[0] = (INDEX)count;
}
