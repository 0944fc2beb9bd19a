"""The scripts that measure speed: their baseline is the published form, and they run."""

import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import torch
from oracle import algorithm_1, entropies, ibq_loss

from ibqlab.data.resizing import RESIZERS
from ibqlab.quantizers import build_quantizer

pytestmark = pytest.mark.usefixtures("warm_start")
BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def published_form(monkeypatch):
    """The baseline's module, imported anew, because its quantizer is known in this test alone."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "published_form", raising=False)
    import published_form  # noqa: PLC0415 - it registers its quantizer when it is imported

    yield published_form
    sys.modules.pop("published_form", None)


def case(tokens=40, codes=60, dim=8):
    drawn = torch.randn(tokens + codes, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn[:tokens].clone().requires_grad_(), drawn[tokens:].clone().requires_grad_()


def test_the_baseline_is_the_papers_algorithm(published_form):
    z, codebook = case()
    quantized, index, sample, average = published_form.published_index_backprop(z, codebook, 0.1, 1e-5)
    z_q, expected_index, _ = algorithm_1(z, codebook)
    expected_sample, expected_average = entropies(z, codebook, 0.1)
    assert torch.equal(index, expected_index)
    for ours, theirs in ((quantized, z_q), (sample, expected_sample), (average, expected_average)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(quantized.sin().sum() + 3 * sample - 2 * average, (z, codebook))
    theirs = torch.autograd.grad(z_q.sin().sum() + 3 * expected_sample - 2 * expected_average, (z, codebook))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_baselines_quantizer_has_the_published_loss_and_equals_ibq(published_form):
    z, codebook = case()
    features = z.detach().T.reshape(1, 8, 5, 8)
    settings = {"codebook_size": 60, "code_dim": 8, "entropy_temperature": 0.1}
    found = {}
    for name in ("ibq", "ibq_published_form"):
        quantizer = build_quantizer(name, **settings).double()
        quantizer.codes.weight.data.copy_(codebook.detach())
        inputs = features.clone().requires_grad_()
        out = quantizer(inputs)
        (out.loss + out.quantized.sin().sum()).backward()
        found[name] = out, inputs.grad, quantizer.codes.weight.grad
    theirs, ours = found["ibq"], found["ibq_published_form"]
    assert torch.equal(ours[0].indices, theirs[0].indices)
    assert ours[0].terms.keys() == theirs[0].terms.keys()
    for a, b in ((ours[0].loss, theirs[0].loss), (ours[1], theirs[1]), (ours[2], theirs[2])):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    _, _, quantization = ibq_loss(z, codebook)
    sample, average = entropies(z, codebook, 0.1)
    torch.testing.assert_close(ours[0].loss, quantization + 0.05 * (sample - average), rtol=1e-10, atol=1e-12)


def ask(script, folder, *arguments):
    """Run a script on tiny settings; what it prints and the table it writes."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--output", str(folder / "table.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, pd.read_csv(folder / "table.csv")


def assert_tells_its_origin(table):
    for column in ("device", "python", "torch", "commit", "dirty", "seed", "command", "started"):
        assert table[column].notna().all() and table[column].nunique() == 1, column


def test_loading_says_how_many_processes_a_step_needs(tmp_path):
    settings = ["--images", "16", "--workers", "0", "1", "--rounds", "1", "--step-images-per-second", "1e6"]
    told, table = ask("data_loading.py", tmp_path, *settings)
    assert_tells_its_origin(table)
    assert len(table) == len(RESIZERS) * 2 * 2 and (table["images_per_second"] > 0).all()
    assert (table["per_process"] * table["processes"].clip(1) == table["images_per_second"]).all()
    for resize in ("opencv", "pil"):
        slowest = table[(table["resize"] == resize) & (table["processes"] > 0)].nsmallest(1, "per_process").iloc[0]
        assert slowest["processes_needed"] == math.ceil(1e6 / slowest["per_process"]) > 1
        assert f"needs {slowest['processes_needed']} of them (data.workers={slowest['processes_needed']})" in told


def test_a_step_is_timed_against_the_published_form(tmp_path):
    settings = ["builtin/smoke", "--images", "2", "--steps", "2", "--rounds", "2", "--warm-up", "1"]
    _, table = ask("training_speed.py", tmp_path, *settings, "--published-form")
    assert_tells_its_origin(table)
    assert table["quantizer"].tolist() == ["as configured", "published form"]
    assert (table["steps"] == 4).all() and (table["images"] == 2).all()
    configured, published = table.to_dict("records")
    assert configured["speed_ratio"] == pytest.approx(published["seconds_per_step"] / configured["seconds_per_step"])
    assert published["speed_ratio"] == 1
    assert (table["start_seconds"] > table["seconds_per_step"]).all()


def test_a_step_is_timed_as_written_and_compiled(tmp_path, monkeypatch):
    settings = ["builtin/smoke", "--images", "1", "--steps", "1", "--rounds", "1", "--warm-up", "1", "--compile", "off"]
    _, table = ask("training_speed.py", tmp_path, *settings)
    assert table["compile"].tolist() == [False]
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_speed  # noqa: PLC0415 - a script, found in the benchmarks' folder

    forms = training_speed.forms_of("both", published=True)
    assert [settings["speed.compile"] for settings in forms.values()] == [False, True, False]
    rows = [{"images_per_second": 2.0, "peak_gib": 1.0, "quantizer": name.partition(",")[0]} for name in forms]
    rows[2] |= {"images_per_second": 1.0, "peak_gib": 4.0}
    ratios = [(row["speed_ratio"], row["memory_ratio"]) for row in training_speed.with_ratios(rows)]
    assert ratios == [(2.0, 0.25), (2.0, 0.25), (1.0, 1.0)]


def test_the_published_form_is_ibqs_alone():
    command = [sys.executable, str(BENCHMARKS / "training_speed.py"), "imagenet/vqgan_16384", "--published-form"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "imagenet/vqgan_16384 has 'vq'" in done.stderr


def test_quantizers_are_measured_against_written_out_form_and_floor(tmp_path):
    settings = ["--tokens", "128", "--codes", "128", "512", "--dim", "16", "--rounds", "1", "--encode", "builtin/smoke"]
    _, table = ask("index_backprop.py", tmp_path, *settings, "--methods", "index_backprop", "lfq entropies")
    assert set(table["method"]) == {"index_backprop", "lfq entropies", "encode, builtin/smoke"}
    assert_tells_its_origin(table)
    assert (tmp_path / "table_figure.png").stat().st_size > 10_000
    for _, pair in table.groupby(["method", "codes"]):
        ours, literal = (pair[pair["form"] == form].iloc[0] for form in ("ibqlab", "written out"))
        assert ours["times_faster"] == pytest.approx(literal["seconds"] / ours["seconds"])
        assert literal["times_faster"] == 1
    timed = table[table["floor_s"].notna()]
    assert timed["share_of_floor"].to_numpy() == pytest.approx((timed["floor_s"] / timed["seconds"]).to_numpy())
    # So little memory may come out of pages that the process has already; N × K numbers do not.
    assert (table["peak_mb"].dropna() >= 0).all()
    assert table[(table["method"] == "index_backprop") & (table["form"] == "written out")]["peak_mb"].max() > 0.2
    assert (table[table["method"].str.startswith("encode")]["images_per_second"] > 0).all()


def test_written_out_forms_are_what_they_are_compared_with(published_form, monkeypatch):
    monkeypatch.delitem(sys.modules, "index_backprop", raising=False)
    import index_backprop as benchmark  # noqa: PLC0415 - a script, found in the benchmarks' folder

    inputs = benchmark.Inputs((40, 64, 8), torch.float64, "cpu")
    for name, method in benchmark.METHODS.items():
        ours, literal = (
            method.forms[form](inputs.features, inputs.codebook, inputs.pull) for form in ("ibqlab", "written out")
        )
        torch.testing.assert_close(ours, literal, rtol=1e-8, atol=1e-10, msg=name)
    sys.modules.pop("index_backprop", None)


def test_cross_entropy_is_timed_against_the_written_out_form(tmp_path):
    settings = ["--sizes", "300", "700", "--tokens", "40", "--dim", "8", "--rounds", "2", "--torch-rows", "auto", "16"]
    told, table = ask("cross_entropy.py", tmp_path, *settings)
    assert_tells_its_origin(table)
    names = ["written out", "ours"]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        names += ["torch, rows auto", "torch, rows 16"]
    types = ["float32", "bfloat16"] if torch.cuda.is_available() else ["float32"]
    assert list(zip(table["vocabulary"], table["dtype"], table["form"], strict=True)) == [
        (vocabulary, dtype, name) for vocabulary in (300, 700) for dtype in types for name in names
    ]
    assert (table["seconds"] > 0).all() and (table["floor_share"] > 0).all() and (table["peak_mib"] >= 0).all()
    for _, rows in table.groupby(["vocabulary", "dtype"]):
        base = rows[rows["form"] == "written out"].iloc[0]
        assert rows["time_ratio"].tolist() == pytest.approx((rows["seconds"] / base["seconds"]).tolist())
        assert rows["loss"].tolist() == pytest.approx([base["loss"]] * len(rows), rel=1e-2)
    assert told.count("| ours |") == 2 * len(types)


def test_the_written_out_forms_memory_is_that_of_the_logits(tmp_path):
    """Large enough for a process's account of its memory: N × V is 64 MiB, everything else small."""
    settings = ["--sizes", "32768", "--tokens", "512", "--dim", "4", "--rounds", "1", "--torch-rows", "32"]
    _, table = ask("cross_entropy.py", tmp_path, *settings)
    base, ours = (
        table[(table["form"] == name) & (table["dtype"] == "float32")].iloc[0] for name in ("written out", "ours")
    )
    assert base["peak_mib"] > 2 * 64
    assert ours["peak_mib"] < 0.8 * base["peak_mib"]
    assert ours["memory_ratio"] == pytest.approx(ours["peak_mib"] / base["peak_mib"])


def test_sampling_is_timed_against_a_plain_loop_that_draws_the_same_tokens(tmp_path):
    settings = ["--width", "64", "--depth", "1", "--batches", "1", "2", "--positions", "3", "--rounds", "1"]
    told, table = ask("sampling.py", tmp_path, *settings)
    assert_tells_its_origin(table)
    assert list(zip(table["batch"], table["form"], strict=True)) == [
        (batch, name) for batch in (1, 2) for name in ("plain loop", "ours")
    ]
    assert (table["same_tokens"] == 1).all() and (table["floor_share"] > 0).all()
    for _, rows in table.groupby("batch"):
        seconds = rows["seconds_per_token"].tolist()
        assert rows["speed_up"].tolist() == pytest.approx([1.0, seconds[0] / seconds[1]])
    assert told.count("| ours |") == 2


def test_the_plain_loop_is_the_librarys_sampling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import plain_sampling  # noqa: PLC0415 - it lies beside the benchmarks
    import sampling  # noqa: PLC0415 - likewise

    from ibqlab.generator import GeneratorConfig  # noqa: PLC0415 - the library's name beside the script's

    config = GeneratorConfig(
        vocabulary_size=12, num_classes=3, grid_size=3, depth=2, num_heads=2, width=16, hidden_multiple=8
    )
    generator = sampling.make_generator(config, torch.device("cpu")).double()
    labels, settings = torch.tensor([0, 2]), sampling.SAMPLING
    expected = generator.sample(labels, seed=sampling.SEED, **vars(settings))
    assert torch.equal(plain_sampling.sample_plainly(generator, labels, settings, 9, sampling.SEED), expected)
    assert torch.equal(generator.sample_plainly(sampling.make_request(generator, labels, 9)), expected)
    for name in ("sampling", "plain_sampling", "rows", "cross_entropy"):
        sys.modules.pop(name, None)


def test_a_first_image_that_fails_is_not_measured_and_says_why(monkeypatch, capfd):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sampling  # noqa: PLC0415 - it lies beside the benchmarks

    chosen = Namespace(preset="nothing", width=None, depth=None)
    assert math.isnan(sampling.first_image_seconds(chosen))
    assert "nothing" in capfd.readouterr().err
    chosen = Namespace(preset="B", width=64, depth=1)
    assert sampling.first_image_seconds(chosen) > 0
    for name in ("sampling", "plain_sampling", "rows", "cross_entropy"):
        sys.modules.pop(name, None)


def test_workers_are_compared_on_the_same_cells(tmp_path):
    script = [str(BENCHMARKS / "study_workers.py"), "--cells", "2", "--steps", "2", "--output", str(tmp_path / "w.csv")]
    subprocess.run([sys.executable, *script], check=True, capture_output=True)
    table = pd.read_csv(tmp_path / "w.csv")
    assert table["workers"].tolist() == [1, 2] and table["share_of_one_worker"].iloc[0] == 1
    assert (table["shortest_cell_s"] > 0).all() and table["commit"].notna().all()
