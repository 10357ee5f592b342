"""The batches of a stage: from a loader to gradients, and to an update of the weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sltt.analysis import FiringRates
from sltt.data import Splits
from sltt.losses import is_per_step, keeps_mean, to_score
from sltt.metrics import collects
from sltt.rules import Output
from sltt.rules.diagnosis import check_reached
from sltt.sequence.layout import last_fold, spiking_layers
from sltt.sequence.padding import Padded, target_of
from sltt.sequence.spikes import observe_spikes
from sltt.sequence.steps import check_input
from sltt.training.batches import EpochSampler, count_parts, cut, join_outputs, seed_batch, share, whole_epoch
from sltt.training.graphs import make_graphs
from sltt.training.learner import Learner
from sltt.training.phases import Stage, freeze_norm, set_rates
from sltt.training.progress import BatchMemory, Progress
from sltt.training.safeguards import check_finite, check_labels, check_length
from sltt.training.score import Score, count_scored


class BatchLoop:
    """The batches of a stage.

    Attributes:
        batches: how many there are in an epoch.
        fold: of a full batch, once one was trained.
        score: of the epoch in progress, and `firing` its firing rates.
    """

    def __init__(self, learner: Learner, stage: Stage, splits: Splits, sampler: EpochSampler, batches: int):
        self.learner, self.stage, self.splits, self.sampler, self.batches = learner, stage, splits, sampler, batches
        self.memory = BatchMemory(learner.session.fabric.device)
        self.graphs = make_graphs(learner.session, learner.settings, stage.rule, stage.steps)
        self.fold = None
        self._spiking, self._said = spiking_layers(learner.model), list[str]()
        needed = stage.rule.online or learner.scaled or learner.settings.callbacks or collects(learner.settings.metric)
        # numbers of a batch are read while the device works on the next one, where nothing needs them before
        self._late = learner.session.copies is not None and not needed
        self._uncounted = list[Callable[[], float]]()  # the last batch, until its numbers are read

    def run(self, loader: Any, state: Progress) -> Iterator[float | None]:
        """Train what is left of an epoch; give the loss of each batch after its update, for callbacks."""
        self.score = Score(self.learner.settings.metric, self.learner.processes, state)
        self.firing = FiringRates(list(self._spiking))
        self.firing.load_state_dict(state.firing)
        self.learner.net.train()
        if self.stage.freeze_norm:
            freeze_norm(self.learner.model)
        batches, failure = self._prepare(whole_epoch(loader)), None
        try:
            batch = next(batches, None)
            while batch:
                training, batch = self._train(state, *batch), None
                next(training)
                try:  # a GPU has work, and next the host waits for it, or for the batch before
                    batch = next(batches, None)
                except Exception as error:
                    failure = error
                yield next(training)
            if failure:
                raise failure
        finally:
            self.settle()

    def settle(self) -> float | None:
        """Check and count the last batch, unless that is done; return its loss."""
        return self._uncounted.pop()() if self._uncounted else None

    def _prepare(self, batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor | Padded, float]]:
        """Yield batches, checked and on the device, and the share of a padded batch's real steps that is here."""
        here = self.learner.session
        for x, y in batches:
            check_labels(target_of(y), self.splits.classes, self.learner.settings.loss)
            check_length(x, y, self.splits, self.stage.steps)
            if here.fabric.device.type != "cpu":  # where the rule does not look, since that would wait
                check_input(x)
            real = y.steps / here.processes.sum([y.steps])[0] if isinstance(y, Padded) else 1.0
            yield *here.batch(x, y, self.splits.per_step), real

    def _train(self, state: Progress, x: Tensor, y: Tensor | Padded, real: float) -> Iterator[float | None]:
        """Train a batch, or this process's share of it; see `_prepare`. Yields once its gradients are launched."""
        learner, rule, processes = self.learner, self.stage.rule, self.learner.processes
        settings, loss_of, length = learner.settings, learner.loss, self.sampler.length
        place = state.batch + len(self._uncounted)
        set_rates(learner.optim, learner.initial, self.stage, settings.schedule, state.epoch + place / self.batches)
        learner.model.zero_grad()
        largest = min(settings.size, length)
        size = min(largest, length - place * settings.size)
        weight, count = share(size, processes.rank, processes.count)
        drawn = seed_batch(settings.seed, state.epoch, place)  # of the rule, in all processes alike
        seed_batch(settings.seed, state.epoch, place, processes.rank)
        weight = real if isinstance(y, Padded) else weight
        static, per_step, carried = self.splits.static, is_per_step(loss_of), rule.state_dict()

        def reduce_and_update() -> None:
            processes.reduce_gradients(learner.model.parameters())
            learner.update(check=True)

        def iteration(x: Tensor, y: Tensor | Padded) -> tuple[Output, FiringRates]:
            parts = cut(x, y, count_parts(settings.accumulate, size, processes.count), static=static, per_step=per_step)
            outs = []
            # outside of calls of the network, so that its casts of weights last for all of them
            casts = torch.autocast(learner.session.fabric.device.type, enabled=False)
            with casts, observe_spikes(self._spiking, FiringRates(list(self._spiking))) as seen:
                for part in parts:
                    rule.load_state_dict(carried)  # each part draws the same time steps
                    out = rule(
                        *(learner.net, part.x, part.y, loss_of),
                        steps=self.stage.steps if static else None,
                        backward=lambda loss, share=weight * part.weight: learner.session.fabric.backward(loss * share),
                        update=reduce_and_update if rule.online else None,
                        seed=drawn,
                        mean_logits=keeps_mean(loss_of, y),
                    )
                    outs.append(out)
                seen.settle()
            return join_outputs(outs, parts), seen

        run = partial(iteration, x, y)
        if self.graphs and not self.graphs.problem and size == largest:  # the last batch of an epoch may be smaller
            run = partial(self.graphs, iteration, x, y, rule.draw(self.stage.steps, drawn))
        with learner.round_weights():
            due = self.memory.is_due(len(x), full=size == largest)
            out, seen = self.memory.measure(run) if due else run()
        if count:
            self.firing.add(seen)
        if not rule.online:
            processes.reduce_gradients(learner.model.parameters())
            check_reached(learner.model)
        yield None
        self.settle()
        gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
        numbers, counted = [out.loss, torch.nn.utils.get_total_norm(gradients)], count_scored(loss_of, y, count)
        score, copied = partial(self.score.measure, *to_score(loss_of, out.logits, y), counted), None
        if self._late:
            bad = ~(numbers[0].isfinite() & numbers[1].isfinite())
            for gradient in gradients:  # no weight changes by a NaN, though the host does not know of it yet
                gradient.masked_fill_(bad, 0.0)
            numbers = [torch.as_tensor(figure).to("cpu", non_blocking=True) for figure in (*numbers, score())]
            score, copied = numbers.pop, torch.Event(out.loss.device)
            copied.record()

        def finish() -> float:
            if copied:
                copied.synchronize()
            loss = numbers[0].item()
            check_finite(loss, numbers[1].item(), learner.model, learner.optim, learner.scaled)
            self.score.add(score(), counted)
            state.count(loss, counted, y)
            return loss

        self._uncounted.append(finish)
        loss = None if self._late else self.settle()
        if not rule.online:
            learner.update()
        processes.average_statistics(learner.model)
        if learner.average:
            learner.average.update(learner.model)
        self.fold = self.fold or last_fold(learner.net)  # the last batch may be smaller
        yield loss

    def launches(self) -> list[str]:
        """Say how many time steps share a call of the network, or why none do; and why there is no CUDA graph: once."""
        fold, lines = self.fold if self.stage.rule.fold == "auto" else None, []
        if fold and fold.trained > 1:
            lines.append(f"{fold.trained} of {self.stage.steps} time steps share a call of the network")
        if fold and fold.why:
            lines.append(f"time steps run one by one, since the network {fold.why}")
        if self.graphs and self.graphs.problem:
            lines.append(f"batches run without a CUDA graph, since {self.graphs.problem}")
        new = [line for line in lines if line not in self._said]
        self._said += new
        return new
