"""Interactive views without a browser: what they show is what the run folder holds."""

import base64
import re
import shutil
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from ibqlab.diagnostics.usage import perplexity
from ibqlab.plots import plot_run_curves, run_curve_table
from ibqlab.runs import Run
from ibqlab.studies import (
    AblationParameters,
    StudyError,
    StudyParameters,
    figure_collapse,
    figure_reconstructions,
    open_study,
)
from ibqlab.studies.method_grid import name_start
from ibqlab.studies.run_report import _figure_curves, figure_run_histogram
from ibqlab.training import train
from ibqlab.widgets import LiveCurves, explore_study, live

GRID = {
    "recipe": "builtin/smoke",
    "methods": ("vq", "ibq"),
    "initialisations": ("published", "normal"),
    "codebook_sizes": (16,),
    "code_dims": (4,),
    "seeds": (0,),
    "steps": 4,
    "projection": "pca",
}


def grid(folder, **changes):
    return open_study("explore_collapse", StudyParameters(**GRID | changes, output=str(folder)))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """VQ from its own start and from IBQ's, IBQ from its own; snapshots at steps 0, 2 and 4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = grid(tmp_path_factory.mktemp("study") / "small")
    trained.run(progress=False).check()
    torch.set_num_threads(threads)
    return trained


@pytest.fixture
def explorer(study):
    return explore_study(study)


def alt(picture):
    """What a picture says it shows, once it has been seen to be a picture."""
    return re.fullmatch(r'<img alt="([^"]*)" style="[^"]*" src="data:image/png;base64,iVBOR[^"]+">', picture.value)[1]


class TestExplorer:
    def test_opens_at_the_end_of_the_first_run(self, study, explorer):
        cell, run = study.finished()[0]
        assert explorer.run.path == run.path
        assert explorer.step.value == run.snapshot_steps[-1] == 4
        assert [step for _, step in explorer.step.options] == run.snapshot_steps
        assert {axis: choice.value for axis, choice in explorer.choices.items()}.items() <= cell.labels.items()

    def test_the_slider_shows_each_snapshot(self, explorer):
        seen = set()
        for step in (0, 2, 4):
            explorer.step.value = step
            seen.add((explorer.code_map.value, explorer.histogram.value))
            assert f"step {step}; " in alt(explorer.code_map)
            assert f"step {step}; " in alt(explorer.histogram)
        assert len(seen) == 3
        assert len({picture for pair in seen for picture in pair}) == 6

    def test_numbers_are_those_of_the_snapshot(self, explorer):
        explorer.step.value = 2
        counts = explorer.run.snapshot(2)["counts"]
        hit = int((counts > 0).sum())
        assert explorer.numbers.value == (
            f"VQ from U(±1/K), step 2: usage {100 * hit / 16:.1f} % of 16 codes in {counts.sum()} validation tokens, "
            f"perplexity {perplexity(counts):.1f} codes, {16 - hit} dead codes"
        )

    def test_offers_only_what_was_trained(self, explorer):
        starts = explorer.choices["init"]
        assert [label for label, _ in starts.options] == [name_start("U(±1/K)", True), "N(0, 1)"]
        starts.value = "N(0, 1)"
        assert explorer.numbers.value.startswith("VQ from N(0, 1), step 4")
        explorer.choices["method"].value = "ibq"
        assert [label for label, _ in starts.options] == [name_start("N(0, 1)", True)]
        assert starts.disabled
        assert explorer.numbers.value.startswith("IBQ from N(0, 1), step 4")

    def test_a_method_comes_with_its_own_start(self, explorer):
        starts = explorer.choices["init"]
        starts.value = "N(0, 1)"
        explorer.choices["method"].value = "ibq"
        explorer.choices["method"].value = "vq"
        assert starts.value == "U(±1/K)"
        assert explorer.numbers.value.startswith("VQ from U(±1/K)")

    def test_colours_mean_the_same_at_every_step(self, explorer, monkeypatch):
        tops = []
        monkeypatch.setattr(
            "ibqlab.widgets.explorer.plot_code_map",
            lambda *_, most_hits: tops.append(most_hits) or plot_run_curves(ROWS),
        )
        explorer.choices["method"].value = "ibq"
        for step in (0, 2, 4):
            explorer.step.value = step
        run = explorer.run
        assert set(tops) == {max(run.snapshot(step)["counts"].max() for step in run.snapshot_steps)}

    def test_what_was_chosen_before_is_dimmed_while_the_next_is_drawn(self, explorer, monkeypatch):
        seen = []
        draw = explorer._frame

        def drawing():
            seen.append((explorer.numbers.value, explorer.code_map.value[:30]))
            return draw()

        monkeypatch.setattr(explorer, "_frame", drawing)
        explorer.step.value = 0
        explorer.step.value = 4
        assert seen[0] == ("VQ from U(±1/K), step 0: drawing …", '<div style="opacity: 0.25"><im')
        assert seen[1][1].startswith("<img"), "a snapshot seen before is there at once"
        assert explorer.code_map.value.startswith("<img")

    def test_shows_its_pictures_without_a_kernel(self, explorer):
        bundle = explorer._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert "application/vnd.jupyter.widget-view+json" in data
        page = data["text/html"]
        assert page.count("<img") == 2 and explorer.numbers.value in page
        numbers, code_map, histogram = data["text/plain"].split("\n")
        assert numbers == explorer.numbers.value
        assert (code_map, histogram) == (alt(explorer.code_map), alt(explorer.histogram))

    def test_another_run_keeps_the_step(self, explorer):
        explorer.step.value = 2
        explorer.choices["method"].value = "ibq"
        assert explorer.step.value == 2
        assert explorer.numbers.value.startswith("IBQ from N(0, 1), step 2")

    def test_every_step_of_a_run_is_drawn_in_one_space(self, explorer, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            "ibqlab.widgets.explorer.plot_code_map",
            lambda projection, frame, *_, **__: drawn.append((projection, frame)) or plot_run_curves(ROWS),
        )
        explorer.choices["method"].value = "ibq"
        for step in (0, 2):
            explorer.step.value = step
        projections, frames = zip(*drawn, strict=True)
        assert frames == (2, 0, 1)
        assert len({id(projection) for projection in projections}) == 1
        assert len(projections[0].codes) == 3

    def test_a_snapshot_seen_before_is_not_drawn_again(self, explorer, monkeypatch):
        first = explorer.code_map.value
        explorer.step.value = 0
        monkeypatch.setattr("ibqlab.widgets.explorer.plot_code_map", None)
        explorer.step.value = 4
        assert explorer.code_map.value == first

    def test_seeds_are_offered_where_there_are_several(self, study, explorer):
        shown = explorer.children[0].children
        assert [choice.description for choice in shown] == ["method", "codebook starts at", "codes K", "dimension D"]
        cell, run = study.finished()[0]
        twice = [(cell, run), (type(cell)(cell.name, cell.config, cell.labels | {"seed": 1}), run)]
        two = open_study(study.folder)
        two.finished = lambda: twice
        assert explore_study(two).children[0].children[-1].description == "seed"

    def test_says_what_is_wrong_with_a_damaged_snapshot(self, study, explorer):
        file = explorer.run.path / "snapshots" / "step_00000002.npz"
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        try:
            explorer.step.value = 2
        finally:
            file.write_bytes(whole)
        assert "is damaged" in explorer.numbers.value
        assert explorer.code_map.value == explorer.histogram.value == ""
        explorer.step.value = 4
        assert "step 4" in alt(explorer.code_map)

    def test_another_kind_of_study_is_refused_with_what_to_type(self, tmp_path):
        tables = open_study(
            "ablations", AblationParameters(preset="smoke", tables=("lfq",), output=str(tmp_path / "x"))
        )
        with pytest.raises(
            StudyError, match=r"only grids of methods can be drawn and explored so.*\nibqlab report .*/x"
        ):
            explore_study(tables)
        with pytest.raises(StudyError, match="only grids of methods"):
            figure_reconstructions(tables)

    def test_without_a_finished_run_says_what_to_type(self, study, tmp_path):
        with pytest.raises(StudyError, match=r"nothing to explore; type study\.run\(\)"):
            explore_study(grid(tmp_path / "empty"))


class TestCollapseFigure:
    def test_published_starts_first_and_all_starts_beside_them(self, study):
        figure_collapse(study)
        figure_collapse(study, "same")
        figures = study.folder / "figures"
        published = pd.read_csv(figures / "collapse_curves.csv")[["method", "init"]].drop_duplicates()
        assert published.values.tolist() == [["vq", "U(±1/K)"], ["ibq", "N(0, 1)"]]
        same = pd.read_csv(figures / "collapse_curves_same_start.csv")[["method", "init"]].drop_duplicates()
        assert same.values.tolist() == [["vq", "U(±1/K)"], ["vq", "N(0, 1)"], ["ibq", "N(0, 1)"]]
        with pytest.raises(ValueError, match="'published', 'same'; got 'alike'"):
            figure_collapse(study, "alike")


class TestTooShort:
    def test_short_runs_say_so_on_their_figures(self, study):
        told = "4 steps: too short to mean anything"
        for figure in (
            figure_collapse(study),
            figure_reconstructions(study),
            figure_run_histogram(study.finished()[0][1]),
            _figure_curves(study.finished()[0][1]),
        ):
            assert told in [text.get_text() for text in figure.findobj(Text)]
            assert all(text.get_rotation() == 0 for text in figure.texts), "nothing is written across the panels"
        caption = figure_reconstructions(study).get_supxlabel().replace("\n", " ")
        tokens = int(study.rows()["tokens"].min())
        assert f"a table's PSNR is over the images of {tokens:,} validation tokens" in caption

    def test_figures_of_a_stopped_run_say_of_which_step_they_are(self, study, tmp_path):
        run = study.finished()[0][1]
        stopped = Run(shutil.copytree(run.path, tmp_path / "stopped"))
        (stopped.path / "snapshots" / "step_00000004.npz").unlink()
        told = [text.get_text() for text in figure_run_histogram(stopped).findobj(Text)]
        assert any(text.startswith("step 2, the last snapshot (the run is at step 4): ") for text in told)
        told = [text.get_text() for text in figure_run_histogram(run).findobj(Text)]
        assert any(text.startswith("step 4: ") for text in told) and not any("last snapshot" in text for text in told)

    def test_the_smoke_preset_and_few_steps_are_too_short(self):
        assert grid("./x").too_short == "4 steps"
        assert grid("./x", steps=100).too_short == ""
        assert grid("./x", steps=100, preset="smoke").too_short == "preset smoke"


ROWS = pd.DataFrame(
    [
        {
            "step": 0,
            "validation_usage": 0.9,
            "validation_perplexity": 700,
            "validation_tokens": 640,
            "validation_psnr": 9,
        },
        {"step": 2, "loss": 0.5, "usage": 0.25, "usage_tokens": 128, "perplexity": 5.0},
        {"step": 4, "loss": 0.25, "usage": 0.5, "usage_tokens": 256, "perplexity": 9.0},
    ]
)


class TestRunCurves:
    def test_draws_the_table(self):
        figure = plot_run_curves(ROWS)
        loss, usage, perplexities, psnr = figure.axes
        assert loss.get_lines()[0].get_xydata().tolist() == [[2, 0.5], [4, 0.25]]
        training, validation = usage.get_lines()
        assert training.get_xydata().tolist() == [[2, 25], [4, 50]]
        assert validation.get_xydata().tolist() == [[0, 90]]
        assert (training.get_label(), validation.get_label()) == ("training, window", "validation")
        assert perplexities.get_yscale() == "log"
        assert perplexities.get_ylim()[1] > 700
        assert psnr.get_lines()[0].get_xydata().tolist() == [[0, 9]]
        assert [axes.get_ylabel() for axes in figure.axes] == [
            "loss (no unit)",
            "codes hit (%)",
            "perplexity (codes)",
            "PSNR (dB)",
        ]
        assert (
            "a window of the last 256 training tokens (at first 128), 640 validation tokens" in figure.get_supxlabel()
        )

    def test_is_readable_and_leaves_matplotlib_alone(self):
        before = dict(mpl.rcParams)
        figure = plot_run_curves(ROWS)
        figure.draw_without_rendering()
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
        drawn, page = figure.get_tightbbox(), figure.bbox_inches
        assert min(drawn.x0, drawn.y0) > -0.02
        assert drawn.x1 < page.x1 + 0.02
        assert drawn.y1 < page.y1 + 0.02
        assert dict(mpl.rcParams) == before

    def test_the_first_row_alone_can_be_drawn(self):
        figure = plot_run_curves(ROWS.iloc[:1, :5])
        assert [len(axes.get_lines()) for axes in figure.axes] == [0, 1, 1, 1]
        only_training = plot_run_curves(ROWS.iloc[1:].drop(columns="validation_psnr"))
        assert [len(axes.get_lines()) for axes in only_training.axes] == [1, 1, 1, 0]

    def test_the_table_is_ordered_and_complete(self):
        table = run_curve_table(ROWS.iloc[::-1])
        assert table["step"].tolist() == [0, 2, 4]
        assert table["loss"].isna().tolist() == [True, False, False]
        assert table["validation_psnr"].tolist()[0] == 9

    def test_refuses_what_holds_no_rows(self):
        with pytest.raises(ValueError, match="need the column step; got loss"):
            plot_run_curves(ROWS[["loss"]])
        with pytest.raises(ValueError, match="no rows: train first"):
            plot_run_curves(ROWS.iloc[:0])


class TestLiveCurves:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock set by hand: clock[0] is the time, in seconds."""
        now = [100.0]
        monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
        return now

    def test_draws_at_most_every_so_often(self, clock):
        curves = LiveCurves()
        shown = []
        for second, row in ((0.0, 0), (1.9, 1), (2.1, 2)):
            clock[0] = 100 + second
            curves(ROWS.iloc[row].dropna().to_dict())
            shown.append(curves.widget.value)
        assert "up to step 4" in alt(curves.widget)
        assert shown[0] == shown[1] != shown[2]

    def test_drawing_takes_no_more_than_an_eighth_of_the_time(self, clock, monkeypatch):
        curves = LiveCurves()
        draw = curves._show

        def slow():
            clock[0] += 1.0
            draw()

        monkeypatch.setattr(curves, "_show", slow)
        curves({"step": 0, "loss": 1.0})
        shown = curves.widget.value
        clock[0] += 7.9
        curves({"step": 1, "loss": 0.9})
        assert curves.widget.value == shown
        clock[0] += 0.2
        curves({"step": 2, "loss": 0.8})
        assert "up to step 2" in alt(curves.widget)

    def test_follows_a_training_run_to_its_last_step(self, study, tmp_path, monkeypatch):
        cell = study.cells[0]
        curves = LiveCurves(cell.config)
        shown, show = [], curves.widget.show
        monkeypatch.setattr(curves.widget, "show", lambda figure, text: (shown.append(figure), show(figure, text)))
        run = train(cell.config, tmp_path / "run", progress=False, watch=curves)
        assert [row["step"] for row in curves.rows] == run.metrics["step"].tolist() == [0, 1, 2, 3, 4]
        assert "up to step 4" in alt(curves.widget)
        (figure,) = shown[-1:]
        losses = figure.axes[0].get_lines()[0].get_ydata()
        np.testing.assert_allclose(losses, run.metrics["loss"].dropna())
        assert figure.axes[0].get_xlim()[1] > cell.config.steps

    def test_a_training_that_is_stopped_shows_its_last_step(self, study, clock, tmp_path):
        """The clock stands still: after the first row nothing is drawn until the end."""
        config = study.cells[0].config
        curves = LiveCurves(config)
        shown = []

        def watch(row):
            curves(row)
            shown.append(alt(curves.widget))
            if row["step"] == 2:
                raise KeyboardInterrupt

        watch.finish = curves.finish
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=False, watch=watch)
        assert shown[-1].endswith("up to step 0")
        assert alt(curves.widget).endswith("up to step 2")

    def test_a_notebooks_output_changes_in_place(self, monkeypatch):
        """As IPython's display does it: one output with an id, to which updates are sent."""
        sent = []

        def display(data, *, raw, display_id):
            assert raw and display_id
            sent.append(data)
            return SimpleNamespace(update=lambda data, raw: sent.append(data))

        monkeypatch.setattr("IPython.display.display", display)
        curves = LiveCurves()
        curves.widget._ipython_display_()
        assert sent == [{"text/plain": "curves appear with the first step; a run that was finished before logs none"}]
        curves({"step": 1, "loss": 0.5})
        assert sent[1]["text/plain"].endswith("up to step 1")
        assert base64.b64decode(sent[1]["image/png"]).startswith(b"\x89PNG")
        assert sent[1]["text/html"] == curves.widget.value

    def test_errors_say_what_to_do(self):
        with pytest.raises(ValueError, match="must be ≥ 0; got -1"):
            LiveCurves(every=-1)
