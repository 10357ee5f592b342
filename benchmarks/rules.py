"""Time and peak memory of the rules over T, on the digits network, on resnet18 and on the MLP of `recall`.

    python benchmarks/rules.py [--networks digits,resnet18] [--steps 1,4,16] [--repeats 5] [--json FILE]
    python benchmarks/rules.py --networks recall --steps 16 --repeats 300

One training iteration is zero_grad and the rule, without an optimizer step. Time is the median over the repeats, after
one that is not counted, with the smallest and the largest: of the processor, with one thread, or with a GPU that of the
wall clock. Memory is what PyTorch's allocator holds at the peak above its level before the iteration; the gradients
exist before, so they are not in it. The rules take turns within a repeat, so that a drift of the machine's speed meets
them alike. First the logits of all rules are checked to be equal.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tables import fill
from torch import nn
from turns import in_turns

import sltt
from sltt.analysis import peak_memory
from sltt.training.console import megabytes

MEMORY = functools.partial(sltt.LIF, tau=20.0, detach_reset=True)
# what makes the network, its input, and the layer of neurons whose gradient through time `Mixed` keeps
NETWORKS = {
    "digits": (sltt.models.DigitsNet, (128, 1, 8, 8), "features.2"),
    "resnet18": (sltt.models.resnet18, (32, 3, 32, 32), "blocks.2.neuron1"),
    "recall": (functools.partial(sltt.models.MLP, (200, 64, 4), neuron=MEMORY, norm=False), (128, 200), "hidden.1"),
}
RULES: list[sltt.Rule] = [sltt.BPTT(), sltt.SLTT(), sltt.SLTT(k=1), sltt.OTTT(), sltt.RateBased()]
LOSS = sltt.losses.CrossEntropyMSE()


def iteration(rule: sltt.Rule, model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> sltt.Output:
    model.zero_grad(set_to_none=False)
    return rule(model, x, y, LOSS, steps=steps)


def measure(network: str, steps: int, repeats: int, device: torch.device) -> list[dict]:
    make, shape, layer = NETWORKS[network]
    rules = [*RULES, sltt.Mixed({layer: "all"})]
    torch.manual_seed(0)
    model = make().to(device)
    x, y = torch.randn(shape, device=device), torch.randint(4, shape[:1], device=device)
    logits = [iteration(rule, model, x, y, steps).logits for rule in rules]
    assert all(torch.allclose(o, logits[0], rtol=1e-4, atol=1e-5) for o in logits), "the rules' outputs differ"
    cuda = device.type == "cuda"

    def run(rule: sltt.Rule) -> None:
        iteration(rule, model, x, y, steps)
        if cuda:
            torch.cuda.synchronize()

    clock = time.perf_counter if cuda else time.process_time
    seconds = in_turns([functools.partial(run, rule) for rule in rules], repeats, clock)
    return [
        {
            "network": network,
            "steps": steps,
            "rule": repr(rule),
            "seconds": statistics.median(times),
            "seconds_min": min(times),
            "seconds_max": max(times),
            "peak_memory": peak_memory(functools.partial(run, rule), device),
        }
        for rule, times in zip(rules, seconds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,resnet18")
    parser.add_argument("--steps", default="1,4,16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False)
    console.print(f"torch {torch.__version__}, {device}")
    rows = []
    for network in options.networks.split(","):
        table = Table(title=f"{network}, input {list(NETWORKS[network][1])}", title_justify="left")
        for heading in ("T", "rule", "ms", "min – max", "of SLTT", "peak memory"):
            table.add_column(heading, justify="left" if heading == "rule" else "right")
        for steps in map(int, options.steps.split(",")):
            found = measure(network, steps, options.repeats, device)
            rows += found
            of_sltt = next(row["seconds"] for row in found if row["rule"] == repr(sltt.SLTT()))
            for row in found:
                middle, least, most = (1e3 * row[name] for name in ("seconds", "seconds_min", "seconds_max"))
                figures = f"{middle:.1f}", f"{least:.1f} – {most:.1f}", f"{row['seconds'] / of_sltt:.2f}"
                table.add_row(str(steps), row["rule"], *figures, megabytes(row["peak_memory"]))
            table.add_section()
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
        fill()


if __name__ == "__main__":
    main()
