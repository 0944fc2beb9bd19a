"""Published checkpoints on the Hugging Face hub, fetched only when asked for and checked against the hub's checksum.

Repositories and files are those that the authors' documentation (SEED-Voken, docs/IBQ.md and docs/Open-MAGVIT2.md;
LlamaGen, README.md) links to. Not verified: that the hub still has them, and that they hold what the documentation
says.
"""

from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.cache import hash_file
from ibqlab.base.checks import require_choice
from ibqlab.generator.sampling_config import SAMPLING_CARDS, SamplingConfig
from ibqlab.pretrained.tensor_files import CheckpointError


@dataclass(frozen=True, kw_only=True)
class PublishedTokenizer:
    """A tokenizer that its authors published, and what they report of it on ImageNet's validation set at 256 pixels."""

    repository: str
    """On the Hugging Face hub."""
    file: str
    """In that repository."""
    codebook_size: int
    """K, codes."""
    code_dim: int
    """D, numbers per code."""
    rfid: float
    """Reported Fréchet distance of reconstructions."""
    lpips: float | None = None
    """Reported perceptual distance; None if not reported."""
    usage: float | None = None
    """Reported share of codes used, 0 to 1; None if not reported."""


@dataclass(frozen=True, kw_only=True)
class PublishedGenerator:
    """A class-conditional generator of ImageNet images that its authors published, and what they report of it at 256
    pixels: larger images were made smaller for that."""

    repository: str
    """On the Hugging Face hub."""
    file: str
    """In that repository; it holds the tokenizer, too (`load_first_stage`), but not LlamaGen's."""
    design: str
    """"ibq", "magvit2" or "llamagen", the name of its settings' class."""
    preset: str
    """Of that design: its size, such as "XL"."""
    tokenizer: str
    """Whose tokens it draws: a key of `PUBLISHED`."""
    gfid: float
    """Reported Fréchet distance of 50,000 drawn images, by the ADM evaluator; not comparable with an rFID."""
    inception_score: float | None
    """Reported Inception score of the same images; None if not reported."""
    sampling: SamplingConfig
    """How those images were drawn."""
    grid_size: int = 16
    """Tokens along one side of an image."""


def _ibq(
    size: int, rfid: float, lpips: float | None = None, usage: float | None = None, *, pretrain: bool = False
) -> PublishedTokenizer:
    return PublishedTokenizer(
        repository=f"TencentARC/IBQ-Tokenizer-{size}{'-Pretrain' if pretrain else ''}",
        file=f"{'IBQ_pretrain' if pretrain else 'imagenet256'}_{size}.ckpt",
        codebook_size=size,
        code_dim=256,
        rfid=rfid,
        lpips=lpips,
        usage=usage,
    )


def _magvit2(suffix: str, file: str, bits: int, rfid: float, usage: float | None = None) -> PublishedTokenizer:
    return PublishedTokenizer(
        repository=f"TencentARC/Open-MAGVIT2-Tokenizer-{suffix}",
        file=file,
        codebook_size=2**bits,
        code_dim=bits,
        rfid=rfid,
        usage=usage,
    )


PUBLISHED = {
    "IBQ-1024": _ibq(1024, 2.24, 0.2580, 0.99),
    "IBQ-8192": _ibq(8192, 1.87, 0.2437, 0.98),
    "IBQ-16384": _ibq(16384, 1.37, 0.2235, 0.96),
    "IBQ-262144": _ibq(262144, 1.00, 0.2030, 0.84),
    "IBQ-16384-Pretrain": _ibq(16384, 2.06, pretrain=True),
    "IBQ-262144-Pretrain": _ibq(262144, 1.53, pretrain=True),
    "Open-MAGVIT2-256": _magvit2("256-resolution", "imagenet_256_L.ckpt", 18, 1.17, 1.0),
    "Open-MAGVIT2-128": _magvit2("128-resolution", "imagenet_128_L.ckpt", 18, 1.18, 1.0),
    "Open-MAGVIT2-16384-Pretrain": _magvit2("16384-Pretrain", "pretrain256_16384.ckpt", 14, 2.55),
    "Open-MAGVIT2-262144-Pretrain": _magvit2("262144-Pretrain", "pretrain256_262144.ckpt", 18, 1.67),
}
"""Published tokenizers by name. "Open-MAGVIT2-128" was trained, and its rFID measured, at 128 pixels; those named
Pretrain were trained on text-to-image data."""


