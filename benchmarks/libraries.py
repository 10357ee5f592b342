"""Networks of other libraries as they are: a batch under SLTT and BPTT here, beside the library's own BPTT.

    pip install '.[interop]'
    python benchmarks/libraries.py [--networks sew,snntorch,norse,norse-linear,sinabs,sinabs-linear]
                                   [--batch N] [--threads 1] [--repeats 11] [--json FILE]

Rules are called with their defaults, on the network that the library itself trains. SpikingJelly runs all steps of a
layer in one call (step mode "m"), in the faster of both memory formats; sinabs too; snnTorch and Norse loop over time.
The loss is the cross entropy of the mean output. Turns alternate in one process: each ratio is of one turn, and the
table has the median and the quartiles. The time of one thread is processor time, that of several is wall time.
"""

# pyright: reportMissingImports=false
import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import write
from torch import Tensor, nn
from turns import hardware, in_turns, timed

import sltt

LOSS = nn.CrossEntropyLoss()
Case = tuple[Callable[[], Any], Tensor, Tensor, int]  # makes the network for a rule; input, classes, T
Run = Callable[[], Any]


def sew(batch: int | None, channels_last: bool) -> tuple[Case, Run]:
    """SpikingJelly's SEW-ResNet-18 on images of 64×64 pixels, T = 4."""
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    def make(mode: str = "s") -> Any:
        torch.manual_seed(0)
        more = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
        model = sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", spiking_neuron=neuron.IFNode, **more)
        functional.set_step_mode(model, mode)
        return model

    x, y, steps, own = torch.rand(batch or 8, 3, 64, 64), torch.arange(batch or 8) % 10, 4, make("m")
    own = own.to(memory_format=torch.channels_last) if channels_last else own
    xs = x.repeat(steps, 1, 1, 1, 1)

    def run() -> None:
        functional.reset_net(own)
        own.zero_grad(set_to_none=True)
        LOSS(own(xs).mean(0), y).backward()

    return (make, x, y, steps), run


def snntorch(batch: int | None) -> tuple[Case, Run]:
    """The convolutional network of snnTorch's tutorials, 28×28 pixels, T = 25."""
    import snntorch as snn
    from snntorch import surrogate, utils

    def make() -> nn.Module:
        torch.manual_seed(0)
        leaky = partial(snn.Leaky, beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=25), init_hidden=True)
        first = nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), leaky(), nn.Conv2d(12, 64, 5), nn.MaxPool2d(2), leaky()
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(1024, 10), leaky())

    x, y, steps, own = torch.rand(batch or 64, 1, 28, 28), torch.arange(batch or 64) % 10, 25, make()

    def run() -> None:
        utils.reset(own)
        own.zero_grad(set_to_none=True)
        LOSS(torch.stack([own(x) for _ in range(steps)]).mean(0), y).backward()

    return (make, x, y, steps), run


def norse(batch: int | None, linear: bool = False) -> tuple[Case, Run]:
    """Norse's convolutional network for digits, or a linear one; 28×28 pixels, T = 16."""
    from norse import torch as norse

    from sltt.interop.norse import KeepState

    def make() -> Any:
        torch.manual_seed(0)
        hidden = [nn.Flatten(), nn.Linear(784, 256), norse.LIFCell(), nn.Linear(256, 128), norse.LIFCell()]
        if not linear:
            first = nn.Conv2d(1, 20, 5), norse.LIFCell(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), norse.LIFCell()
            hidden = [*first, nn.MaxPool2d(2), nn.Flatten()]
        return norse.SequentialState(*hidden, nn.Linear(128 if linear else 800, 10), norse.LICell())

    steps, y, own = 16, torch.arange(batch or 32) % 10, make()
    x = 30 * torch.rand(steps, batch or 32, 1, 28, 28)

    def run() -> None:
        own.zero_grad(set_to_none=True)
        outputs, state = [], None
        for x_t in x:
            y_t, state = own(x_t, state)
            outputs.append(y_t)
        LOSS(torch.stack(outputs).mean(0), y).backward()

    return (lambda: KeepState(make()), x, y, steps), run


