"""What views, figures, counts and generators make of tokens that lie on no grid: right, or left out with a sentence."""

import numpy as np
import pandas as pd
import pytest
import torch
from registry import SMALL_DIGITS
from test_titok import TINY

from ibqlab.config import parse, to_dict
from ibqlab.generating.pipeline import Pipeline
from ibqlab.generating.token_statistics import describe_tokenizer
from ibqlab.metrics import evaluate_reconstruction
from ibqlab.plots.token_link import plot_token_link, token_link_table
from ibqlab.pretrained import load_tokenizer
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokens.ngrams import measure_ngrams
from ibqlab.training import recipe_config, train
from ibqlab.views.atlas import AtlasSettings, pictures, write_atlas
from ibqlab.views.atlas_facts import atlas_facts
from ibqlab.views.card_page import card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import WHOLE_SIDE, index_patches, shrink
from ibqlab.views.subject import open_subject
from ibqlab.views.token_page import TokenImage, describe_token, token_html
from ibqlab.widgets.token_view import TokenView, compare_tokens

IMAGES = 20
T = TINY["tokens"]


def recipe(autoencoder: dict, **quantizer) -> TrainConfig:
    """A run of two steps on digits."""
    base = to_dict(recipe_config("builtin/smoke", {**SMALL_DIGITS, "steps": 2}))
    quantizer = {"name": "vq", "codebook_size": 16, "code_dim": 4, "codebook_init": "kmeans", **quantizer}
    base["tokenizer"] = {"autoencoder": autoencoder, "quantizer": quantizer}
    base["data"]["image_size"] = 8
    return parse(TrainConfig, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    return train(recipe(TINY), tmp_path_factory.mktemp("titok") / "run", progress=False).path


@pytest.fixture(scope="module")
def with_grid(tmp_path_factory):
    """A run of a tokenizer with 2 × 2 tokens."""
    autoencoder = {"base_channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1}
    autoencoder |= {"attention_resolutions": [], "resolution": 8, "latent_channels": 4}
    return train(recipe(autoencoder), tmp_path_factory.mktemp("grid") / "run", progress=False).path


@pytest.fixture
def index(trained):
    return index_patches(open_subject(trained), IMAGES, progress=False)


@pytest.fixture
def reader(trained):
    return CardReader(open_subject(trained), IMAGES, progress=False)


@pytest.fixture
def tokens(trained, index):
    return TokenImage(open_subject(trained).tokenizer, index, 1)


class TestPatches:
    def test_a_patch_is_the_whole_image(self, index):
        assert index.codes.shape == (IMAGES, 1, T) and index.patch == (8, 8) and not index.has_grid
        for token in (0, T - 1, T):
            cut, square = index.cut(token)
            assert np.array_equal(cut, index.pictures[token // T]) and square is None

    def test_large_images_are_shown_small(self):
        assert shrink(np.zeros((256, 192, 3), np.uint8), WHOLE_SIDE).shape == (96, 72, 3)

    def test_nothing_stands_beside_anything(self, index):
        assert all(len(index.beside(code)[0]) == 0 for code in range(16))
        assert index.is_inside(np.arange(T), 5).all()

    def test_images_take_turns_as_ever(self, index):
        code = int(index.counts.argmax())
        images = index.typical([code], 8) // T
        assert len(set(images)) == min(8, len(set(index.tokens_of(code) // T)))


class TestCards:
    def test_says_once_that_there_is_no_grid(self, reader):
        told = [text for text in reader.lacks if "lie on no grid" in text]
        assert told == [
            f"The {T} tokens of an image lie on no grid: each is about the whole image, which is shown in the place of "
            "a patch, and no code stands beside another."
        ]

    def test_of_one_code(self, reader):
        code = int(reader.index.counts.argmax())
        card = reader.read([code])
        assert card.beside == [] and card.near
        assert card.decoded.alone.shape == card.decoded.among_average.shape == (8, 8, 3)
        assert card.decoded.place[1:] == (0, T // 2)
        page = card_html(card)
        assert "Images of tokens nearest to it" in page and "patch" not in page.split("</style>")[1].split("lie on")[0]
        assert 'class="square"' not in page and "beside it" not in page
        assert f"token {T // 2}, this code, among tokens" in page and "row 0" not in page

    def test_a_code_alone_is_an_image_of_that_code_everywhere(self, reader):
        code = int(reader.index.counts.argmax())
        tokenizer = reader.subject.tokenizer
        with torch.no_grad():
            expected = tokenizer.decode_indices(torch.full((1, 1, T), code))[0].permute(1, 2, 0)
        shown = reader.read([code]).decoded.alone
        assert np.abs(shown / 127.5 - 1 - expected.clamp(-1, 1).numpy()).max() <= 1.01 / 127.5

    def test_of_several_codes(self, reader):
        card = reader.read(np.argsort(-reader.index.counts)[:3].tolist())
        assert card.beside_inside is None
        page = card_html(card)
        assert "What these images share: their mean" in page and "stand beside each other" not in page

    def test_of_unit_vectors_is_measured_by_the_cosine(self, tmp_path):
        config = recipe(TINY, codebook_init="uniform", unit_vectors=True)
        run = train(config, tmp_path / "run", progress=False)
        index = index_patches(open_subject(run.path), IMAGES, progress=False)
        assert index.ruler == "cosine" and (index.distance <= 2 + 1e-5).all()


class TestTokens:
    def test_stand_in_a_strip_and_not_over_the_picture(self, tokens):
        page = token_html(tokens, (0, 2))
        assert page.count('data-token="0,') == T and 'class="grid"' not in page and page.count('class="strip"') == 1
        assert f"{T} tokens of 16 codes" in page and "they lie on no grid" in page and "row 0" not in page
        for token, code in enumerate(tokens.codes[0]):
            assert f">{code}</text>" in page and f"token {token}</title>" in page
        assert describe_token(tokens, (0, 2)).startswith("Token 2: code ")

    def test_one_that_is_replaced_changes_the_picture(self, tokens):
        other = (int(tokens.codes[0, 3]) + 1) % 16
        tokens.replace((0, 3), other)
        assert tokens.codes[0, 3] == other and (tokens.codes != tokens.original).sum() <= 1
        assert "1 token replaced, decoded" in token_html(tokens, (0, 3))

    def test_no_such_token(self, tokens):
        with pytest.raises(ValueError, match=r"places are \(0, token\) with tokens 0 to 5, because .*got 1, 0"):
            tokens.replace((1, 0), 3)

    def test_in_a_notebook(self, trained):
        view = TokenView(trained, count=IMAGES)
        view.choose(0, 4)
        assert "Token 4: code" in view.static_html() and view.card.codes
        with pytest.raises(ValueError, match="because tokens lie on no grid"):
            view.choose(2, 0)

    def test_beside_one_with_a_grid_no_place_is_shared(self, trained, with_grid):
        pair = compare_tokens(trained, with_grid, images="digits", count=IMAGES)
        pair.children[0].choose(0, 4)
        assert pair.children[1].chosen is None
        pair.children[1].choose(1, 1)
        assert pair.children[0].chosen == (0, 4)
        pair.children[0].image.value = 3
        assert pair.children[1].tokens.image == 3


class TestAtlas:
    def test_shows_whole_images_and_says_why(self, trained, tmp_path):
        page = write_atlas(trained, tmp_path / "atlas", AtlasSettings(count=IMAGES), progress=False)
        facts = atlas_facts(page.parent)
        assert facts["grid"] == [1, 1] and facts["has_grid"] is False and facts["tokens"] == IMAGES * T
        assert sum("lie on no grid" in text for text in facts["lacks"]) == 1
        assert facts["decoded"] and "decoded_codes" not in facts
        assert '"beside"' not in (page.parent / "cards" / "0.js").read_text()

    def test_decodes_the_most_used_codes_alone(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(pictures, "WHOLE_CODES", 2)
        page = write_atlas(trained, tmp_path / "atlas", AtlasSettings(count=IMAGES), progress=False)
        facts = atlas_facts(page.parent)
        counts = index_patches(open_subject(trained), IMAGES, progress=False).counts
        assert len(facts["decoded_codes"]) == 2 < (counts > 0).sum()
        assert sorted(counts[facts["decoded_codes"]]) == sorted(counts)[-2:]
        assert any("Only the 2 most used codes are decoded" in text for text in facts["lacks"])

    def test_as_a_table_for_others(self, trained, tmp_path):
        pytest.importorskip("pyarrow")
        write_atlas(trained, tmp_path / "atlas", AtlasSettings(count=IMAGES, parquet=True), progress=False)
        table = pd.read_parquet(tmp_path / "atlas" / "codes.parquet")
        assert table["patch"].notna().sum() == (table["hits"] > 0).sum()


class TestCounts:
    def test_the_token_before_is_the_only_neighbour(self):
        numbers = np.random.default_rng(0)
        start = numbers.integers(8, size=(400, 1))
        sequence = (start + np.arange(6)) % 8  # each token follows from the one before
        bits = measure_ngrams(sequence[:300], sequence[300:], 8, (1, 6))
        assert bits.keys() == {"uniform", "unigram", "position", "left", "mix"}
        assert bits["left"][1:].max() < 0.3 and bits["position"].min() > 2.5
        assert bits["mix"][1:].max() < 0.3

    def test_with_classes(self):
        labels = np.arange(400) % 4
        sequence = np.repeat(labels[:, None], 6, 1)
        both = labels[:300], labels[300:]
        bits = measure_ngrams(sequence[:300], sequence[300:], 8, (1, 6), labels=both)
        assert {"class", "mix_class"} <= bits.keys() and not {"upper", "both"} & bits.keys()
        assert bits["class"].max() < 0.3 and bits["position"].min() > 1.5

    def test_the_figure_shows_a_row_of_tokens(self, trained):
        report = describe_tokenizer(load_tokenizer(trained, "raw"), recipe(TINY).data, images=40, validation_images=20)
        assert report.grid == (1, T) and "upper" not in set(report.table["name"])
        figure = plot_token_link(report)
        heat = figure.subfigs[0].axes[0]
        assert heat.get_xlabel() == "token" and heat.get_ylabel() == "" and not len(heat.get_yticks())
        assert heat.images[0].get_array().shape == (1, T)
        positions = token_link_table(report).dropna(subset="position")
        assert (positions["row"] == 0).all() and positions["column"].max() == T - 1

    def test_reconstructions_are_measured_as_ever(self, trained):
        tokenizer = load_tokenizer(trained, "raw").float().eval()
        batch = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        result = evaluate_reconstruction(tokenizer, [batch], "seed-voken-ibq", metrics=("psnr",), progress=False)
        assert result.counts.sum() == 4 * T


def test_tokens_that_no_generator_can_draw_are_not_written(trained, tmp_path):
    inputs = {"tokenizer": str(trained), "tokens": str(tmp_path / "tokens")}
    generator = recipe_config("builtin/smoke_generator", inputs)
    pipeline = Pipeline(folder=tmp_path, tokenizer=None, generator=generator)
    with pytest.raises(ValueError, match="tokens lie on no grid"):
        pipeline.write_tokens(pipeline.load_tokenizer())
    assert not (tmp_path / "tokens").exists()