def _llamagen(size: str, pixels: int, gfid: float, inception_score: float | None = None) -> PublishedGenerator:
    return PublishedGenerator(
        repository="FoundationVision/LlamaGen",
        file=f"c2i_{size}_{pixels}.pt",
        design="llamagen",
        preset=size,
        tokenizer="LlamaGen-VQ-16",
        gfid=gfid,
        inception_score=inception_score,
        sampling=SAMPLING_CARDS[f"llamagen_{size.lower()}"],
        grid_size=pixels // 16,
    )


def _generator(design: str, size: str, gfid: float, inception_score: float) -> PublishedGenerator:
    ibq = design == "ibq"
    return PublishedGenerator(
        repository=f"TencentARC/IBQ-AR-{size}" if ibq else f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution",
        file=f"AR_256_{size}.ckpt",
        design=design,
        preset=size,
        tokenizer="IBQ-16384" if ibq else "Open-MAGVIT2-256",
        gfid=gfid,
        inception_score=inception_score,
        sampling=SAMPLING_CARDS[f"{design}_{size.lower()}"],
    )


PUBLISHED_GENERATORS = {
    "IBQ-AR-B": _generator("ibq", "B", 2.88, 254.73),
    "IBQ-AR-L": _generator("ibq", "L", 2.45, 267.48),
    "IBQ-AR-XL": _generator("ibq", "XL", 2.14, 278.99),
    "IBQ-AR-XXL": _generator("ibq", "XXL", 2.05, 286.73),
    "Open-MAGVIT2-AR-B": _generator("magvit2", "B", 3.08, 258.26),
    "Open-MAGVIT2-AR-L": _generator("magvit2", "L", 2.51, 271.70),
    "Open-MAGVIT2-AR-XL": _generator("magvit2", "XL", 2.33, 271.77),
    "LlamaGen-B-256": _llamagen("B", 256, 5.46),
    "LlamaGen-L-256": _llamagen("L", 256, 3.80, 248.28),
    "LlamaGen-B-384": _llamagen("B", 384, 6.09),
    "LlamaGen-L-384": _llamagen("L", 384, 3.07, 256.06),
    "LlamaGen-XL-384": _llamagen("XL", 384, 2.62, 244.08),
    "LlamaGen-XXL-384": _llamagen("XXL", 384, 2.34, 253.90),
    "LlamaGen-3B-384": _llamagen("3B", 384, 2.18, 263.33),
}
"""Published generators by name. LlamaGen's end with the pixels of an image; those of 384 were resized to 256 for their
numbers. Their Inception scores are those that IBQ repeats (table 7), which has none of B."""


def download_published(name: str, folder: str | Path | None = None) -> Path:
    """Fetch a published checkpoint, and check that it arrived as it was published.

    A download that breaks off goes on where it stopped when this is called again; a file that is there is not fetched
    twice, but checked.

    Args:
        name: a key of `PUBLISHED` or of `PUBLISHED_GENERATORS`.
        folder: where to put it; None: the hub's own cache (HF_HOME).
    Returns:
        The file's path, for `load_tokenizer` or `load_generator`.
    Raises:
        ValueError: an unknown name.
        CheckpointError: the hub cannot be reached (the message says how to do without), or the file is not the
            published one; it is then deleted.
    """
    checkpoints = PUBLISHED | PUBLISHED_GENERATORS
    require_choice("published checkpoint", name, checkpoints)
    import huggingface_hub as hub  # noqa: PLC0415 - everything but this works without it

    entry = checkpoints[name]
    try:
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(entry.repository, entry.file))
        where = {} if folder is None else {"local_dir": folder}
        path = Path(hub.hf_hub_download(entry.repository, entry.file, revision=facts.commit_hash, **where))
    except Exception as error:
        # Which exceptions say "no network" changes with the hub's versions and its HTTP library.
        link = f"https://huggingface.co/{entry.repository}/resolve/main/{entry.file}"
        load = "load_generator" if isinstance(entry, PublishedGenerator) else "load_tokenizer"
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise CheckpointError(
            f"{name} could not be fetched ({cause}). Call this again where there is a network (and HF_HUB_OFFLINE is "
            f'not set), or bring {link} here by other means and type {load}("path/to/{entry.file}")'
        ) from error
    expected, actual = (facts.etag or "").strip('"'), hash_file(path)
    if actual != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: sha256 {actual[:12]}… is not the hub's {expected[:12] or 'missing one'}…: the file was damaged "
            f'on its way or replaced. It was deleted; call download_published("{name}") again'
        )
    return path
