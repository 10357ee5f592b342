import subprocess

import pytest
import torch
from torch import nn

import sltt
from sltt.interop import to_c
from sltt.training.quantised import round_weights
from tests.training.blobs import Blobs, averaged, equal, network, train, weights


def on_grid(weight, last=False):
    """The equation, for a linear layer."""
    scale = (weight.abs().max() if last else weight.abs().amax(1, keepdim=True)) / 127
    return scale * torch.round(weight / scale)


def test_weights_are_rounded_to_the_grid_of_each_output_channel_and_come_back():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, groups=1), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with round_weights(model):
        conv = model[0].weight.flatten(1)
        torch.testing.assert_close(conv[::2], on_grid(before["0.weight"].flatten(1)[::2]))
        assert not conv[1].any()
        torch.testing.assert_close(model[2].weight, on_grid(before["2.weight"]))
        torch.testing.assert_close(model[3].weight, on_grid(before["3.weight"], last=True))
        assert torch.equal(model[2].bias, before["2.bias"])
        assert not torch.equal(model[2].weight, before["2.weight"])
        kept = model[3].weight.clone()
        with round_weights(model):
            torch.testing.assert_close(model[3].weight, kept)  # what is rounded stays
    assert equal(model.state_dict(), before)


def test_gradients_at_rounded_weights_change_the_float_weights(tmp_path):
    """One step of SGD by hand."""
    model, rate = network().requires_grad_(True), 0.5
    model[3].p = 0.0
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    by_hand = network()
    by_hand[3].p = 0.0
    with torch.no_grad():
        by_hand[0].weight.copy_(on_grid(by_hand[0].weight))
        by_hand[4].weight.copy_(on_grid(by_hand[4].weight, last=True))
    x, y = (torch.stack([torch.as_tensor(one[i]) for one in Blobs().load(4).train]) for i in (0, 1))
    sltt.SLTT()(by_hand, x, y, sltt.losses.CrossEntropyMSE(), steps=4)
    for name, p in by_hand.named_parameters():
        expected[name] -= rate * p.grad

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=rate)

    settings = {"epochs": 1, "batch_size": 60, "steps": 4, "optimizer": optimizer, "quantised": "int8"}
    _, result = train(tmp_path / "run", model, **settings)
    found = weights(result.run / "last.ckpt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_the_rounded_weights_are_validated_selected_loaded_and_said(tmp_path):
    model, result = train(tmp_path / "run", quantised="int8")
    row = result.history[result.epoch - 1]
    assert sltt.evaluate(model, Blobs(), "validation", device="cpu").loss == pytest.approx(row["validation_loss"])
    floats, found = weights(result.run / "best.ckpt"), averaged(result.run / "best.ckpt")
    assert equal(model.state_dict(), found)
    torch.testing.assert_close(found["0.weight"], on_grid(floats["0.weight"]))
    assert not torch.equal(found["0.weight"], floats["0.weight"])
    assert "| weights | rounded to int8, for the export to C |" in (result.run / "card.md").read_text()


def test_the_exported_integers_are_the_rounded_weights_and_c_gives_the_logits(tmp_path):
    model, _ = train(tmp_path / "run", quantised="int8")
    x = torch.stack([x for x, _ in Blobs().load(4).test])
    exported = to_c(model, x, tmp_path / "c", name="blobs", steps=4, weights="int8")
    made = subprocess.run(["make", "-s"], cwd=exported.folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "0 of" in made.stdout  # C is `exported.network` to the last bit
    first, *_, last = exported.network.operations
    for op, layer in ((first, model[0]), (last, model[4])):
        integers, floats = (w.flatten(1) / w.flatten(1).abs().amax(1, keepdim=True) for w in (op.weight, layer.weight))
        sign = model[1].weight.sign()[:, None] if layer is model[0] else 1  # BatchNorm is folded
        torch.testing.assert_close(integers.float(), floats.detach() * sign, rtol=1e-5, atol=1e-5)
    expected = sltt.unroll(model.eval(), x, steps=4).mean(0)
    found = exported.network.unroll(x).mean(0) * exported.network.logit_scale
    assert (found - expected).std() < 0.05 * expected.std()
