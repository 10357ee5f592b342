"""What an export to C refuses, or warns of, before anything is written."""

import re

import pytest
import torch
from torch import nn

import sltt
from sltt.interop import to_c


class Own(sltt.LIF):
    @staticmethod
    def step(x, v, **constants):
        return sltt.LIF.step(x, v / 2, **constants)


REFUSED = {
    "GroupNorm": (nn.GroupNorm(2, 6), r"0 \(GroupNorm\) \(use BatchNorm\)"),
    "a neuron of one's own": (Own(), r"0 \(Own\)"),
    "RunningMax": (sltt.RunningMax(nn.MaxPool1d(1)), r"0 \(RunningMax\) \(use MaxPool\)"),
    "an activation": (nn.ReLU(), r"0 \(ReLU\) \(use neurons\)"),
    "softmax": (nn.LogSoftmax(1), r"0 \(LogSoftmax\) \(use the logits before it, whose largest is the same in each"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_c_has_not_are_named_before_anything_is_written(case, tmp_path):
    layer, named = REFUSED[case]
    with pytest.raises(ValueError, match=rf"C has no counterpart for {named}.*or export one step by sltt"):
        to_c(nn.Sequential(layer, nn.Linear(6, 3), sltt.LIF()), torch.randn(4, 2, 6), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bad_options_of_layers_and_operations_are_named_all_at_once(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3, padding_mode="reflect"), nn.Linear(36, 3)
            self.pool = nn.AdaptiveAvgPool2d(5)
            self.neuron = sltt.LIF()

        def forward(self, x):
            return self.head((self.neuron(self.conv(x)) * x[:, :, 2:, 2:]).mean(1).flatten(1))

    expected = r"conv \(Conv2d\), which pads by other than zeros; the operation getitem in the model \(Odd\);.* mean in"
    with pytest.raises(ValueError, match=expected):
        to_c(Odd(), torch.randn(2, 2, 1, 8, 8), tmp_path / "a")
    odd = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4), sltt.LIF(), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(ValueError, match=r"1 \(AdaptiveAvgPool2d\), whose windows have several sizes"):
        to_c(odd, torch.randn(2, 2, 1, 8, 8), tmp_path / "a")


class Len(nn.Sequential):
    def forward(self, x):
        return super().forward(x.reshape(len(x), -1))


def test_bad_input_is_refused_with_the_remedy(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3)), torch.randn(4, 2, 6)

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            to_c(*args, **{"folder": tmp_path / "a", **kwargs})
        assert not (tmp_path / "a").exists()

    for name in ("2d", 3, 'x"', "x\n", "layer1_x"):
        refused(f"name must be a name in C, .* got {re.escape(repr(name))}; such as my_network", model, x, name=name)
    refused(r"traced by torch.fx: .* values; x.shape\[0\] for len\(x\)", Len(*model), x)
    refused("exists: choose another folder", model, x, folder=tmp_path)
    refused("steps must be at least 1, got 0", model, x[0], steps=0)
    refused("at least one time step", model, x[:0])
    refused(r"2 \(Flatten\), which keeps a dim", nn.Sequential(nn.Linear(6, 1), sltt.LIF(), nn.Flatten(0)), x)
    refused("weights must be one of 'float32', 'int8', got 'int4'", model, x, weights="int4")
    refused("ram must be at least 1, got 0", model, x, ram=0)
    taken = r"network takes 92 bytes of RAM in float32, more than 91; {} takes 36 of them: make it smaller, or use we"
    refused(taken.format(r"1 \(LIF\)"), model, x, ram=91)
    taken = r"takes 152 bytes of flash in int8, more than 64; 0 \(Linear\) takes 84.*smaller$"
    refused(taken, model, x, flash=64, weights="int8")
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    refused(r"0\.weight has values that are NaN or infinite: export a checkpoint", model, x)


def test_changes_in_place_that_a_trace_does_not_show_are_refused(tmp_path):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.lif, self.head = nn.Linear(6, 6), sltt.LIF(v_threshold=0.1), nn.Linear(6, 3)

        def forward(self, x):
            y = self.one(x)
            z = y
            z += x
            return self.head(self.lif(y))

    with pytest.raises(ValueError, match=r"changes a tensor in place.*write z = z \+ x"):
        to_c(InPlace(), torch.randn(2, 2, 6), tmp_path / "a")

    class Counts(InPlace):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.head(self.lif(self.one(x))) * (1 + self.calls // 40)

    with pytest.raises(ValueError, match="something else than its trace of the first time step: leave out what counts"):
        to_c(Counts(), torch.randn(50, 2, 6), tmp_path / "a")


CHANGED = {None: "", 0: "of the spikes of 1 (LIF)", 2: "of the spikes of 3 (IF)", 4: "of the spread of the logits"}


@pytest.mark.parametrize("place", CHANGED)
def test_only_the_layer_that_integers_change_is_named_in_a_warning(place, tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(v_threshold=0.3), nn.Linear(8, 8), sltt.IF(), nn.Linear(8, 3))
    x = torch.rand(4, 20, 6) + 0.5
    x[..., 0] = 0
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
            layer.bias[0] = -100.0  # silent
        if place is not None:
            model[place].weight[:, 0] = 100.0  # of an input of zeros: takes the scale, and the others round to 0
    to_c(model, x, tmp_path / "a", weights="int8")
    warnings = [record.getMessage() for record in caplog.records]
    assert [f"% {CHANGED[place]}: train with quantised='int8'" in warning for warning in warnings] == [True][
        : place is not None
    ]


def test_a_logit_that_is_the_same_for_all_samples_is_not_named(tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(v_threshold=100.0), nn.Linear(8, 1))
    to_c(model, torch.rand(8, 6), tmp_path / "a", steps=5, weights="int8")
    assert not caplog.records
