"""A model of one's own that grows in a training loop of one's own: python examples/own_loop.py

Three lines belong to esper_ray: `attach`, `step` and `epoch`. Everything happens in this process. Where a system is up,
`with esper_ray.connect(esper_ray.load()) as system:` and `attach(..., system=system)` let its Tamiyo decide.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import esper_ray


def main(epochs: int = 20) -> nn.Module:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    inputs, targets = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 10))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss()

    grower = esper_ray.attach(model, loss=loss, optimizer=optimizer, epochs=epochs, sample=inputs)
    for _ in range(epochs):
        for chosen in torch.randperm(1300).split(32):
            found = loss(model(inputs[chosen]), targets[chosen])
            found.backward()
            grower.step(inputs[chosen], targets[chosen], found)
            optimizer.step()
            optimizer.zero_grad()
        print(grower.epoch([(inputs[1300:], targets[1300:])]))
    grower.close()
    return model


if __name__ == "__main__":
    print(main())
