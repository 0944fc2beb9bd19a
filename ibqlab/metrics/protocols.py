"""The published ways to evaluate, each written out in full, because numbers compare only within one of them.

Resizing with or without antialiasing, 8 bits or none, which Inception and which reference: each choice alone moves FID
by more than the papers' differences. A protocol fixes all of them; every result carries its name.
"""

from dataclasses import dataclass, fields

from ibqlab.base.checks import require, require_choice
from ibqlab.data.resizing import RESIZERS
from ibqlab.metrics.pixel_metrics import ROUNDINGS

RECONSTRUCTION_METRICS = ("rfid", "lpips_vgg", "lpips_alex", "psnr", "ssim", "usage", "perplexity")
GENERATION_METRICS = ("fid", "is", "kid", "precision", "recall")
CROPS = {
    "opencv": "centre square, spare pixels halved, rounded down",
    "pil": "centre square, spare pixels halved, rounded half to even",
    "pil_bicubic": "centre square, spare pixels halved, rounded half to even",
    "adm": "centre square, spare pixels halved, rounded down",
    "none": "none",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything about an evaluation that changes its numbers. `print(protocol)` is enough to re-run it.

    For other settings make one of your own: `dataclasses.replace(PROTOCOLS["adm"], name="adm-64", image_size=64)`.
    """

    name: str
    """In every result."""
    purpose: str
    """What it reproduces."""
    resize: str = "none"
    """Short side of image files: "opencv" (bilinear, no antialias), "pil" (bilinear, antialias), "pil_bicubic"
    (bicubic, antialias), "adm" (halved by averaging, then bicubic) or "none" (as stored)."""
    image_size: int = 256
    """Pixels, of image files after resize and centre crop. Image sources and arrays bring their own size."""
    rounding: str = "none"
    """What feature extractors see: "none" (float in [0, 1]), or 8 bits in one of the ways of `ROUNDINGS`."""
    pixel_rounding: str = "truncated"
    """What PSNR and SSIM see, both pictures alike."""
    reference: str = "the same images, prepared in the same way"
    """What features are compared with."""
    extractor: str = "inception-pytorch-fid"
    """Registered feature extractor, with its own resize to 299 pixels."""
    published_extractor: str = ""
    """What the published pipeline runs."""
    deviation: str = ""
    """Where ours may differ from the published numbers, and how far."""
    inception_splits: int = 10
    """Equal splits of the Inception Score, after a shuffle with seed 2020."""
    inception_split_size: int = 0
    """Above 0: consecutive splits of so many images instead, in the order given."""
    kid_subsets: int = 100
    """Pairs of random subsets."""
    kid_subset_size: int = 1000
    """Images per subset."""
    neighbours: int = 3
    """k of precision and recall."""
    samples: int = 50_000
    """Images of the published numbers."""
    reference_images: int = 50_000
    """Reference images of the published precision and recall."""
    source: str = ""
    """Where this is written."""

    def __post_init__(self) -> None:
        require_choice("resize", self.resize, (*RESIZERS, "none"))
        require_choice("rounding", self.rounding, ROUNDINGS)
        require_choice("pixel_rounding", self.pixel_rounding, ROUNDINGS)
        least = {"image_size": 1, "inception_splits": 1, "inception_split_size": 0, "kid_subsets": 1}
        least |= {"kid_subset_size": 2, "neighbours": 1, "samples": 2, "reference_images": 2}
        for name, lowest in least.items():
            require(getattr(self, name) >= lowest, f"{name} must be at least {lowest}, got {getattr(self, name)}")

    @property
    def crop(self) -> str:
        """The crop that belongs to the resize, in words."""
        return CROPS[self.resize]

    @property
    def splits(self) -> str:
        """The splits of the Inception Score, in words."""
        if self.inception_split_size:
            return f"consecutive splits of {self.inception_split_size:,} images in the order given"
        return f"{self.inception_splits} equal splits after a shuffle"

    def __str__(self) -> str:
        """The card: one line per setting."""
        lines = [f"{field.name}: {getattr(self, field.name)}" for field in fields(self)]
        return "\n".join([*lines, f"crop: {self.crop}", f"Inception Score: {self.splits}"])


_PYTORCH_FID = "pytorch-fid's InceptionV3 (pt_inception-2015-12-05-6726825d), 2048 features after pooling"
_SEED_VOKEN_DEVIATION = (
    "We run torch-fidelity's inception-v3-compat, a port of the same network whose weight file bears the same hash "
    "(6726825d), behind pytorch-fid's own input: float in [0, 1], bilinear to 299 without antialias "
    "(align_corners=False), times 2 minus 1. What remains is rounding: other kernels and devices, and means that the "
    "published script takes in float32 (1e-8 of the value). We average PSNR and SSIM over images, the script over "
    "batches. Which LPIPS network the paper reports is not stated; we name ours."
)

_FIDELITY_INCEPTION = "torch-fidelity's Inception (resize of TensorFlow 1), with pytorch-fid's weights"
_SAME_NETWORK = (
    "We run torch-fidelity's inception-v3-compat, which has that resize and whose weight file bears the same hash. "
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="seed-voken-ibq",
            purpose="Reconstruction as published for IBQ: rFID, LPIPS, PSNR, SSIM and usage on ImageNet validation.",
            resize="opencv",
            published_extractor=_PYTORCH_FID,
            deviation=_SEED_VOKEN_DEVIATION,
            source="SEED-Voken evaluation_image.py with the IBQ configurations; EMA weights, float32, clamped output",
        ),
        Protocol(
            name="open-magvit2",
            purpose="Reconstruction as published for Open-MAGVIT2; its originals are resized with antialias.",
            resize="pil",
            published_extractor=_PYTORCH_FID,
            deviation=_SEED_VOKEN_DEVIATION,
            source="SEED-Voken evaluation_image.py with the Open-MAGVIT2 configurations",
        ),
        Protocol(
            name="adm",
            purpose="Class-conditional generation on ImageNet 256 × 256: FID, IS, precision and recall of the papers.",
            rounding="truncated",
            reference="stored batch VIRTUAL_imagenet256_labeled.npz: μ and Σ for FID, its 10,000 images for P and R",
            extractor="inception-tensorflow",
            published_extractor="TensorFlow graph classify_image_graph_def.pb, pool_3 and softmax without bias",
            deviation=(
                "We run torch-fidelity's inception-v3-compat, a port of that graph with TensorFlow's bilinear resize "
                "to 299; a stored μ and Σ come from the graph itself, and how far FID moves by that is not measured. "
                "sFID is not computed. The evaluator takes distances for P and R in float16 where they fit, ours "
                "are float64. KID is no part of the evaluator: ours is torch-fidelity's."
            ),
            inception_split_size=5000,
            reference_images=10_000,
            source="openai/guided-diffusion evaluations/evaluator.py; samples as SEED-Voken's sample.py writes them",
        ),
        Protocol(
            name="torch-fidelity",
            purpose="FID, IS, KID, precision and recall as torch-fidelity computes them on 8-bit images.",
            resize="pil",
            rounding="rounded",
            pixel_rounding="rounded",
            reference="for reconstructions the same images; for samples the images given",
            extractor="inception-tensorflow",
            published_extractor="torch-fidelity inception-v3-compat; precision and recall from layer 2048",
            deviation=(
                "torch-fidelity's default for precision and recall is VGG16; this is its option "
                "feature_extractor='inception-v3-compat', feature_layer_prc='2048'. It sums KID in float32, we in "
                "float64."
            ),
            source="torch-fidelity 0.4",
        ),
        Protocol(
            name="taming",
            purpose="Reconstruction by VQGAN's conventions: rFID on ImageNet validation.",
            resize="opencv",
            rounding="truncated",
            extractor="inception-tensorflow",
            published_extractor="torch-fidelity",
            deviation=(
                "taming-transformers has no evaluation script: resize and crop are those of its validation data, 8 "
                "bits those of the callers. Its reference images are not stated; ours are the same images, prepared "
                "in the same way. It prints rFIDs only."
            ),
            source="fact sheet of the peers §1.4 (taming-transformers 3ba01b2)",
        ),
        Protocol(
            name="llamagen",
            purpose="Reconstruction as published for LlamaGen: rFID, PSNR and SSIM on ImageNet validation.",
            resize="adm",
            rounding="half_up",
            pixel_rounding="half_up",
            reference="a batch (.npz) of validation images, as the ADM evaluator reads it; here the images themselves",
            extractor="inception-tensorflow",
            published_extractor="TensorFlow graph classify_image_graph_def.pb of the ADM evaluator, pool_3",
            deviation=(
                "We run torch-fidelity's inception-v3-compat, a port of that graph. Its SSIM is called with a data "
                "range of 2 on images in [0, 1], which gives too high values; ours has the range 1 and a window of "
                "7 × 7. Reconstructions at 384 and 512 pixels, which it resizes to 256 by bicubic interpolation before "
                "the FID, are a protocol of your own here."
            ),
            source="fact sheet of the peers §3.1 (LlamaGen ce98ec4)",
        ),
        Protocol(
            name="vqgan-lc",
            purpose="Reconstruction as published for VQGAN-LC: rFID, PSNR, SSIM and usage on ImageNet validation.",
            resize="opencv",
            rounding="truncated",
            pixel_rounding="none",
            reference="the uncropped validation folder; here the same images, prepared in the same way",
            extractor="inception-tensorflow",
            published_extractor="clean-fid, between PNG files and the folder of originals",
            deviation=(
                "clean-fid resizes to 299 pixels with an antialiasing bicubic filter, our extractor with TensorFlow "
                "1's; and its reference is not cropped. Neither is reproduced, and how far the FID moves by them is "
                "not measured. PSNR and SSIM come from pyiqa and piq there, here from `ibqlab.metrics.pixel_metrics`."
            ),
            source="fact sheet of the peers §4 (VQGAN-LC 4708958)",
        ),
        Protocol(
            name="titok",
            purpose="Reconstruction as published for TiTok (1d-tokenizer): rFID on ImageNet validation.",
            resize="pil_bicubic",
            rounding="rounded",
            pixel_rounding="rounded",
            extractor="inception-tensorflow",
            published_extractor=_FIDELITY_INCEPTION,
            deviation=(
                _SAME_NETWORK + "The evaluator truncates what was rounded to 8 bits before, which changes no level. "
                "The demo truncates at once."
            ),
            source="fact sheet of the peers §5.2 (1d-tokenizer 942a96f)",
        ),
        Protocol(
            name="maskbit",
            purpose="Reconstruction as published for MaskBit and VQGAN+: rFID, PSNR and SSIM on ImageNet validation.",
            resize="pil",
            rounding="truncated_unit",
            pixel_rounding="none",
            extractor="inception-tensorflow",
            published_extractor=_FIDELITY_INCEPTION,
            deviation=(
                _SAME_NETWORK
                + "Its SSIM has a Gaussian window of 11 × 11 (σ 1.5, reflected borders), ours a uniform one "
                "of 7 × 7."
            ),
            source="fact sheet of the peers §6 (maskbit 5ea3d73)",
        ),
        Protocol(
            name="simvq",
            purpose="Reconstruction as published for SimVQ at 128 pixels: rFID, LPIPS, PSNR and SSIM.",
            resize="pil",
            image_size=128,
            published_extractor=_PYTORCH_FID,
            deviation=(
                _SEED_VOKEN_DEVIATION
                + " SimVQ's script takes the mean of the batches' PSNRs, each of a whole batch at "
                "once, which is not the mean over images."
            ),
            source="fact sheet of the peers §7 (SimVQ d8bd94d); EMA weights, clamped output",
        ),
    )
}
"""The protocols by name."""


def find_protocol(protocol: str | Protocol) -> Protocol:
    """A protocol by its name, or one of your own.

    Raises:
        ValueError: unknown name (the message gives the nearest), or a changed protocol under a published name.
        TypeError: neither a name nor a protocol.
    """
    if isinstance(protocol, str):
        require_choice("protocol", protocol, PROTOCOLS)
        return PROTOCOLS[protocol]
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol must be a name or a Protocol; got {type(protocol).__name__}. Type 'seed-voken-ibq'")
    require(
        PROTOCOLS.get(protocol.name, protocol) == protocol,
        f"a changed protocol needs a name of its own; got {protocol.name!r}. "
        f"Type dataclasses.replace(…, name='{protocol.name}-changed')",
    )
    return protocol


def choose_metrics(metrics: tuple[str, ...] | list[str] | str | None, available: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics asked for, in the order of the tables; None: all.

    Raises:
        ValueError: none at all, or an unknown name; the message gives the nearest.
    """
    chosen = available if metrics is None else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in chosen:
        require_choice("metric", name, available)
    require(bool(chosen), f"at least one metric is needed, of {', '.join(available)}; got none")
    return tuple(name for name in available if name in chosen)
