"""A LightningModule with a quantizer inside; the monitor is a callback of its Trainer.

python experiments/bring_your_own/lightning_module.py --output ./lightning && ibqlab report ./lightning
"""

import argparse

import torch
from digits import digit_batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from vector_quantize_pytorch import VectorQuantize

from ibqlab.monitor import CodebookMonitor, LightningCallback

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:
    import pytorch_lightning as pl


class Tokenizer(pl.LightningModule):
    """Encoder, vector-quantize-pytorch's quantizer, decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, 1, 1))
        self.quantizer = VectorQuantize(dim=16, codebook_size=128, accept_image_fmap=True)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1))

    def training_step(self, images, _):
        quantized, _, commitment = self.quantizer(self.encoder(images))
        return F.mse_loss(self.decoder(quantized), images) + commitment.sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", default="lightning")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

pl.seed_everything(0)
model = Tokenizer()
monitor = CodebookMonitor(arguments.output, codebook_size=128, steps=arguments.steps, settings={"quantizer": "EMA"})
monitor.attach(model.quantizer)
trainer = pl.Trainer(
    max_steps=arguments.steps,
    callbacks=[LightningCallback(monitor)],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(list(digit_batches(arguments.steps, 64)), batch_size=None))
