"""Tokenizers of every system side by side: one size, one protocol, each system's own beside it, and table 1."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peers import stored_file
from PIL import Image
from test_notebooks import run_papermill

from ibqlab.config import ConfigError
from ibqlab.data import PhotosSource
from ibqlab.diagnostics import USAGE_DEFINITIONS, UsageCounter, measure_usage
from ibqlab.diagnostics.variance import variance_lost
from ibqlab.grids import evaluation_session
from ibqlab.grids.comparison import judge_comparison, open_comparison, reasons_against_own
from ibqlab.grids.comparison_tables import show_tokens, table_1, table_1_markdown, token_table
from ibqlab.grids.evaluation_parameters import ComparisonParameters, EvaluationParameters
from ibqlab.grids.evaluation_rules import find_tokenizer
from ibqlab.grids.evaluation_session import open_evaluation
from ibqlab.grids.own_protocols import ResizingTokenizer
from ibqlab.grids.printed_numbers import Printed, find_published
from ibqlab.grids.protocol_shares import PARTS, VALUES, describe_shares, protocol_shares
from ibqlab.grids.token_statistics import COLUMNS, TokenStatistics
from ibqlab.metrics import PROTOCOLS, evaluate_reconstruction, open_images
from ibqlab.metrics.cautions import EvaluationWarning
from ibqlab.plots import plot_protocol_dots, plot_tokenizer_rarefaction
from ibqlab.pretrained import available_families, load_tokenizer
from ibqlab.pretrained.family import find_family
from ibqlab.recipes.published_files import PublishedNumbers, published_files
from ibqlab.tokenizer import TitokConfig, Tokenizer, TokenizerConfig
from ibqlab.tokens.ngrams import measure_ngrams

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "vqgan": "taming_vqgan",
    "vqgan_gumbel": "taming_gumbel",
    "ldm": "ldm_vq",
    "llamagen": "llamagen_vq",
    "vqgan_lc": "vqgan_lc",
    "simvq": "simvq",
    "diffusers": "diffusers_vq",
    "maskgit": "maskgit_vqgan",
    "maskbit": "maskbit_lfq",
    "vqgan_plus": "vqgan_plus",
}
"""Family → golden values whose container stands in for a published file."""
HELD = {"ldm": "ldm"}
"""Families that their file does not tell."""
IMAGES = 6


def tiny_titok(path: Path) -> Path:
    """A file with TiTok's names, of one layer each, in a published width, which tells its heads."""
    torch.manual_seed(0)
    sizes = {"encoder_width": 512, "encoder_layers": 1, "encoder_heads": 8}
    sizes |= {"decoder_width": 512, "decoder_layers": 1, "decoder_heads": 8}
    autoencoder = TitokConfig(resolution=16, patch=4, tokens=10, latent_channels=8, **sizes)
    quantizer = find_tokenizer("x", str(stored_file("llamagen_vq", path.parent))).config.quantizer
    quantizer = dataclasses.replace(quantizer, unit_vectors=False)
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer))
    renamed = (
        ("encoder.latent_tokens", "latent_tokens"),
        (".attn.in_proj.", ".attn.in_proj_"),
        (".mlp.0.", ".mlp.c_fc."),
        (".mlp.2.", ".mlp.c_proj."),
        ("quantizer.codes.", "quantize.embedding."),
    )
    keys = {key: key for key in tokenizer.state_dict()}
    for ours, theirs in renamed:
        keys = {key: published.replace(ours, theirs) for key, published in keys.items()}
    torch.save({keys[key]: value for key, value in tokenizer.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of original-like photographs, and a tiny file of every family beside it."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "images").mkdir()
    photos = PhotosSource(image_size=96, split="validation", flip=False)
    for number in range(IMAGES):
        pixels = photos.get(number, 0).image.permute(1, 2, 0).numpy()[:, : 80 + number]
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "images" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def files(place) -> dict[str, Path]:
    """Family → its file."""
    return {family: stored_file(name, place) for family, name in FILES.items()} | {
        "titok": tiny_titok(place / "titok.bin")
    }


def parameters(place, files, chosen=None, **settings):
    chosen = {family: files[family] for family in chosen or files}
    told = [f"{family}={name}" for family, name in HELD.items() if family in chosen]
    standard = {"preset": "smoke", "images": str(place / "images"), "image_size": 32, "weights": "ema"}
    standard |= {"checkpoints": tuple(f"{family}={path}" for family, path in chosen.items()), "families": tuple(told)}
    return ComparisonParameters(**standard | settings)


@pytest.fixture(scope="module")
def measured(place, files):
    """All families in one session: the session and its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQLAB_RUNS", str(place / "runs"))
        session = open_comparison(parameters(place, files))
        return session, session.measure(progress=False)


def test_there_is_a_file_of_every_family_but_those_with_tests_of_their_own(files):
    assert set(available_families()) - set(files) == {"ibq", "magvit2"}


def test_every_family_is_measured_at_one_size(measured):
    session, results = measured
    assert session.rules.protocol.name == "seed-voken-ibq at 32 px, digits features"
    assert session.rules.sizes == {"titok": 16}
    assert [result.tokenizer.system for result in results] == [result.tokenizer.label for result in results]
    for result in results:
        assert result.originals.shape[1:] == result.reconstructions.shape[1:] == (32, 32, 3)
        assert result.values["psnr"] > 0 and {card.images for card in result.cards if card.value > 0} == {IMAGES}
    remarks = {result.tokenizer.label: result.cards[0].remarks for result in results}
    assert any("takes 16 × 16 pixels only" in remark for remark in remarks["titok"])
    assert not any("takes" in remark for remark in remarks["vqgan"])
    (caution,) = session.cautions
    assert caution.startswith("resized twice: titok takes 16 × 16 pixels only") and "image_size=16" in caution
    assert next(result.grid for result in results if result.tokenizer.label == "titok") == (1, 10)


def test_each_has_its_own_systems_protocol_in_proportion(measured):
    session, results = measured
    names = {label: rules.protocol.name.split(" ")[0] for label, rules in session.own.items()}
    assert names == {family: find_family(family).protocol for family in names}
    assert set(names.values()) == {"taming", "llamagen", "vqgan-lc", "simvq", "titok", "maskbit"}
    assert session.own["simvq"].protocol.image_size == 16  # half the common size, as 128 is of 256
    assert session.own["titok"].protocol.image_size == 16  # the only size that this one takes
    assert session.own["maskbit"].protocol.image_size == 32
    assert set(names) == {result.tokenizer.label for result in results if result.own}


def test_differences_add_up_and_each_part_is_what_it_says(measured, place):
    session, results = measured
    printed = {"llamagen": Printed(own=PublishedNumbers(psnr=20.0, usage=0.5, protocol="llamagen"))}
    table = protocol_shares(results, printed).set_index(["label", "key"])
    own_minus_common = table["own"] - table["common"]
    assert np.allclose(table["measuring"] + table["preparing"], own_minus_common)
    row = table.loc["llamagen", "psnr"]
    total = row["unexplained"] + row["measuring"] + row["preparing"]
    assert total == pytest.approx(20.0 - row["common"]) and row["printed"] == 20.0
    assert math.isnan(table.loc["llamagen", "rfid"]["printed"]), "digits' features give no rFID"
    assert (table.xs("usage", level="key")["measuring"] == 0).all()

    # By hand: the reconstructions of LlamaGen's images, cut as the common protocol cuts them.
    rules = session.own["llamagen"]
    tokenizer = load_tokenizer(results[3].tokenizer.path)
    mixed = dataclasses.replace(rules.protocol, name="mixed", pixel_rounding=session.rules.protocol.pixel_rounding)
    mixed = dataclasses.replace(mixed, rounding=session.rules.protocol.rounding)
    scores = evaluate_reconstruction(
        tokenizer, str(place / "images"), mixed, metrics=("psnr", "ssim", "rfid"), progress=False
    )
    for key in ("psnr", "ssim", "rfid"):
        assert table.loc["llamagen", key]["same_reconstructions"] == pytest.approx(scores[key].value, rel=1e-6), key
    assert table.loc["llamagen", "psnr"]["measuring"] != 0 != table.loc["llamagen", "psnr"]["preparing"]
    # VQGAN's images are prepared as IBQ's are: nothing is left but measuring.
    assert table.loc["vqgan", "rfid"]["measuring"] != 0
    assert table.loc["vqgan", "rfid"]["preparing"] == pytest.approx(0, abs=1e-6)


def test_the_other_reference_is_the_images_of_the_other_protocol(place, files):
    tokenizer, images = load_tokenizer(files["llamagen"]), str(place / "images")
    common = dataclasses.replace(PROTOCOLS["seed-voken-ibq"], name="a", image_size=32, extractor="digits", source="")
    own = dataclasses.replace(common, name="b", resize="adm")
    settings = {"metrics": ("rfid",), "progress": False, "remeasure": common}
    with_other = evaluate_reconstruction(tokenizer, images, own, reference=images, **settings)
    assert with_other.remeasured[0].value == with_other["rfid"].value, "one rounding and one network"
    other = with_other.other_reference
    assert other.protocol == "a" and other.value != with_other["rfid"].value
    same = evaluate_reconstruction(tokenizer, images, common, reference=images, **settings)
    assert same.other_reference.value == pytest.approx(same["rfid"].value, rel=1e-9)
    assert evaluate_reconstruction(tokenizer, images, own, **settings).other_reference is None


def test_sentences_carry_the_numbers_of_the_table(measured):
    session, results = measured
    printed = {"llamagen": Printed(own=PublishedNumbers(psnr=20.0, usage=0.5, protocol="llamagen", source="its page"))}
    table = protocol_shares(results, printed)
    text = describe_shares(table, reasons_against_own(session, printed))
    lines = text.splitlines()
    (line,) = (line for line in lines if line.startswith("llamagen, PSNR"))
    row = table.set_index(["label", "key"]).loc["llamagen", "psnr"]
    for name in ("own", "common"):
        assert f"{row[name]:.4g} dB under" in line
    assert (
        "printed 20 dB (its page)" in line
        and f"{row['unexplained']:+.3g} dB is of images, weights or implementation" in line
    )
    assert f"{row['measuring']:+.3g} dB by measuring the same reconstructions otherwise" in line
    assert f"{row['preparing']:+.3g} dB by preparing the images otherwise" in line
    (line,) = (line for line in lines if line.startswith("ldm, usage"))
    assert line.endswith("both protocols give the same.")
    (line,) = (line for line in lines if line.startswith("llamagen: what is not explained"))
    assert "6 images were measured, the published numbers are from 50,000" in line
    assert "averaged" not in line, "its one set of weights is its authors'"
    assert "must not be compared" in judge_comparison(session.rules, printed)


def test_table_1_has_the_papers_columns_in_its_order(measured):
    _, results = measured
    printed = {
        "vqgan": Printed(
            own=PublishedNumbers(rfid=4.98, protocol="taming"), table_1=PublishedNumbers(rfid=4.98, usage=0.059)
        )
    }
    table = table_1(results, printed)
    paper = ["method", "token_type", "tokens", "ratio", "train_resolution", "codebook_size", "codebook_dim"]
    assert list(table)[:10] == [*paper, "table_1_rfid", "table_1_lpips", "table_1_usage"]
    rows = table.set_index("method")
    assert rows.loc["titok", ["token_type", "tokens"]].tolist() == ["1D", "10"] and math.isnan(
        rows.loc["titok", "ratio"]
    )
    assert rows.loc["diffusers", ["token_type", "tokens", "ratio"]].tolist() == ["2D", "16 × 16", 2]
    assert rows.loc["simvq", "train_resolution"] == "128 × 128" and rows.loc["maskbit", "codebook_dim"] == 0
    assert rows.loc["vqgan", "table_1_usage"] == 0.059 and rows.loc["vqgan", "authors_protocol"] == "taming"
    for result in results:
        assert rows.loc[result.tokenizer.label, "psnr"] == result.values["psnr"]
        own = {card.key: card.value for card in result.own.cards}
        assert rows.loc[result.tokenizer.label, "own_ssim"] == own["ssim"]
    lines = table_1_markdown(table).splitlines()
    assert len(lines) == 2 + len(results) and "usage (%), table 1 |" in lines[0] and "| 5.9 |" in lines[2]
    assert "LPIPS, table 1" not in lines[0], "empty columns are left out"


class TestTokens:
    def test_one_row_for_each_with_every_key(self, measured):
        _, results = measured
        table = token_table(results)
        assert list(table) == ["label", "K", "D", "images", *COLUMNS]
        rows = table.set_index("label")
        assert (rows["usage_any_hit"] == [result.values["usage"] for result in results]).all()
        assert rows.loc["titok", "tokens_per_image"] == 10
        assert rows[["entropy_bits", "mix_bits", "feature_to_code_distance", "code_norm_mean"]].notna().all(axis=None)
        assert rows.loc["llamagen", "feature_norm_mean"] == pytest.approx(1), "it compares unit vectors"
        assert rows.loc["llamagen", "code_norm_mean"] == pytest.approx(1)
        shown = show_tokens(table)
        assert list(shown) == list(rows.index) and "usage, window_65536 (share of codes)" in shown.index
        assert shown.loc["usage, window_65536 (share of codes)"].eq("–").all()

    def test_the_numbers_are_those_of_all_features_at_once(self, place, files):
        tokenizer = load_tokenizer(files["diffusers"])
        opened = open_images(str(place / "images"), resize="pil", image_size=32)
        statistics = TokenStatistics(tokenizer, IMAGES, tokenizer.latent_grid(32, 32))
        seen = []
        protocol = dataclasses.replace(PROTOCOLS["open-magvit2"], name="small", image_size=32, source="")
        evaluate_reconstruction(
            tokenizer,
            str(place / "images"),
            protocol,
            metrics=("psnr",),
            batch_size=4,
            observers=[statistics, lambda numbers, out: seen.append(out)],
            progress=False,
        )
        features, codes = (
            torch.cat([maps.double().permute(0, 2, 3, 1).flatten(0, 2) for maps in kind])
            for kind in ([out.features for out in seen], [out.quantizer.quantized for out in seen])
        )
        indices = torch.cat([out.quantizer.indices for out in seen]).reshape(opened.count, -1)
        row = statistics.row()
        error = (features - codes).square()
        assert row["quantization_error"] == pytest.approx(float(error.mean()), rel=1e-6)
        share = float(error.sum() / (features - features.mean(0)).square().sum())
        assert row["relative_quantization_error"] == pytest.approx(share, rel=1e-6)
        assert row["relative_quantization_error"] >= variance_lost(features, codes) - 1e-3, "which fits a linear map"
        bits = measure_ngrams(indices[[0, 1, 2, 4, 5]], indices[[3]], 64, (16, 16))
        assert row["mix_bits"] == pytest.approx(bits["mix"].mean())

    def test_kept_tokens_and_features_do_not_grow_with_the_images(self, files, monkeypatch):
        monkeypatch.setattr("ibqlab.grids.token_statistics.MOST_TOKENS", 4 * 256)
        monkeypatch.setattr("ibqlab.grids.token_statistics.MOST_FEATURES", 100)
        tokenizer = load_tokenizer(files["diffusers"])
        images = torch.rand(32, 3, 32, 32) * 2 - 1
        statistics = TokenStatistics(tokenizer, len(images), (16, 16))
        for numbers in torch.arange(len(images)).split(5):
            with torch.no_grad():
                statistics(numbers, tokenizer(images[numbers]))
        assert sum(map(len, statistics._tokens)) == 4 and sum(map(len, statistics._features)) <= 100
        assert statistics.row()["mix_bits"] > 0

    def test_a_stream_has_the_usage_of_its_tokens_under_every_definition(self):
        generator = torch.Generator().manual_seed(0)
        indices = (torch.rand(600, 4, 32, generator=generator) ** 3 * 500).long()
        counter = UsageCounter(512, images_per_batch=20)
        for batch in indices.split(37):
            counter.update(batch)
        found = counter.usages()
        assert found.keys() == USAGE_DEFINITIONS.keys()
        for name, usage in found.items():
            expected = measure_usage(indices, 512, name, tokens_per_image=128, images_per_batch=20)
            assert usage == expected, name

    def test_too_few_tokens_leave_a_definition_out(self):
        counter = UsageCounter(16)
        with pytest.raises(ValueError, match="at least 1 image; none came"):
            counter.usages()
        counter.update(torch.zeros(31, 2, 2, dtype=torch.long))
        assert counter.usages().keys() == {"any_hit", "above_uniform_8pct"}
        counter.update(torch.zeros(1, 2, 2, dtype=torch.long))
        assert "one_batch" in counter.usages()


class TestRequests:
    def test_a_file_that_does_not_tell_its_family_needs_it_in_both_notebooks(self, place, files):
        with pytest.raises(ValueError, match="family='ldm'"):
            open_comparison(parameters(place, files, ["ldm"], families=()))
        with pytest.raises(ValueError, match="families names 'b'; the checkpoints' labels are ldm"):
            open_comparison(parameters(place, files, ["ldm"], families=("b=ldm",)))
        as_vqgan = open_comparison(parameters(place, files, ["ldm"], families=("ldm=vqgan",)))
        assert as_vqgan.tokenizers[0].system == "vqgan"
        one = EvaluationParameters(checkpoint=str(files["ldm"]), family="ldm", preset="smoke", image_size=32)
        assert open_evaluation(one).tokenizers[0].system == "ldm"

    def test_another_family_is_another_result(self, place, files, monkeypatch, tmp_path):
        computed = []
        compute = evaluation_session.evaluate_reconstruction
        monkeypatch.setattr(
            evaluation_session, "evaluate_reconstruction", lambda *a, **k: computed.append(k) or compute(*a, **k)
        )
        settings = {"own_protocols": False, "metrics": ("psnr", "usage"), "output": str(tmp_path / "out")}
        for family in ("ldm", "vqgan", "ldm"):
            open_comparison(parameters(place, files, ["ldm"], families=(f"ldm={family}",), **settings)).measure(False)
        assert len(computed) == 2

    def test_own_protocols_are_measured_once_and_may_be_left_out(self, place, files, monkeypatch, tmp_path):
        computed = []
        compute = evaluation_session.evaluate_reconstruction
        monkeypatch.setattr(
            evaluation_session,
            "evaluate_reconstruction",
            lambda *a, **k: computed.append(a[2].name) or compute(*a, **k),
        )
        settings = {"metrics": ("psnr",), "output": str(tmp_path / "out")}
        without = open_comparison(parameters(place, files, ["maskbit"], own_protocols=False, **settings))
        assert not without.own and without.measure(False)[0].own is None
        (first,) = open_comparison(parameters(place, files, ["maskbit"], **settings)).measure(False)
        (again,) = open_comparison(parameters(place, files, ["maskbit"], **settings)).measure(False)
        assert [name.split(" ")[0] for name in computed] == ["seed-voken-ibq", "maskbit"]
        assert again.own == first.own and first.own.common_reference is None
        stored = next((tmp_path / "out" / "results").glob("*-own.json"))
        stored.write_text(stored.read_text()[:40])
        (mended,) = open_comparison(parameters(place, files, ["maskbit"], **settings)).measure(False)
        assert len(computed) == 3 and mended.own == first.own
        stored.write_text(json.dumps({"cards": 1}))
        assert open_comparison(parameters(place, files, ["maskbit"], **settings)).measure(False)[0].own == first.own

    def test_the_only_weights_of_a_family_stand_for_either(self, place, files):
        both = open_comparison(parameters(place, files, ["simvq", "vqgan"], weights="ema", metrics=("psnr",)))
        assert both.rules.weights == "ema" and both.rules.as_given == ("vqgan",) and not both.cautions
        with pytest.warns(EvaluationWarning, match="weights: simvq is measured with its weights as trained"):
            raw = open_comparison(parameters(place, files, ["simvq", "vqgan"], weights="raw", metrics=("psnr",)))
        assert len(raw.cautions) == 1

    def test_averages_of_published_files_are_measured_unasked(self, place, files):
        session = open_comparison(parameters(place, files, ["simvq", "vqgan"], weights="", metrics=("psnr",)))
        assert session.rules.weights == "ema" and not session.cautions

    @pytest.mark.parametrize("images", ["photos", ""])
    def test_the_photographs_fit_tokenizers_of_larger_images(self, images, place, files):
        told = {"images": images, "image_size": 0, "limit": 4, "metrics": ("psnr",)}
        assert open_comparison(parameters(place, files, ["llamagen"], **told)).rules.images.side == (224, 224)
        assert open_comparison(parameters(place, files, ["simvq"], **told)).rules.images.side == (128, 128)

    def test_averages_that_a_file_lacks_are_asked_for_before_any_work(self, place, files):
        with pytest.raises(ConfigError, match="ldm holds no averaged weights; give weights=raw"):
            open_comparison(parameters(place, files, ["ldm"], families=("ldm=ibq",)))

    def test_published_sizes_are_taken_as_they_are(self, place, files):
        session = open_comparison(
            parameters(place, {"simvq": files["simvq"]}, preset="published", image_size=0, metrics=("psnr",))
        )
        assert session.rules.protocol == PROTOCOLS["seed-voken-ibq"]
        assert session.own["simvq"].protocol == PROTOCOLS["simvq"]
        assert any(text.startswith("size: ") for text in session.cautions), "96 pixels are enlarged to 256"
        resized = open_comparison(
            parameters(place, {"simvq": files["simvq"]}, preset="published", image_size=64, metrics=("psnr",))
        )
        assert resized.rules.protocol.name == "seed-voken-ibq at 64 px"
        assert resized.own["simvq"].protocol.name == "simvq at 32 px"


def test_a_tokenizer_of_one_size_is_given_images_of_that_size(files):
    inner = load_tokenizer(files["titok"])
    tokenizer = ResizingTokenizer(inner, 16)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    small = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        out, expected = tokenizer(images), inner(small)
    assert torch.equal(out.quantizer.indices, expected.quantizer.indices)
    assert out.reconstruction.shape == images.shape and tokenizer.latent_grid(32, 32) == (1, 10)
    flat = torch.full((1, 3, 32, 32), 0.25)
    with torch.no_grad():
        back = tokenizer(flat).reconstruction
        direct = inner(flat[:, :, :16, :16]).reconstruction
    assert torch.allclose(back.mean(), direct.mean(), atol=1e-5)


class TestPrintedNumbers:
    def test_a_published_file_is_recognised_by_system_codes_and_parameters(self, tmp_path):
        rows = published_files()
        known = rows["MaskBit-14bit"]
        model = _full_size("maskbit/maskbit_tokenizer_14bit", tmp_path / known.file)
        (found,) = find_published([model]).values()
        assert found == Printed(own=known.own, table_1=known.table_1)
        assert found.number("rfid") == 1.37 and found.table_1.rfid == 1.61
        other = dataclasses.replace(model, system="vqgan_plus")
        assert not find_published([other])

    def test_of_several_alike_the_name_of_the_file_decides(self, tmp_path):
        model = _full_size("llamagen/VQ-16", tmp_path / "vq_ds16_c2i.pt")
        assert find_published([model])["m"].number("rfid") == 2.19
        assert not find_published([dataclasses.replace(model, path=tmp_path / "mine.pt")])
        named = find_published([dataclasses.replace(model, path=tmp_path / "mine.pt")], ["m=LlamaGen-VQ-16"])
        assert named["m"].number("usage") == named["m"].table_1.usage == 0.97, "its authors print none"
        assert [numbers.source for numbers in named["m"].sets] == ["LlamaGen README", "IBQ, table 1"]


def _full_size(name: str, path: Path):
    from golden import golden_file  # noqa: PLC0415
    from peers import full_size  # noqa: PLC0415

    from ibqlab.grids.evaluation_rules import TokenizerUnderTest  # noqa: PLC0415

    assert golden_file("peers/peers_state_dict_keys.json").is_file()
    family, config, _ = full_size(name)
    return TokenizerUnderTest(label="m", path=path, config=config, system=family)


@pytest.mark.usefixtures("warm_start")
def test_one_command_makes_table_1_of_every_family(place, files, tmp_path):
    request = parameters(place, files)
    lists = {name: json.dumps(list(getattr(request, name))) for name in ("checkpoints", "families")}
    given = {"preset": "smoke", "images": request.images, "image_size": "32", "weights": "ema"} | lists
    given["output"] = str(tmp_path / "out")
    arguments = [word for name, value in given.items() for word in ("-p", name, value)]
    done, _ = run_papermill(ROOT / "notebooks" / "compare_published.ipynb", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "out" / "table_1.csv")
    assert table["method"].tolist() == list(files) and table["psnr"].notna().all() and table["own_psnr"].notna().all()
    assert (tmp_path / "out" / "table_1.md").read_text().count("\n") == 2 + len(files)
    tokens, shares = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("tokens", "protocols"))
    assert tokens["label"].tolist() == list(files) and {*VALUES, *PARTS} <= set(shares)
    pictures = {file.stem for file in (tmp_path / "out" / "figures").glob("*.png")}
    assert pictures == {"metrics", "protocols", "rarefaction", "reconstructions"}


class TestOneProtocol:
    """Runs of ours, and tokenizers whose system evaluates by the common protocol."""

    @pytest.fixture
    def table(self, measured):
        _, results = measured
        result = dataclasses.replace(results[0], own=None)
        printed = {
            "vqgan": Printed(own=PublishedNumbers(psnr=20.0, protocol=result.cards[0].protocol, source="a page"))
        }
        return protocol_shares([result], printed), result

    def test_nothing_is_the_protocols_where_it_is_the_same(self, table):
        rows, result = table
        (line, *_) = (text for text in describe_shares(rows).splitlines() if "PSNR" in text)
        difference = 20 - result.values["psnr"]
        assert f"the protocol is the same, so {difference:+.3g} dB is of images, weights or implementation" in line
        assert (rows[["measuring", "preparing"]] == 0).all(axis=None)

    def test_no_part_is_claimed_where_the_printed_protocol_is_another(self, table):
        rows, _ = table
        text = describe_shares(rows.assign(printed_protocol="llamagen"))
        assert "no part of it is told by one protocol alone" in text

    def test_nothing_to_explain(self, measured):
        _, results = measured
        text = describe_shares(protocol_shares([dataclasses.replace(results[0], own=None)], {}))
        assert text.startswith("vqgan: nothing is printed for it and no protocol of its own is known")

    def test_figures_refuse_empty_tables(self, table):
        rows, _ = table
        with pytest.raises(ValueError, match="a table of protocols has no rows"):
            plot_protocol_dots(rows[:0])
        with pytest.raises(ValueError, match="rarefaction table"):
            plot_tokenizer_rarefaction(rows)


def test_a_plugins_family_must_name_a_protocol_that_is_there(place, files, monkeypatch):
    monkeypatch.setattr(type(find_family("ldm")), "protocol", "mine")
    with pytest.raises(ValueError, match="the family 'ldm' names the protocol 'mine', which is none; write one of"):
        open_comparison(parameters(place, files, ["ldm"]))
    monkeypatch.setattr(type(find_family("ldm")), "protocol", "")
    assert not open_comparison(parameters(place, files, ["ldm"])).own


def test_the_bundled_photographs_need_no_folder(place, files, tmp_path):
    settings = {"images": "", "limit": 4, "output": str(tmp_path / "out"), "metrics": ("psnr", "usage")}
    session = open_comparison(parameters(place, files, ["vqgan", "maskgit", "simvq", "titok"], **settings))
    # No file is resized, so that protocols differ by rounding and by size alone.
    assert session.own.keys() == {"vqgan", "maskgit", "simvq", "titok"}
    first, *_ = results = session.measure(progress=False)
    assert "crops of" in first.cards[0].reference and {result.cards[0].images for result in results} == {4}
    table = protocol_shares(results, {}).set_index(["label", "key"])
    assert table.loc["maskgit", "psnr"]["measuring"] != 0 == table.loc["maskgit", "psnr"]["preparing"]
