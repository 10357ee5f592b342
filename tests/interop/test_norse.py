import pytest
import torch
from torch import nn

import sltt
from tests.conftest import LOSS, batch, gradient
from tests.interop.libraries import gradients_of, network


class TestNorse:
    def sequential(self):
        torch_ = pytest.importorskip("norse.torch")
        p = torch_.LIFBoxParameters(v_th=torch.tensor(0.1))
        net = network(torch_.LIFBoxCell(p), torch_.LIFCell(torch_.LIFParameters(v_th=torch.tensor(0.1))))
        return torch_.SequentialState(*net).double()

    @pytest.mark.parametrize("rule", [sltt.BPTT(), sltt.BPTT(segment=2), sltt.SLTT()], ids=repr)
    def test_a_sequential_state_equals_its_own_loop(self, rule):
        model = self.sequential()
        x, y = batch(steps=5)
        state, total = None, 0
        for x_t in x:
            logits, state = model(x_t, state)
            total = total + LOSS(logits, y) / len(x)
            if isinstance(rule, sltt.SLTT):
                state = [s if s is None else type(s)(*(v.detach() for v in s)) for s in state]
        total.backward()
        expected = gradient(model)
        kept = pytest.importorskip("sltt.interop.norse").KeepState(model)
        torch.testing.assert_close(gradients_of(rule, kept, x, y), expected, rtol=1e-10, atol=1e-13)

    def test_a_module_that_keeps_no_state_is_refused(self):
        model = self.sequential()
        with pytest.raises(ValueError, match=r"the model \(SequentialState\).*wrap it in sltt.interop.norse.KeepState"):
            sltt.SLTT()(model, *batch(), LOSS)

    @pytest.mark.parametrize("name", ["LIF", "LI", "LIFRecurrent"])
    def test_modules_of_all_time_steps_are_refused(self, name):
        torch_ = pytest.importorskip("norse.torch")
        module = getattr(torch_, name)(*(3, 3) if "Recurrent" in name else ())
        with pytest.raises(ValueError, match=rf"{name}\) takes all time steps in one call: use its cell"):
            pytest.importorskip("sltt.interop.norse").KeepState(module)

    @pytest.mark.parametrize(
        ("module", "message"), [(nn.Linear(3, 3), "needs no KeepState"), (None, "module must be a Module, got None")]
    )
    def test_a_module_without_a_state_is_refused(self, module, message):
        keep = pytest.importorskip("sltt.interop.norse").KeepState
        with pytest.raises(ValueError, match=message):
            keep(module)

    def test_a_torch_rnn_inside_is_refused(self):
        torch_ = pytest.importorskip("norse.torch")
        keep = pytest.importorskip("sltt.interop.norse").KeepState
        with pytest.raises(ValueError, match=r"1 \(LSTM\) takes all time steps in one call"):
            keep(torch_.SequentialState(nn.Linear(3, 3), nn.LSTM(3, 3)))
