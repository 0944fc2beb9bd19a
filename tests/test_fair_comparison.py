"""The fair comparison: an equal search for every method, results at the chosen rates, and what may be said of them."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from ibqlab.cli import main
from ibqlab.config import ConfigError, parse, to_dict
from ibqlab.diagnostics.lab import LabRunConfig, LabSource, LabTokenizer, World, run_lab, train_in_lab
from ibqlab.diagnostics.variance import variance_lost
from ibqlab.grids.cells import STOPPED
from ibqlab.plots.fair_dots import describe_marks, plot_fair_comparison
from ibqlab.quantizers import quantizer_config
from ibqlab.runs import Run, RunError
from ibqlab.studies import FairParameters, FairTables, StudyError, fair_grid, open_study
from ibqlab.studies.comparisons import holm_differences, welch_p
from ibqlab.studies.fair_comparison import describe_failures
from ibqlab.studies.fair_grid import FairGrid, FairPreset, read_fair_preset
from ibqlab.studies.registry import write_study_report

PRESETS = """
smoke:
  methods: [vq, ibq, lfq]
  data:
    world:
      world: {dim: 4, clusters: 8, encoder: learning}
      steps: 6
      batch_size: 32
      codebook_size: 8
      code_dim: 4
      rates: [1e-2, 1e30]
      sizes: {lfq: {code_dim: 3}}
  seeds: [0, 1, 2]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Presets of one small world, and the comparison in it: the higher rate cannot be trained at."""
    root = tmp_path_factory.mktemp("fair")
    (root / "presets.yaml").write_text(PRESETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fair_grid, "FILE", root / "presets.yaml")
        patch.setenv("IBQLAB_RUNS", str(root / "runs"))
        study = open_study("fair_comparison", FairParameters(preset="smoke"))
        study.outcome = study.run(progress=False)
    return root, study


@pytest.fixture
def study(folder, monkeypatch):
    root, _ = folder
    monkeypatch.setattr(fair_grid, "FILE", root / "presets.yaml")
    monkeypatch.setenv("IBQLAB_RUNS", str(root / "runs"))
    return open_study("fair_comparison", FairParameters(preset="smoke"))


def test_every_method_has_the_same_search_and_other_seeds_than_its_results():
    grid = FairGrid(FairParameters(preset="laptop"))
    for data, bench in grid.data.items():
        arms = [arm for arm in grid.arms if arm.data == data]
        searches = {tuple((cell.labels["rate"], cell.labels["seed"]) for cell in grid.search(arm)) for arm in arms}
        assert searches == {tuple((rate, 1000) for rate in bench.rates)}
        configs = [cell.config for arm in arms for cell in (*grid.search(arm), *grid.final(arm, 1e-3))]
        assert {config.steps for config in configs} == {bench.steps}
        assert {config.batch_size for config in configs} == {configs[0].batch_size}
    assert not {*grid.seeds} & {*grid.preset.search_seeds} and len(grid.seeds) >= 5
    assert list(grid.data) == ["lab", "digits", "photos"] and len(grid.methods) >= 24


def test_a_method_starts_from_its_own_the_common_and_the_equal_start_each_once():
    grid = FairGrid(FairParameters(preset="laptop", data=("digits",)))
    starts = {label: [(arm.start, arm.own) for arm in grid.arms if arm.label == label] for label in grid.methods}
    assert starts["vq"] == [("uniform", True), ("normal", False)]
    assert starts["ibq"] == [("normal", True), ("uniform", False)]
    assert starts["simvq"] == [("unit", True), ("normal", False), ("uniform", False)]
    assert starts["lfq"] == starts["fsq"] == [("grid", True)]
    assert starts["vq, k-means"] == [("kmeans", True)]  # a start that is typed is what the method is about
    for arm in grid.arms:
        assert grid.config(arm).tokenizer.quantizer.codebook_init == arm.start
    sizes = {arm.label: grid.config(arm).tokenizer.quantizer.codebook_size for arm in grid.arms}
    assert {label: size for label, size in sizes.items() if size != 256} == {"fsq": 240}


def test_results_are_trained_at_the_rate_that_the_search_chose(folder):
    _, study = folder
    search, final = study._first_cells, study.cells[len(study._first_cells) :]
    assert len(search) == 10 and len(final) == 5 * 3
    assert {cell.labels["rate"] for cell in final} == {1e-2}
    assert {cell.labels["seed"] for cell in final} == {0, 1, 2}
    assert len(study.outcome.finished) == 5 + 15 and len(study.outcome.failed) == 5
    assert all("loss is" in error for error, *_ in study.outcome.failed.values())


def test_a_rate_that_leaves_the_numbers_is_the_worst_and_is_told(study):
    tables = FairTables(study)
    table = tables.search()
    assert table.query("rate == 1e30")["score"].isna().all() and not table.query("rate == 1e30")["chosen"].any()
    assert table.query("rate == 0.01")["chosen"].all() and table.query("chosen")["at_edge"].all()
    assert "5 rates failed and count as the worst" in tables.describe_search()
    assert describe_failures(study).count("rate1e+30") == 5


def test_the_best_rate_is_that_of_the_best_reconstruction(study):
    arm = study.grid.arms[0]
    scores = {1e-3: 0.4, 1e-2: 0.2, 1e-1: np.nan}
    study.grid.scores = lambda arm, store: scores
    assert study.grid.best_rate(arm, study.store) == 1e-2  # an error: less is better
    study.grid.scores = lambda arm, store: {1e-3: np.nan}
    assert study.grid.best_rate(arm, study.store) is None
    study.grid.scores = lambda arm, store: None
    assert study.grid.best_rate(arm, study.store) is None


def test_of_images_the_best_rate_is_that_of_the_most_decibels():
    images = FairGrid(FairParameters(preset="laptop", data=("digits",)))
    images.scores = lambda arm, store: {1e-3: 21.0, 1e-2: 19.0}
    assert images.best_rate(images.arms[0], None) == 1e-3


def test_typed_levels_decide_the_size():
    grid = FairGrid(FairParameters(preset="laptop", data=("digits",), methods=("ibq", "fsq levels=[8,5,5]")))
    quantizer = next(grid._configs[arm].tokenizer.quantizer for arm in grid.arms if arm.label != "ibq")
    assert (quantizer.levels, quantizer.codebook_size, quantizer.code_dim) == ((8, 5, 5), 200, 3)


def test_a_finished_comparison_trains_nothing_again_and_takes_more_seeds(study):
    before = {file: file.stat().st_mtime_ns for file in study.folder.glob("*/*/metrics.jsonl")}
    assert len(before) >= 20
    study.run(progress=False)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    more = open_study("fair_comparison", FairParameters(preset="smoke", seeds=(0, 1, 2, 3)))
    assert len(more.cells) == len(study.cells) + 5  # the searches stay
    with pytest.raises(StudyError, match="steps: 0 → 7"):
        open_study("fair_comparison", FairParameters(preset="smoke", steps=7))
    assert [cell.name for cell in open_study(study.folder).cells] == [cell.name for cell in study.cells]


def test_a_search_that_ends_otherwise_than_before_has_its_results_trained(folder, monkeypatch, tmp_path):
    """The number of runs stays, and their names change: the best rate's run had been killed, as for want of memory."""
    root, _ = folder
    monkeypatch.setattr(fair_grid, "FILE", tmp_path / "presets.yaml")
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    presets = (root / "presets.yaml").read_text().replace("rates: [1e-2, 1e30]", "rates: [1e-3, 1e-2]")
    (tmp_path / "presets.yaml").write_text(presets)
    parameters = FairParameters(preset="smoke", methods=("lfq",), seeds=(0,))
    study = open_study("fair_comparison", parameters)
    study.run(progress=False)
    (arm,) = study.grid.arms
    best = study.grid.best_rate(arm, study.store)
    (lost,) = [cell for cell in study.grid.search(arm) if cell.labels["rate"] == best]
    (final,) = study.grid.final(arm, best)
    for cell in (lost, final):
        (study.store.folder / "rows" / f"{cell.name}.json").unlink()
    study.store.write_failure(lost, "killed by signal 9", "killed")
    again = open_study("fair_comparison", parameters)
    assert again.grid.best_rate(arm, again.store) is None  # a kill says nothing of a rate
    # Any other failure is the rate's: the results are first those of the other rate.
    again.store.write_failure(lost, "loss is nan", "error")
    assert again.grid.best_rate(arm, again.store) not in (None, best)
    again = open_study("fair_comparison", replace(parameters, retry=True))
    again.run(progress=False)
    assert FairTables(again).values(arm, "usage") and again.grid.best_rate(arm, again.store) == best


