"""Spoken digits by rules and networks, on the data set's own split and by speakers that were not trained on.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset data/free-spoken-digit-dataset
    python benchmarks/speech.py [--seeds 2] [--data.root …] [--runs runs/speech] [--splits own speakers]

Each case is an `sltt compare` of the recipe `speech` with one thread, kept in `--runs`: the same command goes on where
it stopped. Networks have about as many weights.
"""

import argparse
from pathlib import Path

import torch
from cells import recorded, write
from tables import DOCS, fill
from turns import saved

PATH = DOCS / "results" / "speech.json"
SPEAKERS = "george,jackson,lucas,nicolas,theo,yweweler"
# BPTT did not learn with the recipe's surrogate: γ is the best of 1, 4, 6 and 10 on the validation samples
WIDE = "{class_path: sltt.surrogates.Triangle, init_args: {gamma: 6.0}}"
CASES = {  # the network: rules, and options of the recipe
    "delays on the input": ("SLTT", []),
    "recurrent": ("BPTT", [
        "--model.features", "[40,128,128,10]", "--model.delays", "[]", "--model.recurrent", "true",
        "--model.neuron.init_args.surrogate", WIDE,
    ]),
    "delays between layers": ("SLTT", [
        "--model.features", "[40,95,95,10]", "--model.delays", "[[0,3,6,9,12],[0,6,12,18]]",
    ]),
    "feed-forward": ("SLTT", ["--model.features", "[40,210,210,10]", "--model.delays", "[]"]),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data.root", dest="root", default="data/free-spoken-digit-dataset")
    parser.add_argument("--runs", type=Path, default=Path("runs/speech"))
    parser.add_argument("--splits", nargs="+", default=["own", "speakers"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for split in asked.splits:
        speakers = ["--vary", f"data.speaker={SPEAKERS}"] if split == "speakers" else []
        for network, (rules, options) in CASES.items():
            words = ["compare", "speech", "--data.root", asked.root, "--rules", rules, *options, *speakers]
            words += ["--seeds", str(asked.seeds)]
            rows = saved(words, asked.runs / f"{split}-{network.replace(' ', '-')}")["rows"]
            kept = "rule", "accuracies", "seconds", "validation", "peak_memory", "varied"
            new = [{"split": split, "network": network, **{k: row[k] for k in kept if k in row}} for row in rows]
            write(PATH, [row for row in recorded(PATH) if (row["split"], row["network"]) != (split, network)] + new)
    fill()


if __name__ == "__main__":
    main()
