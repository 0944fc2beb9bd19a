"""Whose checkpoint is it? Told from names and other entries of the file, or the user asked; never guessed.

IBQ, VQGAN (taming-transformers) and latent-diffusion write the same names and shapes. What differs: IBQ's code writes
averaged weights (`model_ema.…`) beside the others, the others never did, and their Lightning was older than 2. And VQ
starts its codes within ±1/K, where codes that nothing chose stay for ever, while IBQ's start at N(0, 1): that tells
what is likely, and the user is asked all the same.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained import families  # noqa: F401 - registers them
from ibqlab.pretrained.family import Family, all_families, find_family
from ibqlab.pretrained.names import AVERAGE, FIRST_STAGE, LLAMAGEN_CLASSES
from ibqlab.pretrained.tensor_files import CheckpointError, TensorFile
from ibqlab.pretrained.tokenizer_architecture import PUBLISHED_CODEBOOK

UNREAD: dict[str, tuple[str, ...]] = {
    "a tokenizer of VAR": ("quantize.quant_resi.", "quantize.ema_vocab_hit_SV"),
    "a VQGAN with moving averages (taming-transformers)": ("quantize.embedding.embed_avg",),
    "a generator of taming-transformers": ("transformer.pos_emb", "pos_emb"),
    "a diffusion model (latent-diffusion)": ("model.diffusion_model.",),
}
"""What is not read as a tokenizer, and beginnings of names that only it has; the first that fits is named."""
AROUND_A_FIRST_STAGE = {
    "model.diffusion_model.": "ldm",
    "transformer.class_emb.": "ibq",
    "transformer.pos_emb": "vqgan",
}
"""Names of what was trained on a tokenizer, in one file with it, and the tokenizer's family."""
TOKEN_EMBEDDINGS = ("tok_emb.weight", "pre_emb.weight")
CODES_LOOKED_AT = 4096
LEAST_DIMENSION = 4
"""Codes of fewer numbers may lie within ±1/K by chance."""


def recognise(
    file: TensorFile, tensors: Mapping[str, Tensor], family: str | None = None, quantizer: str | None = None
) -> Family:
    """The family of a tokenizer's file.

    Args:
        file: the file.
        tensors: those of the tokenizer in it, by the file's names.
        family: what the user said.
        quantizer: what the user said; of files with VQGAN's names it tells the family, too.
    Raises:
        CheckpointError: another system's file, or one that several may have written; the message says what to type.
        ValueError: a family that nobody registered.
    """
    if family is not None:
        return _confirmed(find_family(family), tensors)
    fitting = [known for known in all_families() if known.marks and not known.missing_marks(tensors)]
    if not fitting and quantizer == "lfq" and "quant_conv.weight" in tensors:
        return find_family("ibq")
    if not fitting:
        raise _nobody(tensors)
    if len({known.marks for known in fitting}) > 1:
        titles = " and of ".join(known.title for known in fitting)
        raise CheckpointError(
            f"names of {titles} stand in one file, which holds the weights of one model; save that model alone"
        )
    if len(fitting) == 1:
        return fitting[0]
    return _told_apart(file, tensors, quantizer, fitting)


def refuse_unread(names: Mapping[str, object], network: str = "tokenizer") -> None:
    """Raise CheckpointError, with the system's name and what to do, for a file that is not read as the network."""
    for title, starts in UNREAD.items():
        if any(name.startswith(starts) for name in names):
            first_stage = any(name.startswith(FIRST_STAGE) for name in names)
            advice = "its tokenizer is load_first_stage(path)" if first_stage else "open it with its authors' code"
            raise CheckpointError(
                f"this is {title}, not a {network} that ibqlab reads (list those: ibqlab download); {advice}"
            )
    if network == "tokenizer" and any(name.startswith(LLAMAGEN_CLASSES) for name in names):
        raise CheckpointError("this is a generator of LlamaGen, not a tokenizer; use load_generator")


def _confirmed(family: Family, tensors: Mapping[str, Tensor]) -> Family:
    missing = family.missing_marks(tensors)
    if not missing:
        return family
    others = [known for known in all_families() if known.marks and not known.missing_marks(tensors)]
    others = [known for known in others if known.marks == others[0].marks]  # several share their names
    looks = ""
    if others:
        titles = " or ".join(known.title for known in others)
        looks = f"; it looks like {titles}: type family={' or family='.join(repr(known.name) for known in others)}"
    raise CheckpointError(
        f"this is not {family.title}: no tensor's name begins with {_plain(missing[0])}{looks or _first_names(tensors)}"
    )


