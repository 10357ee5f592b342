"""The paper's claims at the scale of two CPU cores: what docs/paper.md rests on.

    python benchmarks/paper.py [NAME ...] [--data DIR]

A step is a measurement or a command of `sltt`, with one thread. Measurements run alone; then two commands run at a
time, and what they print goes to `runs/paper/NAME.log`. Each step is kept in `runs/paper`: run again, a finished one is
left out, and a comparison goes on where it stopped. The results go to docs/results/paper, and from there into the
tables and figures of docs.

NAME is the beginning of a step's name. The longest run only if they are named: `gradients-cifar10-training`,
`cifar10-stage…`, and `map` and `advice` for the fields of T = 32 and 64. `memory` takes up to 19 GB. DIR/nmnist has
N-MNIST, and DIR/cifar10 has CIFAR-10 as folders of images; without `--data`, the steps that read them are left out.
"""

import argparse
import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from advice_tables import advised
from cells import write
from tables import DOCS, fill
from torch import nn
from turns import hardware, in_turns, saved, timed

import sltt
from sltt.analysis import Agreement, agreement, count_operations, peak_memory
from sltt.commands.fscil import SCORES
from sltt.commands.parsing import Recipe
from sltt.kernels import using
from sltt.parallel.devices import keep_freed_memory

RESULTS, RUNS = DOCS / "results" / "paper", Path("runs/paper")
IMAGES = "--data sltt.data.ImageFolder --data.root {data}/cifar10 --data.size 32 --data.crop_padding 4"
CIFAR10 = (  # narrower than the recipe, with the paper's neuron: a training takes minutes
    f"cifar10-small {IMAGES} --data.validation 0.04 --data.cutout 0 --model.widths [32,64,128] --model.stem 0 "
    "--model.neuron sltt.LIF --model.neuron.tau 1.1 --model.neuron.v_threshold 1 --model.neuron.v_init null "
    "--model.neuron.surrogate sltt.surrogates.Triangle --model.neuron.surrogate.gamma 1 --optimizer.lr 0.1 "
    "--phases null --steps 4"
)
CIFAR10_NO_LEAK = (
    f"cifar10-small {IMAGES} --data.validation 0.04 --data.cutout 0 --model.widths [32,64,128] --model.stem 0 "
    "--model.neuron.surrogate sltt.surrogates.Triangle --model.neuron.surrogate.gamma 0.75 "
    "--model.neuron.v_threshold 1.5 --model.neuron.v_init 0.75 --optimizer.lr 0.1 --norm_weight_decay null "
    "--phases null --steps 4 --schedule.warmup 0.4"
)
CIFAR10_STAGES = "--phases '[{{epochs: 3, steps: 1}}, {{epochs: 1, lr: 0.01}}]'"
SHOTS = "--base 6 --way 1 --shot 5"
COMMANDS = {
    "fscil-digits": f"fscil fscil-digits {SHOTS}",
    "fscil-nmnist": f"fscil nmnist {SHOTS} --data.root {{data}}/nmnist --model.classes 6",
    "fscil-cifar10": f"fscil {CIFAR10} {SHOTS} --model.classes 6 --epochs 2",
    "accuracy-digits": "compare digits --epochs 6 --seeds 20 --rules BPTT,SLTT",
    "accuracy-digits-events": "compare digits-events --seeds 20 --rules BPTT,SLTT",
    "accuracy-cifar10": f"compare {CIFAR10} --epochs 2 --seeds 3 --rules BPTT,SLTT,SLTT:k=1",
    "accuracy-cifar10-no-leak": f"compare {CIFAR10_NO_LEAK} --epochs 2 --seeds 3 --rules BPTT,SLTT,"
    "SLTT:k=1:rescale=true,SLTT:k=2:rescale=true",
    "cifar10-stage-1-alone": f"compare {CIFAR10} --steps 1 --epochs 3 --seeds 3 --rules SLTT",
    "cifar10-stage-1": f"compare {CIFAR10} --steps 1 --epochs 4 --seeds 3 --rules SLTT",
    "cifar10-stages": f"compare {CIFAR10} --epochs 4 --seeds 3 --rules SLTT,SLTT:k=1 {CIFAR10_STAGES}",
    "cifar10-stage-2": f"compare {CIFAR10} --epochs 4 --seeds 3 --rules SLTT",
    "k-digits": "compare digits --steps 6 --epochs 6 --seeds 3 --rules BPTT,SLTT,"
    "SLTT:k=5,SLTT:k=4,SLTT:k=3,SLTT:k=2,SLTT:k=1",
    "stage-1-alone": "compare digits --steps 1 --epochs 6 --seeds 3 --rules SLTT",
    "stage-1": "compare digits --steps 1 --epochs 8 --seeds 3 --rules SLTT",
    "stages": "compare digits --steps 6 --epochs 8 --seeds 3 --rules SLTT,SLTT:k=1 "
    "--phases '[{{epochs: 6, steps: 1}}, {{epochs: 2, steps: 6, lr: 0.0005}}]'",
    "stage-2": "compare digits --steps 6 --epochs 8 --seeds 3 --rules SLTT",
    "gradients-nmnist": "agreement nmnist --data.root {data}/nmnist --taus 1.1,2,5 --steps 10,20 --at-epochs 0,1 "
    "--samples 32",
    "gradients-cifar10-training": f"agreement {CIFAR10} --rule.k null --rule.rescale false --taus 1.1,2,5 --steps 6,12 "
    "--at-epochs 0,1 --samples 32",
}
TAUS, LENGTHS = (1.1, 5, 20, 2, 10), (8, 32, 2, 64, 16, 4)  # in this order, so that a part of the map tells too
MAP = {
    f"map-T{T}-tau{tau}": f"compare sequential-digits --steps {T} --model.features [{64 // T},64,64,10] "
    f"--model.neuron.tau {tau} --batch_size 128 --optimizer.lr 0.01 --epochs 40 --rules BPTT,SLTT "
    "--seeds 3"
    for T in LENGTHS
    for tau in TAUS
}
ADVICE = {
    name.replace("map", "advice"): words.replace("compare", "agreement").partition(" --rules")[0]
    + " --rule.fold 1 --at-epochs 1 --trial 10"
    for name, words in MAP.items()
}
NETWORKS = {  # the paper's, T, and the batches whose memory and whose time is measured
    "ResNet-18": (sltt.models.resnet18, (3, 32, 32), 6, 128, 16),
    "VGG-11, 48×48": (lambda: sltt.models.vgg11(in_channels=2), (2, 48, 48), 10, 128, 16),
    "VGG-11, 128×128": (lambda: sltt.models.vgg11(in_channels=2), (2, 128, 128), 20, 16, 2),
    "NF-ResNet-34": (sltt.models.nfresnet34, (3, 224, 224), 6, 128, 2),
}
TURNS = 5
KEPT = ["rule", "accuracies", "seconds", "peak_memory", "operations", "cosine", "tau", "steps", "epochs", "agreement"]
KEPT += SCORES  # of few shots
LONG = ("gradients-cifar10-training", "cifar10-stage", *(f"{of}-T{T}" for of in ("map", "advice") for T in (32, 64)))
RULES = {"BPTT": sltt.BPTT(), "SLTT": sltt.SLTT(), "SLTT-1": sltt.SLTT(k=1)}
LOSS = sltt.losses.CrossEntropyMSE()


