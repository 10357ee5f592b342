"""Train with SLTT under Lightning's Trainer: manual optimisation, and a mixin that any LightningModule can have.

pip install lightning
"""

# pyright: reportMissingImports=false
import lightning
import torch
from torch.utils.data import DataLoader

import sltt


class ByRule:
    """A training step in which `self.rule` makes the gradients of `self.model` and `self.loss`."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        out = self.rule(self.model, x, y, self.loss, backward=self.manual_backward)
        optimizer.step()
        self.log("loss", out.loss, prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (sltt.unroll(self.model, x).mean(0).argmax(1) == y).float().mean(), batch_size=len(y))


class Digits(ByRule, lightning.LightningModule):
    """A small spiking network on the digits' events."""

    def __init__(self, rule: sltt.Rule):
        super().__init__()
        self.rule = rule
        self.model = sltt.models.DigitsNet(in_channels=2, width=8)
        self.loss = sltt.losses.CrossEntropyMSE()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005)


def main(epochs: int = 5) -> float:
    """Train; return the accuracy on test samples."""
    lightning.seed_everything(0, verbose=False)
    splits = sltt.data.DigitsEvents().splits(steps=9)
    train = DataLoader(splits.train, 64, shuffle=True, collate_fn=splits.collate)
    test = DataLoader(splits.test, 64, collate_fn=splits.collate)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, accelerator="auto")
    module = Digits(sltt.SLTT(k=3))
    trainer.fit(module, train)
    return trainer.test(module, test, verbose=False)[0]["accuracy"]


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
