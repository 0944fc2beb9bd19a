"""How good reconstructions and samples are, in numbers that say how they were measured. An evaluation goes through the
images once, batch by batch, and returns a card per metric: value, protocol, number of images, resize, crop,
rounding, reference, network and the hash of its weights. A name like FID or LPIPS is only given to the published
network with the published weights, which are never replaced by random ones. Nothing is downloaded. Start reading at
`protocols`, then `reconstruction`.

    from ibqlab.metrics import PROTOCOLS, evaluate_reconstruction
    from ibqlab.pretrained import load_tokenizer
    print(PROTOCOLS["seed-voken-ibq"])                       # every setting of the published evaluation
    result = evaluate_reconstruction(load_tokenizer("runs/ibq"), "imagenet/val", device="cuda")
    result["rfid"].value, result["rfid"].remarks             # one card; result.table() has them all
    evaluate_generation("samples.npz", "VIRTUAL_imagenet256_labeled.npz", device="cuda").table()
"""

from ibqlab.metrics.cards import MetricCard, cards_markdown, cards_table
from ibqlab.metrics.digits_classifier import DigitsExtractor
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.metrics.evaluation import Evaluation
from ibqlab.metrics.extractors import (
    FeatureExtractor,
    Features,
    InceptionExtractor,
    available_extractors,
    build_extractor,
    register_extractor,
)
from ibqlab.metrics.generation import evaluate_generation
from ibqlab.metrics.perceptual import PerceptualDistance, load_lpips
from ibqlab.metrics.pixel_metrics import psnr, ssim, truncate_to_uint8
from ibqlab.metrics.protocols import PROTOCOLS, Protocol
from ibqlab.metrics.reconstruction import evaluate_reconstruction
from ibqlab.metrics.statistics import (
    FeatureStatistics,
    RunningStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

__all__ = [
    "PROTOCOLS",
    "DigitsExtractor",
    "Evaluation",
    "FeatureExtractor",
    "FeatureStatistics",
    "Features",
    "InceptionExtractor",
    "MetricCard",
    "PerceptualDistance",
    "Protocol",
    "RunningStatistics",
    "available_extractors",
    "build_extractor",
    "cards_markdown",
    "cards_table",
    "evaluate_generation",
    "evaluate_reconstruction",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_lpips",
    "open_images",
    "precision_recall",
    "psnr",
    "register_extractor",
    "ssim",
    "truncate_to_uint8",
]
