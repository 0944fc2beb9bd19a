"""Images for training and validation: photographs and digits from installed packages, your own folder or tar shards.

    source = open_data(DataConfig(source="photos", image_size=32), "train")
    for batch in training_batches(source, batch_size=16, seed=0, start_step=0, steps=300):
        images = to_model_range(batch.images)      # (16, 3, 32, 32) float32 in [-1, 1]

What is unusual: no random state is kept anywhere. Batch number s is a function of (seed, s) alone, so a run resumes in
mid-epoch, and neither the number of loader processes nor the number of ranks changes what is trained on.
"""

from ibqlab.data.broken import BrokenImages
from ibqlab.data.classes import class_numbers
from ibqlab.data.digits import DigitsSource
from ibqlab.data.folder import FolderSource
from ibqlab.data.opening import open_data
from ibqlab.data.photos import PHOTOS, Photo, PhotosSource
from ibqlab.data.pictures import UnreadablePicture, open_picture
from ibqlab.data.pixels import to_model_range, to_uint8
from ibqlab.data.resizing import RESIZERS, resize_and_crop, resize_short_side
from ibqlab.data.sampling import Batch, first_images, readable_batches, training_batches, validation_batches
from ibqlab.data.shard_writing import write_shards
from ibqlab.data.shards import ShardSource
from ibqlab.data.source import DataConfig, ImageSource, Sample, Split

__all__ = [
    "PHOTOS",
    "RESIZERS",
    "Batch",
    "BrokenImages",
    "DataConfig",
    "DigitsSource",
    "FolderSource",
    "ImageSource",
    "Photo",
    "PhotosSource",
    "Sample",
    "ShardSource",
    "Split",
    "UnreadablePicture",
    "class_numbers",
    "first_images",
    "open_data",
    "open_picture",
    "readable_batches",
    "resize_and_crop",
    "resize_short_side",
    "to_model_range",
    "to_uint8",
    "training_batches",
    "validation_batches",
    "write_shards",
]
