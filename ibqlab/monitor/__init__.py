"""Your own model: three lines in any PyTorch loop write the run folder that all figures, tables and widgets read.

    monitor = CodebookMonitor("runs/mine", codebook_size=1024)
    …
        monitor.update(step, indices=indices, features=z, codebook=vq.embedding.weight, loss=loss)

`diagnose` does with arrays alone: numbers, a histogram and a map of one codebook among its features. Importing this
package needs torch and numpy; everything else is imported when it is first needed. Start reading at `codebook_monitor`.

codebook_monitor.py  what a loop calls, one process or many
alarm.py             signs of collapse in its rows
snapshots.py         what a snapshot holds
run_writer.py        the run folder behind it: begun, continued, ended
inputs.py            indices, features, codebooks and images as people have them
attaching.py         reads them off a module instead, such as one of vector-quantize-pytorch
callbacks.py         the same for Lightning and for the Transformers Trainer
diagnosis.py         one codebook, without a run
"""

from typing import Any

from ibqlab.monitor import callbacks
from ibqlab.monitor.codebook_monitor import CodebookMonitor
from ibqlab.monitor.diagnosis import Diagnosis, diagnose

__all__ = ["CodebookMonitor", "Diagnosis", "LightningCallback", "TransformersCallback", "diagnose"]


def __getattr__(name: str) -> Any:
    """The callbacks, whose libraries are imported when they are asked for."""
    if name in callbacks.NAMES:
        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
