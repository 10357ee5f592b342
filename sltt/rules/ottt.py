"""Online training through time: the weights' gradient from traces of what came before, the inputs' as in SLTT."""

from typing import Literal, cast, get_args

from torch import nn

from sltt.checks import choice, flag, number
from sltt.rules.batch import Batch, Output
from sltt.rules.credit import Credit
from sltt.rules.folding import fold_of
from sltt.rules.random_steps import RandomSteps, number_of_steps, split_into_calls
from sltt.rules.trace_step import TraceStep
from sltt.rules.traces import Traces
from sltt.sequence.layout import Layout
from sltt.sequence.step import Step


class OTTT(RandomSteps):
    """Online training through time: backward at every step, with a trace of what each weight layer reads.

        ∇W^l = Σ_t e^l[t] x̂^l[t]ᵀ,   x̂^l[t] = λ x̂^l[t−1] + x^l[t]

    x is what the layer reads: the network's input or spikes; the input of a bias is 1. e is that of SLTT. λ is that of
    the neurons that the layer feeds; where they differ, as behind a residual sum, the mean. A layer that feeds no
    neurons, such as a readout without a state, needs no trace. A layer that feeds neurons, and also the output past
    them, has SLTT's gradient. A layer learns in the time steps in which it runs. The learnable λ of `PLIF` has its
    gradient by the same recursion; a learnable λ of other neurons has SLTT's gradient.

    The trace is the path through the membrane potentials of the neurons behind the layer, which SLTT drops. Paths
    through the reset are dropped here too, and paths that cross a second layer of neurons on their way through time.
    So OTTT is BPTT for one layer of neurons with `detach_reset`, and SLTT for λ = 0 or T = 1. Between weights and
    neurons, the slope of the current step stands for that of all steps: exact for maps that are linear and do not
    change, such as average pooling; an estimate for max pooling, ReLU and the statistics of a batch. Memory is that of
    SLTT and one number for each input of a weight layer; it does not grow with T. The bias β of a normalisation has a
    trace, γ has the gradient of the current step. Recurrent weights trace the spikes that they read, as in e-prop.
    Other parameters have SLTT's gradient, and so has a weight where it is used outside of its layer's forward, as in
    `F.linear(x, self.layer.weight)`.

    Args:
        decay: λ of all traces; None is that of the neurons.
        online: update the weights after every time step, by the `update` of the call, instead of once a sequence.
        inputs: trace what reads the network's input, and biases. False is OTTT as published: only layers that read
            spikes have a trace, readouts too, with the λ of the neurons that fired.
        fold: time steps in one call of the network, see `Truncated`. "auto" takes one with a learnable λ, the
            bias of a normalisation, and weights inside of recurrent layers that no kernel runs.
        k: number of steps with a backward, drawn for each batch as in SLTT-K; the traces go on in all steps.
        credit: of layers before a `Delay`, as of `SLTT`; with "exact", the traces of the steps that wait are kept.

    Raises:
        ValueError: decay outside [0, 1], fold < 1 or together with online; when called, `online` without `update` or
            where errors wait for delays, k > T, weights other than those of linear layers and convolutions, or, without
            `decay`, neurons with a hard reset, or a layer with a state of an unknown λ.

    Source: Xiao et al., NeurIPS 2022 (arXiv 2210.04195); Bellec et al., Nature Communications 2020.
    """

    def __init__(
        self,
        decay: float | None = None,
        online: bool = False,
        inputs: bool = True,
        fold: int | Literal["auto"] = "auto",
        k: int | None = None,
        credit: Credit = "exact",
    ):
        self.fold, self.k = fold_of(fold), number_of_steps(k)
        self.credit = choice("credit", credit, get_args(Credit))
        if online and self.fold not in (1, "auto"):
            raise ValueError("online updates the weights after every time step, and fold takes several: choose one")
        self.decay = None if decay is None else number("decay", decay, least=0, most=1)
        self.online = flag("online", online)
        self.inputs = flag("inputs", inputs)

    def check(self, model: nn.Module, steps: int) -> None:
        super().check(model, steps)
        Traces(Layout(model), self.decay, self.inputs)

    def step(self) -> Step:
        return TraceStep(self.decay, self.inputs, self.credit == "exact")

    def run(self, batch: Batch) -> Output:
        step = cast(TraceStep, batch.network.step)
        trained = step.trained = self.trained_steps(batch)
        # the first step shows which neurons each layer feeds; weights that change are read at every step
        for call, graph, some in [(range(1), True, None), *split_into_calls(range(1, batch.steps), trained, batch)]:
            step.traces.in_graph = graph
            value = batch.forward(call, graph=graph, cut=True, trained=some)
            step.traces.end(value, len(call))
            learns = graph and (call.start in trained or some is not None)
            if self.online and step.waits:
                raise ValueError("errors through delays come later, and online updates the weights: use credit='none'")
            batch.backpropagate(value if learns else None, call.stop)
            if self.online and learns and batch.update is not None:
                batch.update()
        return batch.output()
