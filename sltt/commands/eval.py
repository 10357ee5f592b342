"""`sltt eval`: measure a trained run."""

from collections.abc import Sequence
from inspect import signature

from sltt.commands.parsing import CommandOptions, allow_only, begin, load_run
from sltt.metrics import score_text
from sltt.training.console import Console, as_json, megabytes
from sltt.training.evaluation import evaluate, measure_split
from sltt.training.session import session
from sltt.training.settings import Settings, names_of

VIEWS = ("mirror", "shift")
# what a split is measured with; the processes are those that were started
WITHOUT = ("split", *VIEWS, *names_of(Settings, "processes"))
KEYS = [name for name in signature(evaluate).parameters if name not in WITHOUT]
HELP = f"Measure a trained run. {', '.join(f'--{k}' for k in KEYS)} override the run's configuration."


def options() -> CommandOptions:
    parser = CommandOptions("sltt eval RUN", HELP)
    parser.add_checkpoint()
    parser.add_argument("--split", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--mirror", action="store_true", help="mean logits of each image and of its mirror image")
    shift = "average the image (weight 1/2) and copies moved up left and down right (1/4 each)"
    parser.add_argument("--shift", type=int, default=0, metavar="PIXELS", help=shift)
    parser.add_code()
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    folder, words = begin(words)
    args, overrides = options().parse_known_args(words)
    allow_only(overrides, KEYS, "sltt eval", "the others belong to the training")
    built, path, _ = load_run("sltt eval", folder, args.code, args.checkpoint, overrides)
    with session(built) as here:
        views = {name: getattr(args, name) for name in VIEWS}
        metrics = measure_split(here, built, args.split, **views, memory=True)
    if here.processes.rank > 0:
        return
    if args.json:
        print(as_json({"checkpoint": str(path), "split": args.split, **views, **metrics.to_dict()}))
        return
    report = Console()
    moved = f", also moved by {args.shift}" if args.shift else ""
    mirrored = " and their mirror images" if args.mirror else ""
    report.line(f"{path}, T = {built.steps}, {args.split} samples{moved}{mirrored}")
    report.line(f"{metrics.metric:11}  {score_text(metrics.metric, metrics.score)}")
    report.line(f"loss         {metrics.loss:.4f}")
    report.line(f"firing rate  {metrics.firing_rate:.4f}")
    report.line(f"seconds      {metrics.seconds:.1f}")
    peak = megabytes(metrics.peak_memory) if metrics.peak_memory else "–"
    report.line(f"peak memory  {peak} for a batch of {built.size}")
