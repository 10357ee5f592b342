// The parts of a network in C; c_writing.py takes those that the network calls, and what they need ("part NAME: …").
// Words in capitals are replaced: types, FIELD and AT (one number, or one for each channel), CURRENT. A line that
// ends in "//? NAME" is for networks with a neuron that has NAME. A $ stands for the types IN and OUT of a function.

// part bits
/* Spikes are bits, of which the first is the lowest of a word. Return those from i on to the end of a word, or to `end`. */
static uint32_t bits_at(const uint32_t *spikes, int i, int end)
{
    const uint32_t word = spikes[i >> 5] >> (i & 31);

    return end - i < 32 ? word & ((UINT32_C(1) << (end - i)) - 1) : word;
}

/* Return the place of the lowest bit that is set. */
static int lowest(uint32_t word)
{
    static const uint8_t places[32] = {0,  1,  28, 2,  29, 14, 24, 3, 30, 22, 20, 15, 25, 17, 4,  8,
                                       31, 27, 13, 23, 21, 19, 16, 7, 26, 12, 18, 6,  11, 5,  10, 9};

    return places[((word & (~word + 1)) * UINT32_C(0x077CB531)) >> 27]; /* de Bruijn's sequence: all places differ */
}
// part spread: bits
/* Write spikes as zeros and ones. */
static void spread$(const uint32_t *spikes, OUT *out, int size)
{
    for (int i = 0; i < size; i++)
        out[i] = (OUT)bits_at(spikes, i, i + 1);
}
// part add_rows float32
/* Add four rows: each sum is read and written once for all of them. */
static void add_four(const float *restrict a, const float *restrict b, const float *restrict c,
                     const float *restrict d, float *restrict out, int size)
{
    for (int k = 0; k < size; k++)
        out[k] += a[k] + b[k] + c[k] + d[k];
}

static void add_four_values(const float *restrict a, const float *restrict b, const float *restrict c,
                            const float *restrict d, const float *s, float *restrict out, int size)
{
    for (int k = 0; k < size; k++)
        out[k] += s[0] * a[k] + s[1] * b[k] + s[2] * c[k] + s[3] * d[k];
}

/* Add rows of weights, each times its value, or once for values NULL. */
static void add_rows(const float *const *rows, const float *values, int count, float *out, int size)
{
    int k = 0;

    for (; k + 4 <= count; k += 4)
        if (values)
            add_four_values(rows[k], rows[k + 1], rows[k + 2], rows[k + 3], values + k, out, size);
        else
            add_four(rows[k], rows[k + 1], rows[k + 2], rows[k + 3], out, size);
    for (; k < count; k++)
        for (int i = 0; i < size; i++)
            out[i] += (values ? values[k] : 1) * rows[k][i];
}
// part add_rows int8
/* Two of the four bytes of a word as numbers of 16 bits; and added to such numbers. */
#if defined __GNUC__ && defined __ARM_FEATURE_SIMD32
#define EVEN(word) __extension__({ uint32_t e_; __asm__("uxtb16 %0, %1" : "=r"(e_) : "r"(word)); e_; })
#define ODD(word) __extension__({ uint32_t o_; __asm__("uxtb16 %0, %1, ror #8" : "=r"(o_) : "r"(word)); o_; })
#define ADD_EVEN(sum, word) __asm__("uxtab16 %0, %0, %1" : "+r"(sum) : "r"(word))
#define ADD_ODD(sum, word) __asm__("uxtab16 %0, %0, %1, ror #8" : "+r"(sum) : "r"(word))
#else
#define EVEN(word) ((word) & 0xFF00FF)
#define ODD(word) ((word) >> 8 & 0xFF00FF)
#define ADD_EVEN(sum, word) ((sum) += EVEN(word))
#define ADD_ODD(sum, word) ((sum) += ODD(word))
#endif

/* Add four sums of 16 bits, two in a number, to four of 32. */
static void add_sums(uint32_t even, uint32_t odd, int32_t excess, int32_t *out)
{
    out[0] += (int32_t)(even & 0xFFFF) - excess;
    out[1] += (int32_t)(odd & 0xFFFF) - excess;
    out[2] += (int32_t)(even >> 16) - excess;
    out[3] += (int32_t)(odd >> 16) - excess;
}

