"""Studies: the right cells, only the missing ones trained, tables that say what the runs say."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from ibqlab.config import ConfigError, content_hash, field_types, load_yaml, parse
from ibqlab.grids.cells import EvaluationRequest
from ibqlab.notebooks.catalogue import find_notebook
from ibqlab.notebooks.parameters import notebook_parameters
from ibqlab.plots import plot_scaling, scaling_table
from ibqlab.plots.style import CAPTION_SIZE
from ibqlab.pretrained import load_tokenizer
from ibqlab.recipes.presets import PRESETS, load_presets
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.runs import Run, RunError
from ibqlab.runs.provenance_record import command_line
from ibqlab.studies import (
    DEFINITIONS,
    AblationParameters,
    LinkParameters,
    StudyError,
    StudyParameters,
    describe_collapse,
    method_grid,
    open_study,
    show_table,
    summary_table,
    write_study_report,
)
from ibqlab.studies import study as study_module
from ibqlab.studies.figures import figure_histogram, figure_reconstructions
from ibqlab.studies.method_grid import fill_in, grid_cells
from ibqlab.studies.pages import to_markdown
from ibqlab.studies.provenance import provenance_text
from ibqlab.studies.study import Study
from ibqlab.studies.table_files import GeneratorTranslation, Preset, TableRow, TokenizerTranslation
from ibqlab.training import find_recipe, load_recipe, recipe_config

GRID = {
    "preset": "smoke",
    "methods": ["vq", "ibq"],
    "initialisations": ["published"],
    "codebook_sizes": [16],
    "code_dims": [4],
    "seeds": [0, 1],
    "steps": 4,
}


def small(folder, name="scale_codebook", **changes):
    """A study of few runs of few steps."""
    return open_study(name, parse(StudyParameters, GRID | changes | {"output": str(folder)}))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    trained = small(tmp_path_factory.mktemp("study") / "small", "explore_collapse")
    trained.run(progress=False).check()
    return trained


def test_figures_of_one_seed_say_which(study, monkeypatch):
    for figure in (figure_histogram(study), figure_reconstructions(study)):
        assert figure.get_supxlabel().endswith("\nseed 0, the first of 2")
        assert figure._supxlabel.get_fontsize() == CAPTION_SIZE
    monkeypatch.setattr(study, "finished", lambda: [one for one in Study.finished(study) if one[0].labels["seed"] == 0])
    assert "seed" not in figure_histogram(study).get_supxlabel()


def test_images_that_are_not_there_stop_a_study_before_it_takes_its_folder(tmp_path):
    typed = StudyParameters(preset="smoke", output=str(tmp_path / "study"), settings=("data.source=nowhere",))
    with pytest.raises(ValueError, match="nowhere"):
        open_study("explore_collapse", typed).run(progress=False)
    assert not (tmp_path / "study").exists()


def test_reports_tell_of_images_that_were_not_read(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "a_b.png").write_bytes(b"")
    settings = [f"data.source={tmp_path / 'images'}"]
    made = small(tmp_path / "study", "explore_collapse", methods=["vq"], seeds=[0], steps=2, settings=settings)
    made.run(progress=False).check()
    line = "1 of 13 images unreadable: a\\_b.png"
    report = write_study_report(made).with_suffix(".md").read_text(encoding="utf-8")
    assert f"- images not read: {line}" in report
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "study" / "rows").glob("*.json")]
    assert f"- images not read: {line}" in provenance_text(rows, "ibqlab run mine")
    assert "not read" not in provenance_text([row | {"provenance": {}} for row in rows], "ibqlab run mine")


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_more_workers_and_threads_than_any_machine_has_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at most 16,384; got 1,000,000"):
        StudyParameters(preset="smoke", **{name: 10**6})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Preset, {"workers": 10**6}, "workers must be at most 16,384"),
        (Preset, {"samples_per_class": -1}, "samples_per_class must be at least 0"),
        (Preset, {"samples_per_class": 10**12}, "samples_per_class must be at most 1,000,000,000"),
        (Preset, {"seeds": [-1]}, "seeds must be at least 0"),
        (Preset, {"seeds": []}, "must be at least 1; got 0"),
        (Preset, {"weights": "emma"}, "did you mean|'ema', 'raw'"),
        (Preset, {"metrics": ["rfit"]}, "rfid"),
        (Preset, {"generation_metrics": ["fit"]}, "fid"),
        (TokenizerTranslation, {"codebook_sizes": {1024: 10**9}}, "codebook_sizes must be at most 16,777,216"),
        (TokenizerTranslation, {"code_dims": {8: 0}}, "code_dims must be at least 1"),
        (TokenizerTranslation, {"num_res_blocks": {1: 10**5}}, "num_res_blocks must be at most 1,024"),
        (GeneratorTranslation, {"depths": {16: 10**6}}, "depths must be at most 1,024"),
        (GeneratorTranslation, {"width_per_depth": 0}, "width_per_depth must be at least 1"),
        (TableRow, {"published": {"usage": 98.0}}, "usage must lie in 0 to 1; got 98"),
        (TableRow, {"published": {"rfid": -1.0}}, "rfid must lie in 0 to 1,000"),
        (TableRow, {"published": {"recal": 0.5}}, "published must be one of .*; did you mean 'recall'"),
        (EvaluationRequest, {"samples_per_class": 10**12}, "samples_per_class must be at most"),
    ],
)
def test_numbers_of_table_files_have_bounds(kind, changes, message):
    translations = {"recipe": "builtin/smoke", "codebook_sizes": {}, "code_dims": {}, "num_res_blocks": {}}
    given = {
        TokenizerTranslation: translations,
        GeneratorTranslation: {"recipe": "builtin/smoke_generator", "depths": {}},
    }
    assert parse(kind, given.get(kind, {}))
    with pytest.raises(ConfigError, match=message):
        parse(kind, given.get(kind, {}) | changes)


class TestRecipes:
    @pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("[bhi]*/*.yaml")), ids=lambda p: p.stem)
    def test_every_recipe_passes_the_door(self, path):
        assert recipe_config(str(path)).steps >= 1

    def test_every_preset_of_every_study_and_notebook_is_a_grid_that_can_run(self):
        for path in (EXPERIMENTS / "studies").glob("*.yaml"):
            for preset in load_yaml(path):
                assert open_study(path.stem, StudyParameters(preset=preset)).cells
        for preset in PRESETS.values():
            for name in (preset.tokenizer, *preset.generator, *preset.link):
                assert not name or find_recipe(name).is_file()

    def test_every_file_of_grids_uses_the_words_of_the_one_table(self, tmp_path):
        for path in (*(EXPERIMENTS / "studies").glob("*.yaml"), EXPERIMENTS / "tables" / "presets.yaml"):
            assert load_presets(path)
        (tmp_path / "grid.yaml").write_text("smoke: {}\nlabtop: {}\n")
        with pytest.raises(ConfigError, match=r"grid.yaml: the preset 'labtop' is none of smoke, demo, laptop"):
            load_presets(tmp_path / "grid.yaml")

    def test_the_imagenet_recipe_is_the_published_one(self):
        config = recipe_config("imagenet/ibq_16384")
        assert config.steps == 330 * math.ceil(1_281_166 / 256)
        assert config.tokenizer.autoencoder.channel_multipliers == (1, 1, 2, 2, 4)
        assert config.optimizer.betas == (0.5, 0.9)

    def test_an_unknown_recipe_is_answered_with_the_nearest(self):
        with pytest.raises(ConfigError, match="did you mean 'builtin/photos'"):
            find_recipe("builtin/foto")

    def test_settings_replace_what_they_name(self):
        recipe = load_recipe(
            "builtin/smoke", {"tokenizer.quantizer.name": "vq"}, ["steps=7", "optimizer.learning_rate=1e-2"]
        )
        assert (recipe["steps"], recipe["optimizer"]["learning_rate"]) == (7, 0.01)
        assert recipe["tokenizer"]["quantizer"]["name"] == "vq"
        assert recipe["batch_size"] == 4


def claim(study, monkeypatch):
    """The folder as a study's start leaves it before the first run."""
    with monkeypatch.context() as patch:
        patch.setattr(study_module, "run_cells", lambda *_, **__: None)
        study.run(progress=False)


