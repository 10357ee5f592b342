"""Command lines with bad input, all in one process: the exit code, and what the message says."""

import shlex
import sys

import pytest

from sltt.commands import main

TINY = "--model.width 2 --epochs 1 --steps 2 --batch_size 512 --device cpu"
FSCIL = f"fscil fscil-digits {TINY}"
FILES = {
    "alias.yaml": "model: &a {x: *a}\n",
    "twice.yaml": "epochs: 1\nsteps: 2\nepochs: 3\n",
    "nothing.yaml": "epochs: null\n",
    "list.yaml": "- 1\n",
    "mine.py": """
import builtins
import torch
import sltt

class Data(sltt.data.Data):
    def __init__(self, kind: str):
        self.kind = kind

    def splits(self, steps):
        raise getattr(builtins, self.kind)("thrown")

    load = splits

class Net(torch.nn.Module):
    def __init__(self, kind: str = "", late: str = ""):
        super().__init__()
        self.late = late
        if kind:
            raise getattr(builtins, kind)("thrown")

    def forward(self, x):
        raise getattr(builtins, self.late)("thrown")

class Greedy(torch.optim.SGD):
    def __init__(self, params, beta: float = 0.9):
        super().__init__(params)
        self.defaults["momentums"]
""",
}
CASES = f"""
# commands and words
2 | unknown command 'trian'; did you mean train? | trian
2 | unknown recipe 'digit'; did you mean digits? | train digit
2 | . is a folder, and no recipe: `sltt train --resume . | train .
2 | unknown key 'foo' of sltt.data.Digits | train digits --data.foo 3
1 | CIFAR-10 not found | train cifar10 --device cpu --data.root nowhere
# options that are cut short, or misspelt
2 | unknown option --bugdet; did you mean --budget? | profile --bugdet 8GB
2 | unknown option --lr; did you mean --optimizer.lr? | train --lr 3
2 | expected each rule once, got SLTT 2 times | compare digits --rules SLTT,BPTT,SLTT
2 | argument --run: expected one argument | train --run
# YAML that says something else than it seems, or nothing
2 | the aliases stand for more than 10,000 values | train alias.yaml
2 | the key 'epochs' stands twice, in lines 1 and 3 | train twice.yaml
2 | required: model, data | train nothing.yaml
2 | nowhere.yaml is no file, and holds no options | train --config nowhere.yaml
# values of the wrong kind
2 | optimizer.lr: expected float, got abc | train --optimizer.lr abc
2 | precision: expected [32, 'bf16-mixed', '16-mixed'], got bf16 | train --precision bf16
2 | phases: the following arguments are required: epochs | train --phases '[{{steps: 2}}]'
# classes that are not there, or do not fit
2 | unknown class 'Sltt'; did you mean sltt.SLTT? | train --rule Sltt
2 | unknown class 'mine.Bet'; did you mean mine.Net? | train --model mine.Bet
1 | optimizer: KeyError: 'momentums' | train --optimizer mine.Greedy
1 | optimizer: Invalid learning rate: -1.0 | train --optimizer.lr -1
2 | 'os.system' is not allowed | train --rule os.system
2 | optimizer: Expected 'torch.nn.Linear' to be a subclass of <class 'Optimizer'> | train --optimizer torch.nn.Linear
# values out of their range
1 | steps must be at least 1 | train {TINY} --steps 0
1 | SLTT(k=9) trains 9 steps, but the sequence has T = 2; use k ≤ T | train {TINY} --rule.k 9
1 | no images found: looked in | train {TINY} --data sltt.data.ImageFolder --data.root nowhere
1 | sltt: epochs of a phase must be at least 1, got 0 | train {TINY} --phases '[{{epochs: 0}}]'
2 | --optimizer.lr changes nothing, set it in --phases | train --phases '[{{epochs: 1, lr: 0.1}}]' --optimizer.lr 0.5
# exceptions of a user's data set and network
1 | KeyError: 'thrown' (HERE/mine.py, line 11, in splits) | train {TINY} --data mine.Data --data.kind KeyError
1 | sltt: use a smaller --batch_size | train {TINY} --data mine.Data --data.kind MemoryError
1 | TypeError: thrown (HERE/mine.py, line 20, in __init__) | train --model mine.Net --model.kind TypeError
# the other commands
2 | runs in one process | compare --devices 2
2 | --rules names the rules here: leave --rule out | compare --rules SLTT --rule OTTT
2 | --seeds says how many | compare --seed 7
2 | sltt profile takes no --resume | profile --resume nowhere
2 | different values, such as model.neuron.tau=1.1,2,4, got 'steps=2,2' | compare --vary steps=2,2
2 | --vary does not take seed: use --seeds 3 | compare --vary seed=1,2
1 | sltt fscil compares accuracies | {FSCIL} --base 6 --way 1 --metric sltt.metrics.MeanSquaredError
2 | --budget: expected a memory size such as 8GB | profile --budget much
2 | expected the folder of a run before the options | eval
2 | nowhere is not the folder of a run | eval nowhere
2 | --resume takes the folder of a run, and mine.py is a file: --weights | train --resume mine.py
2 | a\\x1b[31m is not the folder of a run | train --resume 'a\x1b[31m'
2 | --save: expected a folder to write to, and list.yaml is a file | agreement --save list.yaml
"""
TABLE = [line.split(" | ", 2) for line in CASES.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(("code", "message", "words"), TABLE, ids=[words for *_, words in TABLE])
def test_a_bad_command_ends_with_its_code_and_a_clear_line(here, capsys, code, message, words):
    assert main(shlex.split(words)) == int(code)
    _, err = capsys.readouterr()
    assert message.replace("HERE", str(here)) in err
    assert "Traceback" not in err
    assert all(line.startswith("sltt: ") for line in err.splitlines())
    remedy = err.splitlines()[1:][-1]  # behind the cause
    if code == "2":
        assert remedy.endswith(("` explains the options", "` lists the commands"))
    assert not list(here.glob("runs"))
