"""Published checkpoints on the Hugging Face hub, fetched only when asked for and checked against the hub's checksum."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.checks import require_choice
from ibqlab.pretrained.published_generators import PUBLISHED_GENERATORS, PublishedGenerator
from ibqlab.pretrained.tensor_files import CheckpointError


@dataclass(frozen=True, kw_only=True)
class PublishedTokenizer:
    """A tokenizer that its authors published, and what they report of it on ImageNet's validation set at 256 pixels.

    Repositories and files are those that the authors' documentation (SEED-Voken, docs/) links to. Not verified: that
    the hub still has them, and that they hold what the documentation says.
    """

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
    known = PUBLISHED | PUBLISHED_GENERATORS
    require_choice("published checkpoint", name, known)
    import huggingface_hub as hub  # noqa: PLC0415 - everything but this works without it

    entry = known[name]
    try:
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(entry.repository, entry.file))
        where = {} if folder is None else {"local_dir": folder}
        path = Path(hub.hf_hub_download(entry.repository, entry.file, revision=facts.commit_hash, **where))
    except Exception as error:
        # Which exceptions say "no network" changes with the hub's versions and its HTTP library.
        raise CheckpointError(_unreachable(name, entry, error)) from error
    expected, actual = (facts.etag or "").strip('"'), _sha256(path)
    if actual != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: sha256 {actual[:12]}… is not the hub's {expected[:12] or 'missing one'}…: the file was damaged "
            f'on its way or replaced. It was deleted; call download_published("{name}") again'
        )
    return path


def _unreachable(name: str, entry: PublishedTokenizer | PublishedGenerator, error: Exception) -> str:
    link = f"https://huggingface.co/{entry.repository}/resolve/main/{entry.file}"
    load = "load_generator" if isinstance(entry, PublishedGenerator) else "load_tokenizer"
    cause = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return (
        f"{name} could not be fetched ({cause}). Call this again where there is a network (and HF_HUB_OFFLINE is not "
        f'set), or bring {link} here by other means and type {load}("path/to/{entry.file}")'
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