def _told_apart(
    file: TensorFile, tensors: Mapping[str, Tensor], quantizer: str | None, fitting: list[Family]
) -> Family:
    """Which of several families with the same names it is, from whatever else tells."""
    quantizer = quantizer or file.quantizer
    if quantizer is not None:
        return find_family("vqgan" if quantizer.startswith("vq") else "ibq")
    for start, name in AROUND_A_FIRST_STAGE.items():
        if any(key.startswith(start) for key in file.tensors):
            return find_family(name)
    near_zero = codes_within_start_of_vq(tensors[PUBLISHED_CODEBOOK])
    if any(key.startswith(AVERAGE) for key in tensors) and not near_zero:
        return find_family("ibq")
    if not any(key.startswith("encoder.mid.attn_1.") for key in tensors):
        return find_family("ldm")
    if file.lightning and int(file.lightning.split(".")[0]) < 2:
        return find_family("vqgan")
    finding = "it has no averaged weights (model_ema.…), which files of IBQ have, so nothing in it tells which"
    if near_zero:
        finding = f"{near_zero:,} of its codes lie within ±1/K, where VQ starts and IBQ does not, so it is likely VQ"
    choices = ", ".join(f"family={known.name!r} for {known.title.removeprefix('a ')}" for known in fitting)
    raise CheckpointError(
        f"names and shapes are those of {', '.join(known.title for known in fitting)} alike; {finding}. Say what it "
        f"is: {choices} (in a command --family {fitting[0].name} and so on)"
    )


def _nobody(tensors: Mapping[str, Tensor]) -> CheckpointError:
    """The error for a file of no known family: the one that it is most like, and what differs."""
    if any(name.startswith("transformer.") or name in TOKEN_EMBEDDINGS for name in tensors):
        return CheckpointError(
            "this is an autoregressive generator (it embeds tokens), not a tokenizer; the one that it was "
            "trained on is load_first_stage(path), where the file holds it"
        )
    codes = ("quantize.", "tok_embeddings.", "codebook_projection.")
    is_vqgan = {"encoder.mid.block_1.conv1.weight", "quant_conv.weight"} <= set(tensors)
    if is_vqgan and not any(name.startswith(codes) for name in tensors):
        return CheckpointError(
            "this is an autoencoder without codes (latent-diffusion's AutoencoderKL), or one with lookup-free codes; "
            "for those type quantizer='lfq' (--quantizer lfq)"
        )
    known = [family for family in all_families() if family.marks]
    found = {family.name: len(family.marks) - len(family.missing_marks(tensors)) for family in known}
    matching = {family.name: sum(any(re.match(m, key) for m in family.marks) for key in tensors) for family in known}
    nearest = max(known, key=lambda family: (found[family.name] / len(family.marks), matching[family.name]))
    if not found[nearest.name]:
        return CheckpointError(
            "this is no image tokenizer of a family that ibqlab reads (list them: ibqlab download; one of yours needs "
            f"the file that registers it, in a command --plugin FILE){_first_names(tensors)}"
        )
    missing = ", ".join(_plain(mark) + "…" for mark in nearest.missing_marks(tensors))
    return CheckpointError(
        f"it resembles {nearest.title} (family={nearest.name!r}), but no tensor's name begins with {missing}: the file "
        "is incomplete, renamed or of another system. Give it as it was published"
    )


def _plain(mark: str) -> str:
    """A mark as it stands in a file."""
    return re.sub(r"\\(.)", r"\1", mark.removesuffix("$"))


def _first_names(tensors: Mapping[str, Tensor]) -> str:
    first = ", ".join(dict.fromkeys(key.split(".")[0] for key in tensors))
    return f"; its tensors' names begin with {for_terminal(first, 120)}"


def codes_within_start_of_vq(codebook: Tensor) -> int:
    """How many codes, of those looked at, still lie within ±1/K in every number, which N(0, 1) never gives.

    At most `CODES_LOOKED_AT` are, evenly spread, because a codebook that is mapped costs memory where it is read.
    """
    size, dim = codebook.shape if codebook.ndim == 2 else (0, 0)
    if dim < LEAST_DIMENSION or size < LEAST_DIMENSION or codebook.is_meta:
        return 0
    sample = codebook[:: -(-size // CODES_LOOKED_AT)].float()
    return int((sample.abs().amax(1) <= 1 / size).sum())
