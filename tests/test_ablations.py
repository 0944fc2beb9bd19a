"""The paper's tables: rows that say what the recipes say, cells shared between tables, numbers that are the runs'."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from matplotlib.text import Text

from ibqlab.cli import main
from ibqlab.config import ConfigError
from ibqlab.grids import cell_rows
from ibqlab.grids.cells import EvaluationRequest, column_of
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.runs import Run
from ibqlab.studies import (
    AblationParameters,
    AblationTables,
    StudyError,
    StudyParameters,
    figure_methods,
    figure_norms,
    figure_table,
    open_study,
    table_files,
    write_study_report,
)
from ibqlab.studies.scaling import power_laws, scaling_sentences, with_fitted
from ibqlab.studies.table_files import TABLES, read_preset, read_table, table_names
from ibqlab.training import recipe_config

SMALL = {"preset": "smoke", "steps": 4, "tables": ("key_designs", "soft_vq", "lfq"), "seeds": (0, 1)}


def tables_at(**parameters):
    return open_study("ablations", AblationParameters(**parameters))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    opened = open_study(
        "ablations", AblationParameters(**SMALL, output=str(tmp_path_factory.mktemp("ablations") / "small"))
    )
    opened.run(progress=False).check()
    return opened


@pytest.fixture(scope="module")
def tables(study):
    return AblationTables(study)


class TestCells:
    @pytest.mark.parametrize("preset", ["smoke", "laptop", "h200", "paper"])
    def test_every_table_can_run_at_every_preset(self, preset):
        opened = tables_at(preset=preset)
        assert set(opened.grid.tables) == set(table_names())
        assert len({cell.name for cell in opened.cells}) == len(opened.cells)
        for table in opened.grid.tables.values():
            assert sum(bool(row.tokenizers) for row in table.values()) >= 2

    def test_at_paper_a_row_is_its_recipe(self):
        rows = tables_at(preset="paper", tables=("key_designs",)).grid.tables["key_designs"]
        for row in rows.values():
            assert row.tokenizers[0].config == recipe_config(row.row.recipe)

    def test_the_preset_changes_what_the_row_is_about_and_nothing_else(self):
        rows = tables_at(preset="laptop", tables=("key_designs",)).grid.tables["key_designs"]
        base = recipe_config("builtin/photos", read_preset("laptop").tokenizers.settings)
        kinds = [row.tokenizers[0].config.tokenizer.quantizer.config_name for row in rows.values()]
        assert kinds == ["vq", "ibq", "ibq", "ibq"]
        doubled = [row.tokenizers[0].config.tokenizer.quantizer for row in rows.values()][1:]
        assert [quantizer.double_quantization for quantizer in doubled] == [False, True, True]
        for row in rows.values():
            config = row.tokenizers[0].config
            assert (config.data, config.optimizer, config.record, config.steps) == (
                base.data,
                base.optimizer,
                base.record,
                base.steps,
            )

    def test_rows_of_several_tables_that_are_one_run_share_a_cell(self):
        opened = tables_at(preset="laptop")
        last = [list(opened.grid.tables[name].values())[-1].tokenizers[0].name for name in ("key_designs", "code_dim")]
        assert last[0] == last[1]
        rows = [row for table in opened.grid.tables.values() for row in table.values()]
        assert len(opened.cells) < sum(len(row.tokenizers) + len(row.generators) for row in rows)

    def test_generators_wait_for_their_tokenizer_and_keep_the_papers_proportions(self):
        rows = tables_at(preset="laptop", tables=("generators",)).grid.tables["generators"]
        made = [row.generators[0] for row in rows.values() if row.generators]
        assert len(made) == 4 and len({cell.needs for cell in made}) == 1
        for cell in made:
            generator = cell.config.generator
            assert generator.width == 32 * generator.depth and generator.num_heads == generator.depth

    def test_printed_numbers_are_the_papers(self):
        assert read_table("key_designs").rows["VQ"].printed() == {"rfid": 3.98, "lpips": 0.2873, "usage": 0.053}
        assert read_table("generators").rows["IBQ-XXL, 2.1B"].printed()["gfid"] == 2.05
        lfq = read_table("lfq").rows["LFQ"].printed()
        assert (lfq["rfid"], lfq["gfid"], lfq.get("recall")) == (1.58, 3.40, None)
        assert read_table("soft_vq").rows["Soft VQ, temperature falling to the end"].printed() == {}


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"preset": "laptopp"}, "did you mean 'laptop'"),
            ({"tables": ("key_design",)}, "did you mean 'key_designs'"),
            ({"seeds": (0, 0)}, "seeds holds a value twice"),
            ({"steps": -1}, "steps must be at least 0; got -1"),
        ],
    )
    def test_misspelt_parameters(self, given, says):
        with pytest.raises(ValueError, match=says):
            tables_at(**given)

    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            ({}, "rows is empty"),
            ({"a": {"recipee": "imagenet/ibq_16384"}}, "did you mean 'recipe'"),
            ({"a": {"recipe": "imagenet/ibq_16348"}}, "row 'a': there is no recipe"),
            (
                {"a": {"recipe": "imagenet/ibq_16384"}, "b": {"recipe": "imagenet/ibq_16384"}},
                "'a' and 'b' are the same",
            ),
            (
                {"a": {"recipe": "imagenet/ibq_16384", "settings": {"tokenizer.quantizer.codebook_size": 77}}},
                "does not say what 77 becomes",
            ),
        ],
    )
    def test_mistakes_in_a_table_are_named(self, rows, says, tmp_path, monkeypatch):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"title": "t", "table": "9", "source": "s", "rows": rows}))
        (tmp_path / "presets.yaml").write_text((TABLES / "presets.yaml").read_text())
        monkeypatch.setattr(table_files, "TABLES", tmp_path)
        with pytest.raises(ConfigError, match=says):
            tables_at(preset="smoke", tables=("mine",))

    def test_the_folder_of_other_settings_is_refused_and_more_seeds_are_not(self, study):
        with pytest.raises(StudyError, match=r"holds another grid.*steps: 4 → 5"):
            tables_at(**SMALL | {"steps": 5}, output=str(study.folder))
        fewer = tables_at(**SMALL | {"seeds": (1,)}, output=str(study.folder))
        assert len(fewer.run(progress=False).finished) == len(study.cells) // 2


class TestTables:
    def test_values_are_those_of_the_runs(self, study, tables):
        rows = study.grid.tables["key_designs"]
        for label, values in tables.values("key_designs")["usage"].items():
            runs = [Run(study.folder / cell.name).metrics.iloc[-1] for cell in rows[label].tokenizers]
            assert values == [run["validation_usage"] for run in runs]

    def test_shown_has_ours_the_papers_tokens_costs_and_seeds(self, tables):
        shown = tables.shown("key_designs")
        assert list(shown["row"]) == list(read_table("key_designs").rows)
        assert list(shown["paper's usage"]) == ["5.3 %", "98 %", "97 %", "96 %"]
        assert list(shown["paper's rFID"]) == ["3.98", "1.67", "1.55", "1.37"]
        assert shown["usage"].str.fullmatch(r"[\d.]+ % \([\d.]+–[\d.]+\)").all()
        assert shown["tokens"].eq("640").all() and shown["seeds"].eq("2 of 2").all()
        assert (shown["quantizer (ms)"].astype(float) > 0).all() and shown["quantizer (MiB)"].ne("–").all()

    def test_norms_are_shown_where_a_table_asks_for_them(self, study, tables):
        rows = study.grid.tables["key_designs"]
        last = Run(study.folder / rows["VQ"].tokenizers[0].name).metrics.iloc[-1]
        assert tables.values("key_designs")["feature_norm"]["VQ"][0] == last["feature_norm_mean"]
        assert {"norm of features", "norm of codes", "codes in softmax(z·C)"} <= set(tables.shown("key_designs"))
        assert "norm of features" not in tables.shown("soft_vq")
        assert figure_norms(tables, "soft_vq") is None and len(figure_norms(tables, "key_designs").axes) == 4
        drawn = pd.read_csv(study.folder / "figures" / "key_designs_norms.csv")
        assert list(drawn["row"].unique()) == list(rows)

    def test_soft_inference_is_another_number_of_the_same_run(self, study, tables):
        rows = study.grid.tables["soft_vq"]
        assert rows["Soft VQ, averages"].tokenizers == rows["Soft VQ, single codes"].tokenizers
        psnr = tables.values("soft_vq")["psnr"]
        assert psnr["Soft VQ, averages"] != psnr["Soft VQ, single codes"]

    def test_generators_have_their_own_measures(self, tables):
        values = tables.values("lfq")
        assert set(values["bits_per_token"]) == {"LFQ", "IBQ"}
        assert all(4 < bits < 8 for row in values["bits_per_token"].values() for bits in row)

    def test_sentences_are_computed_and_say_what_was_not_measured(self, tables):
        told = tables.sentences("key_designs")
        assert re.search(r"usage: the paper's ordering .* here\. \d of 6 pairs stand as there", told)
        assert told.count("2 seeds, corrected for 12 comparisons (Holm)") == 2
        assert "PSNR (dB) against the paper's rFID" in told
        assert "not taken at preset smoke: rFID, LPIPS" in told

    def test_the_figure_shows_the_table(self, study, tables):
        figure = figure_table(tables, "key_designs")
        usage = figure.axes[0]
        drawn = pd.read_csv(study.folder / "figures" / "key_designs.csv")
        means = drawn[(drawn["measure"] == "usage") & (drawn["kind"] == "mean")]["value"]
        points = {round(line.get_xdata()[0], 6) for line in usage.lines if len(line.get_xdata())}
        assert {round(100 * value, 6) for value in means} <= points
        assert "%" in usage.get_xlabel() and figure.axes[2].xaxis_inverted()
        assert figure_methods(tables).axes

    def test_data_name_the_seeds_that_values_are_of(self, study):
        data = AblationTables(tables_at(**SMALL | {"seeds": (1,)}, output=str(study.folder))).data("key_designs")
        assert set(data[data["kind"] == "seed"]["seed"]) == {1}

    def test_partial_tables_say_what_is_missing(self, study, tmp_path):
        part = tables_at(**SMALL, output=str(tmp_path / "part"))
        some = AblationTables(part)
        assert figure_table(some, "key_designs") is None
        assert "Not finished" in some.sentences("key_designs")
        assert some.shown("key_designs")["seeds"].eq("0 of 2").all()
        part.store.prepare(part.cells[0])
        row = study.store.row(study.cells[0])
        part.store.write_row(part.cells[0], {k: v for k, v in row.items() if k not in part.cells[0].labels})
        part.store.write_failure(part.cells[1], "TrainingError: step 3: not finite")
        told = AblationTables(part).sentences("key_designs")
        assert "VQ (seed 1; failed: TrainingError: step 3: not finite)" in told and "IBQ (seeds 0, 1)" in told


class TestKills:
    def test_killed_at_three_moments_with_all_its_workers_it_ends_with_the_same_table(self, tmp_path):
        """Engine, server and cells die together; what is compared is everything but times."""
        given = {"preset": "smoke", "tables": ("key_designs",), "steps": 20}
        whole = tables_at(**given, output=str(tmp_path / "whole"))
        whole.run(progress=False).check()
        broken = tables_at(**given, output=str(tmp_path / "broken"))
        code = (
            "import sys\n"
            "from ibqlab.studies import AblationParameters, open_study\n"
            "given = {'preset': 'smoke', 'tables': ('key_designs',), 'steps': 20}\n"
            "open_study('ablations', AblationParameters(**given, output=sys.argv[1])).run(progress=False)"
        )
        moments = [random.Random(7).uniform(0.1, 0.9) for _ in range(3)]
        for moment in moments:
            engine = subprocess.Popen([sys.executable, "-c", code, str(broken.folder)], start_new_session=True)
            done = steps_done(broken)
            while steps_done(broken) < done + 24 * moment and engine.poll() is None:
                time.sleep(0.05)
            engine.kill()
            engine.wait()
            kill_workers(broken)
        broken.run(progress=False).check()
        costs = ["quantizer (ms)", "s per run"]
        first, second = (AblationTables(one).shown("key_designs").drop(columns=costs) for one in (whole, broken))
        pd.testing.assert_frame_equal(first, second)
        resumed = [Run(broken.folder / cell.name).provenance.get("resumed", []) for cell in broken.cells]
        assert sum(map(len, resumed)) >= 1


def steps_done(study):
    return sum(study.store.last_step(cell.name) for cell in study.cells)


def kill_workers(study):
    """Kill whoever holds a cell's lock, as the kernel lists them."""
    with open("/proc/locks", encoding="ascii") as locks:
        lines = [line.split() for line in locks]
    for file in (study.folder / "locks").glob("*"):
        for line in lines:
            if line[5].endswith(f":{file.stat().st_ino}"):
                os.kill(int(line[4]), signal.SIGKILL)


