"""A table and a CSV of finished runs: accuracy by rule over the seeds, seconds for an epoch.

    python benchmarks/results.py RUN … --csv docs/results/NAME.csv

Each run is a folder that `sltt train` wrote. The CSV has a row for each epoch of each run, with its test accuracy.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

import yaml
from cells import Row, markdown

from sltt.commands.results import scores_text

OF_RUN = "test_accuracy", "last_epoch_test"
COLUMNS = "rule", "seed", "epoch", "train_accuracy", "validation_accuracy", "seconds", *OF_RUN


def rows(run: Path) -> list[Row]:
    """A row for each epoch of a run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    result = json.loads((run / "result.json").read_text())
    k = config["rule"].get("init_args", {}).get("k")
    rule = config["rule"]["class_path"].rpartition(".")[2] + (f"(k={k})" if k else "")
    with (run / "metrics.csv").open() as file:
        epochs = list(csv.DictReader(file))
    shared = {"rule": rule, "seed": config["seed"], "test_accuracy": result["test_accuracy"]}
    shared["last_epoch_test"] = result["last_epoch_test_accuracy"]
    return [{**shared, **{c: e[c] for c in COLUMNS if c in e}} for e in epochs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    runs = [rows(run) for run in options.runs]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted((row for run in runs for row in run), key=lambda r: (r["rule"], r["seed"])))
    lines = []
    for rule in sorted({run[0]["rule"] for run in runs}):
        mine = [run for run in runs if run[0]["rule"] == rule]
        reached = (scores_text([run[0][column] for run in mine]) for column in OF_RUN)
        seconds = statistics.median(float(row["seconds"]) for run in mine for row in run)
        lines.append([rule, str(len(mine)), *reached, f"{seconds:.1f}"])
    print(markdown(["rule", "seeds", "test accuracy", "after the last epoch", "seconds for an epoch"], lines), end="")


if __name__ == "__main__":
    main()
