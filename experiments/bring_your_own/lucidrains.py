"""A quantizer of vector-quantize-pytorch, which averages its codebook itself, watched from outside.

python experiments/bring_your_own/lucidrains.py --output ./lucidrains && ibqlab report ./lucidrains
"""

import argparse

import torch
from digits import digit_batches
from torch import nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from ibqlab.monitor import CodebookMonitor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="lucidrains")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

torch.manual_seed(0)
encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1))
quantizer = VectorQuantize(dim=32, codebook_size=128, codebook_dim=8, accept_image_fmap=True)
decoder = nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1))
model = nn.ModuleList([encoder, quantizer, decoder])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

with CodebookMonitor(
    arguments.output, codebook_size=128, steps=arguments.steps, settings={"quantizer": "EMA"}
) as monitor:
    monitor.attach(quantizer)  # indices, features after the projection, and codes are read off it
    for step, images in enumerate(digit_batches(arguments.steps, 64), start=1):
        quantized, indices, commitment = quantizer(encoder(images))
        loss = F.mse_loss(decoder(quantized), images) + commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.update(step, loss=loss)
