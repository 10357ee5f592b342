"""Tables of docs/results.md and of other pages, from docs/results; `tables.py` puts them into the pages."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import advice_tables
import paper_tables
import yaml
from cells import Row, accuracies, by, grouped, load, markdown, runs, seconds, seeds, shown, tasks
from turns import quotient, spread

import sltt
from sltt.commands.results import scores_text
from sltt.training.console import megabytes


def of_task(results: Path, task: str, rules: Sequence[str] = ()) -> str:
    """A line for each rule in tasks.json, or for these alone."""
    rows = [
        [rule, scores_text(row["accuracies"]), megabytes(row["peak_memory"]), f"{row['cosine']:.3f}"]
        for rule, row in tasks(results, task).items()
        if rule in rules or not rules
    ]
    return markdown(["rule", "test accuracy", "memory", "cosine"], rows)


def summary(results: Path) -> str:
    """The first table: data with BPTT, SLTT and SLTT-1."""
    found = {
        "[N-MNIST](#n-mnist-1000-training-recordings), 1,000 recordings, T = 10": seeds(results, "nmnist"),
        "[CIFAR-10](#the-rules-compared), two epochs, T = 4": seeds(results, "cifar10-rules"),
        "[the digits' events](#all-rules-on-seven-tasks), T = 9": accuracies(tasks(results, "digits-events")),
        "[Delayed recall](recall.md), needs the gradient through time": accuracies(tasks(results, "recall")),
    }
    rules = ["BPTT", "SLTT", "SLTT-1"]
    rows = [[label, *(scores_text(of.get(rule, [])) for rule in rules)] for label, of in found.items()]
    return markdown(["data", *rules], rows)


def recurrent(results: Path) -> str:
    """Sequential digits with recurrent layers."""
    found = load(results, "recurrent")
    rows = [[shown(row["rule"]), ", ".join(f"{one:.1%}" for one in row["accuracies"])] for row in found]
    return markdown(["rule", "test accuracy, seeds 0 to 2"], rows)


def all_tasks(results: Path) -> str:
    """A line for each task and rule."""
    rows = []
    for row in load(results, "tasks"):
        time = "–" if row["seconds"] is None else f"{row['seconds']:.1f}"
        reached = scores_text(row["accuracies"]), str(len(row["accuracies"]))
        cells = megabytes(row["peak_memory"]), time, f"{row['cosine']:.3f}"
        rows.append([row["task"], row["rule"], *reached, *cells])
    headings = ["task", "rule", "test accuracy", "seeds", "memory", "seconds per epoch", "cosine"]
    return markdown(headings, rows)


def trainings(results: Path, name: str) -> str:
    """A line for each rule in a CSV that results.py wrote."""
    rows, times = [], seconds(results, name)
    for rule, of in runs(results, name).items():
        reached = ([float(epochs[-1][key]) for epochs in of] for key in ("test_accuracy", "last_epoch_test"))
        rows.append([rule, str(len(of)), *map(scores_text, reached), f"{times[shown(rule)]:.3g}"])
    return markdown(["rule", "seeds", "test accuracy", "after the last epoch", "seconds per epoch"], rows)


def over_time(results: Path, name: str, after: Sequence[int]) -> str:
    """Mean validation accuracy and the time of the median epoch after some epochs, in a CSV that results.py wrote."""
    rows, times = [], seconds(results, name)
    for rule, of in runs(results, name).items():
        reached = (statistics.mean(float(epochs[count - 1]["validation_accuracy"]) for epochs in of) for count in after)
        took = (count * times[shown(rule)] for count in after)
        rows.append([rule, *(f"{one:.1%}, {time:.0f} s" for one, time in zip(reached, took, strict=True))])
    return markdown(["rule", *(f"after {count} epochs" for count in after)], rows)


def trained_map(results: Path) -> str:
    """Accuracy and cosine over T and τ, after a training on sequential digits."""
    rows = []
    for cell in sorted(load(results, "paper/map").values(), key=lambda cell: (cell["T"], cell["tau"])):
        of = {row["rule"]: row for row in cell["rows"]}
        reached = (scores_text(of[rule]["accuracies"]) for rule in ("BPTT", "SLTT"))
        rows.append([str(cell["T"]), f"{cell['tau']:g}", *reached, f"{of['SLTT']['cosine']:.2f}"])
    return markdown(["T", "τ", "BPTT", "SLTT", "cosine after the training"], rows)


def sparsity(results: Path) -> str:
    """Accuracy, energy and time over the weight of a penalty on firing rates."""
    rows = []
    for task, found in load(results, "sparsity").items():
        for row in found:
            reached = scores_text(row["validation"]), scores_text(row["accuracies"])
            counted = f"{row['firing_rate']:.3f}", f"{row['synaptic_operations'] / 1e6:.3g}"
            energy = f"{row['picojoules'] / 1e6:.3g}", f"{row['picojoules_of_data'] / 1e6:.3g}"
            time = (f"{row[part] / found[0][part]:.2f}" for part in ("training", "inference"))
            rows.append([f"`{task}`", f"{row['weight']:g}", *reached, *counted, *energy, *time])
    headings = ["recipe", "weight", "validation", "test accuracy", "firing rate", "10⁶ synaptic operations", "µJ",
                "µJ of the input", "time of training", "of inference"]  # fmt: skip
    return markdown(headings, rows)


def training(results: Path) -> str:
    """A whole training of the digits: accuracy, and memory, multiplications and cosine of a batch after it."""
    rows = []
    for row in load(results, "paper/training-digits")["rows"]:
        counted = (f"{row['operations'][part]:.2e}" for part in ("forward", "backward"))
        reached = scores_text(row["accuracies"]), megabytes(row["peak_memory"])
        rows.append([shown(row["rule"]), *reached, *counted, f"{row['cosine']:.3f}"])
    headings = ["rule", "test accuracy", "memory", "multiplications, forward", "backward", "cosine with BPTT"]
    return markdown(headings, rows)


def rules_over_t(results: Path) -> str:
    """Memory and time of a batch of the digits over T, as rules.py measured them."""
    found = sorted(grouped(load(results, "rules"), "steps").items())
    rows = []
    rules = list(by(found[0][1], "rule"))
    for T, of in found:
        one = by(of, "rule")
        cells = (f"{megabytes(one[rule]['peak_memory'])}, {one[rule]['seconds']:.2g} s" for rule in rules)
        rows.append([str(T), *cells])
    return markdown(["T", *(f"`{rule}`" for rule in rules)], rows)


def short(results: Path, name: str) -> str:
    """A line for each case that short.py trained, with the mean and the deviation over seeds."""
    found: list[Row] = load(results, f"short-{name}")
    names = [key for key in found[0] if key not in ("seed", "test", "validation", "peak_memory")]
    rows = []
    for of in grouped(found, *names).values():
        case = (shown(str(of[0][key])) for key in names)
        reached = (scores_text([row[key] for row in of]) for key in ("validation", "test"))
        rows.append([*case, str(len(of)), *reached, megabytes(of[0]["peak_memory"])])
    headings = ({"norm": "normalisation", "steps": "T"}.get(key, key) for key in names)
    return markdown([*headings, "seeds", "validation", "test accuracy", "memory"], rows)


def deeper_cosines(results: Path) -> str:
    """Cosines with BPTT's gradient of rules that keep paths across layers, before and after an epoch."""
    found = [row for row in load(results, "deeper") if "cosines" in row]
    rules = list(found[0]["untrained"])
    rows = []
    for row in found:
        cells = (f"{row['untrained'][rule]:.2f} to {row['after an epoch'][rule]:.2f}" for rule in rules)
        rows.append([str(row["layers"]), f"`{row['task']}`", *cells])
    return markdown(["hidden layers", "recipe", *rules], rows)


