"""The fused neuron step, and the saving of spikes as bits; nothing else knows how they work.

from sltt import kernels

with kernels.using(compile="off", bits=False):  # how to switch both off
    rule(model, x, y, loss)
"""

from sltt.kernels.custom import CustomStep, custom_step
from sltt.kernels.deferred import settled
from sltt.kernels.derivatives import differentiable_once
from sltt.kernels.layers import layer_call
from sltt.kernels.norm import batch_statistics, stepwise_norms
from sltt.kernels.options import Compile, Sparse, compiler_problem, using, without_modes
from sltt.kernels.pooling import running_max
from sltt.kernels.restoring import bits_pay, release
from sltt.kernels.saved_tensors import saving, tag_dropped
from sltt.kernels.sensitivity import Sensitivity
from sltt.kernels.steady import Steady, steady_steps
from sltt.kernels.step import NeuronStep, neuron_step
from sltt.kernels.values import convolution_gradients
from sltt.kernels.weights import Weights

__all__ = [
    "Compile",
    "CustomStep",
    "NeuronStep",
    "Sensitivity",
    "Sparse",
    "Steady",
    "Weights",
    "batch_statistics",
    "bits_pay",
    "compiler_problem",
    "convolution_gradients",
    "custom_step",
    "differentiable_once",
    "layer_call",
    "neuron_step",
    "release",
    "running_max",
    "saving",
    "settled",
    "steady_steps",
    "stepwise_norms",
    "tag_dropped",
    "using",
    "without_modes",
]
