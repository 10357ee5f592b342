"""Train the networks of `sltt.models.pretrained`, and write their files and cards into the package.

python benchmarks/pretrained.py [NAME ...]    # in a folder with data/free-spoken-digit-dataset, for speech
"""

import re
import sys
from pathlib import Path

from sltt.commands import main
from sltt.training.card import CARD

NAMES = ["digits", "digits-events", "recall-delays", "speech"]
WEIGHTS = Path(__file__).parents[1] / "sltt" / "models" / "weights"


def make(name: str) -> None:
    """Train a recipe as it is, and pack the epoch that is the best on the validation samples."""
    run, out = Path("runs", name), WEIGHTS / f"{name}.sltt"
    train = ["train", name, "--device", "cpu", "--run", str(run)]
    if main(train):
        sys.exit(f"the training of {name} failed")
    out.unlink(missing_ok=True)
    main(["pack", str(run), "--out", str(out)])
    card = (run / CARD).read_text(encoding="utf-8")
    facts = re.sub(r"^# .*", f"# {name}\n\nMade by `sltt {' '.join(train)}`, then `sltt pack {run}`.", card)
    facts = re.sub("^Load it: .*", f'Load it: `model = sltt.models.pretrained("{name}")`.', facts, flags=re.MULTILINE)
    out.with_suffix(".md").write_text(facts, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        make(name)
