"""One sample through a trained network: what goes in, which neurons spike at each step, and what comes out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sltt.rules import unroll
from sltt.sequence.layout import spiking_layers
from sltt.sequence.modes import evaluation_mode
from sltt.sequence.padding import target_of
from sltt.sequence.spikes import observe_spikes
from sltt.training.files import write_atomically
from sltt.training.loop import Loop

SAMPLE = "sample.npz"
NEURONS = 2048  # of each layer that are kept


@dataclass
class Sample:
    """Spikes and logits of a network for one sample.

    Attributes:
        spikes: of each layer of neurons, [T, neurons], at most `NEURONS` of them.
        rates: of each layer, over all neurons and steps.
        x: the input, [T, values]; [1, values] where it is the same in every step.
        logits: mean over the steps so far, [T, classes].
        label: the class; None where the target is no class.
    """

    spikes: dict[str, np.ndarray]
    rates: dict[str, float]
    x: np.ndarray
    logits: np.ndarray
    label: int | None


def write_sample(loop: Loop, steps: int) -> None:
    """Write what the trained network does in so many steps with the first validation sample, or else training sample.

    The training is done, and not lost for a network that cannot be watched: then there is no file.
    """
    if loop.processes.count > 1:
        return
    splits, fired = loop.splits, {}
    try:
        samples = splits.validation or splits.train
        x, y = loop.learner.session.batch(*splits.collate_of(samples)([samples[0]]))
        with (
            evaluation_mode(loop.learner.model),
            observe_spikes(spiking_layers(loop.learner.model), lambda name, s: fired.setdefault(name, []).append(s)),
        ):
            logits = unroll(loop.learner.model, x, steps=steps if splits.static else None).flatten(1)
    except Exception as error:
        loop.report.warn(f"the spikes of a sample are not kept: {error}")
        return
    so_far = logits.cumsum(0) / torch.arange(1, len(logits) + 1, device=logits.device).unsqueeze(1)
    spikes = {name: torch.cat(steps).flatten(1).ne(0) for name, steps in fired.items()}  # [T, neurons]
    arrays = {
        "x": (x if splits.static else x[:, 0]).float(),
        "logits": so_far.float(),
        **{f"rate.{name}": fired.float().mean() for name, fired in spikes.items()},
        **{f"spikes.{name}": fired[:, :: -(-fired.shape[1] // NEURONS)] for name, fired in spikes.items()},
    }
    if splits.classes is not None and target_of(y).numel() == 1:
        arrays["label"] = torch.as_tensor(int(target_of(y)))
    kept: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
    write_atomically(loop.folder / SAMPLE, lambda file: np.savez_compressed(file, **kept))


def read_sample(run: Path) -> Sample:
    """Read what `write_sample` wrote.

    Raises FileNotFoundError where a run has no sample yet.
    """
    with np.load(run / SAMPLE) as arrays:
        spikes = {name[7:]: arrays[name] for name in arrays.files if name.startswith("spikes.")}
        rates = {name[5:]: float(arrays[name]) for name in arrays.files if name.startswith("rate.")}
        label = int(arrays["label"]) if "label" in arrays.files else None
        x = arrays["x"]
        return Sample(spikes, rates, x.reshape(len(x), -1), arrays["logits"], label)
