"""The study of what tokens cost: its cells, its tables, and that each run is made once."""

import pytest

from ibqlab.studies.token_costs import LinkParameters, LinkStudy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def study(runs, monkeypatch):
    """The smallest study, trained by the first test that wants it."""
    monkeypatch.setenv("IBQLAB_RUNS", runs)
    made = LinkStudy(LinkParameters(preset="smoke", codebook_sizes=(64,), lookup_free_bits=6, steps=2))
    made.train()
    return made


def test_each_tokenizer_has_a_generator_and_one_over_permuted_codes(study):
    assert [cell.name for cell in study.cells] == ["IBQ, K = 64", "LFQ, K = 64"]
    ibq, lfq = study.cells
    assert [config.index_permutation for config in ibq.generators.values()] == [-1, 1]
    assert ibq.generators["generator"].generator.vocabulary_size == 64
    assert lfq.generators["permuted"].generator.bits == (3, 3)
    assert lfq.tokenizer.tokenizer.quantizer.config_name == "lfq"


def test_tables_and_figures_are_of_all_tokenizers(study, monkeypatch):
    table = study.table()
    assert set(table["tokenizer"]) == {"IBQ, K = 64", "LFQ, K = 64"}
    assert table["permuted"].any() and (table["codebook_size"] == 64).all()
    permuted = study.permutation_table()
    assert len(permuted) == 2
    assert (permuted["difference"] == permuted["permuted_bits"] - permuted["bits"]).all()
    assert len(list(study.figures())) == 2 and study.figure_scaling().axes
    monkeypatch.setattr("ibqlab.training.trainer.Trainer.fit", None)
    study.train()


def test_a_study_without_permutation_says_nothing_about_it(monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
    study = LinkStudy(
        LinkParameters(preset="smoke", codebook_sizes=(8,), lookup_free_bits=0, permute=False, output="a")
    )
    assert study.folder == "a" and list(study.cells[0].generators) == ["generator"]
    other = LinkStudy(LinkParameters(preset="smoke", codebook_sizes=(8,), seed=1))
    assert other.folder.startswith("link_stages-smoke-") and other.cells[0].tokenizer.seed == 1


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
