"""The fused neuron step, and the saving of spikes as bits; nothing else knows how they work.

from sltt import kernels

with kernels.using(compile="off", bits=False):  # how to switch both off
    rule(model, x, y, loss)
"""

from sltt.kernels.bits import saving_bits, tag_dropped
from sltt.kernels.options import Compile, compiler_problem, using
from sltt.kernels.step import Step, neuron_step

__all__ = ["Compile", "Step", "compiler_problem", "neuron_step", "saving_bits", "tag_dropped", "using"]
