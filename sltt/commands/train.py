"""`sltt train`: train a recipe, then measure the selected weights on the test samples."""

import re
from collections.abc import Sequence
from dataclasses import replace

from sltt.commands.failures import UsageError
from sltt.commands.fit_parser import make_parser
from sltt.commands.parsing import allow_only, build, build_run, find_recipe, parse, parse_resume, run_folder
from sltt.metrics import score_text
from sltt.parallel.devices import keep_freed_memory
from sltt.training.card import add_test_score
from sltt.training.checkpoints import load_checkpoint, load_selected
from sltt.training.console import as_json
from sltt.training.evaluation import measure_split
from sltt.training.files import CONFIG, LAST, write_atomically
from sltt.training.fit import train
from sltt.training.session import Session, session
from sltt.training.settings import RESUMABLE, Settings


def run(words: Sequence[str]) -> None:
    keep_freed_memory()
    named = bool(words) and not words[0].startswith("-")
    continued, code, words = parse_resume(words)
    if continued and named:
        raise UsageError(f"--resume continues {continued} with its own recipe: leave out {words[0]!r}")
    if continued:
        if continued.is_file():
            raise UsageError(f"--resume takes the folder of a run, and {continued} is a file: --weights starts from it")
        run_folder(continued)
        allow_only(words, RESUMABLE, "sltt train --resume", "a run continues with its own settings")
    # the run's own may need packages that are not here
    unread = ["loggers"] if continued and re.search(r"--loggers[ =]null\b", " ".join(words)) else []
    command = f"sltt train {words[0] if named else '[RECIPE]'}"
    if continued:
        checkpoint = None if (continued / CONFIG).exists() else load_checkpoint(continued / LAST)
        name, built = "", build_run(command, continued, words, code, checkpoint, unread)
    else:
        parser, source = make_parser(command), find_recipe(words[0] if named else "digits")
        config = parse(parser, source, words[named:])
        name, built = source.stem, build(parser, config)
    name = f"{name}-{type(built.rule).__name__.lower()}"
    built = replace(built, run=continued or built.run, resume=continued is not None)
    with session(built) as here:
        _train(here, built, name)


def _train(here: Session, built: Settings, name: str) -> None:
    """`sltt train` in each of its processes."""
    splits = here.splits(built.dataset, built.steps)
    report = here.console(None)
    processes = f", {here.processes.count} processes" if here.processes.count > 1 else ""
    network = f"{type(built.model).__name__} with {sum(p.numel() for p in built.model.parameters()):,} parameters"
    report.line(f"{network}, {built.rule}, T = {built.steps}{processes}")
    sizes = ", ".join(f"{size} {name}" for name, size in splits.sizes.items())
    report.line(f"samples: {sizes} (split {splits.fingerprint})")
    result = train(here, replace(built, report=report), name)
    if splits.test is None:
        report.line(f"written to {result.run}; there are no test samples to measure it on")
        return
    run = result.run
    built = replace(built, steps=result.steps)  # of phases, that of the weights
    last = selected = measure_split(here, built, "test")
    if splits.validation:
        load_selected(built.model, run, here.processes, "last")
        last = measure_split(here, built, "test")
    if here.processes.rank > 0:
        return
    name, best, end = selected.metric, score_text(selected.metric, selected.score), score_text(last.metric, last.score)
    summary = {"epoch": result.epoch, f"test_{name}": selected.score, f"last_epoch_test_{name}": last.score}
    add_test_score(run, best)
    write_atomically(run / "result.json", lambda file: file.write(as_json(summary).encode()))
    report.line(
        f"test {name} {best} with the weights of epoch {result.epoch}, the best by validation; {end} after the last"
        if splits.validation
        else f"test {name} {end} after the last epoch"
    )
    report.line(f"written to {run}")