class TestGrid:
    def test_axes_multiply(self):
        cells = small("./nowhere", codebook_sizes=[16, 32], code_dims=[4, 8]).cells
        assert len(cells) == 2 * 2 * 2 * 2
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            quantizer = cell.config.tokenizer.quantizer
            assert (quantizer.config_name, quantizer.codebook_size) == (
                cell.labels["method"],
                cell.labels["codebook_size"],
            )
            assert (quantizer.code_dim, cell.config.seed) == (cell.labels["code_dim"], cell.labels["seed"])
            assert cell.config.steps == 4

    def test_a_start_that_is_published_anyway_is_trained_once(self):
        cells = small("./nowhere", initialisations=["published", "uniform", "normal"], seeds=[0]).cells
        starts = {(cell.labels["method"], cell.labels["init"]): cell.labels["published_init"] for cell in cells}
        assert starts == {
            ("vq", "U(±1/K)"): True,
            ("vq", "N(0, 1)"): False,
            ("ibq", "U(±1/K)"): False,
            ("ibq", "N(0, 1)"): True,
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seeds": []}, "seeds is empty"),
            ({"methods": ["vq", "vq"]}, "methods holds a value twice"),
            ({"methods": ["ibqq"]}, "did you mean 'ibq'"),
            ({"initialisations": ["norml"]}, "did you mean 'normal'"),
            ({"codebook_sizes": [1]}, "at least 2"),
            ({"codebook_size": [16]}, "codebook_sizes"),
            ({"workers": 0}, "workers must be at least 1"),
            ({"settings": ["tokenizer.quantizer.code_dim=4"]}, "is the grid's own"),
            ({"settings": ["optimizer.learning_rat=1"]}, "did you mean 'learning_rate'"),
            ({"projection": "tsne"}, "projection"),
        ],
    )
    def test_impossible_grids_are_refused(self, changes, message):
        preset = {key: value for key, value in GRID.items() if key != "preset"} | {"recipe": "builtin/smoke"}
        with pytest.raises(ConfigError, match=message):
            grid_cells(fill_in(StudyParameters(), preset | changes, "mine"), Path("nowhere"))

    def test_settings_reach_every_cell_and_the_folder_knows_them(self, tmp_path):
        given = StudyParameters(preset="smoke", settings=("optimizer.learning_rate=3e-4",), output=str(tmp_path / "a"))
        changed = open_study("scale_codebook", given)
        plain = open_study("scale_codebook", StudyParameters(preset="smoke", output=str(tmp_path / "a")))
        assert {cell.config.optimizer.learning_rate for cell in changed.cells} == {3e-4}
        assert {cell.config.tokenizer.quantizer.codebook_size for cell in changed.cells} == {32, 64}
        assert "settings='[optimizer.learning_rate=3e-4]'" in changed.command
        changed.store.claim({"study": "scale_codebook", "recipe": "builtin/smoke", "steps": 0, "settings": ["a=1"]})
        with pytest.raises(StudyError, match=r"settings: \[\"a=1\"\] → nothing"):
            plain.run(progress=False)
        laptop = open_study("scale_codebook", StudyParameters(settings=("batch_size=4",)))
        assert laptop.grid.settings == ("optimizer.learning_rate=3e-4", "batch_size=4")

    def test_a_folder_is_opened_as_it_was_made_and_refused_for_anything_else(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
        given = StudyParameters(preset="smoke", settings=("batch_size=4", "data.source=photos"), seeds=(5,), output="a")
        made = open_study("scale_codebook", given)
        claim(made, monkeypatch)
        again = open_study("a")
        assert (replace(again.grid, output="a"), again.folder.resolve()) == (made.grid, made.folder.resolve())
        assert again.cells == made.cells and again.command == made.command
        with pytest.raises(StudyError) as refused:
            open_study("scale_codebook", StudyParameters(preset="smoke", steps=7, output="a"))
        message = str(refused.value)
        assert 'steps: 0 → 7; settings: ["batch_size=4", "data.source=photos"] → nothing' in message
        command = "ibqlab run scale_codebook preset=smoke seeds='[5]' settings='[batch_size=4, data.source=photos]' "
        assert f"open_study('a'), or ibqlab report a; to go on with it: {command}output=a;" in message
        with pytest.raises(StudyError, match='study: "scale_codebook" → "explore_collapse"'):
            open_study("explore_collapse", StudyParameters(**vars(given) | {"initialisations": ("normal",)}))
        added = StudyParameters(**vars(given) | {"seeds": (5, 6), "methods": ("vq",)})
        assert {cell.labels["seed"] for cell in open_study("scale_codebook", added).cells} == {5, 6}

    def test_folders_that_are_no_study_of_this_kind(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="there is no such study 'mine'"):
            open_study("mine")
        with pytest.raises(ConfigError, match="there is no study 'ablation'; did you mean 'ablations'"):
            open_study("ablation", AblationParameters(preset="smoke"))
        with pytest.raises(ConfigError, match="ablations takes AblationParameters; got StudyParameters"):
            open_study("ablations", StudyParameters(preset="smoke"))
        claim(open_study("ablations", AblationParameters(preset="smoke", tables=("lfq",))), monkeypatch)
        assert list(open_study("ablations-smoke").grid.tables) == ["lfq"]
        other = AblationParameters(preset="laptop", tables=("lfq",), output="ablations-smoke")
        with pytest.raises(StudyError, match=r'preset: "smoke" → "laptop".*open_study\(\'ablations-smoke\'\)'):
            open_study("ablations", other)
        (tmp_path / "ablations-smoke" / "parameters.json").write_text("{}")
        with pytest.raises(StudyError, match="names no study"):
            open_study("ablations-smoke")
        with pytest.raises(StudyError, match="Give output another folder, or the parameters"):
            open_study("ablations", other)
        (tmp_path / "ablations-smoke" / "parameters.json").write_text('{"study": "mine"}')
        with pytest.raises(ConfigError, match="there is no study 'mine'"):
            open_study("ablations-smoke")

    def test_parameters_overrule_the_preset(self):
        study = open_study(
            "scale_codebook", StudyParameters(preset="smoke", codebook_sizes=(8,), seeds=(3,), output="mine")
        )
        assert [cell.labels["codebook_size"] for cell in study.cells] == [8, 8]
        assert {cell.labels["seed"] for cell in study.cells} == {3}
        assert study.folder.name == "mine"
        assert study.command == "ibqlab run scale_codebook preset=smoke codebook_sizes='[8]' seeds='[3]' output=mine"

    @pytest.mark.parametrize(
        ("name", "parameters", "words"),
        [
            ("scale_codebook", StudyParameters(seeds=(0,)), "seeds='[0]'"),
            ("ablations", AblationParameters(seeds=(0,), threads=2), "threads=2 seeds='[0]'"),
            ("link_stages", LinkParameters(lookup_free_bits=0, permute=False), "lookup_free_bits=0 permute=False"),
        ],
    )
    def test_its_runs_note_a_command_that_can_be_pasted_and_its_reports_no_paths(
        self, name, parameters, words, tmp_path, monkeypatch
    ):
        typed = []
        (tmp_path / "here").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path / "here")
        folder = tmp_path / "elsewhere" / "my study"
        monkeypatch.setattr(study_module, "run_cells", lambda *_, **__: typed.append(command_line()))
        study = open_study(name, replace(parameters, preset="smoke", output=str(folder)))
        study.run(progress=False)
        assert typed == [f"ibqlab run {name} preset=smoke {words} 'output={folder}'"]
        assert study.command == typed[0].replace(str(folder), "…/my study")
        again = open_study(folder)
        assert (again.parameters, again.command) == (study.parameters, study.command)

    @pytest.mark.parametrize("name", list(DEFINITIONS))
    def test_each_study_is_named_as_its_notebook_and_takes_its_parameters(self, name):
        typed = notebook_parameters(find_notebook(name))
        assert typed.keys() <= field_types(DEFINITIONS[name].parameters).keys() and "preset" in typed

    def test_a_cells_settings_are_resolved_once(self, monkeypatch):
        resolved = []
        monkeypatch.setattr(
            method_grid, "recipe_config", lambda *words: resolved.append(words) or recipe_config(*words)
        )
        assert len(small("./nowhere", codebook_sizes=[16, 32]).cells) == len(resolved) == 8

    def test_an_unknown_preset_is_refused(self):
        with pytest.raises(ConfigError, match="no preset 'huge'; there are: smoke"):
            open_study("scale_codebook", StudyParameters(preset="huge"))


