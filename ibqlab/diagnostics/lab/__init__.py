"""The lab without images: clusters in a plane, or features out of a file of yours, quantized by any methods side by
side within seconds and recorded exactly like training. It shows the mechanism of collapse without an encoder of
images, and says which quantizer suits features that you have. Start reading at `laboratory`, whose `run_lab` does all.

    result = run_lab(World(encoder="drifting"), ["vq", "ibq"], codebook_size=256, steps=400)
    result.table()                                    # one row per method; figures: ibqlab.plots.lab

worlds.py          clusters, with a fixed, drifting or learning encoder
feature_files.py   features from .npy, .npz, .safetensors, .parquet, or an array
methods.py         quantizers as people type them
laboratory.py      a step, a run, all methods
run_config.py      settings of a lab, and of a single run, of which a study may have many
result.py          rows and snapshots of all methods, and their table
parameters.py      what the notebooks playground and features_lab may set
"""

from ibqlab.diagnostics.lab.feature_files import FeatureFile
from ibqlab.diagnostics.lab.laboratory import run_lab, train_in_lab
from ibqlab.diagnostics.lab.parameters import FeaturesLabParameters, Lab, PlaygroundParameters, prepare_lab
from ibqlab.diagnostics.lab.result import LabFailure, LabResult, LabRun
from ibqlab.diagnostics.lab.run_config import LabRunConfig, LabSettings, LabSource, LabTokenizer
from ibqlab.diagnostics.lab.worlds import ENCODERS, World

__all__ = [
    "ENCODERS",
    "FeatureFile",
    "FeaturesLabParameters",
    "Lab",
    "LabFailure",
    "LabResult",
    "LabRun",
    "LabRunConfig",
    "LabSettings",
    "LabSource",
    "LabTokenizer",
    "PlaygroundParameters",
    "World",
    "prepare_lab",
    "run_lab",
    "train_in_lab",
]
