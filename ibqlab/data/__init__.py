"""Images for training and validation: photographs and digits from installed packages, or a folder of your own.

    source = open_data(DataConfig(source="photos", image_size=32), "train")
    for batch in training_batches(source, batch_size=16, seed=0, start_step=0, steps=300):
        images = to_model_range(batch.images)      # (16, 3, 32, 32) float32 in [-1, 1]

What is unusual: no random state is kept anywhere. Batch number s is a function of (seed, s) alone, so a run resumes in
mid-epoch, and neither the number of loader processes nor the number of ranks changes what is trained on.
"""

from ibqlab.data.broken import BrokenImages
from ibqlab.data.digits import DigitsSource
from ibqlab.data.folder import FolderSource
from ibqlab.data.opening import open_data
from ibqlab.data.photos import PHOTOS, Photo, PhotosSource
from ibqlab.data.pixels import to_model_range, to_uint8
from ibqlab.data.sampling import Batch, training_batches, validation_batches
from ibqlab.data.source import DataConfig, ImageSource, Sample, Split

__all__ = [
    "PHOTOS",
    "Batch",
    "BrokenImages",
    "DataConfig",
    "DigitsSource",
    "FolderSource",
    "ImageSource",
    "Photo",
    "PhotosSource",
    "Sample",
    "Split",
    "open_data",
    "to_model_range",
    "to_uint8",
    "training_batches",
    "validation_batches",
]
