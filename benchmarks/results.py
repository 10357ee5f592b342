"""A table and a CSV of finished runs: accuracy by rule over the seeds, seconds for an epoch.

    python benchmarks/results.py RUN … --csv docs/results/NAME.csv

Each run is a folder that `sltt train` wrote. The CSV has a row for each epoch of each run, with its test accuracy.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

COLUMNS = (
    "rule",
    "seed",
    "epoch",
    "train_accuracy",
    "validation_accuracy",
    "seconds",
    "test_accuracy",
    "last_epoch_test",
)


def rows(run: Path) -> list[dict[str, Any]]:
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
    print("| rule | seeds | test accuracy | after the last epoch | seconds for an epoch |")
    print("| --- | --- | --- | --- | --- |")
    for rule in sorted({run[0]["rule"] for run in runs}):
        mine = [run for run in runs if run[0]["rule"] == rule]
        cells = []
        for column in ("test_accuracy", "last_epoch_test"):
            values = [run[0][column] for run in mine]
            spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1%}{spread}")
        seconds = statistics.median(float(row["seconds"]) for run in mine for row in run)
        print(f"| {rule} | {len(mine)} | {cells[0]} | {cells[1]} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