/* Add rows of weights, each times its value, or once for values NULL. A word has four weights, each + 128. */
static void add_rows(const uint32_t *const *rows, const int32_t *values, int count, int32_t *out, int size)
{
    uint32_t sum = values ? 0 : (uint32_t)count;
    int small = 1;

    for (int k = 0; values && k < count; k++) {
        small &= values[k] >= 0 && values[k] <= 257;
        sum += (uint32_t)values[k];
    }
    small &= sum <= 257; /* times 255: fits in 16 bits */
    for (int i = 0; i < size && small && count; i += 8) {
        const int word = i >> 2;
        uint32_t a = 0, b = 0, c = 0, d = 0;

        for (int k = 0; k < count && !values; k++) {
            const uint32_t v = rows[k][word], w = rows[k][word + 1]; /* the array has one word more */
            ADD_EVEN(a, v);
            ADD_ODD(b, v);
            ADD_EVEN(c, w);
            ADD_ODD(d, w);
        }
        for (int k = 0; k < count && values; k++) {
            const uint32_t v = rows[k][word], w = rows[k][word + 1], value = (uint32_t)values[k];
            a += value * EVEN(v);
            b += value * ODD(v);
            c += value * EVEN(w);
            d += value * ODD(w);
        }
        add_sums(a, b, (int32_t)(128 * sum), out + i);
        if (i + 4 < size)
            add_sums(c, d, (int32_t)(128 * sum), out + i + 4);
    }
    for (int i = 0; i < size && !small; i += 4) { /* without signs, since weights + 128 may leave 32 bits */
        uint32_t sums[4] = {0};

        for (int k = 0; k < count; k++) {
            const uint32_t v = rows[k][i >> 2], value = (uint32_t)values[k];
            sums[0] += value * (v & 0xFF);
            sums[1] += value * (v >> 8 & 0xFF);
            sums[2] += value * (v >> 16 & 0xFF);
            sums[3] += value * (v >> 24);
        }
        for (int k = 0; k < 4; k++)
            out[i + k] += (int32_t)(sums[k] - 128 * sum);
    }
}
// part conv_layer
typedef struct {
    int channels, height, width;             /* of the input, [height][width][channels] */
    int outputs, out_width, row;             /* of the output; a row of weights takes `row` numbers or words */
    int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x;
    int dilation_y, dilation_x, groups;
    const NUMBER *bias;                      /* [outputs] */
} conv_layer;
// part conv: conv_layer add_rows bits
/* Sum one pixel of the output: the weights [kernel_height][kernel_width][channels][row] of inputs that are not 0. */
static void conv$(const conv_layer *l, const ROW *weights, const uint32_t *spikes, const IN *values, int pixel,
                  NUMBER *out)
{
    const int across = l->dilation_x == 1 ? l->kernel_width : 1; /* pixels beside each other */
    const int top = pixel / l->out_width * l->stride_y - l->padding_y;
    const int left = pixel % l->out_width * l->stride_x - l->padding_x;
    const int channels = l->channels, width = l->width, size = l->row, outputs = l->outputs;
    const ROW *rows[64];
    NUMBER factors[64];
    int count = 0;

    memcpy(out, l->bias, (size_t)outputs * sizeof *out);
    for (int ky = 0; ky < l->kernel_height; ky++)
        for (int kx = 0; kx < l->kernel_width; kx += across) {
            const int y = top + ky * l->dilation_y, x = left + kx * l->dilation_x;
            const int begin = (y * width + (x < 0 ? 0 : x)) * channels;
            const int end = (y * width + (x + across > width ? width : x + across)) * channels;
            const int before = (y * width + x - ky * l->kernel_width - kx) * channels * size;

            if (y < 0 || y >= l->height)
                continue;
            for (int i = begin, next; i < end; i = next) {
                next = (i | 31) + 1 < end ? (i | 31) + 1 : end;
                for (int k = i; values && k < next; k++)
                    if (values[k] != 0) {
                        rows[count] = weights + (k * size - before);
                        factors[count++] = values[k];
                    }
                for (uint32_t active = values ? 0 : bits_at(spikes, i, end); active; active &= active - 1)
                    rows[count++] = weights + ((i + lowest(active)) * size - before);
                if (count > 32) { /* the next word has 32 at most */
                    add_rows(rows, values ? factors : NULL, count, out, outputs);
                    count = 0;
                }
            }
        }
    add_rows(rows, values ? factors : NULL, count, out, outputs);
}
// part grouped: conv_layer bits
/* As conv, in groups of channels; a row of weights [outputs / groups] is of bytes. */
static void grouped$(const conv_layer *l, const WEIGHT *weights, const uint32_t *spikes, const IN *values, int pixel,
                     NUMBER *out)
{
    const int inside = l->channels / l->groups;

    memcpy(out, l->bias, (size_t)l->outputs * sizeof *out);
    for (int ky = 0; ky < l->kernel_height; ky++)
        for (int kx = 0; kx < l->kernel_width; kx++) {
            const int y = pixel / l->out_width * l->stride_y - l->padding_y + ky * l->dilation_y;
            const int x = pixel % l->out_width * l->stride_x - l->padding_x + kx * l->dilation_x;
            const int first = (y * l->width + x) * l->channels;

            if (y < 0 || y >= l->height || x < 0 || x >= l->width)
                continue;
            for (int c = 0; c < l->channels; c++) {
                const WEIGHT *row = weights + ((ky * l->kernel_width + kx) * l->channels + c) * l->row;
                const NUMBER value = values ? values[first + c] : (NUMBER)bits_at(spikes, first + c, first + c + 1);
                for (int k = 0; value != 0 && k < l->row; k++)
                    out[c / inside * l->row + k] += value * row[k];
            }
        }
}
// part pool_layer
typedef struct {
    int channels, height, width, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x;
    int largest;                             /* of a window, else the sum of it */
    NUMBER factor;                           /* of the sum */
} pool_layer;
// part pool: pool_layer bits
static void pool$(const pool_layer *l, const uint32_t *spikes, const IN *values, OUT *out)
{
    for (int i = 0; i < l->out_height * l->out_width; i++, out += l->channels) {
        int seen = 0;                        /* inputs of the window; those beyond the border are none */

        memset(out, 0, (size_t)l->channels * sizeof *out);
        for (int k = 0; k < l->kernel_height * l->kernel_width; k++) {
            const int y = i / l->out_width * l->stride_y - l->padding_y + k / l->kernel_width;
            const int x = i % l->out_width * l->stride_x - l->padding_x + k % l->kernel_width;
            const int first = (y * l->width + x) * l->channels, end = first + l->channels;

            if (y < 0 || y >= l->height || x < 0 || x >= l->width)
                continue;
            for (int c = 0; values && c < l->channels; c++) {
                const IN value = values[first + c];
                if (!l->largest)
                    out[c] = (OUT)(out[c] + value * l->factor);
                else if (!seen || value > out[c])
                    out[c] = (OUT)value;
            }
            for (int j = first; !values && j < end; j = (j | 31) + 1)
                for (uint32_t active = bits_at(spikes, j, end); active; active &= active - 1) {
                    const int c = j - first + lowest(active);
                    out[c] = (OUT)(l->largest ? 1 : out[c] + l->factor);
                }
            seen = 1;
        }
    }
}
// part affine
/* out = gain * in + shift, each of a channel; in and out may be the same. */
static void affine$(const IN *in, const NUMBER *gain, const NUMBER *shift, NUMBER *out, int size, int channels)
{
    for (int i = 0; i < size;)
        for (int c = 0; c < channels; c++, i++)
            out[i] = gain[c] * in[i] + shift[c];
}
// part add
/* Add what another path gives, or begin a sum with it; in and out may be the same. */
static void add$(const IN *in, NUMBER *out, int size, int begin)
{
    for (int i = 0; i < size; i++)
        out[i] = (begin ? 0 : out[i]) + in[i];
}
// part keep
/* Keep currents for all time steps, of 2^-shift, to the nearest integer. */
static void keep$(const IN *in, OUT *out, int size, int shift)
{
    for (int i = 0; i < size; i++)
        out[i] = (OUT)((in[i] + ((1 << shift) >> 1)) >> shift);
}
// part add_scaled
/* As add, each channel times its factor; of integers over 2^bits, to the nearest: shifts keep the sign, as in all compilers. */
static void add_scaled$(const IN *in, const FACTORS, NUMBER *out, int size, int channels, int begin)
{
    for (int i = 0; i < size;)
        for (int c = 0; c < channels; c++, i++)
            out[i] = (begin ? 0 : out[i]) + SCALED;
}
// part join
/* Copy values to another order: a step of a pixel and of a channel in `out`. */
static void join$(const IN *in, OUT *out, int size, int channels, int pixel, int channel)
{
    for (int i = 0; i < size; i++)
        out[i / channels * pixel + i % channels * channel] = (OUT)in[i];
}
// part join_spikes: bits
/* As join, of bits, which begin at a place in zeros. */
static void join_spikes(const uint32_t *spikes, uint32_t *out, int place, int size, int channels, int pixel, int channel)
{
    for (int i = 0; i < size; i = (i | 31) + 1)
        for (uint32_t active = bits_at(spikes, i, size); active; active &= active - 1) {
            const int k = i + lowest(active), bit = place + k / channels * pixel + k % channels * channel;

            out[bit >> 5] |= UINT32_C(1) << (bit & 31);
        }
}
// part delay
/* Join the inputs of some time steps ago, for each pixel those of all taps; `ring` has the last `depth`, *now the oldest. */
static void delay$(const IN *in, const int16_t *taps, int count, int depth, int size, int channels, OUT *ring,
                   int32_t *now, OUT *out)
{
    for (int i = 0; i < size; i += channels)
        for (int k = 0; k < count; k++) {
            const OUT *row = ring + (*now + depth - taps[k]) % depth * size + i;

            for (int c = 0; c < channels; c++)
                *out++ = (OUT)(taps[k] ? row[c] : in[i + c]);
        }
    for (int i = 0; i < size; i++)
        ring[*now * size + i] = (OUT)in[i];
    *now = (*now + 1) % depth;
}
// part delay_spikes: join_spikes
/* As delay, of bits. */
static void delay_spikes(const uint32_t *spikes, const int16_t *taps, int count, int depth, int size, int channels,
                         uint32_t *ring, int32_t *now, uint32_t *out)
{
    const int words = (size + 31) >> 5;

    memset(out, 0, (size_t)((size * count + 31) >> 5) * sizeof *out);
    for (int k = 0; k < count; k++)
        join_spikes(taps[k] ? ring + (*now + depth - taps[k]) % depth * words : spikes, out, k * channels, size, channels,
                    count * channels, 1);
    memcpy(ring + *now * words, spikes, (size_t)words * sizeof *ring);
    *now = (*now + 1) % depth;
}
// part charge float32
/* What stays of a state, and a current. */
static float charge(float decay, float state, float current)
{
    return decay * state + current;
}
// part charge int8
/* What stays of a state, decay / 2^14 of it to the nearest integer, and a current; within the limits of 16 bits. */
static int32_t charge(int32_t decay, int32_t state, int32_t current)
{
    int32_t sum = ((decay * state + (1 << 13)) >> 14) + current;

#if defined __GNUC__ && defined __ARM_FEATURE_SAT
    __asm__("ssat %0, #16, %0" : "+r"(sum));
    return sum;
#else
    return sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum;
#endif
}
// part neuron_layer
typedef struct {
    int channels;
    FIELD(FACTOR, decay);                    /* what stays of a potential */
    FIELD(STATE, threshold);
    int hard;                                /* a spike sets the potential to 0, else takes the threshold off */
    int shift;                               /* a current counts 2^-shift */  //? shift
    FIELD(FACTOR, synapse);                  /* what stays of a synaptic current */  //? synapse
    FIELD(FACTOR, adaptation);               /* what stays of a raise of the threshold */  //? adaptation
    FIELD(STATE, rise);                      /* what a spike adds to it */  //? adaptation
    FIELD(STATE, subtract);                  /* what a spike takes off */  //? subtract
    int levels, negative;                    /* of graded spikes: the largest; whether there is one of -1 */  //? levels
} neuron_layer;
// part lif: neuron_layer charge
/* Charge the neurons of one pixel with the currents in. Those that reach their threshold spike, and are reset. */
static void lif$(const neuron_layer *l, const IN *in, int pixel, uint32_t *spikes,
                STATE *i_syn,  //? synapse
                STATE *a,  //? adaptation
                STATE *v)
{
    const int end = (pixel + 1) * l->channels;

    for (int i = end - l->channels, c = 0, next; i < end; i = next) {
        uint32_t bit = UINT32_C(1) << (i & 31), word = spikes[i >> 5] & (bit - 1);

        next = (i | 31) + 1 < end ? (i | 31) + 1 : end;
        for (int k = i; k < next; k++, c++, bit <<= 1) {
            NUMBER u = CURRENT, threshold = l->AT(threshold);

            if (i_syn)  //? synapse
                u = i_syn[k] = (STATE)charge(l->AT(synapse), i_syn[k], u);  //? synapse
            if (a)  //? adaptation
                threshold += a[k];  //? adaptation
            u = charge(l->AT(decay), v[k], u);
            if (u >= threshold) {
                word |= bit;
                u = l->hard ? 0 : u - l->AT(TAKEN);
            }
            v[k] = (STATE)u;
            if (a)  //? adaptation
                a[k] = (STATE)charge(l->AT(adaptation), a[k], word & bit ? l->AT(rise) : 0);  //? adaptation
        }
        spikes[i >> 5] = word;
    }
}
// part graded: neuron_layer charge
/* As lif, with spikes of several levels, each of which takes off as much. */
static void graded$(const neuron_layer *l, const IN *in, int pixel, OUT *spikes, STATE *v)
{
    for (int c = 0, i = pixel * l->channels; c < l->channels; c++, i++) {
        NUMBER u = charge(l->AT(decay), v[i], CURRENT);
        int s = 0;

        for (; s < l->levels && u >= l->AT(threshold); s++)
            u -= l->AT(TAKEN);
        if (l->negative && -u >= l->AT(threshold)) {
            u += l->AT(TAKEN);
            s = -1;
        }
        v[i] = (STATE)u;
        spikes[i] = (OUT)s;
    }
}
