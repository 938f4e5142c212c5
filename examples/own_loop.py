"""A loop of your own: every rank sees one part of a sine, and their average learns the whole sine."""

from __future__ import annotations

import math

import torch
from torch import nn

import hvd_train

STEPS, BATCH = 3000, 64

with hvd_train.connect() as comm:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    averager = hvd_train.Averager(model, optimizer, comm, period=10)  # all start from rank 0's parameters

    def sine(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(math.pi * x)

    torch.manual_seed(comm.rank)
    for _ in range(STEPS):
        x = 2 * (comm.rank + torch.rand(BATCH, 1)) / comm.size - 1  # this rank's part of [-1, 1]
        loss = nn.functional.mse_loss(model(x), sine(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averager.step(len(x))  # every 10th call averages
    averager.finish()

    if comm.rank == 0:
        x = torch.linspace(-1, 1, 1001).unsqueeze(1)
        with torch.no_grad():
            error = nn.functional.mse_loss(model(x), sine(x)).item()
        print(f"world size {comm.size}: mean squared error over the whole sine {error:.6f}")