class TestEarlierFolders:
    """Hashes as the first versions computed them: cells that were finished then are finished now."""

    def test_cells_have_the_keys_they_had(self, tmp_path):
        cells = small(tmp_path / "study", seeds=[0]).cells
        assert {cell.name: cell.key for cell in cells} == {
            "vq-uniform-K16-D4-seed0": "295682214a0c",
            "ibq-normal-K16-D4-seed0": "d438de111b69",
        }
        keys = {"vq-K64-D8-blocks2-seed0-ade71b": "ade71b8e6e4f", "ibq-K64-D8-blocks2-seed0-366b85": "366b8512fa73"}
        ablations = open_study("ablations", AblationParameters(preset="smoke"))
        assert keys.items() <= {cell.name: cell.key for cell in ablations.cells}.items()

    @pytest.mark.parametrize(
        ("recipe", "expected"),
        [
            ("builtin/smoke", "3ee0bf45720f"),
            ("builtin/smoke_generator", "f890eb0abe51"),
            # As this recipe was, before it stopped asking for a compiler: no step of such a run was ever finished.
            (("imagenet/ibq_262144", {"speed.compile": True}), "d0cf3f39d62e"),
            ("generators/ibq_b", "babb91693be6"),
        ],
    )
    def test_runs_have_the_hashes_they_had(self, recipe, expected):
        words = (recipe,) if isinstance(recipe, str) else recipe
        assert content_hash(recipe_config(*words)) == expected

    def test_another_value_of_a_newer_setting_is_another_run(self):
        strict = recipe_config("builtin/smoke", {"data.unreadable": "stop"})
        assert content_hash(strict) != content_hash(recipe_config("builtin/smoke"))