def test_a_run_that_the_alarm_stopped_is_no_result(study, monkeypatch):
    arm = study.grid.arms[0]
    whole = study.store.row
    stopped = {study.grid.final(arm, 1e-2)[0].name, study.grid.search(arm)[0].name}
    monkeypatch.setattr(
        study.store, "row", lambda cell: whole(cell) and whole(cell) | {STOPPED: cell.name in stopped and "nan, step 3"}
    )
    assert len(FairTables(study).values(arm, "usage")) == 0 and study.grid.best_rate(arm, study.store) is None
    assert np.isnan(list(study.grid.scores(arm, study.store).values())).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": (0,)}, "Not tested: a test needs two seeds of each method, and there is 1."),
        ({"methods": ("ibq",)}, "Nothing to compare IBQ with: no other method has this start."),
        ({"methods": ("ibq", "bsq code_dim=2 codebook_size=4")}, "Nothing to compare is finished yet."),
    ],
)
def test_why_nothing_is_compared_is_said(study, settings, words):
    tables = FairTables(open_study("fair_comparison", FairParameters(preset="smoke", **settings)))
    assert words in tables.verdicts("world", "own")


def test_the_tables_are_of_the_rows_and_compare_each_view_with_its_own_reference(study):
    tables = FairTables(study)
    assert [arm.label for arm in tables.view_arms("world", "own")] == ["vq", "ibq", "lfq"]
    assert [arm.label for arm in tables.view_arms("world", "equal")] == ["vq", "ibq"]
    arm = study.grid.arm("world", "vq", "normal")
    rows = [study.store.row(cell)["usage"] for cell in study.grid.final(arm, 1e-2)]
    assert tables.values(arm, "usage") == rows and len(rows) == 3
    results = tables.data().set_index(["method", "start", "measure"])
    assert results.loc[("vq", "normal", "usage"), "mean"] == pytest.approx(np.mean(rows))
    common = tables.differences("world", "common")
    ibq = study.grid.arm("world", "ibq")
    expected = np.mean(rows) - np.mean(tables.values(ibq, "usage"))
    assert common[arm, "usage"].value == pytest.approx(expected)
    equal = tables.differences("world", "equal")
    vq, other = study.grid.arm("world", "vq"), study.grid.arm("world", "ibq", "uniform")
    expected = np.mean(tables.values(vq, "usage")) - np.mean(tables.values(other, "usage"))
    assert equal[vq, "usage"].value == pytest.approx(expected)
    shown = tables.shown("world", "own").set_index("method")
    assert list(shown.index) == ["VQ", "IBQ", "LFQ"] and shown.loc["IBQ", "usage − IBQ's"] == "–"
    assert (shown["seeds"] == "3 of 3").all() and shown.loc["LFQ", "D"] == "3"


