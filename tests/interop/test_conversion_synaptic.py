"""Neurons of other libraries with a synaptic current, and `CubaLIF` in their place."""

import pytest
import torch

import sltt
from tests.conftest import batch
from tests.interop.libraries import network
from tests.interop.test_conversion import EXACT, check_equal


@pytest.mark.parametrize(
    "kwargs", [{"beta": 0.7, "reset_mechanism": "zero", "reset_delay": False}, {"beta": 1.0}], ids=str
)
def test_synaptic_of_snntorch(kwargs):
    snntorch = pytest.importorskip("snntorch")
    x, y = batch(steps=6)
    settings = {"alpha": 0.6, "init_hidden": True, "spike_grad": sltt.surrogates.ArcTan(), **kwargs}
    converted = check_equal(network(*(snntorch.Synaptic(**settings) for _ in range(2))).double(), x, y, EXACT)
    assert type(converted[1]) is sltt.CubaLIF


@pytest.mark.parametrize("norm_input", [False, True])
@pytest.mark.parametrize("reset", ["MembraneSubtract", "MembraneReset"])
def test_synaptic_current_of_sinabs(norm_input, reset):
    layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")

    def make():
        neuron = layers.LIFSqueeze(
            tau_mem=3.0,
            tau_syn=2.0,
            norm_input=norm_input,
            num_timesteps=1,
            spike_fn=activation.SingleSpike,
            reset_fn=getattr(activation, reset)(),
            spike_threshold=torch.tensor(0.4),
        )
        return neuron.requires_grad_(False)

    x, y = batch(steps=6)
    converted = check_equal(network(make(), make()), x.float(), y, {"rtol": 1e-4, "atol": 1e-6})
    assert type(converted[1]) is sltt.CubaLIF


@pytest.mark.parametrize("rest", [0.0, -0.25])
def test_lif_cell_of_norse(rest):
    norse = pytest.importorskip("norse.torch")
    keep = pytest.importorskip("sltt.interop.norse").KeepState
    rest = torch.tensor(rest)
    p = norse.LIFParameters(
        tau_mem_inv=torch.tensor(300.0, dtype=torch.float64), v_th=torch.tensor(0.2), v_leak=rest, v_reset=rest
    )
    converted = check_equal(network(*(keep(norse.LIFCell(p)) for _ in range(2))).double(), *batch(steps=6), EXACT)
    assert type(converted[1]) is sltt.CubaLIF