class TestTraining:
    def test_every_cell_is_finished_and_labelled(self, study):
        assert [cell.name for cell, _ in study.finished()] == [cell.name for cell in study.cells]
        metrics = study.metrics()
        assert set(metrics["method"]) == {"vq", "ibq"}
        assert metrics.groupby("run")["step"].max().eq(4).all()

    def test_started_again_it_trains_only_what_is_missing(self, study, tmp_path):
        copy = small(shutil.copytree(study.folder, tmp_path / "copy"), "explore_collapse")
        lost, *kept = copy.cells
        shutil.rmtree(copy.folder / lost.name)
        stamps = {cell.name: (copy.folder / cell.name / "metrics.jsonl").stat().st_mtime_ns for cell in kept}
        copy.run(progress=False).check()
        assert len(copy.finished()) == 4
        assert stamps == {c.name: (copy.folder / c.name / "metrics.jsonl").stat().st_mtime_ns for c in kept}
        pd.testing.assert_series_equal(copy.rows().set_index("cell")["l1"], study.rows().set_index("cell")["l1"])

    def test_two_workers_find_what_one_finds(self, study, tmp_path):
        shared = small(tmp_path / "shared", workers=2, seeds=[0])
        shared.run(progress=False).check()
        ours, theirs = (s.rows().set_index("cell")["usage"] for s in (shared, study))
        pd.testing.assert_series_equal(ours, theirs[ours.index])

    def test_a_failing_cell_is_listed_and_the_others_are_kept(self, tmp_path):
        wild = small(tmp_path / "wild", seeds=[0])
        (wild.folder / wild.cells[0].name).mkdir(parents=True)
        (wild.folder / wild.cells[0].name / "notes.txt").write_text("somebody's file")
        with pytest.raises(StudyError, match=r"1 of 2 runs are finished(?s:.)*vq-uniform"):
            wild.run(progress=False).check()
        assert [cell.labels["method"] for cell, _ in wild.finished()] == ["ibq"]
        assert (wild.folder / wild.cells[0].name / "notes.txt").read_text() == "somebody's file"

    def test_a_folder_of_another_grid_is_not_overwritten(self, study):
        before = (study.folder / study.cells[0].name / "config.yaml").read_text()
        other = Study(study.definition, replace(study.parameters, steps=5))
        with pytest.raises(RunError, match="steps"):
            other.run(progress=False)
        with pytest.raises(RunError, match="steps"):
            other.metrics()
        assert (study.folder / study.cells[0].name / "config.yaml").read_text() == before

    def test_nothing_finished_says_what_to_do(self, tmp_path):
        empty = small(tmp_path / "empty")
        for read in (empty.rows, empty.metrics):
            with pytest.raises(StudyError, match=r"call run\(\) first"):
                read()


