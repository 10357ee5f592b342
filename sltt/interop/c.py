"""C: a trained network as one file of C11 without dependencies, for microcontrollers."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sltt import checks
from sltt.interop.c_integers import in_integers
from sltt.interop.c_network import Fire, Network, Operation
from sltt.interop.c_reading import read_network
from sltt.interop.c_writing import Program, lines_of
from sltt.interop.conversion import check_exportable
from sltt.rules import unroll
from sltt.sequence.copies import copy_model
from sltt.sequence.steps import time_steps

log = logging.getLogger("sltt")
Arithmetic = Literal["float32", "int8"]
VECTORS = 4  # samples in the test of the exported network
ROUNDED = 0.2  # rounding may change this share of the spikes of a layer, given the same inputs


@dataclass(frozen=True)
class Exported:
    """Files and sizes of a network that `to_c` wrote.

    Attributes:
        folder: of the files.
        network: the same operations in Python: `network.unroll(x)`, of such an x as `to_c` took, gives the logits.
        flash: bytes of weights and parameters, without the code.
        ram: bytes of the state, `sizeof(NAME_net)`.
    """

    folder: Path
    network: Network = field(repr=False)
    flash: int
    ram: int


def to_c(
    model: nn.Module,
    example: Tensor,
    folder: str | Path,
    *,
    name: str = "network",
    steps: int | None = None,
    weights: Arithmetic = "float32",
    ram: int | None = None,
    flash: int | None = None,
) -> Exported:
    """Write one time step of a network as C11, with a test, a Makefile and a README.

        to_c(model, x, "digits", name="digits", steps=4)     # digits.c, digits.h, digits_test.c, Makefile, README.md

    The C has no dependency but <stdint.h> and <string.h>, allocates nothing, and computes layers that read spikes on
    active inputs alone. The network runs in evaluation mode. [Layers](to-a-microcontroller.md#layers) are convolutions,
    linear layers, BatchNorm, pooling, sums, `torch.cat`, delays, `LIF`, `IF`, `PLIF`, `ChannelLIF`, `CubaLIF`, `ALIF`,
    `IntegerLIF`, `TernaryLIF`, `LI`, `Recurrent`.

    Args:
        model: maps one time step [B, ...] to logits [B, classes], or [B, classes, H, W] of the pixels of an image.
        example: a sequence [T, B, ...]; or, with `steps`, a static input [B, ...]. 4 of the samples become the test.
        folder: to make for the files.
        name: what the names of files, functions and types begin with.
        steps: T for a static input.
        weights: the arithmetic. "float32" gives the logits of `sltt.unroll` up to rounding. "int8" has weights of 8
            bits, states of 16 and sums of 32, and gives those of `Exported.network` to the last bit; the example sets
            the scale of the input.
        ram: bytes that the state may take.
        flash: bytes that weights and parameters may take, without the code.

    Raises:
        ValueError: naming every layer that C has not, or the largest of a network that does not fit; for weights that
            are not finite, a folder that exists, or a name that is none in C. Nothing is written then.
    """
    checks.instance("model", model, nn.Module)
    checks.choice("weights", weights, get_args(Arithmetic))
    limits = {"RAM": ram, "flash": flash}
    limits = {what: checks.whole_number(what.lower(), n, least=1) for what, n in limits.items() if n is not None}
    sequence = time_steps(example, steps)
    if not (isinstance(name, str) and re.fullmatch("(?!Makefile$|layer[0-9])[A-Za-z][A-Za-z0-9_]*", name)):
        expected = "of letters, digits and _, and none such as layer1"
        raise ValueError(f"name must be a name in C, {expected}, got {name!r}; such as my_network")
    folder = checks.folder("folder", folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder, or remove this one")
    check_exportable(model)
    x = torch.stack([sequence.input(range(t, t + 1)) for t in range(sequence.steps)]).float().cpu()
    model = copy_model(model).float().cpu().eval()
    expected = unroll(model, x)
    network = read_network(model, x[0], sequence.steps)
    margin = torch.empty(x.shape[1])
    found, sure = network.unroll(x, margin), margin > 1e-3
    if not torch.allclose(found[:, sure], expected[:, sure], rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        problem = f"{type(model).__name__} computes something else than its trace of the first time step"
        raise ValueError(f"{problem}: leave out what counts time steps, and write z = z + x for z.add_(x)")
    if weights == "int8":
        network = _quantise(network, x)
        expected = network.unroll(x)
    program = Program(network.keep(True) if sequence.static else network, name, events=not sequence.static)
    if sequence.static and program.ram > limits.get("RAM", program.ram):
        program = Program(network.keep(False), name, events=False)
    or_int8 = ", or use weights='int8'" if weights == "float32" else ""
    for what, limit in limits.items():
        if (used := getattr(program, what.lower())) > limit:
            ((layer, most),) = program.by_layer()[what].most_common(1)
            use = f"{used:,} bytes of {what} in {weights}, more than {limit:,}"
            raise ValueError(f"{name} takes {use}; {layer} takes {most:,} of them: make it smaller{or_int8}")
    # floats are summed in another order than PyTorch's, which may change a spike where a potential meets its threshold
    tested = margin.argsort(descending=True, stable=True)[:VECTORS]
    inputs = x[:1, tested] if sequence.static else x[:, tested]
    inputs, network = network.to_integers(inputs) if network.integers else inputs, program.network
    files = {
        f"{name}.h": program.header(),
        f"{name}.c": program.source(),
        f"{name}_test.c": _test(program, inputs, expected[:, tested]),
        "Makefile": _MAKEFILE.replace("NAME", name),
        "README.md": _readme(program),
    }
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return Exported(folder, network, program.flash, program.ram)


@torch.no_grad()
def _quantise(network: Network, x: Tensor) -> Network:
    """Return the network in integers; warn of each layer whose output on sequences x is rounded too far."""
    integers, spikes = in_integers(network, x), {op.name: op.output for op in network.neurons}
    apart, most = Counter[str](), Counter[str]()

    def compare(op: Operation, output: Tensor) -> Tensor:
        if not isinstance(op, Fire):
            return output
        before = values[spikes[op.name]].double()
        apart[op.name] += int((before != output).sum())
        most[op.name] += int((before.abs() + output.abs() > 0).sum())
        return before  # so that the rounding of each layer counts alone

    rounded, error, spread, power = integers.run(x, compare), 0.0, 0.0, 0.0
    for values in network.run(x):
        logits, after = values[network.output], next(rounded)[integers.output] * integers.logit_scale
        error += (after - logits).square().sum().item()
        spread += (logits - logits.mean((0, 1))).square().sum().item()
        power += logits.square().sum().item()
    shares = {f"of the spikes of {name}": apart[name] / total for name, total in most.items() if total}
    shares["of the spread of the logits"] = (error / max(spread, power / 100, 1e-30)) ** 0.5
    for what, share in shares.items():
        if share > ROUNDED:
            remedy = "train with quantised='int8', or use weights='float32'"
            log.warning("rounding to int8 changes %.0f%% %s: %s", 100 * share, what, remedy)
    return integers


def pixels_first(network: Network, x: Tensor) -> Tensor:
    """Return inputs [T, B, ...] as C takes them, [B, T, inputs] with the channels last."""
    images = x.reshape(*x.shape[:2], *network.input.shape)
    return images.permute(1, 0, 3, 4, 2).flatten(2)


def _test(program: Program, x: Tensor, expected: Tensor) -> str:
    """Return NAME_test.c: the inputs [T or 1, B, ...] and the logits [T, B, classes, ...] that they must give."""
    network, name, N = program.network, program.name, program.name.upper()
    inputs, logits = pixels_first(network, x), expected.transpose(0, 1).movedim(2, -1)
    samples = len(inputs)
    at_reset, at_step = f", inputs + sample * {N}_INPUTS", f", inputs + (sample * {N}_STEPS + t) * {N}_INPUTS"
    at_reset, at_step = (at_reset, "") if network.once else ("", at_step)
    tolerance = "0" if network.integers else "1e-4f * (1.0f + (expected[k] < 0 ? -expected[k] : expected[k]))"
    return f"""/* Runs {name} on {samples} samples, and compares the logits of each step with the trained network's. */

#include <stdio.h>

#include "{name}.h"

#define SAMPLES {samples}

static const {name}_input inputs[{inputs.numel()}] = {{
{lines_of(inputs, program.types["input"])}
}};

static const {name}_logit logits[SAMPLES * {N}_STEPS * {N}_CLASSES] = {{
{lines_of(logits, program.types["number"])}
}};

static {name}_net net;

static void step(int sample, int t, {name}_logit *got)
{{
    if (t == 0)
        {name}_reset(&net{at_reset});
    {name}_step(&net{at_step}, got);
}}

int main(void)
{{
    int wrong = 0;

    for (int sample = 0; sample < SAMPLES; sample++)
        for (int t = 0; t < {N}_STEPS; t++) {{
            const {name}_logit *expected = logits + (sample * {N}_STEPS + t) * {N}_CLASSES;
            {name}_logit got[{N}_CLASSES];

            step(sample, t, got);
            for (int k = 0; k < {N}_CLASSES; k++) {{
                const {name}_logit apart = got[k] > expected[k] ? got[k] - expected[k] : expected[k] - got[k];
                wrong += !(apart <= {tolerance});
            }}
        }}
    printf("{name}: %d samples, %d of %d logits differ\\n", SAMPLES, wrong, SAMPLES * {N}_STEPS * {N}_CLASSES);
    return wrong != 0;
}}
"""


_MAKEFILE = """# make           run the test on this machine
# make NAME.o    compile the network, also for a device; with a floating-point unit, as here, name it:
#     make NAME.o CC=arm-none-eabi-gcc CFLAGS="-O3 -mthumb -mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard"
CFLAGS ?= -O3 -funroll-loops -std=c11 -Wall -Wextra -pedantic

test: NAME_test
	./NAME_test

NAME_test: NAME_test.o NAME.o
	$(CC) $(LDFLAGS) -o $@ $^

NAME.o NAME_test.o: NAME.h

clean:
	rm -f NAME_test NAME_test.o NAME.o

.PHONY: test clean
"""


def _readme(program: Program) -> str:
    name, N, network = program.name, program.name.upper(), program.network
    reset, frame = f"{name}_reset(&net);", f"{name}_step(&net, frame, logits);   /* {N}_INPUTS values, channels last */"
    if network.once:
        reset = f"{name}_reset(&net, input);   /* {N}_INPUTS values, channels last, which all steps see */"
        frame = f"{name}_step(&net, logits);"
    if program.events:
        where = "x, y, polarity" if network.input.shape[1:] != (1, 1) else "i"
        frame = (
            f"/* for each event of this step: */ {name}_event(&net, {where});\n"
            f"    {name}_tick(&net, logits);   /* or {name}_step(&net, frame, logits) with a whole frame */"
        )
    once = f", the first {network.once} in `{name}_reset`, the others in each step" if network.once else " in each step"
    of_ram, of_flash = program.by_layer().values()
    shapes = {op.name: op.output.shape for op in network.operations}
    shapes |= {"events": network.input.shape} if program.events else {}
    layers = "\n".join(
        f"| `{layer}` | {' × '.join(map(str, shape))} | {of_ram[layer]:,} | {of_flash[layer]:,} |"
        for layer, shape in shapes.items()
    )
    unit, most, logit = (f"{n:.6g}" for n in (network.input_scale, 127 * network.input_scale, network.logit_scale))
    quantised = f"""An input is an integer in ±127, of which 1 stands for {unit} (`{N}_INPUT_SCALE`).
`{name}_quantise(value)` rounds a value to it; values beyond ±{most} become ±127. A logit of 1 stands for {logit}
(`{N}_LOGIT_SCALE`); the sum over {N}_STEPS fits in 32 bits.

"""
    return f"""# {name}

A trained spiking network in C11. `{name}.c` needs `{name}.h`, `<stdint.h>` and `<string.h>`, and allocates nothing.
`make` compiles it and compares its logits with those of the trained network.

```c
#include "{name}.h"

static {name}_net net;

{reset}
{name}_logit sum[{N}_CLASSES] = {{0}};
for (int t = 0; t < {N}_STEPS; t++) {{
    {name}_logit logits[{N}_CLASSES];
    {frame}
    for (int k = 0; k < {N}_CLASSES; k++)
        sum[k] += logits[k];
}}
/* the {f"prediction is sum[0] / {N}_STEPS" if network.output.size == 1 else "class is the index of the largest sum"} */
```

| | |
| --- | --- |
| weights and parameters | {program.flash:,} bytes of flash, code not counted |
| state, `sizeof({name}_net)` | {program.ram:,} bytes of RAM |
| time steps of a sample | {network.steps} |

{quantised if network.integers else ""}The code needs an `int` of 32 bits. These layers run, in this order{once}:

| layer | channels × height × width | RAM | flash |
| --- | --- | --- | --- |
{layers}
"""