def operations(data: Path | None) -> list[dict[str, Any]]:
    """Multiplications of an image through ResNet-18, at the paper's two T."""
    model = sltt.models.resnet18()
    x, y = torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    return [
        {"rule": name, "steps": steps, **count_operations(model, x, y, LOSS, rule, steps=steps)._asdict()}
        for steps in (6, 12)
        for name, rule in RULES.items()
    ]


def memory(data: Path | None) -> list[dict[str, Any]]:
    """Peak of a training batch above the idle process, and weights, gradients and momentum; layers are dense."""
    rows = []
    for (network, (make, shape, steps, batch, _)), rule in itertools.product(NETWORKS.items(), ("BPTT", "SLTT")):
        model = make()
        state = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
        with using(sparse="off"):
            run = iteration(model, rule, shape, steps, batch)
            run()  # makes the gradients
            row = {"network": network, "steps": steps, "batch": batch, "rule": rule}
            rows.append({**row, "peak": peak_memory(run), "state": state})
    return rows


def seconds(data: Path | None) -> dict[str, Any]:
    """Seconds of a training batch of each rule, in turns."""
    keep_freed_memory()  # as in `sltt train`
    rows = []
    for network, (make, shape, steps, _, batch) in NETWORKS.items():
        model = make().to(memory_format=torch.channels_last)
        times = in_turns([timed(iteration(model, rule, shape, steps, batch)) for rule in RULES], TURNS)
        case = {"network": network, "steps": steps, "batch": batch}
        rows += [{**case, "rule": rule, "seconds": one} for rule, one in zip(RULES, times, strict=True)]
    return {"hardware": hardware(1), "rows": rows}


def iteration(model: nn.Module, rule: str, shape: Sequence[int], steps: int, batch: int) -> Callable[[], object]:
    """A training batch of random images, without the optimizer's step."""
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    return lambda: RULES[rule](model, x, y, LOSS, steps=steps)


