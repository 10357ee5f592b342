"""Fast kernels: the fused neuron step, layers on spikes, spikes saved as bits. No other package knows how they work.

from sltt import kernels

with kernels.using(compile="off", bits=False):  # how to switch both off
    rule(model, x, y, loss)
"""
# ruff: noqa: F401

from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.layers.layers import LayerFunction, as_images, is_small, operation_of, run_layer, spike_call
from sltt.kernels.layers.values import convolution_gradients
from sltt.kernels.layers.weights import WeightCache
from sltt.kernels.native import origin as library_origin
from sltt.kernels.native import problem as library_problem
from sltt.kernels.neuron.custom import CustomStep, custom_step
from sltt.kernels.neuron.equations import NeuronStep
from sltt.kernels.neuron.native_step import steady_means
from sltt.kernels.neuron.recurrence import recurrent_steps, runs_recurrence
from sltt.kernels.neuron.sensitivity import Sensitivity
from sltt.kernels.neuron.step import fast_step, neuron_step, normed_step, run_step, steps_by_channel
from sltt.kernels.neuron.triton_step import problem as triton_problem
from sltt.kernels.norm.norm import batch_statistics, counting_batches, plain_norm, stepwise_norm
from sltt.kernels.options import Compile, Sparse, choosing_once, compiler_problem, using, without_modes
from sltt.kernels.options import options as current_options
from sltt.kernels.pooling.pooling import max_pool, running_max
from sltt.kernels.spikes.looks import Spikes, bits_pay, look
from sltt.kernels.spikes.saved import known_count, others_save, save_as_bits, tag_made, tag_of, tag_sum
