import re
import shlex
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

import sltt
from sltt.commands.parsing import Recipe
from tests.scripts import BENCHMARKS, benchmarks_on_the_path, load  # noqa: F401


def test_the_benchmark_of_peers_builds_the_same_network_for_every_case():
    cases = load("peer_cases")
    expected, x, _ = cases.build("digits", "SLTT", 2)
    for name, case in cases.CASES.items():
        if case.neuron in (nn.ReLU, sltt.LIF) and "graph" not in name:  # which a CPU has not
            model, same, y = cases.build("digits", name, 2)
            assert torch.equal(model.head.weight, expected.head.weight)
            assert torch.equal(same, x)
            assert len(y) == 2
            assert model.training is not case.evaluates
            case.run(model, same, y, 2)
    assert cases.build("vgg11-max", "relu")[1].shape == cases.NETWORKS["vgg11-max"][1]


@pytest.mark.parametrize("case", ["SLTT", "BPTT", "SLTT, fold = 1", "SpikingJelly BPTT"])
def test_a_case_on_sequences_has_the_gradient_of_its_rule(case):
    pytest.importorskip("spikingjelly" if "Jelly" in case else "torch")
    sequences = load("open_neuromorphic")
    for work in ("mlp", "linear-256", "recurrent-256"):
        sequences.check(case, work, "cpu")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("jax") is None, reason="needs JAX")
@pytest.mark.parametrize("work", ["tiny", "tiny-linear", "tiny-recurrent", "tiny-static"])
def test_jax_has_the_gradient_of_its_rule(work):
    """Each case compares itself in a process of its own: no other may fork once JAX is imported."""
    sequences = load("open_neuromorphic")
    forms = [f"JAX {rule}, {form}" for form in sequences.JAX_FORMS for rule in ("SLTT", "BPTT")]
    rows = sequences.measure(work, forms, 1, "cpu")
    assert [row["case"] for row in rows] == forms
    assert all(row["seconds"][0] > 0 for row in rows)


def test_the_checkpoints_of_spikingjelly_give_the_gradient_of_bptt():
    pytest.importorskip("spikingjelly")
    cases = load("peer_cases")
    model, _, _ = cases.build("digits", "SpikingJelly memopt, units", 2)
    assert sum(isinstance(m, CheckpointWrapper) for m in model.modules()) == 3  # one for each convolution
    assert cases.cosine("digits", "SpikingJelly memopt, units", 3) == pytest.approx(1, abs=1e-9)


def test_the_tables_of_the_documentation_are_those_of_the_results():
    tables, names = load("tables"), set()
    for path in tables.PAGES:
        page = path.read_text()
        assert tables.filled(page) == page
        names |= {block[2] for block in tables.BLOCK.finditer(page)}
    assert {"resnet18-t6", "resnet18-over-t"} <= names
    assert set(tables.TABLES) <= names


def test_two_rules_are_equal_where_two_one_sided_tests_say_so():
    tables = load("tables")
    first, second = [0.981, 0.984, 0.979, 0.983], [0.98, 0.982, 0.984, 0.979, 0.981]
    middle, spread = tables.difference(first, second)
    assert (middle, spread) == pytest.approx((-0.00055, 0.00272), abs=1e-5)
    assert tables.within_margin(middle, spread) == "equal"
    assert tables.within_margin(*tables.difference(first, [x - 0.05 for x in second])) == "less"
    assert tables.within_margin(*tables.difference(second, [x + 0.05 for x in first])) == "more"
    assert tables.within_margin(*tables.difference(first, [0.9, 1.0])) == "open"
    assert tables.difference([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0)


def test_the_steps_on_a_gpu_measure_what_there_is(tmp_path):
    gpu, cases, works = load("gpu"), load("peer_cases"), load("open_neuromorphic")
    for device in ("cpu", "cuda"):
        found = dict(gpu.commands(device, tmp_path, tmp_path, "data"))
        for name, words in found.items():
            options = {one: words[words.index(one) + 1] for one in words if one.startswith("--")}
            if "benchmarks/peers.py" in words:
                assert name == options["--network"]
                assert name in cases.NETWORKS
                assert {*options["--cases"].split(";")} <= {*cases.CASES}
            if name == "sequences":
                assert {*words[words.index("--works") + 1 : words.index("--cases")]} <= {*works.WORKS}
    assert [row["steps"] for row in gpu.measure_kernels(torch.device("cpu"))] == [1, 6, 1, 6]
    (profiled,) = gpu.measure_profile(torch.device("cpu"))
    assert (profiled["busy"], profiled["launches"]) == (0, 0)
    assert profiled["seconds"] >= profiled["host"] > 0


@pytest.mark.slow
def test_every_command_of_the_paper_is_one_that_sltt_takes():
    paper = load("paper")
    every = {**paper.COMMANDS, **paper.MAP, **paper.ADVICE}.values()
    for text in {re.sub(r"[\d.]+", "", text): text for text in every}.values():  # one of those alike but for numbers
        kind, recipe, *words = [word.format(data="nowhere") for word in shlex.split(text)]
        own = {"--rules", "--seeds", "--base", "--way", "--shot", "--taus", "--at-epochs", "--samples", "--trial"}
        own |= {"--steps"} if kind == "agreement" else set()
        pairs = zip(words[::2], words[1::2], strict=True)
        options = [word for pair in pairs if pair[0] not in own for word in pair]
        Recipe(f"sltt {kind}", recipe, options).resolve()
