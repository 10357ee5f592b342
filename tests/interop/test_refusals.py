import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sltt
from sltt.rules.batch import sequence_loss
from tests.conftest import LOSS, batch
from tests.interop.libraries import gradients_of, jelly, network_of, snn

NEURON, ALL = "spikingjelly.activation_based.neuron", "takes all time steps in one call"
REFUSED = [  # library, a module of it behind a linear layer, and what the message says
    (
        NEURON,
        lambda n: n.LIFNode(step_mode="m"),
        r"1 \(LIFNode\) is in multi-step mode: call functional.set_step_mode\(",
    ),
    (NEURON, lambda n: nn.Sequential(n.LIFNode(step_mode="m"), n.NonSpikingLIFNode(tau=2.0)), f"mode.*; 1.1 .* {ALL}"),
    (NEURON, lambda n: n.SLTTLIFNode(), r"1 \(SLTTLIFNode\) has a learning rule of its own: use LIFNode"),
    (
        "spikingjelly.activation_based.layer",
        lambda n: n.Linear(3, 3, step_mode="m"),
        r"\(Linear\) is in multi-step mode",
    ),
    ("snntorch", lambda n: n.Leaky(beta=0.5), "init_hidden=True"),
    ("snntorch", lambda n: n.DeltaLeaky(beta=0.5, init_hidden=True), "gives its state with its spikes"),
    ("snntorch", lambda n: n.StateLeaky(beta=0.5, channels=3), ALL),
    ("snntorch", lambda n: n.LeakyParallel(3, 3), "is recurrent and keeps no state itself"),
    ("snntorch", lambda n: n.Leaky(beta=0.5, init_hidden=True, output=True), r"return the logits \[B, C\].*got tuple"),
    ("sinabs.layers", lambda n: n.LIF(2.0), r"1 \(LIF\) takes \[B, T, ...\]: use the squeezing layer"),
    ("sinabs.layers", lambda n: n.LIFRecurrent(2.0, nn.Linear(3, 3)), "use the squeezing layer"),
    (
        "sinabs.layers",
        lambda n: n.LIFSqueeze(tau_mem=2.0, batch_size=4),
        "batch_size=4 and num_timesteps=-1, for a time step of 5",
    ),
    ("sinabs.layers", lambda n: n.IAFSqueeze(num_timesteps=5), "has batch_size=-1 and num_timesteps=5"),
    ("norse.torch", lambda n: n.LIFBoxCell(), r"1 \(LIFBoxCell\) passes its state through its calls"),
    ("norse.torch", lambda n: n.LIF(), rf"1 \(LIF\) {ALL}: use its cell"),
    ("norse.torch", lambda n: n.LIFRecurrent(3, 3), rf"1 \(LIFRecurrent\) {ALL}: use its cell"),
    ("torch.nn", lambda n: n.RNN(3, 3), "is recurrent and keeps no state itself: put it into a sltt.Stateful"),
    ("torch.nn", lambda n: n.LSTMCell(3, 3), "is recurrent and keeps no state itself"),
]


