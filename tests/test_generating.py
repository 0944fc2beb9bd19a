"""From recipe to gallery: tokenizer, tokens, generator and images, each made once; and who judges them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_pretrained_generators import tiny_tokenizer
from test_tokens_store import make_tokenizer
from test_transformer import SMALL, make

import ibqlab.generating
from ibqlab.cli import main
from ibqlab.data import DataConfig, open_data
from ibqlab.generating import GeneratorRunParameters, describe_run, draw_gallery, draw_images, prepare_pipeline
from ibqlab.generating.gallery import Gallery, GalleryParameters, choose_classes, gallery_settings, open_gallery
from ibqlab.generating.pairs import class_names, open_pair
from ibqlab.generator.sampling_config import SAMPLING_CARDS
from ibqlab.metrics.digits_classifier import recognise_digits
from ibqlab.plots import generator_curve_table, plot_gallery, plot_generator_curves
from ibqlab.pretrained import CheckpointError
from ibqlab.runs import list_runs, runs_root
from ibqlab.tokens.writing import write_tokens
from ibqlab.training import recipe_config, train_generator
from ibqlab.widgets import LiveCurves, SampleExplorer

DIGITS = (
    *("data.image_size=8", "generator.vocabulary_size=32", "generator.grid_size=4", "generator.width=32"),
    *("generator.depth=2", "generator.num_heads=2", "steps=4", "batch_size=8", "record.validation_images=20"),
)
DIGITS_TOKENIZER = (
    *("data.image_size=8", "tokenizer.autoencoder.channel_multipliers=[1, 2]", "tokenizer.autoencoder.resolution=8"),
    *("tokenizer.quantizer.codebook_size=32", "steps=2", "record.early_snapshots=[]"),
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Tokenizer, tokens and generator of tiny digits, in a folder of all runs of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQLAB_RUNS", str(tmp_path_factory.mktemp("runs")))
        parameters = GeneratorRunParameters(
            preset="digits", output="all", settings=DIGITS, tokenizer_settings=DIGITS_TOKENIZER
        )
        made = prepare_pipeline(parameters)
        made.write_tokens(made.train_tokenizer())
        made.train_generator()
    return made


@pytest.fixture
def here(pipeline, monkeypatch):
    """The pipeline, with its folder as the folder of all runs."""
    monkeypatch.setenv("IBQLAB_RUNS", str(pipeline.folder.parent))
    return pipeline


def test_each_step_is_done_once(here, monkeypatch):
    assert sorted(path.name for path in here.folder.iterdir()) == ["generator", "tokenizer", "tokens"]
    monkeypatch.setattr("ibqlab.training.tokenizer.loop._TokenizerTrainer.fit", None)
    monkeypatch.setattr("ibqlab.training.generator.loop._GeneratorTrainer.fit", None)
    tokenizer = here.train_tokenizer()
    monkeypatch.setattr(tokenizer, "encode_indices", None)
    assert here.write_tokens(tokenizer).manifest.tokenizer == tokenizer.fingerprint()
    run = here.train_generator()
    assert run.status == "finished"
    assert run.config["tokens"] == "all/tokens" and run.config["tokenizer"] == "all/tokenizer"
    table = list_runs(here.folder).set_index("name")
    assert table.loc["generator", "kind"] == "generator" and table.loc["tokenizer", "kind"] == "tokenizer"
    assert table.loc["generator", "codebook_size"] == 32 and table.loc["generator", "validation_loss"] < 4


def test_folders_are_named_by_their_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
    names = {
        prepare_pipeline(GeneratorRunParameters(preset="smoke", **settings)).folder.name
        for settings in ({}, {"settings": ("steps=5",)}, {"tokenizer_settings": ("steps=5",)}, {"tokenizer": "a"})
    }
    assert len(names) == 4 and all(name.startswith("train_generator-smoke-") for name in names)
    fly = prepare_pipeline(GeneratorRunParameters(preset="smoke", store_tokens=False))
    assert fly.generator.tokens == "" and fly.write_tokens(None) is None
    with pytest.raises(ValueError, match="tokenizer_settings are for the preset's tokenizer"):
        GeneratorRunParameters(tokenizer="a", tokenizer_settings=("steps=1",))
    with pytest.raises(ValueError, match="preset must be one of"):
        GeneratorRunParameters(preset="digit")


def test_the_tokens_cost_is_drawn_into_the_run(here):
    run = here.train_generator()
    report, figure = describe_run(run, here.train_tokenizer(), images=64)
    assert {"generator with class", "generator without class", "mix"} <= set(report.table["name"])
    assert figure.axes and (run.path / "figures" / "token_link.png").is_file()
    found = report.table.set_index("name")["bits_per_token"]["generator with class"]
    assert found == pytest.approx(run.metrics["validation_bits_per_token"].dropna().iloc[-1], rel=1e-6)


# --- galleries ---


def test_images_depend_on_their_seed_and_class_alone():
    pair = make(SMALL), tiny_tokenizer()
    drawn = draw_gallery(*pair, [0, 2], columns=3, seed=5, cfg_scale=2.0)
    assert drawn.images.shape == (2, 3, 6, 6, 3) and drawn.images.dtype == np.uint8
    assert drawn.seeds.tolist() == [[5, 6, 7]] * 2 and drawn.labels.tolist() == [[0] * 3, [2] * 3]
    alone = draw_images(*pair, torch.tensor([2]), seed=6, cfg_scale=2.0)
    assert np.array_equal(alone[0], drawn.images[1, 1])
    with pytest.raises(ValueError, match="vocabulary must be the tokenizer's codebook"):
        draw_images(pair[0], tiny_tokenizer("magvit2"), torch.tensor([2]))


def test_classes_have_names_without_images_or_tokens(tmp_path):
    """The run notes them; an earlier run, which does not, has those of its stored tokens."""
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pets" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = DataConfig(source=str(tmp_path / "pets"), image_size=8, validation_share=0.3)
    tokenizer = make_tokenizer()
    write_tokens(tokenizer, data, tmp_path / "tokens", progress=False)
    settings = {"tokens": str(tmp_path / "tokens"), "data.source": data.source, "data.validation_share": 0.3}
    config = recipe_config("builtin/digits_generator", settings, (*DIGITS, "generator.num_classes=2"))
    run = train_generator(config, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "pets")
    assert class_names(run.path) == ["cat", "dog"]
    command = [
        "sample",
        str(run.path),
        "--classes",
        "dog",
        "--images-per-class",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["classes"] == [1]
    misspelt = CliRunner().invoke(main, [*command[:3], "dgo", "--output", str(tmp_path / "other")])
    assert misspelt.exit_code == 2 and "did you mean 'dog'" in misspelt.output
    facts = json.loads((run.path / "provenance.json").read_text())
    for split in ("train", "validation"):
        del facts["data"][split]["classes"]
    (run.path / "provenance.json").write_text(json.dumps(facts))
    assert class_names(run.path) == ["cat", "dog"]
    shutil.rmtree(tmp_path / "tokens")
    assert class_names(run.path) == []


def test_galleries_are_saved_into_the_run(here):
    parameters = GalleryParameters(
        generator="all/generator", classes=(1, 7), images_per_class=2, cfg_scales=(1.0, 3.0), top_ps=(0.9,), seed=4
    )
    gallery = open_gallery(parameters)
    assert gallery.name == "all/generator" and gallery.names == [str(digit) for digit in range(10)]
    gallery.figure_seeds(choose_classes(parameters, gallery.generator))
    assert len(list(gallery.figures_settings())) == 2
    folder = here.folder / "generator" / "figures"
    seeds = pd.read_csv(folder / "gallery.csv")
    assert seeds["seed"].tolist() == [4, 5, 4, 5] and seeds["class"].tolist() == [1, 1, 7, 7]
    assert set(seeds["cfg_scale"]) == {2.0}
    grid = pd.read_csv(folder / "gallery_t0.8_p0.9.csv")
    assert grid["cfg_scale"].tolist() == [1.0, 3.0] * 2 and set(grid["seed"]) == {4} and set(grid["top_p"]) == {0.9}
    assert (folder / "gallery_t1_p0.9.png").is_file()
    table = gallery.table()
    assert len(table) == 4 and set(table["images"]) == {2} and table["recognised"].between(0, 1).all()
    assert "of 10 generated digits as the class asked for" in gallery.judge(1)
    completed = gallery.figure_completions(2)
    assert [axes.get_title() for axes in completed.axes[:3]] == ["image", "its tokens", "2 of 4 rows"]
    assert pd.read_csv(folder / "completions.csv")["tokens_given"].tolist() == [8, 8]


def test_a_file_with_its_tokenizer_makes_a_gallery(here, tmp_path, monkeypatch):
    from ibqlab.pretrained import export_generator  # noqa: PLC0415

    told = {}
    monkeypatch.setattr("ibqlab.generating.gallery.tell", lambda **facts: told.update(facts))
    exported = export_generator(here.folder / "generator", tmp_path / "mine.safetensors")
    parameters = GalleryParameters(
        generator=str(exported), tokenizer=str(here.folder / "generator" / "tokenizer.safetensors"), images_per_class=1
    )
    gallery = open_gallery(parameters)
    gallery.figure_seeds([0])
    assert (runs_root() / "galleries" / "mine" / "gallery.png").is_file()
    assert told == {"folder": str((runs_root() / "galleries" / "mine").resolve())}
    gallery.table()
    assert told["result"] == "160 images drawn under 16 settings"
    assert "only digits have a classifier" in gallery.judge()
    assert gallery.figure_completions() is None
    assert class_names(exported) == []
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_pair(exported)


def test_a_permuted_generator_draws_nothing(here, tmp_path):
    config = recipe_config(
        "builtin/digits_generator",
        {"tokenizer": "all/tokenizer", "tokens": "all/tokens", "index_permutation": 1},
        DIGITS,
    )
    run = train_generator(config, tmp_path / "permuted", progress=False)
    with pytest.raises(CheckpointError, match="numbers the codes anew"):
        open_pair(run.path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"card": "ibq_s"}, "card must be one of"),
        ({"cfg_scales": ()}, "cfg_scales must hold at least one value"),
        ({"classes": (-1,)}, "classes must be at least 0"),
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"device": "gpu"}, "device must be cpu, cuda"),
    ],
)
def test_impossible_galleries_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        GalleryParameters(**settings)


def test_classes_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="classes must lie in 0 to 2"):
        choose_classes(GalleryParameters(classes=(3,)), make(SMALL))
    assert choose_classes(GalleryParameters(), make(SMALL)) == [0, 1, 2]


def test_cards_are_the_published_settings():
    published = {"ibq_b": (1.1, 2.25), "ibq_l": (1.0, 2.0), "ibq_xl": (1.15, 2.35), "ibq_xxl": (1.2, 2.85)}
    for name, card in published.items():
        config = SAMPLING_CARDS[name]
        assert (config.temperature, config.cfg_scale, config.top_k, config.top_p) == (*card, 0, 1.0)
    assert gallery_settings(GalleryParameters(card="ibq_xl")).cfg_scale == 2.35
    assert gallery_settings(GalleryParameters()).cfg_scale == 2.0
    assert SAMPLING_CARDS["magvit2_xl"].cfg_scale == (1.75, 1.85)


@pytest.mark.parametrize("of_digits", [True, False])
def test_a_gallerys_result_is_what_was_drawn_and_not_how_its_generator_was_trained(here, monkeypatch, of_digits):
    """`ibqlab run generation_gallery` ends with it."""
    parameters = GalleryParameters(generator="all/generator", classes=(1, 7), temperatures=(1.0,), top_ps=(0.9,))
    gallery, told = open_gallery(parameters), {}
    gallery.of_digits = of_digits
    monkeypatch.setattr("ibqlab.generating.gallery.tell", lambda **facts: told.update(facts))
    gallery.table()
    says = "of 2 digits recognised at the best of 4 settings" if of_digits else "8 images drawn under 4 settings"
    assert says in told["result"]


def test_all_names_of_the_root_are_there_and_samples_need_no_plots():
    assert all(callable(getattr(ibqlab.generating, name)) for name in ibqlab.generating.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'draw_image'"):
        _ = ibqlab.generating.draw_image
    code = "import sys; from ibqlab.generating import sample_images; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- judges and pictures ---


def test_the_judge_knows_real_digits_and_wrong_labels():
    source = open_data(recipe_config("builtin/digits").data, "validation")
    images = torch.stack([source.get(index, 0).image for index in range(len(source))])
    labels = torch.tensor(source.labels)
    right, wrong = recognise_digits(images, labels), recognise_digits(images, (labels + 1) % 10)
    assert right.real_share > 0.97 and right.share > 0.95 and wrong.share < 0.05
    assert "of 360 generated digits" in right.describe()


def test_a_gallery_needs_as_many_labels_as_images():
    images = np.zeros((2, 3, 4, 4, 3), np.uint8)
    figure = plot_gallery(images, ["a", "b"], ["x", "y", "z"], caption="facts")
    assert len(figure.axes) == 6 and figure.axes[0].get_ylabel() == "a" and figure.axes[2].get_title() == "z"
    with pytest.raises(ValueError, match="needs as many labels; got 1 for rows"):
        plot_gallery(images, ["a"], ["x", "y", "z"])
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        plot_gallery(images[0], ["a"], ["x"])


def test_curves_are_in_bits(here):
    metrics = here.train_generator().metrics
    table, figure = generator_curve_table(metrics), plot_generator_curves(metrics)
    assert table["validation_loss"].iloc[0] == pytest.approx(5.0)
    loss, *_ = figure.axes
    assert [line.get_label() for line in loss.get_lines()] == [
        "training",
        "validation, class given",
        "validation, class unknown",
    ]
    live = LiveCurves(here.generator, every=0)
    for row in metrics.to_dict("records"):
        live({name: value for name, value in row.items() if pd.notna(value)})
    assert "loss, gradient and learning rate against the step, up to step 4" in live.widget.value


def test_one_image_by_hand():
    view = SampleExplorer(make(SMALL), tiny_tokenizer(), ["cat", "dog"])
    assert [label for label, _ in view.label.options] == ["cat", "dog", "class 2", "no class"]
    first = view.picture.value
    assert first.startswith('<img alt="generated image of cat: seed 0, guidance 2, temperature 1, top-p 1"')
    view.seed.value = 3
    assert view.picture.value == f'<div style="opacity: 0.25">{first}</div><p>press draw</p>'
    view.seed.value = 0
    assert view.picture.value == first, "the controls describe it again"
    view.seed.value = 3
    view.button.click()
    assert "seed 3" in view.picture.value and view.picture.value != first
    page = view._repr_mimebundle_()
    assert page["text/html"] == view.picture.value
    assert page["text/plain"] == "generated image of cat: seed 3, guidance 2, temperature 1, top-p 1"
    view._tokenizer = tiny_tokenizer("magvit2")
    view.draw()
    assert "vocabulary must be the tokenizer" in view.picture.value


def test_a_gallery_and_its_controls_draw_in_the_type_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype must be one of 'auto'.* got 'half'"):
        GalleryParameters(dtype="half")
    pair, asked = (make(SMALL), tiny_tokenizer()), []
    plain = pair[0].sample

    def sample(labels, *, compiled, dtype, **settings):
        asked.append((compiled, dtype))
        return plain(labels, compiled=False, dtype=dtype, **settings)

    monkeypatch.setattr(pair[0], "sample", sample)
    parameters = {"dtype": "float64", "cfg_scales": (1.0,), "temperatures": (1.0,), "top_ps": (1.0,)}
    for compiled, expected in ((True, True), (False, None)):
        gallery = Gallery(pair, GalleryParameters(compiled=compiled, **parameters), tmp_path / "generator.safetensors")
        gallery.figure_seeds([0, 1])
        gallery.table()
        SampleExplorer(*pair, **gallery.computing)
        assert asked == [(expected, "float64")] * 3
        asked.clear()