def deeper_accuracies(results: Path) -> str:
    """What these rules reach."""
    found = grouped((row for row in load(results, "deeper") if "rule" in row), "layers", "task")
    rules, rows = list(grouped(next(iter(found.values())), "rule")), []
    for (layers, task), of in found.items():
        seeds = grouped(of, "rule")
        reached = (scores_text([row["test"] for row in seeds.get(rule, [])]) for rule in rules)
        rows.append([str(layers), f"`{task}`", *reached])
    return markdown(["hidden layers", "recipe", *rules], rows)


def twin(results: Path) -> str:
    """An ANN and its twins on validation images; the best of each kind on test images too."""
    forms = {"percentile": "{:g}", "lr": "{:g}", "validation": "{:.1%}", "test": "{:.1%}", "minutes": "{:.1f}"}
    found = load(results, "twin")
    rows = [[row["network"], *(f.format(row[key]) if key in row else "" for key, f in forms.items())] for row in found]
    return markdown(["network", "percentile", "learning rate", "validation", "test", "minutes"], rows)


def twin_digits(results: Path) -> str:
    """Twins of ANNs on the digits."""
    found = grouped(load(results, "twin-digits"), "activation")
    names = [name for name in next(iter(found.values()))[0] if name not in ("activation", "seed")]
    rows = [[kind, *(scores_text([row[name] for row in of]) for name in names)] for kind, of in found.items()]
    return markdown(["activation", *names], rows)


