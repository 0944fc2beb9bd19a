"""A plain VQ-VAE on handwritten digits, watched by a monitor: the three lines that say `monitor`.

python experiments/bring_your_own/vqvae.py --output ./mine && ibqlab report ./mine
torchrun --nproc-per-node 2 experiments/bring_your_own/vqvae.py --output ./mine
"""

import argparse
import os

import torch
from digits import digit_batches
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ibqlab.monitor import CodebookMonitor


class VQVAE(nn.Module):
    """Encoder, codebook with straight-through gradient, decoder; 8 × 8 pixels become 4 × 4 tokens."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, code_dim, 3, 1, 1))
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(code_dim, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1))

    def forward(self, images):
        z = self.encoder(images)  # (B, D, h, w)
        tokens = z.permute(0, 2, 3, 1)
        indices = torch.cdist(tokens.flatten(0, 2), self.codebook).argmin(1).view(tokens.shape[:3])
        codes = self.codebook[indices].permute(0, 3, 1, 2)
        reconstruction = self.decoder(z + (codes - z).detach())
        loss = F.mse_loss(reconstruction, images) + F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        return reconstruction, loss, indices, z


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="bring_your_own")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()
torch.manual_seed(0)
model = wrapped = VQVAE(codebook_size=128, code_dim=16)
if "RANK" in os.environ:  # started by torchrun
    torch.distributed.init_process_group("gloo")
    wrapped = DistributedDataParallel(model)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
monitor = CodebookMonitor(arguments.output, codebook_size=128, steps=arguments.steps, settings={"quantizer": "vq"})
monitor.watch(model.codebook)
for step, images in enumerate(digit_batches(arguments.steps, 64), start=1):
    rebuilt, loss, indices, z = wrapped(images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seen = {"images": images, "reconstructions": rebuilt}
    monitor.update(step, indices=indices, features=z, codebook=model.codebook, loss=loss, **seen)
