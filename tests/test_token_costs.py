"""The study of what tokens cost: its runs on the engine, its tables, and folders of earlier versions."""

import json
import shutil
from functools import partial

import pytest
from click.testing import CliRunner

from ibqlab.cli import main
from ibqlab.grids.progress import describe_labels
from ibqlab.plots import token_scaling_table
from ibqlab.runs import Run, RunError
from ibqlab.studies import LinkParameters, StudyError, open_study, token_costs
from ibqlab.studies.token_costs import figure_token_scaling, figure_tokens, permutation_table, token_reports
from ibqlab.training import train_generator

SMALL = {"preset": "smoke", "codebook_sizes": (64,), "lookup_free_bits": 6, "steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, with the smallest study in it."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQLAB_RUNS", str(root))
        open_study("link_stages", LinkParameters(**SMALL)).run(progress=False).check()
    return root


@pytest.fixture
def study(runs, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(runs))
    monkeypatch.setattr(token_costs, "describe_tokenizer", partial(token_costs.describe_tokenizer, images=256))
    return open_study("link_stages", LinkParameters(**SMALL))


def stamps(folder):
    return {file: file.stat().st_mtime_ns for file in folder.glob("*/*/metrics.jsonl")}


def test_each_tokenizer_has_a_generator_and_one_over_permuted_codes(study):
    names = [f"{stem}/{kind}" for stem in ("ibq-64", "lfq-64") for kind in ("tokenizer", "generator", "permuted")]
    assert [cell.name for cell in study.cells] == names
    cells = {cell.name: cell for cell in study.cells}
    assert [cell.config.index_permutation for cell in study.cells if cell.needs] == [-1, 1, -1, 1]
    assert cells["ibq-64/generator"].config.generator.vocabulary_size == 64
    assert cells["lfq-64/permuted"].config.generator.bits == (3, 3)
    assert cells["lfq-64/tokenizer"].config.tokenizer.quantizer.config_name == "lfq"
    assert {cell.needs for cell in study.cells} == {"", "ibq-64/tokenizer", "lfq-64/tokenizer"}
    assert [describe_labels(cell, study.cells) for cell in study.cells] == names


def test_tables_and_figures_are_of_all_tokenizers(study):
    reports = token_reports(study)
    table = token_scaling_table(reports)
    assert set(table["tokenizer"]) == {"IBQ, K = 64", "LFQ, K = 64"}
    assert table["permuted"].any() and (table["codebook_size"] == 64).all()
    permuted = permutation_table(table)
    assert len(permuted) == 2
    assert (permuted["difference"] == permuted["permuted_bits"] - permuted["bits"]).all()
    assert all(figure_tokens(study, reports, name).axes for name in reports)
    assert figure_token_scaling(study, reports).axes


def test_its_rows_hold_what_each_run_came_to(study):
    rows = study.rows().set_index("cell")
    assert list(rows.index) == [cell.name for cell in study.cells]
    last = Run(study.folder / "lfq-64" / "permuted").metrics.iloc[-1]
    assert rows.loc["lfq-64/permuted", "bits_per_token"] == last["validation_bits_per_token"]
    assert rows.loc["ibq-64/tokenizer", "usage"] > 0


def test_the_report_command_takes_its_folder(study):
    done = CliRunner().invoke(main, ["report", study.folder.name], catch_exceptions=False)
    assert done.exit_code == 0 and str(study.folder / "report.html") in done.output
    text = (study.folder / "report.md").read_text(encoding="utf-8")
    for words in (
        "6 of 6 runs finished",
        "IBQ, K = 64",
        "Does a code's number matter?",
        "## Provenance",
        study.command,
    ):
        assert words in text, words
    assert (study.folder / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 3
    assert json.loads((study.folder / "parameters.json").read_text())["study"] == "link_stages"


def test_started_again_it_does_only_what_is_missing(study, tmp_path):
    folder = shutil.copytree(study.folder, tmp_path / "copy")
    again = open_study(folder)
    before = stamps(folder)
    assert again.run(progress=False).finished == [cell.name for cell in again.cells] and stamps(folder) == before
    shutil.rmtree(folder / "lfq-64" / "permuted")
    assert len(token_reports(again)) == 1  # IBQ's are all there
    again.run(progress=False).check()
    changed = [file.parent.name for file, stamp in stamps(folder).items() if before[file] != stamp]
    assert changed == ["permuted"]
    assert again.rows()["bits_per_token"].equals(study.rows()["bits_per_token"])


def test_a_finished_folder_of_an_earlier_version_lacks_only_its_rows(study, runs):
    """Its generators name their tokenizer from the folder of all runs, and no file says what the folder is of."""
    folder = runs / "earlier"
    for stem in ("ibq-64", "lfq-64"):
        shutil.copytree(study.folder / stem / "tokenizer", folder / stem / "tokenizer")
    new = open_study("link_stages", LinkParameters(**SMALL, output="earlier"))
    for cell in (cell for cell in new.cells if cell.needs):
        settings = {"tokenizer": f"earlier/{cell.needs}"}
        train_generator(type(cell.config)(**vars(cell.config) | settings), folder / cell.name, progress=False)
    before = stamps(folder)
    opened = open_study("link_stages", LinkParameters(**SMALL, output="earlier"))
    assert len(opened.finished()) == 6 and len(token_reports(opened)) == 2
    with pytest.raises(StudyError, match="call run"):
        opened.rows()
    opened.run(progress=False).check()
    assert stamps(folder) == before and len(opened.rows()) == 6
    assert open_study(folder).rows()["bits_per_token"].equals(study.rows()["bits_per_token"])


def test_a_folder_with_a_run_of_other_settings_is_refused(study, runs):
    folder = runs / "other"
    shutil.copytree(study.folder / "ibq-64" / "tokenizer", folder / "ibq-64" / "tokenizer")
    with pytest.raises(RunError, match=r"seed: 0 → 5.*nothing was changed|nothing was changed.*seed: 0 → 5"):
        open_study("link_stages", LinkParameters(**SMALL | {"seed": 5}, output="other"))
    with pytest.raises(StudyError, match="steps: 2 → 3"):
        open_study("link_stages", LinkParameters(**SMALL | {"steps": 3}, output=study.folder.name))


def test_a_study_without_permutation_says_nothing_about_it(monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
    parameters = LinkParameters(preset="smoke", codebook_sizes=(8,), lookup_free_bits=0, permute=False, output="a")
    study = open_study("link_stages", parameters)
    assert study.folder == tmp_path / "a" and [cell.name for cell in study.cells] == [
        "ibq-8/tokenizer",
        "ibq-8/generator",
    ]
    other = open_study("link_stages", LinkParameters(preset="smoke", codebook_sizes=(8,), seed=1))
    assert other.folder.name.startswith("link_stages-smoke-") and other.cells[0].config.seed == 1


def test_its_own_folder_has_the_name_it_had(monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
    assert open_study("link_stages", LinkParameters(preset="smoke")).folder.name == "link_stages-smoke-e2c9fdb78794"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "paper"}, "preset must be one of"),
        ({"codebook_sizes": (4, 4)}, "different numbers"),
        ({"codebook_sizes": (1,)}, "at least 2"),
        ({"codebook_sizes": (), "lookup_free_bits": 0}, "at least one tokenizer"),
        ({"lookup_free_bits": 1}, "lookup_free_bits must be 0"),
        ({"steps": -1}, "steps must be at least 0; got -1"),
    ],
)
def test_impossible_studies_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        LinkParameters(**settings)
