import pytest
import torch
from torch import nn

import sltt
from sltt.commands import main
from sltt.interop import to_onnx

pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="the exported network runs in ONNX Runtime")


class Ordered(sltt.Neuron):
    """First states in another order than that of its states."""

    states = ("v", "a")
    start = {"a": 0.9, "v": -0.9}  # noqa: RUF012
    surrogate = sltt.surrogates.Triangle()

    @staticmethod
    def step(x, v, a, *, surrogate):
        u = 0.5 * v + x
        s = surrogate(u - a)
        return s, u - s, 0.9 * a


def chain(*neurons):
    layers = [nn.Linear(6, 8)]
    for neuron in neurons:
        nn.init.constant_((norm := nn.BatchNorm1d(8)).weight, 3.0)
        layers += [norm, neuron, sltt.Dropout(0.3), nn.Linear(8, 8)]
    layers[-1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return nn.Sequential(*layers)


PAST_BORDER = nn.Sequential(nn.MaxPool2d(2, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 0, True))
NETWORKS = {  # and the shape of an input
    "neurons in a chain": (
        lambda: chain(
            sltt.LIF(tau=2.0, v_reset=0.1, decay_input=True, v_threshold=0.5),
            sltt.IF(v_init=0.5),
            sltt.PLIF(tau=3.0),
            Ordered(),
            sltt.Recurrent(sltt.CubaLIF(tau=3.0), nn.Linear(8, 8)),
        ),
        (5, 4, 6),
    ),
    "RunningMax": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), sltt.IF(), sltt.RunningMax(nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(36, 3)
        ),
        (5, 2, 1, 8, 8),
    ),
    "pools": (
        lambda: nn.Sequential(nn.AvgPool2d(2, 3, 0, True), nn.Conv2d(1, 4, 1), sltt.IF(), PAST_BORDER, nn.Linear(2, 3)),
        (5, 2, 1, 21, 21),
    ),
    "delays": (
        lambda: nn.Sequential(
            sltt.Delay([2, 0, 1]), nn.Conv2d(6, 4, 3), sltt.LIF(), sltt.Delay([0]), sltt.Delay([3]), nn.Conv2d(4, 3, 4)
        ),
        (7, 3, 2, 6, 6),
    ),
    "a readout": (lambda: nn.Sequential(nn.Linear(6, 8), sltt.IF(), nn.Linear(8, 3), sltt.LI()), (4, 3, 6)),
    "graded spikes": (lambda: chain(sltt.IntegerLIF(), sltt.TernaryLIF()), (5, 4, 6)),
    "a neuron alone": (sltt.LIF, (5, 4, 6)),
    "DigitsNet": (lambda: sltt.models.DigitsNet(width=4, neuron=lambda: sltt.LIF(v_threshold=0.1)), (3, 2, 1, 8, 8)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "a readout")) for name in NETWORKS]
)
def test_steps_in_onnx_runtime_are_those_of_the_network(name, tmp_path):
    make, shape = NETWORKS[name]
    model, x = make(), 2 * torch.randn(shape)
    for _ in range(3):
        sltt.unroll(model.train(), x)  # statistics of BatchNorm with which neurons fire
    path = tmp_path / "step.onnx"
    first = to_onnx(model, x[0], path)
    assert model.training
    with sltt.analysis.firing_rates(model.eval()) as rates:
        expected = sltt.unroll(model, x[:, :1])
    assert min(rates.by_layer().values()) > 0
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {i.name: [1, *i.shape[1:]] for i in session.get_inputs()}
    states = {name: torch.full(inputs[name], value).numpy() for name, value in first.items()}
    assert list(inputs) == ["x", *first]
    for t, frame in enumerate(x[:, :1]):
        logits, *after = session.run(None, {"x": frame.numpy(), **states})
        torch.testing.assert_close(torch.from_numpy(logits), expected[t], rtol=1e-4, atol=1e-5)
        states = dict(zip(first, after, strict=True))
    assert to_onnx(model, x, path, sequence=True) == {}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.shape[1] for i in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]
    (logits,) = session.run(None, {"x": x[:, :1].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_a_static_input_is_no_sequence(tmp_path):
    with pytest.raises(ValueError, match=r"\[T, B, ...\], time first") as raised:
        to_onnx(nn.Sequential(nn.Linear(4, 8), sltt.LIF()), torch.rand(5, 4), tmp_path / "a.onnx", sequence=True)
    assert "x.expand(T, *x.shape)" in raised.value.__notes__[-1]
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), sltt.LIF())
    to_onnx(model, torch.rand(3, 5, 4), tmp_path / "b.onnx", sequence=True)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("name", ["x", "logits"])
def test_layers_of_neurons_with_a_name_of_the_file_are_refused(name, tmp_path):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(3, 4))
    model.add_module(name, sltt.LIF())
    with pytest.raises(ValueError, match=f"the layer of neurons {name} has a name that the file needs"):
        to_onnx(model, torch.randn(2, 3), tmp_path / "a.onnx")


def test_states_that_it_does_not_know_are_named(tmp_path):
    class Own(sltt.Stateful):
        states = ("seen",)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"not of 0 \(Own\)"):
        to_onnx(nn.Sequential(Own(), sltt.LIF()), torch.randn(2, 3), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.slow
def test_the_command_exports_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--model.width", "2", "--epochs", "1", "--steps", "2", "--device", "cpu"]
    assert main(["train", "digits", *small, "--run", "a"]) == 0
    assert main(["export", "a", "--to", "onnx"]) == 0
    assert "a/step.onnx" in capsys.readouterr().out
    session = runtime.InferenceSession("a/step.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "features.2", "features.5", "features.9"]
    assert main(["export", "a", "--to", "nir", "--check", "speck"]) == 0
    assert "features_2 (LIF): not on the chip, which has IF, " in capsys.readouterr().out
    assert main(["export", "a", "--to", "c", "--check", "speck"]) == 2
    assert "--check is of a NIR graph, got --to c: use --to nir" in capsys.readouterr().err
    assert main(["export", "a", "--to", "onnx", "--weights", "int8"]) == 2
    assert "--weights is of C, got --to onnx: leave it out" in capsys.readouterr().err
    assert [main(["export", "digits", "--to", "nir"]) for _ in range(2)] == [0, 2]  # not overwritten
    assert main(["export", "a", "--to", "elsewhere"]) == 2
    assert main(["export", "nowhere", "--to", "onnx"]) == 2