class TestReports:
    def test_one_page_with_pictures_tables_commands_and_origin(self, study):
        study.run(progress=False)  # the folder's parameters are those of the last call
        done = CliRunner().invoke(main, ["report", str(study.folder)], catch_exceptions=False)
        assert done.exit_code == 0
        page, text = (study.folder / f"report.{end}" for end in ("html", "md"))
        assert str(page) in done.output
        assert page.read_text().count("data:image/png;base64,") == 5
        assert "<table>" in page.read_text() and "figures/key_designs.png" not in page.read_text()
        written = text.read_text()
        for words in (
            "Too short to mean anything",
            "## Provenance",
            "ibqlab run ablations preset=smoke",
            "## Key designs",
            "| VQ |",
            "threads",
        ):
            assert words in written, words
        origin = json.loads((study.folder / "provenance.json").read_text())
        assert origin["seeds"] == [0, 1] and origin["commits"] and origin["versions"]

    def test_a_folder_that_is_no_study(self, tmp_path):
        with pytest.raises(StudyError, match=r"no study's folder.*parameters.json"):
            write_study_report(tmp_path)

    def test_scaling_has_intervals_laws_and_the_papers_column(self, tmp_path):
        parameters = StudyParameters(preset="smoke", seeds=(0, 1), steps=4, output=str(tmp_path / "scale"))
        opened = open_study("scale_codebook", parameters)
        opened.run(progress=False).check()
        told = scaling_sentences(opened.rows())
        assert "At the largest setting, K = 64 and D = 8" in told
        assert "pairs are told apart" in told or "told apart." in told
        assert "corrected for 3 comparisons (Holm)" in told
        law = power_laws(opened.rows()).set_index(["quantity", "method"]).loc[("used_codes", "vq")]
        runs = with_fitted(opened.rows()).query("method == 'vq'")
        slope = np.polyfit(np.log(runs["codebook_size"]), np.log(runs["used_codes"]), 1)[0]
        assert law["exponent"] == pytest.approx(slope) and law["points"] == 4 and law["low"] < slope < law["high"]
        page = write_study_report(tmp_path / "scale")
        assert "IBQ, K = 262,144" in page.read_text() and page.read_text().count("data:image/png") == 2
        assert len(pd.read_csv(tmp_path / "scale" / "figures" / "power_laws.csv")) == 8


