"""Images for training and validation, as batches that depend on nothing but the run's seed and the step's number.

Images come from photographs and digits inside installed packages, from a folder of your own, or from tar shards. Each
of these is a source: it gives the image with a certain number. The main idea is that no random state is kept anywhere.
Which images are in batch s, and how they are cropped, is a function of (seed, s) alone. So a run resumes in mid-epoch,
and neither the number of loader processes nor the number of ranks changes what is trained on. Start reading in
`batches`, which decides on them, and in `file_source`, which turns a file into an image.

    source = open_data(DataConfig(source="photos", image_size=32), "train")
    for batch in training_batches(source, batch_size=16, seed=0, start_step=0, steps=300):
        images = to_model_range(batch.images)      # (16, 3, 32, 32) float32 in [-1, 1]
"""

from ibqlab.data.batch_loading import Batch
from ibqlab.data.batches import (
    first_images,
    readable_batches,
    training_batches,
    training_requests,
    validation_batches,
    validation_requests,
)
from ibqlab.data.broken import BrokenImages
from ibqlab.data.digits import DigitsSource
from ibqlab.data.file_source import FileSource
from ibqlab.data.image_sources import open_data
from ibqlab.data.photos import PHOTOS, Photo, PhotosSource
from ibqlab.data.pictures import UnreadablePicture, open_picture
from ibqlab.data.pixels import to_model_range, to_uint8
from ibqlab.data.resizing import RESIZERS, resize_and_crop, resize_short_side
from ibqlab.data.shard_writing import write_shards
from ibqlab.data.source import DataConfig, ImageSource, Sample, Split

__all__ = [
    "PHOTOS",
    "RESIZERS",
    "Batch",
    "BrokenImages",
    "DataConfig",
    "DigitsSource",
    "FileSource",
    "ImageSource",
    "Photo",
    "PhotosSource",
    "Sample",
    "Split",
    "UnreadablePicture",
    "first_images",
    "open_data",
    "open_picture",
    "readable_batches",
    "resize_and_crop",
    "resize_short_side",
    "to_model_range",
    "to_uint8",
    "training_batches",
    "training_requests",
    "validation_batches",
    "validation_requests",
    "write_shards",
]
