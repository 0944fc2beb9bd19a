"""The seven published generators: where they are, what their authors report of them, how those images were drawn."""

from dataclasses import dataclass

from ibqlab.generator.sampling_config import SAMPLING_CARDS, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class PublishedGenerator:
    """A class-conditional generator of 256-pixel ImageNet images that its authors published, and what they report.

    Repositories and files are those that the authors' documentation (SEED-Voken, docs/IBQ.md and docs/Open-MAGVIT2.md)
    links to. Not verified: that the hub still has them, and that they hold what the documentation says.
    """

    repository: str
    """On the Hugging Face hub."""
    file: str
    """In that repository; it holds the tokenizer, too (`load_first_stage`)."""
    design: str
    """"ibq" or "magvit2", the name of its settings' class."""
    preset: str
    """Of that design: its size, such as "XL"."""
    tokenizer: str
    """Whose tokens it draws: a key of `PUBLISHED`."""
    gfid: float
    """Reported Fréchet distance of 50,000 drawn images, by the ADM evaluator; not comparable with an rFID."""
    inception_score: float
    """Reported Inception score of the same images."""
    sampling: SamplingConfig
    """How those images were drawn."""


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
}
"""Published generators by name."""
