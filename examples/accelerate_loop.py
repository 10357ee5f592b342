"""Train with SLTT under Hugging Face Accelerate: the rule calls `accelerator.backward`.

pip install accelerate
python examples/accelerate_loop.py
"""

# pyright: reportMissingImports=false
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import sltt


def main(epochs: int = 5) -> float:
    """Train on the digits; return the accuracy on test samples."""
    accelerator = Accelerator()
    set_seed(0)
    splits = sltt.data.Digits().splits(steps=4)
    loader = DataLoader(splits.train, 64, shuffle=True, collate_fn=splits.collate)
    model = sltt.models.DigitsNet(width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss = sltt.losses.CrossEntropyMSE()
    rule = sltt.SLTT()

    for epoch in range(epochs):
        for x, y in loader:  # x: [B, 1, 8, 8], shown 4 times
            optimizer.zero_grad()
            out = rule(model, x, y, loss, steps=4, backward=accelerator.backward)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {out.loss:.3f}")

    model.eval()
    x, y = splits.collate([splits.test[i] for i in range(len(splits.test))])
    x, y = x.to(accelerator.device), y.to(accelerator.device)
    return (sltt.unroll(model, x, steps=4).mean(0).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
