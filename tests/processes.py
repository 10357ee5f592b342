"""What each of two processes runs for parallel/test_distributed.py: trainings, whose weights it leaves in a folder.

torchrun --standalone --nproc_per_node 2 -m tests.processes FOLDER
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sltt
from sltt.data import Data, Splits
from sltt.parallel.processes import Processes
from sltt.training import graphs
from sltt.training.console import Console
from tests.collecting import MacroF1
from tests.conftest import RULES, small_network
from tests.training.test_graphs import Recorded

OF_EACH_KIND = (
    *("BPTT(segment=2, fold=2)", "TBPTT(2)", "SLTT(recompute)", "SLTT(hoist)", "SLTT(k=2, rescale)"),
    *("SLTT(k=2, fold=4)", "OTTT", "RateBased", "Mixed(default=2)"),
)
ONLINE = sltt.OTTT(decay=0.5, online=True)
TRAININGS = {
    **{name: {"rule": RULES[name]} for name in OF_EACH_KIND},
    "OTTT(online)": {"rule": ONLINE},
    "SLTT(k=1), clipped": {"rule": sltt.SLTT(k=1), "clip_norm": 1e-2},
    "in parts, averaged": {"rule": sltt.SLTT(k=2), "accumulate": 3, "ema": 0.8, "clip_norm": 1.0},
    "a batch of one sample": {"rule": sltt.SLTT(), "batch_size": 59},
    "a metric of all samples": {"rule": sltt.SLTT(), "batch_size": 59, "metric": MacroF1()},
}
NORMED = {name: RULES[name] for name in ("BPTT(segment=2, fold=2)", "SLTT(recompute)", "OTTT")}


class Sequences(Data):
    """Three classes of sequences [T, 6], in float64; 60 to train on, 13 held out, 12 to test."""

    def load(self, steps: int) -> Splits:
        generator = torch.Generator().manual_seed(0)
        centres = 2 * torch.randn(3, steps, 6, generator=generator, dtype=torch.float64)

        def samples(count: int) -> list:
            noise = torch.randn(count, steps, 6, generator=generator, dtype=torch.float64)
            return [(centres[i % 3] + 0.5 * noise[i], i % 3) for i in range(count)]

        return Splits(samples(60), samples(13), samples(12), False, 3, "sequences")


def several_lengths() -> Data:
    """Those sequences cut to 1 … 4 steps, in batches of similar length."""
    every = Sequences().splits(4)
    cut = [[(x[: 1 + i % 4], y) for i, (x, y) in enumerate(part)] for part in (every.train, every.validation)]
    return sltt.data.from_datasets(*cut, static=False, pad=True, by_length=True)


def network(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return small_network(**kwargs)


def statistics(model: nn.Module) -> list[float]:
    """All running statistics of a network."""
    return torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()]).tolist()


class Statistics(sltt.callbacks.Callback):
    """Those after every batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_batch(self, now: sltt.callbacks.Moment) -> None:
        self.seen.append(statistics(now.model))


def train(run: Path, model: nn.Module, data: Data | None = None, **settings) -> sltt.training.fit.Fit:
    defaults = {
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "schedule": sltt.schedules.Constant(),
        "steps": 4,
        "epochs": 2,
        "batch_size": 13,
        "device": "cpu",
        "report": Console(quiet=True),
    }
    return sltt.fit(model, data or Sequences(), run=run, **{**defaults, **settings})


COLLECTIVES = ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many collectives ran inside the block: those of gradients, and the others."""
    found = {"gradients": 0, "others": 0}
    kind = "others"

    def reduce_gradients(self, parameters, real=Processes.reduce_gradients):
        nonlocal kind
        kind = "gradients"
        real(self, parameters)
        kind = "others"

    def count(real):
        def collective(*args, **kwargs):
            found["others" if "group" in kwargs else kind] += 1  # a decision of the hosts
            return real(*args, **kwargs)

        return collective

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "reduce_gradients", reduce_gradients)
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, count(getattr(torch.distributed, name)))
        yield found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    messages, measured = {}, {}
    for name, settings in TRAININGS.items():
        with counted(pytest.MonkeyPatch()) as messages[name]:
            result = train(folder / name, network(), **settings)
        measured[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    with pytest.MonkeyPatch.context() as patch, counted(pytest.MonkeyPatch()) as messages["graphs"]:
        patch.setattr(graphs, "CudaGraph", Recorded)
        patch.setattr(torch.Tensor, "is_cpu", False)  # so that no native code runs, which is not recorded
        Recorded.log = []
        train(folder / "graphs", network())
        measured["graphs"] = Recorded.log
    train(folder / "padded", network(), several_lengths(), rule=ONLINE)
    for minutes in (0.0, 10.0):  # a checkpoint after every batch, and of the epochs alone
        train(folder / f"every {minutes} minutes", network(norm=True), checkpoint_minutes=minutes)
    for name, rule in NORMED.items():
        train(folder / "normed" / name, network(norm=True), rule=rule, callbacks=[callback := Statistics()])
        measured[f"normed {name}"] = callback.seen
    for name in ("plain", "k"):
        rule = sltt.SLTT(k=2 if name == "k" else None)
        train(folder / f"one-two-{name}", network(dropout=0.2), rule=rule, resume=True)
        train(folder / f"two-one-{name}", network(dropout=0.2), rule=rule, epochs=1)
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps({"messages": messages, "measured": measured}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
