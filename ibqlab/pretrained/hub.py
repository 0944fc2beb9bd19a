"""Published checkpoints, fetched from the Hugging Face hub when asked for and checked against the hub's checksum.

Some lie elsewhere; of those the message says what to do by hand.

Repositories and files are those that the authors' documentation links to (of each system the README; of SEED-Voken
docs/IBQ.md and docs/Open-MAGVIT2.md). Not verified: that they are still there, and that they hold what the
documentation says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.cache import hash_file
from ibqlab.base.checks import require_choice
from ibqlab.generator.sampling_config import SAMPLING_CARDS, SamplingConfig
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.recipes.published_files import (
    NOT_STATED,
    PublishedTokenizer,
    published_files,
    published_systems,
    weights_size,
)

SYSTEMS = {"ibq": "IBQ", "magvit2": "Open-MAGVIT2", "llamagen": "LlamaGen"}
"""Whose generators those of a design are."""
NAMES_DO_NOT_TELL = ("ibq", "vqgan", "ldm")
"""Families whose files have the same names, so that `family` must be given."""


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
    parameters: int
    """Of the generator alone."""
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

    @property
    def system(self) -> str:
        """Whose it is."""
        return SYSTEMS[self.design]


class _PublishedFiles(Mapping[str, PublishedTokenizer]):
    """experiments/published/files.yaml, read when it is first looked at."""

    def __getitem__(self, name: str) -> PublishedTokenizer:
        return published_files()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(published_files())

    def __len__(self) -> int:
        return len(published_files())


PUBLISHED = _PublishedFiles()
"""Published tokenizers by name, grouped by system. Those named Pretrain were trained on text-to-image data."""


_PARAMETERS = {
    "ibq": {"B": 342_994_944, "L": 649_640_960, "XL": 1_076_103_168, "XXL": 2_063_331_840},
    "magvit2": {"B": 343_570_432, "L": 804_362_240, "XL": 1_486_679_040},
    "llamagen": {
        "B": 110_888_448,
        "L": 342_910_976,
        "XL": 774_699_520,
        "XXL": 1_410_972_672,
        "3B": 3_096_659_200,
    },
}
"""Of the published sizes of each design."""


def _llamagen(size: str, pixels: int, gfid: float, inception_score: float | None = None) -> PublishedGenerator:
    return PublishedGenerator(
        repository="FoundationVision/LlamaGen",
        file=f"c2i_{size}_{pixels}.pt",
        design="llamagen",
        preset=size,
        parameters=_PARAMETERS["llamagen"][size],
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
        parameters=_PARAMETERS[design][size],
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
        CheckpointError: the file is on no hub, or the hub cannot be reached (the message says how to do without), or
            the file is not the published one; it is then deleted.
    """
    checkpoints = {**PUBLISHED, **PUBLISHED_GENERATORS}
    require_choice("published checkpoint", name, checkpoints)
    if not checkpoints[name].repository:
        raise CheckpointError(_by_hand(name, checkpoints[name]))
    import huggingface_hub as hub  # noqa: PLC0415 - everything but this works without it

    entry = checkpoints[name]
    try:
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(entry.repository, entry.file))
        companions = entry.companions if isinstance(entry, PublishedTokenizer) else ()
        # Files that belong together have names that others have, too; so they get a folder of their own.
        where = {} if folder is None else {"local_dir": Path(folder) / name if companions else folder}
        where["revision"] = facts.commit_hash
        path = Path(hub.hf_hub_download(entry.repository, entry.file, **where))
        for companion in companions:
            hub.hf_hub_download(entry.repository, companion, **where)
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


def _by_hand(name: str, entry: PublishedTokenizer) -> str:
    """What to do about a file that is on no hub."""
    family = f', family="{entry.family}"' if entry.family in NAMES_DO_NOT_TELL else ""
    file = entry.file or "its file"
    unpack = ", unpack it" if entry.name_there.endswith(".zip") else ""
    return (
        f"{name} cannot be fetched from here: its authors publish it on no hub, or do not say how its file is called. "
        f"Fetch {entry.name_there} by the link on {published_systems()[entry.system].page}{unpack}, and type "
        f'load_tokenizer("path/to/{file}"{family})'
    )


def list_published() -> str:
    """All published checkpoints by system, with licences, K and D, size of the weights and printed numbers."""
    entries: dict[str, list[str]] = {system: [] for system in published_systems()}
    for name, tokenizer in PUBLISHED.items():
        entries[tokenizer.system].append(_tokenizer_line(name, tokenizer))
    for name, generator in PUBLISHED_GENERATORS.items():
        score = f"  IS {generator.inception_score:.2f}" if generator.inception_score else ""
        entries[generator.system].append(
            f"  {name:<28}  over {generator.tokenizer:<17} {weights_size(generator.parameters):>15}  "
            f"gFID {generator.gfid:.2f}{score}"
        )
    lines = []
    for name, system in published_systems().items():
        licences = f"licence of the code: {system.code_licence}, of the weights: {system.weights_licence}"
        lines += [f"{name} ({licences}), {system.page}", *entries[name], ""]
    return "\n".join(
        [
            *lines,
            "Sizes are those of the weights in float32, as counted from the published settings; files may hold more.",
            f"Checksums: {_checksums()}",
            "Numbers are the authors'; those of table 1 of IBQ, and protocols: experiments/published/files.yaml.",
        ]
    )


def _tokenizer_line(name: str, entry: PublishedTokenizer) -> str:
    size = f"K {entry.codebook_size:>7,}  D {entry.code_dim:>3}  {entry.size:>15}"
    rfid = f"rFID {entry.rfid:.2f}" if entry.rfid is not None else f"rFID {NOT_STATED}"
    by_hand = "" if entry.repository else "  (by hand)"
    return f"  {name:<28}  {size}  {rfid}{by_hand}{f'  {entry.remarks}' if entry.remarks else ''}"


def _checksums() -> str:
    published = [f"{name} {entry.sha256}" for name, entry in PUBLISHED.items() if entry.sha256]
    found = f"sha256 of {', '.join(published)}; of the others " if published else ""
    return f"{found}none is published. Files of the hub are checked against the hub's own sha256 when they are fetched."
