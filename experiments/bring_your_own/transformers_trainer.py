"""The Trainer of transformers, which runs on Accelerate, with a quantizer inside its model and the monitor as callback.

python experiments/bring_your_own/transformers_trainer.py --output ./trainer && ibqlab report ./trainer
"""

import argparse
import tempfile

import torch
from digits import digit_batches
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from vector_quantize_pytorch import VectorQuantize

from ibqlab.monitor import CodebookMonitor, TransformersCallback


class Tokenizer(nn.Module):
    """A model as the Trainer wants it: it returns its loss first."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, 1, 1))
        self.quantizer = VectorQuantize(dim=16, codebook_size=128, accept_image_fmap=True)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1))

    def forward(self, images):
        quantized, _, commitment = self.quantizer(self.encoder(images))
        return {"loss": F.mse_loss(self.decoder(quantized), images) + commitment.sum()}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="trainer")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

torch.manual_seed(0)
model = Tokenizer()
monitor = CodebookMonitor(arguments.output, codebook_size=128, steps=arguments.steps, settings={"quantizer": "EMA"})
monitor.attach(model.quantizer)
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    examples = [{"images": image} for batch in digit_batches(30, 64) for image in batch]
    Trainer(model, settings, train_dataset=examples, callbacks=[TransformersCallback(monitor)]).train()
