import copy
import pickle

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis import FiringRates, firing_rates
from sltt.kernels.spikes.saved import keep_count
from sltt.sequence.layout import spiking_layers
from sltt.sequence.spikes import observe_spikes, watches
from tests.conftest import LOSS, batch, small_network
from tests.references import marked


class Doubled(sltt.LIF):
    def forward(self, x):
        return 2 * super().forward(x)


class WithState(sltt.Stateful):
    spikes = True

    def forward(self, x):
        return (x > 1).to(x.dtype), x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.neuron = WithState()

    def forward(self, x):
        return self.neuron(x)[0]


def seen_and_given(model, run):
    """What an observer sees of each layer, and what the layer gave, by hooks."""
    seen, given, layers = {}, {}, spiking_layers(model)
    for name, module in layers.items():
        module.register_forward_hook(marked(lambda *call, name=name: given.setdefault(name, []).append(call[-1])))
    with observe_spikes(layers, lambda name, spikes: seen.setdefault(name, []).append(spikes)):
        run()
    run()
    return seen, {name: calls[: len(calls) // 2] for name, calls in given.items()}


@pytest.mark.parametrize(
    "kind", [sltt.LIF, sltt.PLIF, sltt.ALIF, Doubled, lambda: sltt.Recurrent(sltt.LIF(), nn.Linear(8, 8))]
)
@pytest.mark.parametrize("rule", [sltt.SLTT(), sltt.BPTT(fold=2)], ids=repr)
def test_observers_see_what_neurons_give_once_and_in_its_graph(kind, rule):
    model = nn.Sequential(nn.Linear(6, 8), kind(), nn.Linear(8, 3)).double()
    x, y = batch()
    seen, given = seen_and_given(model, lambda: rule(model, x, y, LOSS))
    assert seen.keys() == given.keys() == spiking_layers(model).keys()
    for name, spikes in seen.items():
        assert len(spikes) == len(given[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(spikes, given[name], strict=True))
        assert all(s.requires_grad for s in spikes)


def test_a_layer_that_gives_its_state_too():
    model = Pair()
    seen, given = seen_and_given(model, lambda: model(torch.randn(4, 3)))
    assert torch.equal(seen["neuron"][0], given["neuron"][0][0])
    assert not torch.equal(*given["neuron"][0])


def test_observers_leave_after_a_failure_and_stay_out_of_copies():
    model, outer, inner = small_network(), [], []
    layers, x = spiking_layers(model), batch()[0]
    with observe_spikes(layers, lambda name, _: outer.append(name)):
        copy.deepcopy(model)(x[0])
        pickle.loads(pickle.dumps(model))(x[0])
        assert not outer
        with pytest.raises(ZeroDivisionError), observe_spikes(layers, lambda name, _: (inner.append(name), 1 / 0)):
            model(x[0])
        sltt.reset(model)
        model(x[0])
    model(x[1])
    assert outer == ["2", "2", "5"]
    assert inner == ["2"]
    assert not any(watches(module) for module in layers.values())


@pytest.mark.parametrize("kind", [sltt.LIF, WithState])
def test_firing_rates_that_do_not_end_in_reverse_order(kind):
    model, x = nn.Sequential(kind()), torch.full((2, 3, 4), 1.5)
    first, second = firing_rates(model), firing_rates(model)
    of_first, of_second = first.__enter__(), second.__enter__()
    model(x[0])
    first.__exit__(None, None, None)
    model(x[0])
    second.__exit__(None, None, None)
    model(x[0])
    assert sum(spikes for spikes, _ in of_first.state_dict().values()) == 12
    assert sum(spikes for spikes, _ in of_second.state_dict().values()) == 24


def test_the_number_that_a_kernel_counted_is_exact_and_of_unchanged_spikes_only():
    rates, spikes = FiringRates(["layer"]), torch.ones(6)
    keep_count(spikes, torch.tensor([2**24, 1], dtype=torch.int32))  # more than there are, to tell it from a count
    rates("layer", spikes.view(2, 3))
    rates._parts["layer"].append(torch.tensor([2.0**24]))  # of a call whose kernel did not count
    assert rates.state_dict() == {"layer": (2**25 + 1, 6)}
    rates("layer", spikes[:4])
    rates("layer", spikes.mul_(0))
    assert rates.state_dict() == {"layer": (2**25 + 5, 16)}


@pytest.mark.parametrize("fold", [1, 4])
def test_neurons_behind_a_norm_in_a_forward_of_ones_own_count_once(fold):
    class Own(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x)
            return x

    model, x = Own(nn.Linear(6, 64), nn.BatchNorm1d(64), sltt.LIF(), nn.Linear(64, 3)), torch.randn(4, 5, 6)
    sltt.SLTT(fold=fold)(model, x, torch.zeros(5).long(), LOSS)  # finds the pair
    with firing_rates(model) as rates:
        sltt.SLTT(fold=fold)(model, x, torch.zeros(5).long(), LOSS)
    rates.settle()
    assert [*rates._count.values()] == [4 * 5 * 64]
