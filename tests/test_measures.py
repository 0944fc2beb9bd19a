"""One registry of measures: it knows every number that is written, and nobody else says what one is called."""

import ast
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from registry import SMALL_DIGITS

import ibqlab
from ibqlab.base.measures import MEASURES, OTHER_NETWORK, SHARE, is_measure, measure
from ibqlab.data import DigitsSource
from ibqlab.grids.cell_rows import RECORDED, quantizer_cost, soft_inference
from ibqlab.metrics import evaluate_generation, evaluate_reconstruction
from ibqlab.metrics.protocols import GENERATION_METRICS, RECONSTRUCTION_METRICS
from ibqlab.plots import run_curve_table
from ibqlab.pretrained import load_tokenizer
from ibqlab.quantizers import build_quantizer
from ibqlab.recipes.recipe_files import recipe_config
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer
from ibqlab.training import train, train_generator

PACKAGE = Path(ibqlab.__file__).parent
BOOKKEEPING = {
    "step": "when",
    **dict.fromkeys(("weight_decay", "soft_temperature"), "a setting's value in the step"),
    **dict.fromkeys(("step_tokens", "usage_tokens", "validation_tokens", "validation_images"), "what was counted on"),
    **dict.fromkeys(("tokens", "images", "training_usage_tokens", "quantizer_tokens"), "the same, in rows"),
}
"""Columns that say when or on how much was measured: they have no better end and no title of their own."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Run:
    """With everything that adds columns: a discriminator, its LeCam penalty and adaptive weight."""
    adversary = {
        "adversarial_weight": 0.1,
        "adaptive_weight": True,
        "lecam_weight": 0.01,
        "discriminator.num_layers": 1,
    }
    settings = SMALL_DIGITS | {"steps": 3} | {f"loss.{key}": value for key, value in adversary.items()}
    return train(recipe_config("builtin/smoke", settings), tmp_path_factory.mktemp("a") / "tokenizer", progress=False)


def test_every_column_of_a_tokenizers_run_is_listed(tokenizer):
    written = set(tokenizer.metrics)
    assert {"step_usage", "gradient_reach", "validation_psnr", "quantizer_loss"} <= written
    assert {"discriminator", "lecam", "adversarial", "adversarial_weight", "logits_real"} <= written
    assert {key for key in written if not is_measure(key)} <= BOOKKEEPING.keys()
    for key in written & {"usage", "step_usage", "validation_usage", "perplexity", "dead_codes"}:
        assert measure(key).tokens in written, f"{key} does not say in how many tokens it was counted"


def test_every_measure_of_a_run_is_in_the_table_behind_its_curves(tokenizer):
    table = run_curve_table(tokenizer.metrics)
    assert {key for key in tokenizer.metrics if is_measure(key)} <= set(table)
    assert table["code_norm_mean"].dropna().tolist() == tokenizer.metrics["code_norm_mean"].dropna().tolist()


def test_every_column_of_a_generators_run_is_listed(tokenizer, tmp_path):
    settings = {"tokenizer": str(tokenizer.path), "data.source": "digits", "data.image_size": 8, "steps": 2}
    config = recipe_config(
        "builtin/smoke_generator",
        settings | {"generator.vocabulary_size": 32, "generator.grid_size": 4, "generator.num_classes": 10},
    )
    written = set(train_generator(config, tmp_path / "generator", progress=False).metrics)
    assert {"validation_bits_per_pixel", "validation_loss_unconditional"} <= written
    assert {key for key in written if not is_measure(key)} <= BOOKKEEPING.keys()


def test_every_column_of_a_row_is_listed(tokenizer):
    quantizer = load_tokenizer(tokenizer.path, "raw").quantizer
    costs = quantizer_cost(quantizer, torch.randn(16, quantizer.config.code_dim), 16)
    settings = SMALL_DIGITS | {"tokenizer.quantizer": {"name": "soft_vq", "codebook_size": 32, "code_dim": 8}}
    soft = Tokenizer(recipe_config("builtin/smoke", settings).tokenizer)
    averages = soft_inference(soft, [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    assert "soft_psnr" in averages
    columns = {*RECORDED, *costs, *averages, "seconds", "recognised", "recognised_real", *OTHER_NETWORK.values()}
    assert {key for key in columns if not is_measure(key)} <= BOOKKEEPING.keys()


def test_the_cost_of_a_deferred_quantizer_is_that_of_quantizing():
    torch.manual_seed(0)
    quantizer = build_quantizer("deferred_vq", codebook_size=8, code_dim=4, codebook_init="normal")
    before, seen = quantizer.codebook.clone(), []
    quantizer.register_forward_hook(lambda module, given, out: seen.append(bool(out.loss)))
    quantizer_cost(quantizer, torch.randn(16, 4), 16)
    assert all(seen) and quantizer.progress == 0.0 and torch.equal(quantizer.codebook, before)


def test_cards_say_what_the_registry_says(tokenizer):
    images = DigitsSource(image_size=8, split="validation")
    options = {"extractor": "digits", "progress": False, "limit": 24}
    metrics = [name for name in RECONSTRUCTION_METRICS if not name.startswith("lpips") and name != "ssim"]
    rebuilt = evaluate_reconstruction(load_tokenizer(tokenizer.path, "raw"), images, metrics=metrics, **options)
    drawn = evaluate_generation(images, images, "torch-fidelity", metrics=("fid", "precision", "recall"), **options)
    for card in (*rebuilt.cards, *drawn.cards):
        assert card.better == measure(card.key).better
        assert card.unit == (SHARE if measure(card.key).bounds == (0, 1) else measure(card.key).unit)
    assert rebuilt["psnr"].metric == "PSNR" and rebuilt["usage"].metric == "usage (any hit)"
    assert drawn["fid"].metric == "Fréchet distance (digits-cnn)"
    assert all(is_measure(name) and measure(name).better for name in (*RECONSTRUCTION_METRICS, *GENERATION_METRICS))


def test_prefixes_and_suffixes_say_of_what_and_which():
    psnr, mine = measure("validation_psnr"), measure("psnr")
    assert (psnr.key, psnr.title, psnr.axis) == ("validation_psnr", "validation PSNR", "validation PSNR (dB)")
    assert psnr.bounds == mine.bounds == (-math.inf, math.inf)
    assert measure("step_usage").tokens == "step_tokens" and measure("step_usage").scale == 100
    assert measure("code_norm_std").title == "norm of codes, spread"
    assert measure("term_commitment").title == "commitment"
    assert measure("frechet_distance_digits").title == "Fréchet distance (digits)"
    with pytest.raises(KeyError, match=r"no measure 'qqq'; list it in ibqlab/base/measures\.py"):
        measure("qqq")
    with pytest.raises(KeyError, match=r"no measure 'psrn'; did you mean 'psnr'\? A new one is listed in ibqlab/base"):
        measure("psrn")


@pytest.mark.parametrize(
    ("key", "value", "row", "text"),
    [
        ("usage", 0.125, {"usage_tokens": 2048}, "12.50 % of codes in 2,048 tokens"),
        ("step_usage", 0.5, {"usage_tokens": 2048}, "50.00 % of codes in an unknown number of tokens"),
        ("gradient_reach", 1.0, {}, "100.00 % of codes"),
        ("psnr", 20.5, {}, "20.5 dB"),
        ("dead_codes", 1024, {"usage_tokens": 10}, "1,024 codes in 10 tokens"),
        ("l1", 0.25, {}, "0.25"),
    ],
)
def test_values_are_written_with_their_unit(key, value, row, text):
    assert measure(key).text(value, row) == text


def test_bounds_hold_what_they_bound():
    for quantity in MEASURES.values():
        assert quantity.least < quantity.most and quantity.definition and quantity.better in ("higher", "lower", "")
        assert (quantity.unit != SHARE) or quantity.bounds == (0, 1)


# --- who says what a measure is called ---


def spelled_titles(source: str) -> list[str]:
    """Keys of the registry beside which a module writes their title, heading or axis by itself."""
    tree = ast.parse(source)
    pairs = itertools.chain.from_iterable(map(_pairs, ast.walk(tree)))
    pairs = ((key, text) for key, text in pairs if is_measure(key) and not is_measure(text))
    return [key for key, text in pairs if any(_names(text, name) for name in _titles(key))]


def _titles(key: str) -> set[str]:
    quantity = measure(key)
    return {quantity.title, quantity.heading, quantity.axis} - {key}


def _names(text: str, title: str) -> bool:
    """Whether a text begins with a title, whatever its unit: "PSNR, dB"."""
    return text.casefold() == title.casefold() or text.casefold().startswith(f"{title.casefold()},")


def _pairs(node: ast.AST) -> Iterator[tuple[str, str]]:
    """A key and a text that stand together: an entry of a dictionary, a tuple or list, the arguments of a call."""
    if isinstance(node, ast.Dict):
        groups = [[key, value] for key, value in zip(node.keys, node.values, strict=True) if key]
    elif isinstance(node, (ast.Tuple, ast.List)):
        groups = [node.elts]
    elif isinstance(node, ast.Call):
        groups = [[*node.args, *(keyword.value for keyword in node.keywords)]]
    else:
        return
    for group in groups:
        # An entry's value may be a tuple that begins with the title.
        flat = [part for one in group for part in (one.elts if isinstance(one, ast.Tuple) else [one])]
        texts = [one.value for one in flat if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        yield from itertools.permutations(texts, 2)


MODULES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).as_posix() != "base/measures.py"]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nobody_else_says_what_a_measure_is_called(file):
    assert not spelled_titles(file.read_text()), "read the title from ibqlab.base.measures.measure(key)"


@pytest.mark.parametrize(
    "source",
    [
        'TITLES = {"validation_psnr": "validation PSNR (dB)"}',
        'TITLES = {"psnr": ("PSNR, dB", "{:.2f}")}',
        'Panel("rfid", "rFID")',
        'Panel(key="gradient_reach", label="codes reached (%)")',
        'ROWS = [("lpips_vgg", "LPIPS (VGG)", 1)]',
    ],
)
def test_a_title_beside_its_key_is_found(source):
    assert spelled_titles(source)


@pytest.mark.parametrize("source", ['row["psnr"]', '{"rfid": "rfid"}', '("psnr", "ssim")', '"PSNR"'])
def test_keys_alone_are_no_titles(source):
    assert not spelled_titles(source)
