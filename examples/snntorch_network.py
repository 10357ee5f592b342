"""Train a network of snnTorch with SLTT, and compare its memory with BPTT's at T = 64; `fold=1` takes the least.

pip install snntorch
python examples/snntorch_network.py
"""

# pyright: reportMissingImports=false
import snntorch
import torch
from torch import nn
from torch.utils.data import DataLoader

import sltt


def main(epochs: int = 5) -> float:
    """Train on the digits; return the accuracy on test samples."""
    torch.manual_seed(0)
    splits = sltt.data.Digits().splits(steps=64)
    loader = DataLoader(splits.train, 64, shuffle=True, collate_fn=splits.collate)
    model = nn.Sequential(  # init_hidden: the neuron keeps its state between calls
        nn.Flatten(), nn.Linear(64, 128), snntorch.Leaky(beta=0.5, init_hidden=True), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    loss = sltt.losses.CrossEntropyMSE()

    x, y = next(iter(loader))
    for rule in (sltt.BPTT(), sltt.SLTT(), sltt.SLTT(fold=1)):
        memory = sltt.analysis.memory_parts(model, x, y, loss, rule, steps=64).total
        print(f"{rule}: {memory / 1e6:.1f} MB")

    for epoch in range(epochs):
        for x, y in loader:  # x: [B, 1, 8, 8], shown 64 times
            optimizer.zero_grad()
            out = sltt.SLTT()(model, x, y, loss, steps=64)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {out.loss:.3f}")

    model.eval()
    x, y = splits.collate([splits.test[i] for i in range(len(splits.test))])
    return (sltt.unroll(model, x, steps=64).mean(0).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
