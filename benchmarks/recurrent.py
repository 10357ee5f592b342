"""Sequential digits with recurrent layers: test accuracy after the last epoch, and the table of docs/recall.md.

    python benchmarks/recurrent.py [--runs runs/recurrent]

Three rules with three seeds, a few minutes on a core. Each training is an `sltt train` in `runs/recurrent`. Run the
command again to continue. It ends with docs/results/recurrent.json and the table that is made of it.
"""

import argparse
import json
from pathlib import Path

import torch
from tables import DOCS, fill
from turns import train

PATH = DOCS / "results" / "recurrent.json"
RECIPE = "sequential-digits --model.recurrent true"
RULES = "BPTT", "OTTT", "SLTT"
SEEDS = 3


def accuracy(rule: str, seed: int, runs: Path) -> float:
    """What a rule with a seed reaches on the test samples."""
    run = runs / f"{rule}-seed{seed}"
    result = run / "result.json"
    if not result.exists():
        train([*RECIPE.split(), "--rule", rule, "--seed", str(seed)], run)
    return json.loads(result.read_text())["last_epoch_test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/recurrent"))
    given = parser.parse_args()
    rows = []
    for rule in RULES:
        found = [accuracy(rule, seed, given.runs) for seed in range(SEEDS)]
        rows.append({"recipe": RECIPE, "rule": f"{rule}()", "accuracies": [round(one, 4) for one in found]})
    PATH.write_text(json.dumps(rows, indent=1) + "\n")
    fill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