def transformer_costs(results: Path) -> str:
    """Memory and time of a training batch of each rule."""
    found = grouped(load(results, "transformers")["costs"], "network", "steps")
    rules, rows = list(by(next(iter(found.values())), "rule")), []
    for (network, steps), of in found.items():
        one = by(of, "rule")
        cells = (f"{megabytes(one[rule]['memory'])}, {one[rule]['seconds']:.1f} s" for rule in rules)
        rows.append([network, str(steps), *cells])
    return markdown(["network", "T", *rules], rows)


def transformer_agreements(results: Path) -> str:
    """Cosines of each rule with BPTT, with the lowest of a layer in brackets."""
    found = load(results, "transformers")["agreements"]
    rows = []
    for row in found:
        cells = (f"{cosine:.3f} ({least:.2f})" for cosine, least in row["cosines"].values())
        rows.append([row["network"], str(row["batches"]), *cells])
    return markdown(["network", "batches", *map(shown, found[0]["cosines"])], rows)


def ladder(results: Path) -> str:
    """What each step from an analog network to spikes loses, in points of the validation accuracy."""
    labels = {
        ("gelu", "activations"): "GELU",
        ("relu", "activations"): "ReLU",
        ("clipped", "activations"): "ReLU clipped at 2.5",
        ("rates", "rates of 9 levels"): "steady currents, T = 8: rates of 9 levels",
        ("rates", "spikes, T = 8"): "the same weights: spikes, T = 8",
        ("rates", "pooled over time"): "the same, max pooling of sums over time (`sltt.RunningMax`)",
        ("slttk", "spikes, T = 8"): "after two epochs of SLTT-1 at T = 4: spikes, T = 8",
        ("slttk", "spikes, T = 4"): "the same weights: spikes, T = 4",
    }
    found = load(results, "ladder")
    reached = {label: found[case][kind] for (case, kind), label in labels.items() if case in found}
    first = next(iter(reached.values()))
    rows = [[label, f"{one:.1%}", f"{100 * (one - first):+.1f}"] for label, one in reached.items()]
    return markdown(["", "validation", "points"], rows)


def by_views(rows: list[Row]) -> list[str]:
    """Accuracies by one view of an image, and by the mean of six."""
    return [scores_text([row[views] for row in rows]) for views in ("alone", "six")]


def ingredients(results: Path) -> str:
    """What each change of a recipe brings, in points of the validation accuracy by six views.

    A change is compared with the recipe of the same seed that was measured last before it.
    """
    rows = load(results, "ingredients")
    base, gained = {}, {}
    for row in rows:
        if row["case"].startswith("recipe"):
            base[row["seed"]] = row["six"]
        gained.setdefault(row["case"], []).append(row["six"] - base[row["seed"]])
    cells = [
        [case, str(len(of)), *by_views(of), f"{100 * statistics.mean(gained[case]):+.1f}"]
        for case, of in grouped(rows, "case").items()
    ]
    return markdown(["change", "seeds", "one view", "six views", "points"], cells)


def hour(results: Path) -> str:
    """Accuracies of test images after trainings of several lengths."""
    rows = []
    for case, of in grouped(load(results, "hour"), "case").items():
        minutes = statistics.mean(sum(row["seconds"]) for row in of) / 60
        rows.append([case, str(len(of)), f"{minutes:.0f}", *by_views(of)])
    return markdown(["training", "seeds", "minutes", "one view", "six views"], rows)


def hour_seconds(results: Path) -> str:
    """Seconds of a batch of the hour's recipe, and the ratio to it of a batch with a change, within a turn."""
    found, rows = load(results, "hour-seconds"), []
    for batch, of in grouped(found["rows"], "batch").items():
        plain = of[0]["seconds"]
        for row in of:
            ratio = spread(quotient(row["seconds"], plain))
            rows.append([batch, row["change"], f"{statistics.median(row['seconds']):.3g}", ratio])
    table = markdown(["batch", "change", "seconds", "ratio"], rows)
    return f"{found['hardware']}, medians of {len(found['rows'][0]['seconds'])} turns:\n\n{table}"