def load_redraw(monkeypatch):
    """The script beside the recipes."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    spec = importlib.util.spec_from_file_location("redraw", EXPERIMENTS / "redraw.py")
    redraw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(redraw)
    return redraw


class TestNamesOfDistances:
    """FID is called so only with Inception's features."""

    @pytest.mark.parametrize(
        ("metric", "extractor", "column"),
        [
            ("fid", "", "gfid"),
            ("fid", "digits", "frechet_distance_digits"),
            ("rfid", "", "rfid"),
            ("rfid", "digits", "reconstruction_frechet_distance_digits"),
            ("is", "digits", "class_score_digits"),
            ("recall", "", "recall"),
        ],
    )
    def test_columns_bear_the_networks_name(self, metric, extractor, column):
        assert column_of(metric, extractor) == column

    def test_samples_are_measured_under_it(self, tmp_path, monkeypatch):
        np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(2, np.int64))
        monkeypatch.setattr(cell_rows, "evaluate_generation", lambda *_, **__: {"fid": SimpleNamespace(value=3.5)})
        measure = EvaluationRequest(generation_metrics=("fid",), extractor="digits")
        values = cell_rows.sample_measures(tmp_path / "a.npz", measure, None)
        assert values == {"samples": 2, "frechet_distance_digits": 3.5}

    @pytest.mark.parametrize("recorded", ["gfid", "frechet_distance_digits"])
    def test_rows_and_tables_name_the_network_also_of_earlier_rows(self, recorded, tmp_path):
        parameters = AblationParameters(tables=("generators",), seeds=(0,), output=str(tmp_path / "made"))
        study = open_study("ablations", parameters)
        for place, cell in enumerate(study.cells):
            values = {recorded: 10.0 + place} if "depth" in cell.labels else {"psnr": 12.0}
            study.store.prepare(cell)
            study.store.write_row(cell, {"steps": 300, "seconds": 1.0, **values})
        table = study.store.table(study.cells)
        assert "frechet_distance_digits" in table and "gfid" not in table
        tables = AblationTables(study)
        shown = tables.shown("generators")
        assert "Fréchet distance (digits)" in shown and "gFID" not in shown and "paper's gFID" in shown
        figure_table(tables, "generators")
        saved = pd.read_csv(study.folder / "figures" / "generators.csv")
        assert {"frechet_distance_digits", "paper_gfid"} <= set(saved["measure"]) and "gfid" not in set(
            saved["measure"]
        )

    def test_figures_drawn_again_say_which_seed_and_that_runs_are_too_short(self, tmp_path, monkeypatch):
        redraw = load_redraw(monkeypatch)
        source = EXPERIMENTS / "results" / "explore_collapse_laptop" / "usage_histogram.csv"
        picture, table = tmp_path / "usage_histogram.png", pd.read_csv(source)
        for preset, band in (("laptop", ""), ("smoke", "preset smoke: too short to mean anything")):
            facts = {"seeds": [3, 4], "command": f"ibqlab run explore_collapse preset={preset}"}
            (tmp_path / "provenance.json").write_text(json.dumps(facts))
            figure = redraw._draw(picture, table)
            redraw._note_runs(picture, figure)
            assert figure.get_supxlabel().endswith("\nseed 3, the first of 2")
            texts = [text.get_text() for text in figure.findobj(Text)]
            assert (band in texts) if band else not any("too short" in text for text in texts)

    def test_csvs_of_before_and_now_are_drawn_alike(self, monkeypatch):
        redraw = load_redraw(monkeypatch)
        picture = EXPERIMENTS / "results" / "ablations_laptop" / "figures" / "generators.png"
        now = pd.read_csv(picture.with_suffix(".csv"))
        before = now.replace({"measure": {"frechet_distance_digits": "gfid"}})
        assert "gfid" in set(before["measure"])
        labels = [
            [axes.get_xlabel().replace("\n", " ") for axes in redraw._draw(picture, one).axes] for one in (now, before)
        ]
        assert labels[0] == labels[1] and any("Fréchet distance (digits)" in label for label in labels[0])
