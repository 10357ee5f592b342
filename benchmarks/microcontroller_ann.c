/* Instructions of a dense int8 network with the layers of the digits network, by CMSIS-NN, on an emulated Cortex-M4.

   In a checkout of https://github.com/ARM-software/CMSIS-NN (measured at 99f736a6):

   SOURCES=$(ls Source/ConvolutionFunctions/*s8*.c Source/FullyConnectedFunctions/*s8*.c Source/PoolingFunctions/*avgpool*s8*.c \
                Source/NNSupportFunctions/*.c | grep -v "f32\|f16\|flt\|lstm")
   arm-none-eabi-gcc -O3 -std=gnu11 -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 -IInclude --specs=rdimon.specs \
       -Wl,--section-start=.vectors=0 -Wl,-Ttext=0x10000 -Wl,-Tdata=0x20000000 -Wl,-e,start -o ann microcontroller_ann.c $SOURCES
   qemu-system-arm -M mps2-an386 -nographic -semihosting -icount shift=0 -kernel ann

   Weights are random: the count does not depend on them. */

#include <stdio.h>

#include "arm_nnfunctions.h"

#define TIMER ((volatile unsigned *)0xE000E010) /* a tick is 40 ns, and an instruction 1 ns */

extern void _start(void);
void start(void)
{
    *(volatile unsigned *)0xE000ED88 |= 0xF << 20; /* the floating-point unit */
    _start();
}
__attribute__((section(".vectors"), used)) static const void *vectors[] = {(void *)0x20400000, (void *)start};

static int8_t image[8 * 8], weights[32 * 9 + 64 * 288 + 64 * 576 + 10 * 256], one[8 * 8 * 64], two[8 * 8 * 64];
static int32_t bias[64], multiplier[64], shift[64], buffer[20000];

static int conv(const int8_t *in, int channels, int size, const int8_t *weight, int outputs, int8_t *out)
{
    const cmsis_nn_context context = {buffer, sizeof buffer};
    const cmsis_nn_conv_params layer = {0, 0, {1, 1}, {1, 1}, {1, 1}, {0, 127}};
    const cmsis_nn_per_channel_quant_params scale = {multiplier, shift};
    const cmsis_nn_dims input = {1, size, size, channels}, filter = {outputs, 3, 3, channels};
    const cmsis_nn_dims biases = {1, 1, 1, outputs}, output = {1, size, size, outputs};

    return arm_convolve_wrapper_s8(&context, &layer, &scale, &input, in, &filter, weight, &biases, bias, &output, out);
}

static int pool(const int8_t *in, int size, int8_t *out)
{
    const cmsis_nn_context context = {buffer, sizeof buffer};
    const cmsis_nn_pool_params layer = {{2, 2}, {0, 0}, {-128, 127}};
    const cmsis_nn_dims input = {1, size, size, 64}, filter = {1, 2, 2, 1}, output = {1, size / 2, size / 2, 64};

    return arm_avgpool_s8(&context, &layer, &input, in, &filter, &output, out);
}

static int linear(const int8_t *in, const int8_t *weight, int8_t *out)
{
    const cmsis_nn_context context = {buffer, sizeof buffer};
    const cmsis_nn_fc_params layer = {0, 0, 0, {-128, 127}};
    const cmsis_nn_per_tensor_quant_params scale = {1 << 30, -7};
    const cmsis_nn_dims input = {1, 1, 1, 256}, filter = {256, 1, 1, 10}, output = {1, 1, 1, 10};

    return arm_fully_connected_s8(&context, &layer, &scale, &input, in, &filter, weight, &output, bias, &output, out);
}

int main(void)
{
    const int8_t *weight = weights;
    unsigned random = 1, before;
    int8_t logits[10];
    int failed;

    for (unsigned i = 0; i < sizeof weights; i++)
        weights[i] = (int8_t)((random = random * 1664525 + 1013904223) >> 24);
    for (unsigned i = 0; i < sizeof image; i++) {
        image[i] = (int8_t)((random = random * 1664525 + 1013904223) >> 24);
        multiplier[i] = 1 << 30;
        shift[i] = -7;
        bias[i] = 100;
    }
    TIMER[1] = 0xFFFFFF;
    TIMER[0] = 5;
    before = TIMER[2];
    failed = conv(image, 1, 8, weight, 32, one);
    failed |= conv(one, 32, 8, weight += 32 * 9, 64, two);
    failed |= pool(two, 8, one);
    failed |= conv(one, 64, 4, weight += 64 * 288, 64, two);
    failed |= pool(two, 4, one);
    failed |= linear(one, weight += 64 * 576, logits);
    printf("%u instructions; status %d\n", ((before - TIMER[2]) & 0xFFFFFF) * 40, failed);
    return failed;
}
