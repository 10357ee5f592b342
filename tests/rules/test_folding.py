import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sltt
from sltt import kernels
from sltt.kernels import stepwise_norm
from sltt.sequence.once import Results
from sltt.sequence.run import Run
from tests.conftest import LOSS, gradient, gradients
from tests.references import marked, measured, recorded


def changed(module, **attributes):
    vars(module).update(attributes)
    return module


class Net(nn.Module):
    """Layers large enough to be packed, with BatchNorm, dropout, a residual sum, and neurons without BatchNorm."""

    def __init__(self, neuron=sltt.LIF):
        super().__init__()
        self.conv1, self.norm1, self.lif1 = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), neuron()
        self.conv2, self.norm2, self.lif2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), neuron()
        self.dropout, self.conv3, self.lif3 = sltt.Dropout(0.3), nn.Conv2d(16, 16, 3, padding=1), neuron()
        self.head = nn.Linear(16 * 8 * 8, 5)

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(self.lif1(self.norm1(x))) + x
        y = self.lif3(self.conv3(self.dropout(F.avg_pool2d(self.lif2(self.norm2(y)), 2))))
        return self.head(y.flatten(1))


def data(static, steps=5):
    x = torch.randn(4, 2, 16, 16, dtype=torch.float64) if static else torch.randn(steps, 4, 2, 16, 16).double()
    return x, torch.randint(5, (4,)), {"steps": steps} if static else {}