def test_what_the_equal_start_does_is_shown_for_those_that_have_another(study):
    tables = FairTables(study)
    assert list(tables.start_effects("world")["method"]) == ["IBQ"]
    text = tables.describe_effects("world")
    assert "from U(±1/K) instead of the own start" in text and "verdicts from U(±1/K)" in text


def test_verdicts_name_every_method_once_per_measure(study):
    tables = FairTables(study)
    lines = tables.verdicts("world", "own").splitlines()
    assert len(lines) == len(study.grid.data["world"].measures) + 1
    for line in lines[:-1]:
        assert line.count("LFQ") == 1 and line.replace("LFQ", "").count("VQ") == 1 and "IBQ" not in line
    assert "corrected for 8 comparisons (Holm)" in lines[-1]


def test_the_report_has_every_table_and_the_failures(study):
    write_study_report(study)
    text = (study.folder / "report.md").read_text()
    for words in ("## The search", "### Each from its own start", "### All from N(0, 1)", "### All from U(±1/K)"):
        assert words in text
    assert "## Runs that failed" in text and "![Every method at its best rate: world]" in text
    figures = study.folder / "figures"
    assert len(pd.read_csv(figures / "search.csv")) == 10
    assert set(pd.read_csv(figures / "results.csv")["measure"]) == {*study.grid.data["world"].measures}
    assert (figures / "fair_world.png").is_file() and (figures / "world_start_effects.csv").is_file()