@pytest.mark.parametrize(("library", "make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_modules_that_do_not_step_are_refused_by_name(library, make, message):
    model, (x, y) = nn.Sequential(nn.Linear(6, 3), make(pytest.importorskip(library))), batch()
    with pytest.raises(ValueError, match=message) as caught:
        sltt.SLTT()(model, x.float(), y, LOSS)
    assert "got tuple" not in message or "1 (Leaky) gives a tuple" in caught.value.__notes__[0]


def test_reset_net_within_forward_is_refused():
    library = jelly("LIFNode")

    class Resets(nn.Sequential):
        def forward(self, x):
            library.reset(self)
            return super().forward(x)

    with pytest.raises(ValueError, match=r"1 \(LIFNode\) was reset in the middle of a sequence: leave the reset out"):
        sltt.unroll(Resets(nn.Linear(6, 8), library.make(8), nn.Linear(8, 3)).double(), batch()[0])


SNNTORCH, JELLY = "snntorch.functional", "spikingjelly.activation_based.functional"
CE, MSE = "nn.CrossEntropyLoss()", "sltt.losses.CrossEntropyMSE(alpha=1, one_hot=True)"


@pytest.mark.parametrize(
    ("module", "name", "ours", "factors"),  # theirs(a · logits) = b · ours(logits), at T = 4
    [
        (SNNTORCH, "ce_rate_loss", CE, (1, 1)),
        (SNNTORCH, "ce_count_loss", f"sltt.losses.OfMean({CE})", (1 / 4, 1)),
        (SNNTORCH, "ce_max_membrane_loss", f"sltt.losses.OfMax({CE})", (1, 1)),
        (SNNTORCH, "mse_count_loss", f"sltt.losses.OfMean({MSE})", (1, 4)),
        (SNNTORCH, "mse_membrane_loss", MSE, (1, 1)),
        (JELLY, "temporal_efficient_training_cross_entropy", CE, (1, 1)),
    ],
)
def test_losses_of_all_time_steps_are_refused_and_ours_is_named(module, name, ours, factors):
    theirs = getattr(pytest.importorskip(module), name)
    theirs = theirs() if isinstance(theirs, type) else theirs
    message = f"{name} of {module} takes the logits of all time steps at once: docs/interop.md lists ours"
    model = nn.Sequential(nn.Linear(6, 8), sltt.LIF(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match=message):
        sltt.BPTT()(model, *batch(), theirs)
    with pytest.raises(ValueError, match=message):
        sltt.losses.OfMean(theirs)
    logits, y = torch.randn(4, 5, 3), torch.arange(5) % 3
    expected = sequence_loss(eval(ours, {"nn": nn, "sltt": sltt}), logits, y)
    torch.testing.assert_close(theirs(factors[0] * logits, y).squeeze(), factors[1] * expected)


@pytest.mark.parametrize(
    ("module", "name"), [(SNNTORCH, "mse_temporal_loss"), (SNNTORCH, "SpikeTime"), (JELLY, "spike_similar_loss")]
)
def test_a_loss_without_a_counterpart_is_refused(module, name):
    loss = getattr(pytest.importorskip(module), name)
    with pytest.raises(ValueError, match=f"{name} of .*call it in a sltt.losses.SequenceLoss, under BPTT"):
        sltt.SLTT()(nn.Linear(6, 3).double(), *batch(), loss() if isinstance(loss, type) else loss)


def test_a_layer_of_sinabs_for_the_batch_size_that_comes_is_taken():
    layers = pytest.importorskip("sinabs.layers")
    model = nn.Sequential(nn.Linear(6, 3), layers.IAFSqueeze(batch_size=5))
    x, y = batch()
    twin = nn.Sequential(model[0], layers.IAFSqueeze(num_timesteps=1))
    expected = gradients_of(sltt.SLTT(), twin, x.float(), y)
    torch.testing.assert_close(gradients_of(sltt.SLTT(), model, x.float(), y), expected)


def test_ottt_refuses_hard_resets_and_weights_inside_of_neurons():
    model, x, y = network_of(jelly("LIFNode", tau=2.0))
    with pytest.raises(ValueError, match=r"1 \(LIFNode\) resets to v_reset = 0.0"):
        sltt.OTTT()(model, x, y, LOSS)
    model, x, y = network_of(snn("RLeaky", recurrent=True))
    with pytest.raises(ValueError, match=r"no traces for the weights of 1 \(RLeaky\)"):
        sltt.OTTT(decay=0.5)(model, x, y, LOSS)


def test_a_model_without_a_state_is_warned_about():
    with pytest.warns(UserWarning, match="no module of the model keeps a state between time steps.*sltt.register"):
        sltt.SLTT()(nn.Linear(6, 3).double(), *batch(), LOSS)


def test_what_a_rule_refuses_is_not_evaluated_either():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(step_mode="m"), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"1 \(LIFNode\)"):
        sltt.unroll(model, torch.randn(4, 5, 6))


def test_nir_refuses_what_depends_on_values():
    pytest.importorskip("nir")

    class Chooses(nn.Linear):
        def forward(self, x):
            return x if x.sum() > 0 else super().forward(x)

    with pytest.raises(ValueError, match=r"Chooses cannot be traced by torch\.fx: .*control flow"):
        sltt.interop.to_nir(Chooses(6, 6), torch.zeros(2, 6))


@pytest.mark.parametrize("export", ["to_nir", "to_onnx"])
def test_weights_that_are_nan_are_not_exported(export, tmp_path):
    pytest.importorskip("nir" if export == "to_nir" else "onnxscript")
    model = nn.Sequential(nn.Linear(6, 6), sltt.LIF())
    with torch.no_grad():
        model[0].bias[2] = torch.nan
    file = [tmp_path / "step.onnx"] if export == "to_onnx" else []
    with pytest.raises(ValueError, match=r"0\.bias has values that are NaN or infinite"):
        getattr(sltt.interop, export)(model, torch.zeros(2, 6), *file)


def exported(export, model, folder):
    pytest.importorskip({"to_nir": "nir", "to_onnx": "onnxscript"}.get(export, "torch"))
    given = {"to_c": (torch.ones(4, 2, 6), folder / "c"), "to_onnx": (torch.ones(2, 6), folder / "a")}
    return getattr(sltt.interop, export)(model, *given.get(export, [torch.ones(2, 6)]))


@pytest.mark.parametrize("export", ["to_c", "to_nir", "to_onnx"])
def test_two_heads_are_refused_and_cat_is_named(export, tmp_path):
    class Heads(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"got tuple.*torch.cat\(\(a, b\), 1\)"):
        exported(export, Heads(nn.Linear(6, 6), sltt.IF()), tmp_path)


@pytest.mark.parametrize("name", ['0"', "a'b", "a\\", "a\rb", "\N{LINE SEPARATOR}", "a*/b", "a/*", "`"])
@pytest.mark.parametrize("export", ["to_c", "to_nir", "to_onnx"])
def test_names_that_would_be_code_are_refused(export, name, tmp_path):
    model = nn.Sequential(nn.Sequential(OrderedDict({name: nn.Identity()})), sltt.IF())
    with pytest.raises(ValueError, match=f"the name {re.escape(repr(name))} would enter source code: expected no"):
        exported(export, model, tmp_path)


@pytest.mark.parametrize("place", ["", "1", "2"])
@pytest.mark.parametrize("export", ["to_c", "to_nir"])
def test_hooks_that_would_not_run_are_refused_by_name(export, place, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), sltt.IF(), nn.Linear(6, 3))
    prune.identity(model[0], "weight")  # by a hook that computes the weight
    exported(export, model, tmp_path)
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=rf"would not run the hooks of {place or 'the model'} \("):
        exported(export, model, tmp_path / "refused")