def untrained(recipe: Recipe, steps: int, tau: float, seed: int, samples: int, *options: str) -> Agreement:
    """SLTT's gradient beside BPTT's, of random weights and the first training samples."""
    built = recipe.build("--steps", str(steps), "--model.neuron.tau", str(tau), "--seed", str(seed), *options)
    splits = built.dataset.splits(steps)
    x, y = splits.collate([splits.train[i] for i in range(samples)])
    arguments = built.model, x, y, built.loss, [sltt.SLTT()]
    return agreement(*arguments, steps=steps if splits.static else None)[0]


def map_gradients(data: Path | None) -> list[dict[str, Any]]:
    """Cosine of SLTT's gradient with BPTT's over T and τ, before the training: three random networks."""
    recipe, rows = Recipe("sltt agreement", "sequential-digits", []), []
    for T, tau in itertools.product(sorted(LENGTHS), sorted(TAUS)):
        size = "--model.features", f"[{64 // T},64,64,10]"
        cosines = [untrained(recipe, T, tau, seed, 128, *size).cosine for seed in range(3)]
        rows.append({"T": T, "tau": tau, "cosines": cosines})
    return rows


def cifar10_gradients(data: Path | None) -> dict[str, Any]:
    """The same by layer, of ResNet-18 and eight images of CIFAR-10."""
    recipe, rows = Recipe("sltt agreement", "cifar10", IMAGES.format(data=data).split()), []
    for tau, T in itertools.product((1.1, 2, 5), (6, 12)):
        rows.append({"tau": tau, "steps": T, "epochs": 0, "agreement": [vars(untrained(recipe, T, tau, 0, 8))]})
    return {"recipe": "cifar10", "rows": rows}


MEASURES = {
    "operations": operations,
    "memory": memory,
    "seconds": seconds,
    "map-gradients": map_gradients,
    "gradients-cifar10": cifar10_gradients,
}


def run(text: str, kept: Path, data: Path | None) -> Any:
    """What a command finds; from its folder, where it has finished before."""
    words = [word.format(data=data) for word in shlex.split(text)]
    found = kept / f"{words[0]}.json"
    if found.exists():
        return json.loads(found.read_text())
    torch.set_num_threads(1)
    with open(f"{kept}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return saved(words, kept)
        except SystemExit:  # where a seed died, the others are written
            found.unlink(missing_ok=True)
            raise


def found_by(commands: dict[str, str], data: Path | None) -> Iterator[tuple[str, Any]]:
    """What each command finds, two running at a time."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        began = {pool.submit(run, text, RUNS / name, data): name for name, text in commands.items()}
        for one in as_completed(began):
            name = began[one]
            if one.exception():
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{name} failed, see {RUNS / name}.log")
            print(name, "is done", flush=True)
            yield name, one.result()


def shortened(found: Any) -> Any:
    """What the tables show of a comparison, of agreements or of few shots."""
    return {**found, "rows": [{key: row[key] for key in KEPT if key in row} for row in found["rows"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    measure(options.names, options.data)
    train(options.names, options.data)


def measure(names: Sequence[str], data: Path | None) -> None:
    """The measurements of these names that have not been made."""
    for name, of in MEASURES.items():
        done = RUNS / f"{name}.done"
        if chosen(name, names) and (data or name != "gradients-cifar10") and not done.exists():
            write(RESULTS / f"{name}.json", of(data))
            fill()
            done.touch()


def train(names: Sequence[str], data: Path | None) -> None:
    """The commands of these names, and what each finds."""
    all_commands = {**COMMANDS, **MAP, **ADVICE}
    commands = {n: text for n, text in all_commands.items() if chosen(n, names) and (data or "{data}" not in text)}
    for name, found in found_by(commands, data):
        if name in MAP:
            tau = float(name.rpartition("tau")[2])
            record("map", MAP, name, {"T": found["steps"], "tau": tau, "rows": shortened(found)["rows"]})
        elif name in ADVICE:
            record("advice", ADVICE, name, advised(found["rows"][0]))
        else:
            write(RESULTS / f"{name}.json", shortened(found))
        fill()


def chosen(name: str, names: Sequence[str]) -> bool:
    """Whether a step runs: it is named, or none is and it is not long."""
    return name.startswith(tuple(names)) if names else not name.startswith(LONG)


def record(file: str, names: Iterable[str], name: str, cell: dict[str, Any]) -> None:
    """Add a cell to the others of a file, in the order of the names."""
    path = RESULTS / f"{file}.json"
    cells = {**(json.loads(path.read_text()) if path.exists() else {}), name: cell}
    write(path, {one: cells[one] for one in names if one in cells})


if __name__ == "__main__":
    main()
