"""Train with SLTT in a loop of plain PyTorch: the rule stands where `loss.backward()` would."""

import torch
from torch.utils.data import DataLoader

import sltt


def main(epochs: int = 5) -> float:
    """Train on the digits' events; return the accuracy on test samples."""
    torch.manual_seed(0)
    splits = sltt.data.DigitsEvents().splits(steps=9)
    loader = DataLoader(splits.train, 64, shuffle=True, collate_fn=splits.collate)
    model = sltt.models.DigitsNet(in_channels=2, width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    loss = sltt.losses.CrossEntropyMSE()
    rule = sltt.SLTT()

    for epoch in range(epochs):
        for x, y in loader:  # x: [T, B, 2, 16, 16]
            optimizer.zero_grad()
            out = rule(model, x, y, loss)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {out.loss:.3f}")

    model.eval()
    x, y = splits.collate([splits.test[i] for i in range(len(splits.test))])
    return (sltt.unroll(model, x).mean(0).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