class TestTables:
    def test_summary_is_the_mean_and_range_of_the_runs(self, study):
        table = summary_table(study).set_index("method")
        last = [Run(study.folder / c.name).metrics.iloc[-1] for c in study.cells if c.labels["method"] == "ibq"]
        usage = [row["validation_usage"] for row in last]
        assert table.loc["ibq", "validation_usage_mean"] == pytest.approx(sum(usage) / 2)
        assert table.loc["ibq", "validation_usage_min"] == min(usage)
        assert table.loc["ibq", "seeds"] == 2
        assert table.loc["ibq", "validation_tokens"] >= 10 * 16

    def test_rows_that_lack_a_number_are_named_with_what_to_do(self, study, tmp_path):
        copy = small(shutil.copytree(study.folder, tmp_path / "copy"), "explore_collapse")
        for file in (copy.folder / "rows").iterdir():
            row = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({key: value for key, value in row.items() if key != "gradient_reach"}))
        with pytest.raises(StudyError, match=r"must hold gradient_reach of each run.*Delete that folder"):
            summary_table(copy)

    def test_shown_table_names_tokens_and_ranges(self, study):
        shown = show_table(summary_table(study))
        assert "default" in shown["start"].iloc[0]
        assert shown["validation usage"].str.contains("–").all()
        assert to_markdown(shown).count("\n") == 1 + len(shown)

    def test_report_holds_table_hardware_and_tokens(self, study):
        text = write_study_report(study).with_suffix(".md").read_text(encoding="utf-8")
        for words in ("| IBQ |", "builtin/smoke", "core(s)", "torch", "recording took", "## Provenance", study.command):
            assert words in text, words
        assert describe_collapse(study) in text and "lowest to highest over seeds" in text
        origin = json.loads((study.folder / "provenance.json").read_text())
        assert origin["seeds"] == [0, 1]
        assert {"commits", "versions", "hardware", "command"} <= set(origin)
        assert origin["commits"] and all(commit in text for commit in origin["commits"])
        stored = pd.read_csv(study.folder / "figures" / "table.csv")
        assert len(stored) == 2

    def test_a_report_takes_figures_that_are_there_unless_told_otherwise(self, study):
        write_study_report(study)
        picture = study.folder / "figures" / "usage_histogram.png"
        before = picture.stat().st_mtime_ns
        write_study_report(study, redraw=False)
        assert picture.stat().st_mtime_ns == before
        write_study_report(study.folder)
        assert picture.stat().st_mtime_ns > before

    def test_scaling_figure_draws_the_table(self, study):
        table = scaling_table(summary_table(study))
        usage, psnr = plot_scaling(table).axes
        means = [line for line in usage.lines if line.get_marker() in "so"]
        drawn = sorted(value for line in means for value in line.get_ydata())
        assert drawn == pytest.approx(sorted(100 * table["validation_usage_mean"]))
        assert "dB" in psnr.get_ylabel()
        assert "K" in usage.get_xlabel()

    def test_two_starts_of_one_method_cannot_be_one_line(self, study):
        table = scaling_table(summary_table(study))
        with pytest.raises(ValueError, match="one start per method"):
            plot_scaling(pd.concat([table, table.assign(init="elsewhere")]))


