"""Base of the rules: the contract.

Shapes: T time steps, B samples, C classes.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sltt.checks import function, instance, whole_number
from sltt.frozen import Frozen, arguments_of
from sltt.losses import Activity, SequenceLoss, bind_loss, check_loss, is_per_step
from sltt.rules.batch import Backward, Batch, Fold, Output, StepLoss
from sltt.rules.diagnosis import check_reached, explain_errors, note
from sltt.rules.fold_trial import ProbeLoss
from sltt.rules.folding import choose_fold
from sltt.rules.gradients import add_together
from sltt.rules.stream import Stream
from sltt.sequence.once import add_gradients
from sltt.sequence.padding import Padded, check_lengths, target_of
from sltt.sequence.run import Run
from sltt.sequence.step import Step
from sltt.sequence.steps import Sequence, time_steps


class Rule(Frozen, ABC):
    """Turns a batch into gradients: owns the time loop, cuts the graph, runs backward, and leaves the sum in `.grad`.

    Calling a rule resets the model, runs T steps and backpropagates L = 1/T Σ_t loss(model(x[t]), target). It adds to
    `.grad`, so call `optimizer.zero_grad()` before. The model is reset afterwards too, also after an exception: no
    state and no graph outlive the call. A rule is a value, which never changes: trainings and threads may share one.

    What a network marks by `sltt.once` is computed once a sequence, if it depends on weights alone.

    A rule of your own defines `run`, and `step` where it changes what layers do.

    Attributes:
        hoist: with a static input, run layers marked by `sltt.once` on that input once per sequence, too.
        repeats: the first layers, of a static input, run in each time step; else once, as far as a pooling or a linear
            layer leaves less to keep.
        recompute: run convolutions and linear layers again in the backward.
        fold: time steps in one call of the network.
        online: the rule updates the weights itself, at every time step.
        sequence_losses: losses of a whole sequence that the rule can train.
        pads: the rule leaves out the steps behind a sample's length, see `sltt.Padded`.
        reads_logits: the rule reads the logits of steps that ran before.
    """

    hoist: bool = False
    repeats: bool = True
    recompute: bool = False
    fold: int | Literal["auto"] = 1
    online: bool = False
    sequence_losses: tuple[type[SequenceLoss], ...] = ()
    pads: bool = True
    reads_logits: bool = False

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Any,
        loss: StepLoss,
        *,
        steps: int | None = None,
        backward: Backward | None = None,
        update: Callable[[], Any] | None = None,
        seed: int | None = None,
        mean_logits: bool = False,
        stream: Stream | None = None,
    ) -> Output:
        """Run one batch.

        On the CPU, NaN or infinite values in the input raise ValueError. On another device the input is not checked,
        since that would wait for the device; the loss becomes NaN instead. So it does where weights are NaN.

        Args:
            model: maps the input of one time step [B, ...] to logits [B, C], and keeps its own state.
            x: a sequence, time first [T, B, ...]; or, with `steps`, a static input [B, ...] shown at every step. What
                made it gets its gradient in one backward, at the end.
            target: what `loss` compares the logits with, usually classes [B]; `sltt.Padded` for several lengths.
            loss: `loss(logits [B, C], target) -> scalar`, of one time step; or a `SequenceLoss`, where the rule can.
            steps: T for a static input.
            backward: called instead of `Tensor.backward` with each scalar to backpropagate, of one time step or several
                in a call, e.g. `fabric.backward`. On a GPU, `.grad` then has this scalar's gradient alone.
            update: step and zero the optimizer; called by a rule that is `online`, after every time step.
            seed: random seed for this batch, such as for the steps that SLTT-K trains. None draws from PyTorch's
                global generator. Give the same seed in all processes of a data-parallel training.
            mean_logits: return the mean of the logits over time, [1, B, C], in place of those of all steps: for dense
                outputs, these take memory that grows with T.
            stream: the batch is the next chunk of this `sltt.Stream`, and goes on from the states, and traces of OTTT,
                that the chunk before left. No gradient goes back to that. After an error, call `stream.reset()`.

        Raises:
            ValueError: gradients switched off, no time step, too few dimensions, NaN or infinite input, a target of
                another batch size, a model that does not return logits, a module that does not run step by step or
                whose state a rule cannot reach, or a neuron that stands in two places of the network.
        """
        self._check(model, loss, update)
        for name, value, of in (("backward", backward, "a scalar"), ("update", update, "no argument")):
            if value is not None:
                function(name, value, of)
        if seed is not None:
            whole_number("seed", seed)
        per_step = is_per_step(loss)
        made, x = x, x.detach().requires_grad_() if isinstance(x, Tensor) and x.grad_fn is not None else x
        sequence = time_steps(x, steps, None if per_step else target_of(target))
        if not sequence.batch:
            raise ValueError(f"expected at least one sample to train on, got an input of shape {list(x.shape)}")
        if isinstance(target, Padded):
            self._check_padded(sequence, target, loss)
        if per_step:
            of, expected = target_of(target), [sequence.steps, sequence.batch]
            if not isinstance(of, Tensor) or list(of.shape[:2]) != expected:
                got = list(of.shape) if isinstance(of, Tensor) else type(of).__name__
                raise ValueError(f"expected targets [T, B, ...] = {expected} for each time step, got {got}")
        # a backward of the user's own may ask for the gradients of all weights in each time step
        repeats = self.repeats or not (backward is None or str(getattr(backward, "__module__", "")).startswith("sltt."))
        network = Run(model, sequence, self.step(), hoist=self.hoist, repeats=repeats, keep=not self.online)
        explained = explain_errors(backward, network)
        if x.device.type != "cpu":  # where a launch takes longer than the sum
            explained = add_together(explained, model)
        norms = [layer for layer in network.layout.layers.values() if layer.role.stepwise]
        if norms and not (model.training or any(layer.module.training for layer in norms)):
            warnings.warn(f"{norms[0]} learns no statistics in evaluation mode: call model.train()", stacklevel=2)
        try:
            fold, mean = self.choose_fold(network, loss), mean_logits and not self.reads_logits
            batch = Batch(network, target, loss, explained, update, seed, fold, mean)
            with network, nullcontext() if stream is None else stream.carry(network, self):
                batch.loss = bind_loss(loss, network)
                out = instance("what `run` of a rule returns", self.run(batch), Output, "return batch.output()")
                network.results.finish(explained)
                if x is not made and x.grad is not None:  # once, for all steps
                    explained(add_gradients(out.loss.new_zeros(()), [(made, x.grad)]))
                total, logits = network.result(out.loss, out.logits)
                logits = logits.mean(0, keepdim=True) if mean_logits and len(logits) > 1 else logits
            if backward is None and update is None and getattr(x, "grad", None) is None:
                check_reached(model)
        except Exception as error:
            note(error, network)
            raise
        return Output(total, logits)

    def choose_fold(self, network: Run, loss: Any = None) -> Fold:
        """Return how many time steps share a call of a network, before its run; see `folding.choose_fold`."""
        if self.fold == "auto" and (self.hoist or self.recompute or self.online):
            return Fold()
        return choose_fold(network, self.fold, self, loss)

    def run_trial(self, run: Run, fold: int, backward: Backward) -> Tensor:
        """Run the rule on a copy of a network with so many time steps in a call; return the logits."""
        probe = torch.arange(run.sequence.steps), ProbeLoss()
        return self.run(Batch(run, *probe, backward, update=lambda: None, seed=0, fold=Fold(fold, fold))).logits

    def step(self) -> Step:
        """Return what layers do in a time step, for a batch: a `Step` whose methods are overridden.

        By default, layers run as they are.
        """
        return Step()

    def check(self, model: nn.Module, steps: int) -> None:
        """Raise ValueError for a network or a T that the rule cannot train, where that shows without a batch."""

    def _check(self, model: nn.Module, loss: StepLoss, update: Callable[[], Any] | None) -> None:
        instance("model", model, nn.Module)
        check_loss(loss)
        if not torch.is_grad_enabled():
            raise ValueError("a rule makes gradients, and torch.no_grad() is in force; to predict, use sltt.unroll")
        if isinstance(loss, SequenceLoss) and not isinstance(loss, self.sequence_losses):
            kind = type(loss).__name__
            names = ", ".join(loss_type.__name__ for loss_type in self.sequence_losses)
            takes = f"trains losses of one step and {names}" if names else "backpropagates a sum over time steps"
            raise ValueError(
                f"{self} {takes}, and not {kind}: use BPTT(), or the nearest sum, "
                + (f"PerStep(MSELoss()) for {kind}" if loss.per_step else f"the loss inside {kind} by itself")
            )
        if self.online and update is None:
            raise ValueError(f"{self} updates the weights at every time step: call it with update=…")

    def _check_padded(self, sequence: Sequence, target: Padded, loss: Any) -> None:
        kind = type(loss).__name__
        if not self.pads or sequence.static:
            what = f"{self} has mean rates of all steps" if not self.pads else "a static input has no length"
            remedy = "use SLTT or BPTT" if not self.pads else "give a sequence [T, B, ...], without steps"
            raise ValueError(f"{what}, and the target is Padded: {remedy}")
        if isinstance(loss, SequenceLoss | Activity):
            raise ValueError(f"{kind} looks at padded steps too: use CrossEntropyMSE, say, or sequences of one length")
        instance("target of Padded", target.target, Tensor)
        check_lengths(target.lengths, sequence.steps, sequence.batch)

    @abstractmethod
    def run(self, batch: Batch) -> Output:
        """Forward, loss and backward of a batch.

        SLTT is:

            for t in range(batch.steps):
                batch.backward(batch.forward(range(t, t + 1)))
                batch.detach()
            return batch.output()
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint between batches. Empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""

    def draw(self, steps: int, seed: int | None) -> Hashable:
        """Return what the rule draws for a batch of T = `steps` by its seed; None where it draws nothing.

        Batches of another draw do other work: a CUDA graph repeats one.
        """
        return None

    def no_graph(self, steps: int) -> str | None:
        """Return why CUDA graphs cannot repeat batches of T = `steps`, after "the rule …"; None where they can."""
        return "updates the weights at every time step" if self.online else None

    def __repr__(self) -> str:
        taken = arguments_of(type(self))
        settings = ", ".join(f"{k}={v}" for k, v in vars(self).items() if k in taken and v != taken[k].default)
        return f"{type(self).__name__}({settings})"
