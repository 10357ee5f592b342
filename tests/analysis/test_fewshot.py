import math

import pytest
import torch
from torch import nn

import sltt
from sltt.analysis.fewshot import chance, draw_shots, embeddings, incremental, prototypes, session_sizes


def test_sessions_take_all_classes():
    assert session_sizes(100, 60, 5) == [60, *[5] * 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 9, 2), "9 base classes and 2 new ones are more than 10"),
        ((10, 6, 3), "4 new classes do not part into sessions of 3"),
        ((10, 1, 1), "base must be at least 2"),
    ],
)
def test_sessions_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        session_sizes(*arguments)


def test_shots_are_of_each_class_and_drawn_by_the_seed():
    labels = [0, 1, 2, 1, 2, 1, 2, 1]
    found = draw_shots(labels, [1, 2], 2, seed=0)
    assert [labels[i] for i in found] == [1, 1, 2, 2]
    assert len(set(found)) == 4
    assert found == draw_shots(labels, [1, 2], 2, seed=0)
    assert len({tuple(draw_shots(labels, [1], 2, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="class 2 has 3 training samples, fewer than shot=4"):
        draw_shots(labels, [1, 2], 4, seed=0)


def reference(known, x, y, sizes):
    """The protocol, sample by sample."""
    accuracies, by_class = [], {}
    for session in range(len(sizes)):
        seen, by_class = sum(sizes[: session + 1]), {}
        for sample, label in zip(x, y, strict=True):
            if label < seen:
                cosines = [float(sample @ p) / math.sqrt(float(sample @ sample) * float(p @ p)) for p in known[:seen]]
                by_class.setdefault(int(label), []).append(cosines.index(max(cosines)) == int(label))
        right = [one for several in by_class.values() for one in several]
        accuracies.append(sum(right) / len(right))
    share = [sum(by_class[c]) / len(by_class[c]) for c in range(sum(sizes))]
    base, new = share[: sizes[0]], share[sizes[0] :]
    return accuracies, sum(base) / len(base), sum(new) / len(new)


def test_scores_are_those_of_the_protocol():
    torch.manual_seed(0)
    sizes, y = [4, 2, 1], torch.cat([torch.arange(8), torch.randint(8, (60,))])  # class 7 never comes
    x = torch.randn(8, 5, dtype=torch.float64)[y] + 0.8 * torch.randn(68, 5, dtype=torch.float64)
    known = prototypes(x, y, 8)
    assert torch.allclose(known[3], x[y == 3].mean(0))
    found = incremental(known, x, y, sizes)
    accuracies, base, new = reference(known, x, y, sizes)
    assert found.accuracies == pytest.approx(accuracies)
    assert (found.base, found.new) == pytest.approx((base, new))
    assert 0 < found.new < 1
    assert found.harmonic == pytest.approx(2 / (1 / base + 1 / new))
    assert found.last == found.accuracies[-1]
    assert found.average == pytest.approx(sum(accuracies) / 3)


def test_a_guess_and_classes_that_are_never_found():
    assert chance([2, 2]).accuracies == [0.5, 0.25]
    known, x = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = incremental(torch.cat([known, -known]), x, torch.tensor([0, 1, 2, 3]), [2, 2])
    assert (found.base, found.new, found.harmonic) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("static", [True, False])
def test_an_embedding_is_the_mean_of_what_the_classifier_reads(static, neuron):
    torch.manual_seed(0)
    first, spiking, head = nn.Linear(6, 5), neuron(), nn.Linear(5, 3)
    model = nn.Sequential(first, spiking, head)
    x = torch.randn(*([] if static else [4]), 2, 6)
    found = embeddings(model, x, steps=4 if static else None)
    assert found.shape == (2, 5)
    logits = sltt.unroll(model, x, steps=4 if static else None).mean(0)
    assert torch.allclose(head(found), logits, atol=1e-6)  # a linear layer keeps the mean over time
    assert not head._forward_pre_hooks


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear that classifies"):
        embeddings(nn.Sequential(sltt.LIF()), torch.randn(2, 3), steps=2)