def sinabs(batch: int | None, linear: bool = False) -> tuple[Case, Run]:
    """A convolutional network of sinabs' layers with their defaults, or a linear one; 28×28 pixels, T = 16."""
    from sinabs import layers, utils

    def make(steps: int = 1) -> nn.Module:
        torch.manual_seed(0)
        lif, iaf = partial(layers.LIFSqueeze, tau_mem=20.0, num_timesteps=steps), layers.IAFSqueeze
        if linear:
            hidden = nn.Linear(784, 256), lif(), nn.Linear(256, 128), lif(), nn.Linear(128, 10), lif()
            return nn.Sequential(nn.Flatten(), *hidden)
        iaf = partial(iaf, num_timesteps=steps)
        first = nn.Conv2d(1, 8, 5), iaf(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3), iaf(), nn.AvgPool2d(2), nn.Flatten()
        return nn.Sequential(*first, nn.Linear(400, 64), iaf(), nn.Linear(64, 10), iaf())

    steps, y = 16, torch.arange(batch or 32) % 10
    own, x = make(steps), 3 * torch.rand(steps, batch or 32, 1, 28, 28)
    samples_first = x.transpose(0, 1).flatten(0, 1)

    def run() -> None:
        own.zero_grad(set_to_none=True)
        utils.reset_states(own)
        LOSS(own(samples_first).unflatten(0, (-1, steps)).mean(1), y).backward()

    return (make, x, y, steps), run


# in the forms of the library, of which the fastest counts
NETWORKS: dict[str, list[Callable[[int | None], tuple[Case, Run]]]] = {
    "sew": [partial(sew, channels_last=False), partial(sew, channels_last=True)],
    "snntorch": [snntorch],
    "norse": [norse],
    "norse-linear": [partial(norse, linear=True)],
    "sinabs": [sinabs],
    "sinabs-linear": [partial(sinabs, linear=True)],
}


def ruled(rule: sltt.Rule, case: Case) -> Run:
    """Make a case of a rule."""
    make, x, y, steps = case
    model = make()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        rule(model, x, y, LOSS, steps=None if len(x) == steps and x.ndim == 5 else steps)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, help="samples; default: the network's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.networks.split(","):
        found = [form(options.batch) for form in NETWORKS[name]]
        case = found[0][0]
        runs = {f"own {i}": run for i, (_, run) in enumerate(found)}
        runs |= {"SLTT": ruled(sltt.SLTT(), case), "BPTT": ruled(sltt.BPTT(), case)}
        for run in runs.values():
            run()  # the first batch of a rule looks at the network
        clock = time.process_time if options.threads == 1 else time.perf_counter
        times = dict(zip(runs, in_turns([timed(run, clock) for run in runs.values()], options.repeats), strict=True))
        own = min((times[key] for key in times if key.startswith("own")), key=statistics.median)
        row = {"network": name, "batch": len(case[2]), "steps": case[3], "own": own}
        row |= {rule: times[rule] for rule in ("SLTT", "BPTT")}
        row |= {"hardware": hardware(options.threads), "began": datetime.now(UTC).isoformat(timespec="seconds")}
        rows.append(row)
        print(f"{name}, B = {row['batch']}, T = {row['steps']}: own BPTT {1e3 * statistics.median(own):.1f} ms", end="")
        for rule in ("SLTT", "BPTT"):
            low, middle, high = statistics.quantiles((a / b for a, b in zip(times[rule], own, strict=True)), n=4)
            print(f"; {rule} {middle:.2f} ({low:.2f} to {high:.2f})", end="")
        print(flush=True)
        if options.json:
            write(options.json, rows)


if __name__ == "__main__":
    main()