def residual(results: Path) -> str:
    """The phases of the recipe `cifar10-small`, with the shortest and the longest epoch of each."""
    recipe = yaml.safe_load(Path(sltt.__file__).with_name("recipes").joinpath("cifar10-small.yaml").read_text())
    times = iter([float(row["seconds"]) for (epochs,) in runs(results, "cifar10-small").values() for row in epochs])
    rows = []
    for phase in recipe["phases"]:
        of = list(islice(times, phase["epochs"]))
        images = f"crops of {phase['crop']} pixels" if "crop" in phase else "whole"
        rule, steps = "steady currents" if "rule" in phase else "SLTT-1", phase.get("steps", recipe["steps"])
        took = " to ".join(dict.fromkeys(f"{one(of):.0f}" for one in (min, max)))
        rows.append([str(phase["epochs"]), rule, str(steps), images, took])
    return markdown(["epochs", "rule", "T", "images", "seconds per epoch"], rows)


def layers(results: Path) -> str:
    """Milliseconds of the dense gradients of some layers, PyTorch's and ours."""
    found = load(results, "layers")
    rows = []
    for (dtype, layer), of in grouped(found["rows"], "dtype", "layer").items():
        if layer in ("64→64, 32×32", "512→512, 4×4"):
            one = {row["pass"]: row["milliseconds"] for row in of}
            name = f"{layer}, {dtype}"
            for part in ("input gradient", "weight gradient"):
                times = (f"{one[part][column][0]:.1f}" for column in ("dense", "dense, ours"))
                rows.append([name, part, *times])
                name = ""
    table = markdown(["channels, pixels", "", "PyTorch", "ours"], rows).replace("|  |", "| |")
    return f"{found['hardware']}, {found['batch']} images, medians of {found['repeats']}:\n\n{table}"


def scaling(results: Path) -> str:
    """Images a second with one and two processes, and what a reduction costs."""
    rows = []
    for rule, (one, two) in load(results, "scaling")["measured"].items():
        speeds = (f"{row['samples_per_second']:.1f}" for row in (one, two))
        cells = f"{two['reduction_seconds'] / two['seconds']:.1%}", megabytes(two["memory"])
        rows.append([shown(rule), *speeds, *cells])
    headings = ["rule", "images/s, 1 process", "2 processes", "reduction, of a batch", "memory of a process"]
    return markdown(headings, rows)


def scaling_model(results: Path) -> str:
    """What reductions would cost on many GPUs."""
    rows = []
    for row in load(results, "scaling")["modelled"]:
        network = f"{row['network']}, {row['batch']} images a GPU, T = {row['steps']}, {megabytes(row['bytes'])}"
        shares = (f"{row[key]:.1%}" for key in ("after", "overlap", "each"))
        rows.append([network, shown(row["rule"]), str(row["gpus"]), *shares])
    return markdown(["network", "rule", "GPUs", "once", "once, overlapped", "each backward"], rows)


def last_epoch(results: Path) -> str:
    """What a few batches of SLTT-1 make of trained weights, by where they begin."""
    rows = [
        [
            row["start"],
            f"{row['rate']:g}" if row["batches"] else "",
            str(row["batches"]),
            str(row["steps"]),
            f"{row['right']:.1%}",
            f"{row['loss']:.3f}",
        ]
        for row in load(results, "last-epoch")
    ]
    return markdown(["begins from", "rate", "batches", "T", "right", "cross entropy"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "ladder": ladder,
    "ingredients": ingredients,
    "hour": hour,
    "last-epoch": last_epoch,
    "hour-seconds": hour_seconds,
    "cifar10-small": residual,
    "layers": layers,
    "scaling": scaling,
    "scaling-model": scaling_model,
    "tasks": all_tasks,
    **{task: partial(of_task, task=task) for task in ("recall", "recall-marked", "sequential-digits")},
    "neuromorphic": partial(of_task, task="nmnist"),
    **{f"short-{name}": partial(short, name=name) for name in ("stabilised", "transformer")},
    "transformer-costs": transformer_costs,
    "transformer-agreements": transformer_agreements,
    "twin": twin,
    "twin-digits": twin_digits,
    "deeper-cosines": deeper_cosines,
    "deeper-accuracies": deeper_accuracies,
    "summary": summary,
    "recall-short": partial(of_task, task="recall", rules=("BPTT", "OTTT", "SLTT", "SLTT-1")),
    "recurrent": recurrent,
    "sparsity": sparsity,
    "training": training,
    "rules": rules_over_t,
    **{name: partial(trainings, name=name) for name in ("nmnist", "cifar10-rules")},
    "nmnist-time": partial(over_time, name="nmnist", after=(2, 4, 8, 12)),
    "map": trained_map,
    **paper_tables.TABLES,
    **advice_tables.TABLES,
}
