"""Find a learning rate: train some batches at a rate that rises with each, and see where the loss falls fastest.

With phases, it tests the rule and T of the first that has no rate of its own. No weights are kept. Other options are
those of sltt train: --rule, --batch_size, --optimizer.…
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace

from sltt.analysis.rates import FALLS, RateTest, find_learning_rate
from sltt.commands.parsing import CommandOptions, count
from sltt.commands.prepared import Prepared
from sltt.commands.tables import Table, number
from sltt.training.console import Console, as_json
from sltt.training.session import session

SHOWN = 12  # rows of the table, at most


def options() -> CommandOptions:
    parser = CommandOptions("sltt lr [RECIPE]", __doc__)
    parser.add_argument("--smallest", type=float, default=1e-5, help="first learning rate; default: 1e-5")
    parser.add_argument("--largest", type=float, default=1.0, help="last learning rate; default: 1")
    parser.add_argument("--batches", type=count, default=100, help="number of batches; default: 100")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(words: Sequence[str]) -> None:
    known, recipe = options().parse_recipe(words)
    built = recipe.build()
    # the phases that have a rate of their own take no other
    stage = next((one for one in built.stages() if one.lr is None), None)
    if stage is None:
        raise ValueError(
            "every phase has a learning rate of its own, and the test finds one for all: give the values of a phase, "
            "such as --phases null --steps 1"
        )
    built = replace(built, rule=stage.rule)
    with session(built) as here:
        ready = Prepared(here, built, stage.steps)
        batches = itertools.islice(ready.batches(built.size), known.batches)
        given = ready.model, batches, ready.loss, ready.rule, ready.optimizer
        rates = {"smallest": known.smallest, "largest": known.largest, "count": known.batches}
        found = find_learning_rate(*given, steps=ready.repeat, clip_norm=built.clip_norm, **rates)
    about = {"recipe": recipe.name, "rule": repr(stage.rule), "steps": stage.steps}
    about |= {"optimizer": type(ready.optimizer).__name__}
    if known.json:
        print(as_json({**about, "batch_size": built.batch_size, **asdict(found)}))
    else:
        _print(found, Console())


def _print(found: RateTest, report: Console) -> None:
    pairs = [*zip(found.rates, found.losses, strict=True)][:: -(-len(found.rates) // SHOWN)]
    Table([{"learning rate": number(rate, ".2g"), "loss": number(loss, ".4f")} for rate, loss in pairs]).show(report)
    report.line(
        f"The loss falls by less than {FALLS:.0%} at these rates: try others, by --smallest and --largest, or more "
        "--batches."
        if found.suggestion is None
        else f"Take --optimizer.lr {found.suggestion:.2g}: there the loss falls fastest. It is lowest at "
        f"{found.lowest:.2g}; larger rates are too large."
    )
