"""A fully connected network, for inputs without an image plane."""

from collections.abc import Sequence

from torch import Tensor, nn

from sltt.checks import flag, whole_numbers
from sltt.models.base import Delays, NeuronFactory, delays_before, neuron_maker
from sltt.neurons import LIF, Recurrent
from sltt.neurons.dropout import Dropout


class MLP(nn.Module):
    """Layers of (linear, BatchNorm, neuron, dropout), and a linear layer without a neuron.

    Args:
        features: sizes of the input, of each hidden layer, and of the logits.
        neuron: makes a neuron; called once for each hidden layer.
        dropout: probability of the dropout after each neuron.
        norm: with BatchNorm. Its running statistics are those of all time steps together; leave it out where the steps
            differ, such as a silent one.
        recurrent: the spikes of each hidden layer come back one time step later, through a linear layer without bias.
        delays: taps of a `Delay` before each linear layer, from the input on; None for a layer without one.
    """

    def __init__(
        self,
        features: Sequence[int],
        neuron: NeuronFactory = LIF,
        dropout: float = 0.0,
        norm: bool = True,
        recurrent: bool = False,
        delays: Delays = (),
    ):
        super().__init__()
        self.features = list(whole_numbers("features", features, least=1, fewest=2))
        norm, recurrent = flag("norm", norm), flag("recurrent", recurrent)
        neuron = neuron_maker(neuron)
        before = delays_before(delays, len(features) - 1)

        def linear(i: int) -> list[nn.Module]:
            delay, taps = before[i]
            return [*delay, nn.Linear(features[i] * taps, features[i + 1])]

        layers: list[nn.Module] = []
        for i, after in enumerate(features[1:-1]):
            neurons = Recurrent(neuron(), nn.Linear(after, after, bias=False)) if recurrent else neuron()
            layers += [*linear(i), *([nn.BatchNorm1d(after)] if norm else []), neurons, Dropout(dropout)]
        *delay, self.head = linear(len(features) - 2)
        self.hidden = nn.Sequential(*layers, *delay)

    def forward(self, x: Tensor) -> Tensor:
        """One time step [B, ...], flattened to [B, features[0]], to logits [B, features[-1]]."""
        return self.head(self.hidden(x.flatten(1)))