def test_a_quantizer_of_the_users_own_takes_part(study, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            from ibqlab.quantizers import quantizer_from

            @quantizer_from(name="fair_mine", label="Mine")
            def nearest(features, codebook):
                return torch.cdist(features, codebook).argmin(1)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    parameters = FairParameters(
        preset="smoke",
        methods=("fair_mine", "ibq"),
        seeds=(0,),
        plugins=("mine.py",),
        output="own",
        against="fair_mine",
    )
    mine = open_study("fair_comparison", parameters)
    mine.run(progress=False)
    assert FairTables(mine).shown("world", "own")["method"].tolist() == ["Mine", "IBQ"]
    assert mine.store.row(mine.cells[-1]) is not None
    assert "fair_mine" in json.dumps(to_dict(mine.cells[0].config))


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"preset": "smok"}, "did you mean 'smoke'"),
            ({"data": ("digit",)}, "did you mean 'digits'"),
            ({"seeds": (1000,)}, "those of the search"),
            ({"seeds": (1, 1)}, "holds a value twice"),
            ({"against": "lfqq"}, "against must be one of"),
            ({"methods": ("vq", "vq")}, "twice"),
            ({"methods": ("vqq",)}, "methods must be one of"),
            ({"methods": ("vq revive=1",)}, "method 'vq, revive=1' on lab"),
            ({"methods": ("lfq codebook_size=100",)}, "on lab"),
            ({"methods": ("vq name=ibq",)}, "'vq' is the name already"),
        ],
    )
    def test_is_refused_with_the_thing_and_the_rule(self, settings, words):
        with pytest.raises(ValueError) as error:
            FairGrid(FairParameters(**{"preset": "laptop", **settings}))
        assert words in str(error.value)

    def test_a_typed_size_of_a_grid_has_its_own_dimension(self):
        grid = FairGrid(FairParameters(preset="smoke", methods=("lfq codebook_size=8", "ibq")))
        config = grid.config(grid.arms[0]).tokenizer.quantizer
        assert (config.codebook_size, config.code_dim) == (8, 3)

    def test_without_the_presets_reference_the_first_method_is_it(self):
        assert FairGrid(FairParameters(preset="laptop", methods=("vq", "lfq"))).against == "vq"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"rates": [1e-3, 1e-3]}, "holds one twice"),
            ({"rates": [0.0]}, "a rate must be > 0"),
            ({"recipe": "builtin/digits"}, "either a world or a recipe"),
            ({"settings": {"seed": 1}}, "a world has none"),
        ],
    )
    def test_mistakes_in_the_file_are_told(self, change, words):
        bench = {"world": {"dim": 2, "encoder": "learning"}, "rates": [1e-3]} | change
        with pytest.raises(ConfigError, match=words):
            parse(FairPreset, {"methods": ["vq"], "data": {"lab": bench}}, source="x")

    def test_every_preset_of_the_file_can_be_planned(self):
        for name in ("smoke", "laptop"):
            assert read_fair_preset(name).data and FairGrid(FairParameters(preset=name)).arms

    def test_at_the_command_line(self):
        done = CliRunner().invoke(main, ["run", "fair_comparison", "preset=laptop", "against=nothing"])
        assert done.exit_code and "against must be one of" in done.output


class TestLabRuns:
    WORLD = World(dim=4, clusters=6, encoder="learning")

    def config(self, dim=4, **settings):
        quantizer = quantizer_config({"name": "vq", "codebook_size": 8, "code_dim": dim})
        source = LabSource(label="vq", world=self.WORLD)
        shared = {"steps": 5, "batch_size": 16, **settings}
        return LabRunConfig(lab=source, tokenizer=LabTokenizer(quantizer=quantizer), **shared)

    def test_are_those_of_run_lab(self, tmp_path):
        run = train_in_lab(self.config(), tmp_path / "run", progress=False)
        result = run_lab(self.WORLD, ["vq"], codebook_size=8, steps=5, batch_size=16, snapshots=4, progress=False)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.runs["vq"].rows]
        last = run.metrics.iloc[-1]
        assert {key: last[key] for key in rows[-1]} == pytest.approx(rows[-1], nan_ok=True)
        assert run.status == "finished" and Run(tmp_path / "run").snapshot()["features"].shape[1] == 4

    def test_may_have_other_channels_than_the_points_where_the_encoder_learns(self, tmp_path):
        run = train_in_lab(self.config(dim=2), tmp_path / "run", progress=False)
        assert run.snapshot()["features"].shape[1] == 2
        assert run.metrics.iloc[-1]["validation_reconstruction_error"] > 0
        with pytest.raises(ConfigError, match="code_dim must be the dimension of the points"):
            fixed = to_dict(self.config(dim=2)) | {"lab": {"label": "vq", "world": {"dim": 4}}}
            parse(LabRunConfig, fixed, source="x")

    def test_are_read_back_and_refuse_other_settings(self, tmp_path):
        config = self.config()
        assert parse(LabRunConfig, to_dict(config), source="x") == config
        train_in_lab(config, tmp_path / "run", progress=False)
        with pytest.raises(RunError, match="seed"):
            train_in_lab(self.config(seed=1), tmp_path / "run", progress=False)


