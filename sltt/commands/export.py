"""Write the selected weights of a run for other tools.

As a NIR graph, as an ONNX model of one time step with the states as inputs and outputs, or as C for a microcontroller.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from sltt.analysis import measure_energy
from sltt.commands.failures import UsageError
from sltt.commands.parsing import CommandOptions, begin, load_run
from sltt.data import Splits
from sltt.interop.c import Exported, to_c
from sltt.losses import predict_from, prediction_of
from sltt.rules import unroll
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import lengths_of, target_of
from sltt.training.console import Console
from sltt.training.settings import Settings

MEASURED = 1000  # samples that an accuracy is measured on, at most
CORTEX = [
    *("-std=c11", "-O3", "-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "--specs=rdimon.specs"),
    *("-Wl,--section-start=.vectors=0", "-Wl,-Ttext=0x10000", "-Wl,-Tdata=0x20000000", "-Wl,-e,start"),
]
QEMU = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-icount", "shift=0", "-kernel"]
COUNT = r"""
#define main test_main
#include "NAME_test.c"
#undef main
#define TIMER ((volatile unsigned *)0xE000E010) /* a tick is 40 ns, and an instruction 1 ns */
extern void _start(void);
void start(void) { *(volatile unsigned *)0xE000ED88 |= 0xF << 20; _start(); } /* with floating point */
__attribute__((section(".vectors"), used)) static const void *vectors[] = {(void *)0x20400000, (void *)start};
static __attribute__((noinline)) int stack(int paint) /* how far calls went down since it was painted */
{
    volatile unsigned char *here = __builtin_frame_address(0);
    int depth = 16384;
    for (int i = 64; i < 16384 && paint; i++)
        here[-i] = 0xA5;
    while (depth > 64 && here[-depth + 1] == 0xA5)
        depth--;
    return depth;
}
int main(void)
{
    unsigned long long ticks = 0;
    stack(1);
    TIMER[1] = 0xFFFFFF;
    TIMER[0] = 5;
    for (int i = 0; i < SAMPLES * UPPER_STEPS; i++) {
        NAME_logit got[UPPER_CLASSES];
        unsigned before = TIMER[2];
        step(i / UPPER_STEPS, i % UPPER_STEPS, got);
        ticks += (before - TIMER[2]) & 0xFFFFFF;
    }
    int depth = stack(0);
    printf("%lu %d\n", (unsigned long)(ticks * 40 / SAMPLES), (depth + 7) / 8 * 8);
}
"""
SEEN = 64  # samples that set the scale of the input, and whose operations are counted


def options() -> CommandOptions:
    parser = CommandOptions("sltt export RUN", __doc__)
    parser.add_argument("--to", required=True, choices=("nir", "onnx", "c"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: graph.nir, step.onnx or folder c in the run")
    parser.add_code()
    parser.add_argument("--dt", type=float, default=1e-4, help="seconds of a time step, for NIR; default: 0.0001")
    parser.add_argument("--check", choices=("speck", "xylo"), help="say of each layer in NIR whether it fits on a chip")
    parser.add_argument("--name", help="what the names in C begin with; default: from the run's name")
    parser.add_argument("--weights", choices=("float32", "int8"), default="float32", help="in C; default: float32")
    for memory in ("ram", "flash"):
        text = f"bytes of {memory} that the C may take, such as 64k; else nothing is written"
        parser.add_argument(f"--{memory}", type=_bytes, metavar="BYTES", help=text)
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    args, run = options().parse_args(words), Path(folder)
    given = [f"--{name}" for name in ("name", "ram", "flash") if getattr(args, name) is not None]
    if args.to != "c" and (given := given + ["--weights"] * (args.weights != "float32")):
        raise UsageError(f"{given[0]} is of C, got --to {args.to}: leave it out, or use --to c")
    if args.check and args.to != "nir":
        raise UsageError(f"--check is of a NIR graph, got --to {args.to}: use --to nir")
    built, _, content = load_run("sltt export", folder, args.code)
    report = Console()
    splits = _splits(built, content, report)
    x = splits.collate([(splits.test or splits.train)[0]])[0]
    frame = x if splits.static else x[0]
    out = args.out or (run if run.is_dir() else Path()) / {"nir": "graph.nir", "onnx": "step.onnx", "c": "c"}[args.to]
    if args.to == "c":
        name = _default_name(run) if args.name is None else args.name
        limits = {"weights": args.weights, "ram": args.ram, "flash": args.flash}
        return _write_c(built, splits, out, name, limits, report)
    if (args.out or not run.is_dir()) and out.exists():
        raise UsageError(f"{out} exists, and is not overwritten: choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.to == "nir":
            import nir  # pyright: ignore[reportMissingImports]

            from sltt.interop import check_chip, to_nir

            nir.write(out, graph := to_nir(built.model, frame, dt=args.dt))
            report.line(f"written to {out}; a time step is {args.dt:g} seconds")
            for line in check_chip(graph, args.check) if args.check else ():
                report.line(line)
        else:
            from sltt.interop import to_onnx

            first = to_onnx(built.model, frame, out)
            report.line(f"written to {out}: one time step, with the states {', '.join(first)}")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the export needs {error.name}: pip install 'sltt[interop]'") from error


def _splits(built: Settings, content: dict[str, Any], report: Console) -> Splits:
    """Return the data of a run; where it is not here, the one sample that the run keeps."""
    try:
        return built.dataset.splits(built.steps)
    except FileNotFoundError:
        if not (sample := content.get("sample")):
            raise
    report.warn("the data is not here: what is measured, and scales of int8, are of the one sample in the run")
    task, y = content["task"], sample.get("label")
    data: Any = [(sample["x"][0] if task["static"] else sample["x"], torch.tensor(0) if y is None else y)]
    return Splits(data, None, None, task["static"], None if y is None else task["classes"], "")


def _bytes(text: str) -> int:
    """Return the number that 64k or 1M stands for."""
    if not (parts := re.fullmatch(r"([1-9]\d*)([kM]?)", text)):
        raise ValueError(f"expected bytes such as 65536, 64k or 1M, got {text!r}")
    return int(parts[1]) * {"": 1, "k": 1024, "M": 1024**2}[parts[2]]


def _default_name(run: Path) -> str:
    """Return the name of the recipe that made a run, as a name in C: digits_events of digits-events-sltt-DATE-TIME."""
    recipe = re.sub(r"-[^-]+-\d{8}-\d{6}(-\d+)?$", "", run.resolve().name)
    name = re.sub(r"\W", "_", recipe, flags=re.ASCII)
    return name if name[:1].isalpha() else f"net_{name}"


def _write_c(built: Any, splits: Splits, folder: Path, name: str, options: dict[str, Any], report: Console) -> None:
    """Write a trained network as C, and report its size, operations and accuracy."""
    samples = splits.unaugmented_train if splits.validation is None else splits.validation
    of = "training" if splits.validation is None else "validation"
    x, y = _batch(splits, samples, range(SEEN))
    steps = built.steps if splits.static else None
    exported = to_c(built.model, x, folder, name=name, steps=steps, **options)
    report.line(f"written to {folder}: `make -C {quote(str(folder))}` tests it")
    code, stack, instructions = _measure(folder, name)
    report.line(f"flash        {exported.flash:,} bytes of weights and parameters, {code}")
    report.line(f"RAM          {exported.ram:,} bytes, sizeof({name}_net), {stack}")
    with evaluation_mode(built.model):
        energy = measure_energy(built.model, x, steps=steps, lengths=lengths_of(y))
    sums, products = (energy.total(name) for name in ("effective_acs", "effective_macs"))
    report.line(f"operations   {sums:,.0f} sums and {products:,.0f} products a sample of {energy.steps:.4g} steps")
    report.line(f"instructions {instructions}")
    if splits.classes is not None and not splits.per_step:
        before, after, count = _accuracies(built, splits, samples, exported)
        report.line(f"accuracy     {after:.2%} in C, {before:.2%} in PyTorch, on {count} {of} samples")


def _measure(folder: Path, name: str) -> tuple[str, str, str]:
    """Return what code and stack take on a Cortex-M4, which QEMU emulates, and how many instructions a sample takes."""
    unknown = "without the code", "without the stack"
    if missing := [tool for tool in ("arm-none-eabi-gcc", QEMU[0]) if shutil.which(tool) is None]:
        return *unknown, f"not counted: {missing[0]} is not installed"
    with tempfile.TemporaryDirectory() as temporary:
        source, network, program = (Path(temporary, file) for file in ("count.c", "network.o", "count"))
        source.write_text(COUNT.replace("NAME", name).replace("UPPER", name.upper()))
        try:
            for words in (["-c", "-o", network, folder / f"{name}.c"], ["-I", folder, "-o", program, source, network]):
                subprocess.run(["arm-none-eabi-gcc", *CORTEX, *words], check=True, capture_output=True)
            size = subprocess.run(["arm-none-eabi-size", network], check=True, capture_output=True).stdout
            output = subprocess.run([*QEMU, program], check=True, capture_output=True, timeout=300).stdout
        except (OSError, subprocess.SubprocessError) as error:  # it has 4 MB for weights, and 4 MB for the state
            message = (getattr(error, "stderr", None) or b"").decode().strip() or str(error)
            return *unknown, f"not counted: {message.splitlines()[0]}"
    (text, data), (count, stack) = size.splitlines()[1].split()[:2], output.split()
    with_code, with_stack = f"{int(text) + int(data):,} with the code", f"and {int(stack):,} of stack"
    return with_code, with_stack, f"{int(count):,} a sample on a Cortex-M4, counted by QEMU"


def _batch(splits: Splits, samples: Any, rows: range) -> tuple[Tensor, Any]:
    return splits.collate_of(samples)([samples[i] for i in rows if i < len(samples)])


def _accuracies(built: Any, splits: Splits, samples: Any, exported: Exported) -> tuple[float, float, int]:
    """Return the accuracy in PyTorch and of the operations in C, on the first samples, and how many these are."""
    steps = built.steps if splits.static else None
    right, count = [0, 0], min(len(samples), MEASURED)
    for first in range(0, count, 50):
        x, y = _batch(splits, samples, range(first, first + 50))
        with evaluation_mode(built.model):
            logits = unroll(built.model, x, steps=steps), exported.network.unroll(x)
        for i, output in enumerate(logits):
            prediction = predict_from(prediction_of(built.loss), output, lengths_of(y))
            right[i] += int((prediction.argmax(1) == target_of(y)).sum())
    return right[0] / count, right[1] / count, count
