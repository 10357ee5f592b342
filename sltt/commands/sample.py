"""One test sample through a trained network: what goes in, which neurons spike at each step, and what comes out."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sltt.commands.parsing import Recipe, run_config
from sltt.rules import unroll
from sltt.sequence.layout import spiking_layers
from sltt.sequence.padding import target_of
from sltt.sequence.spikes import observing
from sltt.training.checkpoints import start_from

FRAME_NEURONS = 2048  # of each layer that are shown


@dataclass
class Sample:
    """What a network does with one sample.

    Attributes:
        spikes: of each layer of neurons, [T, neurons].
        x: the input, [T, values]; [1, values] where it is the same in every step.
        logits: mean over the steps so far, [T, classes].
        label: the class; None where the target is no class.
    """

    spikes: dict[str, np.ndarray]
    x: np.ndarray
    logits: np.ndarray
    label: int | None

    def frames(self) -> str:
        """The spikes as JSON for the page: of each layer the neurons, and the bits of each step in base64."""
        layers = []
        for name, fired in self.spikes.items():
            shown = fired[:, :: -(-fired.shape[1] // FRAME_NEURONS)]
            steps = [base64.b64encode(np.packbits(row).tobytes()).decode() for row in shown]
            layers.append({"name": name, "neurons": shown.shape[1], "steps": steps})
        classes = [int(step.argmax()) for step in self.logits]
        return json.dumps({"layers": layers, "classes": classes, "label": self.label})


def first_test_sample(run: Path) -> Sample:
    """The first test sample through the network of a run, with the weights that the run selected."""
    built = Recipe("sltt report", str(run_config(run)), [], of_run=True).build()
    start_from(built.model, str(run))
    splits = built.data.splits(built.steps)
    x, y = splits.collate([(splits.train if splits.test is None else splits.test)[0]])
    fired: dict[str, list[torch.Tensor]] = {}
    with observing(spiking_layers(built.model.eval()), lambda name, spikes: fired.setdefault(name, []).append(spikes)):
        logits = unroll(built.model, x, steps=built.steps if splits.static else None).flatten(1)
    so_far = logits.cumsum(0) / torch.arange(1, len(logits) + 1).unsqueeze(1)
    return Sample(
        {name: torch.stack(steps).flatten(1).ne(0).numpy() for name, steps in fired.items()},
        (x if splits.static else x.flatten(1)).reshape(1 if splits.static else len(x), -1).float().numpy(),
        so_far.numpy(),
        None if splits.classes is None or splits.per_step else int(target_of(y)),
    )
