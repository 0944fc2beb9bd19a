"""A loop under Accelerate, alone or in several processes, with two micro-batches a step and an end that the alarm asks
for: the lines that say `monitor`.

python experiments/bring_your_own/accelerate_loop.py --output ./loop && ibqlab report ./loop
torchrun --nproc-per-node 2 experiments/bring_your_own/accelerate_loop.py --output ./loop
"""

import argparse

import torch
from accelerate import Accelerator
from digits import digit_batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from vector_quantize_pytorch import FSQ

from ibqlab.monitor import CodebookMonitor


class Tokenizer(nn.Module):
    """8 × 8 pixels become 4 × 4 tokens of FSQ's 8 · 5 · 5 = 200 codes, which are nowhere stored as parameters."""

    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 3, 3, 1, 1), nn.BatchNorm2d(3)
        self.encoder = nn.Sequential(*layers)  # without the norm all features begin in the middle of the grid
        self.quantizer = FSQ(levels=[8, 5, 5])
        self.decoder = nn.Sequential(nn.ConvTranspose2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1))

    def forward(self, images):
        quantized, _ = self.quantizer(self.encoder(images))
        return self.decoder(quantized)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="loop")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = Tokenizer()
settings = {"quantizer": "FSQ", "codebook_init": "grid", "seed": 0}
monitor = CodebookMonitor(arguments.output, 200, steps=arguments.steps, settings=settings, alarm="stop")
monitor.attach(model.quantizer)  # before it is wrapped
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
images = [image for batch in digit_batches(30, 64) for image in batch]
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(images, 64, shuffle=True, drop_last=True))
step = 1
while step <= arguments.steps and not monitor.stopped:
    for pictures in batches:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(pictures), pictures)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        monitor.update(step, loss=loss)  # once per micro-batch: those of one step are counted together
        step += accelerator.sync_gradients
        if step > arguments.steps or monitor.stopped:
            break
accelerator.end_training()