class TestLoading:
    def test_a_run_folder_gives_its_tokenizer_back(self, study):
        import torch  # noqa: PLC0415

        run = Run(study.folder / study.cells[-1].name)
        raw, averaged = load_tokenizer(run.path, weights="raw"), load_tokenizer(run.path)
        snapshot = run.snapshot()
        assert torch.equal(raw.quantizer.codebook.detach(), torch.from_numpy(snapshot["codebook"]))
        assert not torch.equal(raw.quantizer.codebook, averaged.quantizer.codebook)
        images = raw.encode(snapshot["images"]).indices.flatten()[: len(snapshot["assignments"])]
        assert images.tolist() == snapshot["assignments"][: len(images)].tolist()

    def test_other_weights_are_refused(self, study):
        with pytest.raises(ValueError, match="'ema', 'raw'"):
            load_tokenizer(study.folder / study.cells[0].name, weights="best")

    def test_a_run_without_checkpoint_says_so(self, study, tmp_path):
        source = study.folder / study.cells[0].name
        (tmp_path / "fresh").mkdir()
        settings = yaml.safe_load((source / "config.yaml").read_text())
        (tmp_path / "fresh" / "config.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(RunError, match=r"checkpoint|hash"):
            load_tokenizer(tmp_path / "fresh")