class TestHolmDifferences:
    def test_an_interval_leaves_out_0_exactly_where_the_test_tells(self):
        generator = np.random.default_rng(0)
        seen = {True: 0, False: 0}
        for _ in range(60):
            shifts = generator.choice([0.0, 0.6, 1.5, 4.0], size=7)
            pairs = [(generator.standard_normal(5) + shift, generator.standard_normal(4)) for shift in shifts]
            for difference in holm_differences(pairs):
                outside = difference.low > 0 or difference.high < 0
                assert outside == difference.is_clear
                assert difference.low <= difference.value <= difference.high
                seen[outside] += 1
        assert min(seen.values()) > 50

    def test_a_single_difference_is_welchs(self):
        first, second = [1.0, 2.0, 3.5], [0.5, 0.2, 0.9, 1.1]
        (one,) = holm_differences([(first, second)])
        assert one.p_value == pytest.approx(welch_p(first, second))
        from scipy import stats  # noqa: PLC0415

        interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))

    def test_seeds_that_agree_are_known_to_the_step_of_the_measure(self):
        same, other = [1.0] * 5, [0.25] * 5
        (far,) = holm_differences([(same, other)], [1 / 256])
        assert far.is_clear and 0.74 < far.low < 0.75 < far.high < 0.76
        (near,) = holm_differences([(same, [1 - 1 / 2560] * 5)], [1 / 256])
        assert not near.is_clear

    def test_one_seed_has_no_interval(self):
        one, two = holm_differences([([1.0], [2.0]), ([1.0, 1.1], [2.0, 2.1])])
        assert np.isnan(one.low) and np.isnan(one.p_value) and not one.is_clear and one.value == -1
        assert np.isfinite(two.low)


class TestVarianceLost:
    def test_no_linear_layer_behind_the_codes_changes_it(self):
        torch.manual_seed(0)
        features = torch.randn(4000, 6)
        codes = features.round()
        moved = 3 * codes @ torch.randn(6, 6) + 5
        lost = variance_lost(features, codes)
        assert variance_lost(features, moved) == pytest.approx(lost, rel=1e-6)
        # Rounding to whole numbers: about 1/12 of the step's square, of features of variance 1.
        assert lost == pytest.approx(1 / 12, rel=0.1)

    def test_all_none_and_chance(self):
        torch.manual_seed(0)
        features = torch.randn(500, 8)
        assert variance_lost(features, features) == pytest.approx(0, abs=1e-9)
        assert variance_lost(features, torch.zeros(500, 8)) == 1.0
        draws = [variance_lost(features, torch.randn(500, 8)) for _ in range(40)]
        assert 0.99 < np.mean(draws) <= 1.0  # the fit gains nothing by chance
        assert np.isnan(variance_lost(torch.ones(10, 2), torch.randn(10, 2)))
        assert np.isnan(variance_lost(features[:5], features[:5]))


def test_the_picture_marks_starts_and_the_reference():
    rows = (("vq", "uniform", True, 0.2), ("vq", "normal", False, 0.3), ("ibq", "normal", True, 0.9))
    table = pd.DataFrame(rows, columns=["method", "start", "own_start", "mean"])
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"], is_reference=table["method"] == "ibq")
    table = table.assign(data="digits", seeds=5, rates="0.001, 0.01", steps=200)
    table = pd.concat([table.assign(measure=key) for key in ("usage", "variance_lost")])
    figure = plot_fair_comparison(table)
    usage, lost = figure.axes
    assert usage.get_xlabel() == "usage, %" and lost.xaxis_inverted() and not usage.xaxis_inverted()
    assert [label.get_text() for label in usage.get_yticklabels()] == ["VQ", "IBQ"]
    dotted = next(line for line in usage.lines if list(line.get_xdata()) == [90.0, 90.0])
    assert dotted.get_linestyle() != "-"
    assert figure.get_suptitle() == "Every method at its best rate: digits"
    marks = describe_marks(table)
    assert marks.startswith("Filled: from the method's own start; white inside: N(0, 1),")
    assert "Dotted: IBQ, own start." in marks and "over 5 seeds" in marks and "0.001, 0.01; 200 steps" in marks