def results(model, rule, x, y, kwargs):
    """Gradients, logits, loss and buffers after a rule."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    out = rule(model, x, y, LOSS, **kwargs)
    return [*(p.grad for p in model.parameters()), out.logits, out.loss, *model.buffers()]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("static", "memory_format"),
    [(False, torch.contiguous_format), (True, torch.channels_last)],
    ids=["sequence NCHW", "static NHWC"],
)
@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (sltt.BPTT(fold=5), sltt.BPTT(fold=1)),
        (sltt.BPTT(fold=2), sltt.BPTT(fold=1)),
        (sltt.BPTT(fold=5, recompute=True), sltt.BPTT(fold=1)),
        (sltt.BPTT(fold=2, segment=4), sltt.BPTT(fold=1)),
        (sltt.TBPTT(3, fold=2), sltt.TBPTT(3, fold=1)),
        (sltt.SLTT(fold=3), sltt.SLTT(fold=1)),
        (sltt.SLTT(fold=5, recompute=True), sltt.SLTT(fold=1)),
        (sltt.SLTT(fold=2), sltt.SLTT(fold=1)),
        (sltt.SLTT(k=3, fold=5), sltt.SLTT(k=3)),
    ],
    ids=lambda rule: repr(rule),
)
def test_folding_changes_nothing_but_the_number_of_calls(rule, plain, static, memory_format):
    model = Net().double().to(memory_format=memory_format)
    x, y, kwargs = data(static)
    assert_same(results(model, rule, x, y, kwargs), results(model, plain, x, y, kwargs))


@pytest.mark.parametrize("constants", [{}, {"v_reset": 0.0}, {"decay_input": True, "v_reset": -0.2}], ids=str)
@pytest.mark.parametrize("kind", [sltt.LIF, sltt.PLIF])
def test_folding_every_neuron(kind, constants):
    model = Net(lambda: kind(tau=2.0, **constants)).double()
    x, y, kwargs = data(static=False)
    for rule, plain in ((sltt.BPTT(fold=5), sltt.BPTT(fold=1)), (sltt.SLTT(fold=2), sltt.SLTT(fold=1))):
        assert_same(results(model, rule, x, y, kwargs), results(model, plain, x, y, kwargs))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, momentum=None),
        nn.BatchNorm1d(6, affine=False),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm1d(6, momentum=0.3).eval(),
        nn.BatchNorm1d(6, track_running_stats=False).eval(),
        changed(nn.BatchNorm1d(6), track_running_stats=False),
    ],
    ids=str,
)
def test_batch_norm_takes_the_statistics_of_each_step(norm):
    norm, twin = norm.double(), copy.deepcopy(norm).double()
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found = stepwise_norm(norm, leaves[0].flatten(0, 1), 3).unflatten(0, (3, 8))
        expected = torch.stack([twin(x_t) for x_t in leaves[1]])
        torch.testing.assert_close(found, expected)
        for y in (found, expected):
            y.square().mul(x).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for a, b in zip([*norm.parameters(), *norm.buffers()], [*twin.parameters(), *twin.buffers()], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("dtype", "autocast", "recompute"),
    [
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, False, False),
    ],
)
def test_any_batch_norm_in_16_bits(dtype, autocast, recompute, affine, tracked):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16, affine=affine, track_running_stats=tracked)
    layers = nn.Conv2d(2, 16, 3, padding=1), norm, sltt.LIF(), nn.Flatten(), nn.Linear(16 * 64, 3)
    model, (x, y) = nn.Sequential(*layers), (torch.randn(3, 8, 2, 8, 8), torch.randint(3, (8,)))
    model, x = (model, x) if autocast else (model.to(dtype), x.to(dtype))
    rules = sltt.BPTT(fold=3, recompute=recompute), sltt.BPTT(fold=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kernels.using(compile="off"):
        found, expected = (gradients(model, rule, x, y, LOSS)[0] for rule in rules)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_in_bfloat16_runs_again_for_the_same_bits(affine):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16, affine=affine), sltt.LIF(), nn.Flatten()
    model, (x, y) = nn.Sequential(*layers, nn.Linear(1024, 3)), (torch.randn(3, 8, 2, 8, 8), torch.randint(3, (8,)))
    found = []
    for bits in (True, False):
        with torch.autocast("cpu", torch.bfloat16), kernels.using(bits=bits, compile="off"):
            found.append(gradients(model, sltt.BPTT(fold=3), x, y, LOSS)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["channels last", "transposed", "sliced", "three dimensions"])
def test_batch_norm_takes_any_memory_format(form):
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64)
    x = {
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "sliced": lambda: x[:, ::2],
        "three dimensions": lambda: x.flatten(2),
    }[form]()
    norm = (nn.BatchNorm1d if x.ndim == 3 else nn.BatchNorm2d)(x.shape[1]).double()
    weight, grads = torch.randn(x.shape, dtype=torch.float64), []
    for steps in (3, 1):  # all in one call, and one call for each
        leaf = x.detach().requires_grad_()
        ys = []
        for part in leaf.chunk(3 // steps):
            ys.append(norm(part) if steps == 1 else stepwise_norm(norm, part, steps))
        y = torch.cat(ys)
        (y * weight).sum().backward()
        grads.append((y.detach(), leaf.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_that_the_model_switches_to_evaluation_stays_there():
    class Frozen(Net):
        def forward(self, x):
            self.norm1.eval()
            return super().forward(x)

    model = Frozen().double()
    x, y, kwargs = data(static=True)
    assert_same(results(model, sltt.SLTT(fold=3), x, y, kwargs), results(model, sltt.SLTT(fold=1), x, y, kwargs))


def test_folded_bptt_keeps_no_membrane_potentials_behind_a_norm():
    blocks = [[nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), sltt.LIF()] for _ in range(4)]
    model = nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(16 * 64, 3))
    x, y = torch.randn(16, 8, 16, 8, 8), torch.randint(3, (8,))
    layer = 16 * 8 * 16 * 64 * 4  # bytes of a float for each neuron, sample and time step

    bptt, folded = (measured(sltt.BPTT(fold=n), model, x, y, backward=lambda loss: None) for n in (1, 4))
    assert bptt > 8 * layer  # inputs of the norms, and membrane potentials
    assert folded < 7.5 * layer  # with a copy of the input, channels last


class Counting(sltt.Stateful):
    states = ("seen",)

    def forward(self, x):
        self.seen = (self.seen or 0) + 1
        return self.seen * x


def test_a_state_of_ones_own_takes_the_steps_of_a_call_one_after_the_other():
    model = nn.Sequential(nn.Linear(6, 3), Counting(), sltt.LIF(), nn.Linear(3, 3)).double()
    x, y, seen = torch.randn(5, 2, 6, dtype=torch.float64), torch.randint(3, (2,)), []
    model[1].register_forward_hook(marked(lambda module, args, output: seen.append((len(args[0]), module.seen))))
    for rule, plain in ((sltt.SLTT(fold=2), sltt.SLTT(fold=1)), (sltt.BPTT(segment=4, fold=2), sltt.BPTT(fold=1))):
        assert_same(results(model, rule, x, y, {}), results(model, plain, x, y, {}))
    sltt.SLTT(fold=2)(model, x, y, LOSS)
    assert seen[-3:] == [(4, 2), (4, 4), (2, 5)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.SyncBatchNorm(3), r"1 \(SyncBatchNorm\) normalises over the batch in a way of its own"),
        (nn.GRU(3, 3), r"1 \(GRU\) is recurrent"),
        (nn.InstanceNorm1d(3, track_running_stats=True), r"1 \(InstanceNorm1d\) keeps running statistics"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "changes its estimate in every call"),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), "changes its estimate in every call"),
        (
            changed(nn.BatchNorm1d(3), forward=lambda x: x),
            r"1 \(BatchNorm1d\) normalises over the batch in a way of its",
        ),
        (torch.jit.script(nn.BatchNorm1d(3)), "is scripted"),
    ],
    ids=["norm", "recurrent", "instance", "spectral", "spectral by hook", "own forward", "scripted"],
)
def test_layers_that_cannot_be_folded_are_named(layer, message):
    model = nn.Sequential(nn.Linear(6, 3), layer, sltt.LIF())
    for rule in (sltt.SLTT(fold=2), sltt.BPTT(segment=2, fold=2)):
        with pytest.raises(ValueError, match=message):
            rule(model, torch.randn(4, 2, 6), torch.randint(3, (2,)), LOSS)


def test_a_class_whose_forward_changes_between_batches_is_named(monkeypatch):
    """No attribute of the network changes with it."""
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), sltt.LIF())
    x, y = torch.randn(4, 2, 6), torch.tensor([0, 1])
    sltt.SLTT(fold=2)(model, x, y, LOSS)
    plain = nn.BatchNorm1d.forward
    monkeypatch.setattr(nn.BatchNorm1d, "forward", lambda norm, x: 3 * plain(norm, x))
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) normalises over the batch in a way of its own"):
        sltt.SLTT(fold=2)(model, x, y, LOSS)


@pytest.mark.parametrize("kind", ["norm", "neuron", "checkpoint"])
def test_what_would_not_be_the_same_folded_is_refused(kind):
    class Odd(Net):
        def forward(self, x):
            y = self.lif1(self.norm1(self.conv1(x)))
            if kind == "norm":
                y = self.lif2(self.norm1(self.conv2(y)))
            elif kind == "neuron":
                y = self.lif1(self.norm2(self.conv2(y)))
            else:
                y = self.lif2(checkpoint(lambda y: self.norm2(self.conv2(y)), y, use_reentrant=True))
            return self.head(F.avg_pool2d(y, 2).flatten(1))

    model = Odd().double()
    x, y, kwargs = data(static=True)
    neuron = r"lif1 \(LIF\) runs twice in a time step, .*: use a neuron of its own for each place"
    message = neuron if kind == "neuron" else "runs twice in a call of the network: use fold=1"
    with pytest.raises(ValueError, match=message):
        sltt.SLTT(fold=3)(model, x, y, LOSS, **kwargs)
    assert "forward" not in vars(model.norm1)


def test_a_network_within_a_network_takes_no_fold():
    class Outer(Net):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(512, 3), sltt.LIF())

        def forward(self, x):
            return super().forward(x) + F.pad(sltt.unroll(self.inner, x, steps=2).mean(0), [0, 2])

    model = Outer().double()
    x, y, kwargs = data(static=True)
    with pytest.raises(ValueError, match="fold=3 would change results: the network decides by the value of a tensor"):
        results(model, sltt.SLTT(fold=3), x, y, kwargs)  # whether its input is finite
    assert_same(results(model, sltt.SLTT(), x, y, kwargs), results(model, sltt.SLTT(fold=1), x, y, kwargs))


def test_a_network_that_mixes_samples_is_noticed():
    class Mixing(sltt.LIF):
        def forward(self, x):
            return super().forward(x).unflatten(0, (-1, 2)).mean(1)

    with pytest.raises(ValueError, match=r"expected logits .* of the 4 samples in a time step"):
        sltt.SLTT(fold=2)(Mixing(), torch.randn(4, 4, 3), torch.randint(3, (4,)), LOSS)


@pytest.mark.parametrize("window", [1, 2])
def test_a_loss_of_whole_windows_does_not_see_the_fold(window):
    x, y, kwargs = data(static=False)
    model, loss = Net().double(), sltt.losses.OfLast(LOSS)

    def trained(fold):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        out = sltt.TBPTT(window, fold=fold)(twin, x, y, loss, **kwargs)
        return [out.loss, out.logits, *(p.grad for p in twin.parameters())]

    assert_same(trained(fold=3), trained(fold=1))


@pytest.mark.parametrize("rule", [sltt.SLTT, sltt.BPTT])
def test_a_static_input_passes_its_first_linear_layer_once_a_call(rule, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), sltt.LIF(), nn.Linear(64, 5)).double()
    x, y, found = torch.randn(32, 1, 28, 28).double(), torch.randint(5, (32,)), []
    rows = recorded(monkeypatch, F, "linear", lambda x, *given: len(x))
    for fold in (4, 1):
        found.append(gradients(model, rule(fold=fold), x, y, steps=8))
    assert rows == [32, 128] * 2 + [32] * 9
    assert_same(*found)
    assert_same([sltt.unroll(model, x, steps=8)], [sltt.unroll(model, x, steps=8, fold=1)])


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


ONCE = sltt.SLTT(fold=1), sltt.SLTT(k=3, fold=1), sltt.BPTT(fold=1), sltt.TBPTT(2, fold=1)
EACH = sltt.SLTT(fold=1, recompute=True), sltt.BPTT(segment=2, fold=1), sltt.OTTT(fold=1), sltt.Mixed({"*": 2})


@pytest.mark.parametrize("rule", [*ONCE, *EACH], ids=repr)
@pytest.mark.parametrize("hook", [None, lambda *_: None, marked(lambda *_: None)], ids=["no hook", "hook", "marked"])
def test_a_static_image_passes_its_first_layers_once_where_a_pooling_ends_them(rule, hook):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.MaxPool2d(2), sltt.LIF(), nn.Flatten(), nn.Linear(72, 5)).double()
    x, y = 2 * torch.randn(4, 2, 8, 8).double(), torch.randint(5, (4,))
    if hook:
        model[0].register_forward_hook(hook)
    with Convolutions() as ran:
        found = gradients(model, rule, x, y, steps=8, seed=0)[0]
    assert (ran.count == 1) == (rule in ONCE and hook is None)
    assert_same([found], [gradients(model, rule, x.expand(8, *x.shape), y, seed=0)[0]])  # a sequence of one image


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3), nn.MaxPool2d(2))
        self.rest = nn.Sequential(sltt.LIF(), nn.Flatten())

    def forward(self, x):
        return self.rest(checkpoint(self.stem, x, use_reentrant=False).mul_(2))


IN_PLACE = {
    "behind a pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.MaxPool2d(2), nn.ReLU(True), sltt.LIF(), nn.Flatten()
    ),
    "behind a view": lambda: nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.ReLU(True), sltt.LIF()
    ),
    "in a checkpoint": Checkpointed,
}


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_what_the_first_layers_give_may_change_in_place(make):
    model, x, y = make().double(), 2 * torch.randn(4, 2, 8, 8).double(), torch.randint(5, (4,))
    for rule in (sltt.SLTT(fold=1), sltt.BPTT(fold=1)):
        found = gradients(model, rule, x, y, steps=4)[0]
        assert_same([found], [gradients(model, rule, x.expand(4, *x.shape), y)[0]])


def test_a_backward_that_has_no_module_is_called_for_each_time_step():
    values = []
    sltt.SLTT(fold=1)(
        nn.Sequential(nn.Linear(6, 4), sltt.LIF()), torch.randn(2, 6), torch.arange(2), nn.CrossEntropyLoss(), steps=3,
        backward=values.append,
    )  # fmt: skip
    assert len(values) == 3


def test_a_hook_on_a_weight_of_the_first_layer_sees_each_time_step():
    model, calls = nn.Sequential(nn.Linear(6, 4), sltt.LIF()), []
    model[0].weight.register_hook(lambda g: calls.append(1))
    sltt.SLTT(fold=1)(model, torch.randn(2, 6), torch.arange(2), steps=3, loss=nn.CrossEntropyLoss())
    assert len(calls) == 3


def test_a_static_input_that_the_network_changes_takes_no_fold():
    class Shift(nn.Module):
        def forward(self, x):
            return x.add_(torch.arange(len(x))[:, None])

    model, x = nn.Sequential(Shift(), nn.Linear(784, 64), sltt.LIF()), torch.randn(32, 784)
    before = x.clone()
    with pytest.raises(ValueError, match="fold=4 would change results: the network differs in the logits then"):
        sltt.unroll(model, x, steps=4, fold=4)
    assert torch.equal(x, before)  # a trial has an input of its own
    expected = sltt.unroll(model, x.clone(), steps=4, fold=1)
    torch.testing.assert_close(sltt.unroll(model, x, steps=4), expected)


@pytest.mark.parametrize("loss", [LOSS, sltt.losses.Activity(LOSS)], ids=repr)
@pytest.mark.parametrize(("k", "calls"), [(1, 4), (8, 2), (16, 2)])
def test_steps_of_slttk_with_and_without_a_backward_share_a_call_where_many_have_one(k, calls, loss):
    model, found, counts = nn.Sequential(nn.Linear(7, 6), sltt.LIF(), nn.Linear(6, 3)).double(), [], []
    model.register_forward_hook(marked(lambda *_: counts.append(1)))
    x, y = torch.randn(16, 5, 7).double(), torch.randint(3, (5,))
    for fold in (8, 1):
        out = gradients(model, sltt.SLTT(k=k, fold=fold), x, y, loss, seed=2)
        found.append((out[0], out[1].loss, out[1].logits))
    assert_same(*found)
    assert isinstance(loss, sltt.losses.Activity) or len(counts) <= calls + 16


class Images(nn.Sequential):
    """A forward of its own; with views, it takes no other memory format."""

    def __init__(self, views=False):
        super().__init__(nn.Conv2d(2, 8, 3, padding=1), sltt.LIF(), nn.Conv2d(8, 3, 3, padding=1))
        self.views = views

    def forward(self, x):
        y = super().forward(x)
        return y.view(len(x), -1).view(len(x), 3, 8, 8) if self.views else y


@pytest.mark.parametrize("room", [None, 0])  # 0: one step in a call
@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: nn.Sequential(*Images()), True),
        (Images, True),
        (lambda: Images(views=True), False),
        (lambda: nn.Sequential(nn.GroupNorm(1, 2), *Images()), False),  # whose backward would end the process
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), *Images()), True),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1).requires_grad_(False), nn.GroupNorm(1, 2), *Images()), False),
    ],
    ids=["known", "own", "views", "group norm", "trained", "frozen"],
)
def test_images_run_channels_last_where_a_network_takes_them_so(make, last, room, monkeypatch):
    """In each batch alike, the first one too; a loss may view a dense output."""

    def square(y, target):
        return y.view(-1).square().mean()

    seen, run, model = [], Run.__call__, make()
    monkeypatch.setattr(Run, "__call__", lambda self, *args: (seen.append(self.sequence.last), run(self, *args))[1])
    x, target, found = torch.randn(4, 2, 2, 8, 8), torch.zeros(2), []
    for batch, y in ((x, target), (x[:, :1], target[:1]), (x, target)):  # a smaller one between changes nothing
        seen.clear()
        model.zero_grad()
        with kernels.using(fold_memory=room):
            found.append(gradients(model, sltt.SLTT(), batch, y, square)[0])  # of a copy, whose first batch it is
            sltt.SLTT()(model, batch, y, square)
        assert seen[-1] == last
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], gradient(model))
    model.zero_grad()
    expected = gradients(model.double(), sltt.SLTT(fold=1), x.double(), target, square)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-5)


def test_a_static_image_is_convolved_once_in_an_evaluation(monkeypatch):
    seen, is_fixed = [], Results.is_fixed
    monkeypatch.setattr(Results, "is_fixed", lambda self, *a, **how: (seen.append(is_fixed(self, *a)), seen[-1])[1])
    sltt.unroll(sltt.models.DigitsNet(2, 5).eval(), torch.rand(4, 2, 8, 8), steps=6, fold=1)
    assert seen[0]
