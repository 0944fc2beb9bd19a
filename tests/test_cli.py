"""The command line, as a user types it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from golden import golden_file
from PIL import Image

from ibqlab.cli import main
from ibqlab.cli.run_commands import describe_metric
from ibqlab.costs.fitting import least_bytes, require_fits
from ibqlab.costs.run_cost import count_run
from ibqlab.generating.pipeline import GeneratorRunParameters, prepare_pipeline
from ibqlab.runs import Run, provenance
from ibqlab.runs.finding import find_run, locate, output_folder
from ibqlab.studies import AblationParameters, LinkParameters, StudyParameters, open_study
from ibqlab.training import RunParameters, prepare_run, recipe_config, train, train_generator

PARAMETERS = """\
# what the notebook may be told
preset: str = "smoke"   # as "laptop", a = sign in a comment
steps: int = 3
rate: float = 1e-3
flip: bool = True
sizes: list = [256]
label: str | None = None
limit: int = None
anything = 1
"""


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """A folder that is no checkout, with an empty folder of runs."""
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ibqlab(*arguments, code=0):
    """Run the command line; its output and its errors."""
    result = CliRunner().invoke(main, [str(part) for part in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


def write_notebook(path, *cells, tag="parameters"):
    first, *others = [nbformat.v4.new_code_cell(cell) for cell in cells]
    first.metadata["tags"] = [tag]
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *others]), path)
    return path


@pytest.fixture
def notebook(somewhere):
    return write_notebook(somewhere / "tiny.ipynb", PARAMETERS, "print(preset, steps, rate, sizes)")


@pytest.fixture
def sent(monkeypatch):
    """What would have been given to papermill."""
    seen = {}

    def execute(source, target, values, **settings):
        seen.update(source=source, target=target, values=values)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    return seen


# --- run ---


def test_run_executes_a_notebook_and_names_the_cell_that_fails(somewhere):
    check = "print(sizes, rate)\nassert sizes == [256, 1024] and rate == 1.0, 'wrong values'"
    source = write_notebook(somewhere / "tiny.ipynb", PARAMETERS, check, "raise KeyError('\\x1b[31mgone')")
    before = source.read_bytes()
    target = somewhere / "deep" / "out.ipynb"
    errors = ibqlab("run", source, "sizes=256,1024", "rate=1", "--output", target, code=1)
    assert errors.splitlines()[-1] == "Error: tiny.ipynb failed in notebook cell [4]: KeyError: '\\x1b[31mgone'"
    outputs = [output for cell in nbformat.read(target, 4).cells for output in cell.get("outputs", [])]
    assert outputs[0]["text"] == "[256, 1024] 1.0\n"
    assert source.read_bytes() == before


def test_run_fills_in_a_dated_output_that_nobody_else_has(notebook, sent, somewhere):
    names = {ibqlab("run", notebook).strip().removeprefix("executed copy: ") for _ in range(3)}
    assert len(names) == 3 and sent["target"] in names
    assert all(name.startswith(str(somewhere / "runs" / "notebooks" / "tiny" / "tiny-2")) for name in names)


def test_run_finds_notebooks_of_the_checkout_by_name(somewhere, sent):
    (somewhere / "pyproject.toml").write_text('[project]\nname = "ibqlab"\n')
    (somewhere / "notebooks").mkdir()
    write_notebook(somewhere / "notebooks" / "explore.ipynb", PARAMETERS)
    ibqlab("run", "explore")
    assert sent["source"] == str(somewhere / "notebooks" / "explore.ipynb")
    assert "did you mean 'explore'?" in ibqlab("run", "explor", code=2)


def test_run_reads_values_by_their_annotation(notebook, sent):
    ibqlab("run", notebook, "preset=123", "steps=5", "rate=2", "flip=false", "sizes=[1, 2]", "label=none", "limit=null")
    assert sent["values"] == {
        **{"preset": "123", "steps": 5, "rate": 2.0, "flip": False, "sizes": [1, 2], "label": "none", "limit": None}
    }
    assert isinstance(sent["values"]["rate"], float)
    ibqlab("run", notebook, "sizes=7", "anything={a: 1e-3}")
    assert sent["values"] == {"sizes": [7], "anything": {"a": 0.001}}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stesp=3", "tiny.ipynb has no parameter 'stesp'; did you mean 'steps'?"),
        ("zzz=3", "there are: preset, steps, rate, flip, sizes, label, limit, anything"),
        ("steps", "settings are typed key=value"),
        ("steps=many", "steps must be int, as in steps=3; got 'many'"),
        ("steps=1.5", "steps must be int"),
        ("steps=true", "steps must be int"),
        ("steps=null", "steps must be int"),
        ("rate=fast", "rate must be float, as in rate=0.001; got 'fast'"),
        ("flip=1", "flip must be bool, as in flip=true; got '1'"),
        ("sizes=[1", "sizes: cannot read '[1' as a value"),
    ],
)
def test_run_checks_parameters_before_anything_starts(notebook, sent, somewhere, setting, says):
    assert says in ibqlab("run", notebook, setting, code=2)
    assert not sent and not (somewhere / "runs").exists()


def test_run_refuses_what_is_no_notebook_with_parameters(somewhere, sent):
    untagged = write_notebook(somewhere / "untagged.ipynb", PARAMETERS, tag="other")
    assert "has no cell tagged `parameters`" in ibqlab("run", untagged, code=2)
    magic = write_notebook(somewhere / "magic.ipynb", "steps: int = 3\n%matplotlib inline")
    assert "not plain Python" in ibqlab("run", magic, code=2)
    for content in ("", "[]", "{}", '{"cells": [1]}'):
        (somewhere / "bad.ipynb").write_text(content)
        assert "is not a notebook" in ibqlab("run", "bad.ipynb", code=2)
    assert "there is no notebook 'none.ipynb'" in ibqlab("run", "none.ipynb", code=2)
    assert not sent


def test_run_writes_only_over_executed_copies(notebook, sent, somewhere):
    before = notebook.read_bytes()
    assert "give --output another file" in ibqlab("run", notebook, "--output", notebook, code=2)
    (somewhere / "notes.txt").write_text("mine")
    assert "give --output another file" in ibqlab("run", notebook, "--output", "notes.txt", code=2)
    assert "is a folder" in ibqlab("run", notebook, "--output", somewhere, code=2)
    assert not sent and notebook.read_bytes() == before
    (somewhere / "old.ipynb").write_text(json.dumps({"metadata": {"papermill": {}}, "cells": []}))
    ibqlab("run", notebook, "--output", "old.ipynb")
    assert Path(sent["target"]) == somewhere / "old.ipynb"


READS_PARAMETERS = """\
from ibqlab.config import read_parameters
from ibqlab.studies import StudyParameters, open_study

study = open_study("scale_codebook", read_parameters(StudyParameters, globals()))
"""


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("explore_collapse", ["preset=smok"], "no preset 'smok'; did you mean 'smoke'?"),
        ("scale_codebook", ["preset=laptob"], "did you mean 'laptop'?"),
        ("ablations", ["preset=smok"], "did you mean 'smoke'?"),
        ("ablations", ["preset=smoke", "tables=[lfk]"], "did you mean 'lfq'?"),
        ("train_tokenizer", ["preset=smok"], "did you mean 'smoke'?"),
        ("train_tokenizer", ["recipe=builtin/smok"], "did you mean 'builtin/smoke'?"),
        ("train_tokenizer", ["preset=smoke", "settings=[stesp=3]"], "stesp: unknown key; did you mean 'steps'?"),
        ("train_tokenizer", ["preset=smoke", "projection=umpa"], "did you mean 'umap'?"),
        ("train_tokenizer", ["output=."], "output must name a folder of its own"),
        ("train_generator", ["preset=digit"], "did you mean 'digits'?"),
        ("train_generator", ["tokenizer=nothing"], "there is no such tokenizer 'nothing'"),
        ("generation_gallery", ["card=ibq_bb"], "did you mean 'ibq_b'?"),
        ("generation_gallery", ["generator=nothing"], "there is no such generator 'nothing'"),
        ("link_stages", ["preset=smok"], "did you mean 'smoke'?"),
        ("link_stages", ["codebook_sizes=[64, 1]"], "at least 2"),
        ("evaluate_tokenizer", ["preset=smok"], "did you mean 'smoke'?"),
        ("evaluate_tokenizer", ["device=banana"], "device must be cpu, cuda"),
        ("compare_published", ["metrics=[rfit]"], "did you mean 'rfid'?"),
        ("explore_collapse", ["preset=smoke", "methods=[vq, ibk]"], "did you mean 'ibq'?"),
        ("explore_collapse", ["preset=smoke", "initialisations=[unifrom]"], "did you mean 'uniform'?"),
        ("explore_collapse", ["preset=smoke", "codebook_sizes=[1]"], "codebook_size must be at least 2"),
        (
            "explore_collapse",
            ["preset=smoke", "steps=0x10"],
            "steps: must be an integer; got the text '0x10'; write",
        ),
        ("explore_collapse", ["codebok_sizes=[64]"], "no parameter 'codebok_sizes'; did you mean 'codebook_sizes'?"),
        ("explore_collapse", ["preset=smoke", "settings=[optimizer.learning_rate=1e400]"], "must be a finite number"),
        (
            "explore_collapse",
            ["codebook_sizes=[100000000]"],
            "codebook_sizes must be at most 16,777,216; got 100,000,000",
        ),
        (
            "explore_collapse",
            [f"seeds={list(range(5001))}", "methods=[vq, ibq]"],
            "runs of the grid must be at most 10,0",
        ),
        ("scale_codebook", ["steps=2000000000"], "steps must be at most 1,000,000,000; got 2,000,000,000"),
        ("scale_codebook", ["steps=-1"], "steps must be at least 0; got -1"),
        ("scale_codebook", ["seeds=[-1]"], "seeds must be at least 0; got -1"),
        ("scale_codebook", ["code_dims=[100000]"], "code_dims must be at most 65,536"),
        ("ablations", ["steps=2000000000"], "steps must be at most 1,000,000,000"),
        ("ablations", ["seeds=[3000000000]"], "seeds must be at most 2,147,483,647"),
        ("ablations", ["workers=1000000"], "workers must be at most 16,384"),
        ("ablations", ["threads=-1"], "threads must be at least 0"),
        ("link_stages", ["steps=2000000000"], "steps must be at most 1,000,000,000"),
        ("link_stages", ["seed=-1"], "seed must be at least 0"),
        ("link_stages", ["codebook_sizes=[100000000]"], "codebook_sizes must be at most 16,777,216"),
        ("generation_gallery", ["images_per_class=1000000000"], "images_per_class must be at most 10,000"),
        (
            "generation_gallery",
            ["images_per_class=5001", "classes=[0, 1]"],
            "images_per_class × classes must be at most",
        ),
        ("generation_gallery", [f"cfg_scales={[1.0] * 5001}"], "× top_ps must be at most 10,000"),
        ("generation_gallery", ["classes=[-1]"], "classes must be at least 0"),
        ("generation_gallery", ["seed=-1"], "seed must be at least 0"),
        ("generation_gallery", ["temperatures=[1e-300]"], "temperature must be 0 or finite and at least"),
        ("generation_gallery", ["cfg_scales=[-1]"], "cfg_scale must be 0 to"),
        ("generation_gallery", ["top_ps=[2]"], "top_p must lie above 0 to 1"),
    ],
)
def test_every_mistake_in_a_notebooks_parameters_is_found_before_a_kernel_starts(sent, somewhere, name, settings, says):
    assert says in ibqlab("run", name, *settings, code=2)
    assert not sent and not (somewhere / "runs").exists()


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("explore_collapse", ["preset=smoke"], "steps: 9 → 0"),
        ("scale_codebook", ["preset=smoke", "steps=3"], "steps: 9 → 3"),
        ("ablations", ["preset=smoke", "tables=[lfq]"], "steps: 9 → 0"),
        ("train_tokenizer", ["preset=smoke"], "batch_size: 2 → "),
        ("train_generator", ["preset=smoke"], "batch_size: 2 → "),
        ("link_stages", ["preset=smoke", "codebook_sizes=[64]"], "batch_size: 2 → "),
    ],
)
def test_a_folder_of_other_settings_is_refused_before_a_kernel_starts(sent, somewhere, name, settings, says):
    """Typed for a folder, and without any parameter where the folder is the notebook's own."""
    made = somewhere / "runs" / "made"
    facts = {"study": name, "recipe": "builtin/smoke", "preset": "smoke", "steps": 9}
    made.mkdir(parents=True)
    if name in ("explore_collapse", "scale_codebook", "ablations"):
        (made / "study.json").write_text(json.dumps(facts))
    else:
        inner = {"train_tokenizer": ".", "train_generator": "generator", "link_stages": "ibq-64/tokenizer"}[name]
        recipe = "builtin/smoke_generator" if inner == "generator" else "builtin/smoke"
        Run.start(made / inner, recipe_config(recipe, {"batch_size": 2}))
    before = sorted(made.rglob("*"))
    output = ibqlab("run", name, *settings, "output=made", code=2)
    assert says in output and "nothing was changed" in output
    assert not sent and sorted(made.rglob("*")) == before


def test_a_study_of_other_settings_in_a_notebooks_own_folder_is_refused_without_any_parameter(sent, somewhere):
    folder = somewhere / "runs" / "scale_codebook-laptop"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"study": "scale_codebook", "recipe": "mine", "steps": 0}))
    assert 'recipe: "mine" → "builtin/photos"' in ibqlab("run", "scale_codebook", code=2)
    assert not sent


def test_values_arrive_in_the_types_of_the_notebooks_own_dataclass(sent, somewhere):
    source = write_notebook(
        somewhere / "mine.ipynb", "preset: str = 'smoke'\nseeds = []\nsettings = []", READS_PARAMETERS
    )
    ibqlab("run", source, "seeds=3", "settings=[data.source=set #2, optimizer.betas=[0.5, 0.9]]")
    assert sent["values"] == {"seeds": [3], "settings": ["data.source=set #2", "optimizer.betas=[0.5, 0.9]"]}


def test_help_lists_notebooks_and_their_parameters(somewhere, notebook):
    shown = ibqlab("run", "--help")
    names = [path.stem for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")]
    names.remove("index")  # the page that shows the others, not to be run
    assert all(f"  {name} " in shown for name in names) and "Why does the codebook of VQ collapse" in shown
    assert "  index " not in shown
    shown = ibqlab("run", "explore_collapse", "--help")
    assert 'preset="demo" (str)\n      smoke, demo, laptop, h200 or paper' in shown
    assert 'preset="smoke" (str)\n      as "laptop", a = sign in a comment' in ibqlab("run", notebook, "--help")
    assert "did you mean 'explore_collapse'" in ibqlab("run", "explore_colapse", "--help", code=2)
    assert "NOTEBOOK is missing" in ibqlab("run", code=2)


def test_notebooks_are_copied_out_once_and_changed_copies_stay(somewhere):
    said = ibqlab("notebooks", "mine").splitlines()
    names = sorted(path.name for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    assert sorted(path.name for path in (somewhere / "mine").iterdir()) == names
    assert said == [
        f"{len(names)} notebooks in mine",
        "open them: jupyter lab mine",
        "or without code: ibqlab app mine",
        "or run one: ibqlab run mine/explore_collapse.ipynb preset=smoke",
    ]
    (somewhere / "mine" / "ablations.ipynb").unlink()
    changed = somewhere / "mine" / "explore_collapse.ipynb"
    ours = changed.read_bytes()
    changed.write_bytes(ours + b" ")
    refused = ibqlab("notebooks", "mine", code=2)
    assert "mine holds other files of these names: explore_collapse.ipynb; nothing was copied" in refused
    assert changed.read_bytes() == ours + b" " and not (somewhere / "mine" / "ablations.ipynb").exists()
    changed.write_bytes(ours)
    ibqlab("notebooks", "mine")
    assert (somewhere / "mine" / "ablations.ipynb").is_file()
    (somewhere / "file").write_text("")
    assert "file is a file; name a folder" in ibqlab("notebooks", "file", code=2)


@pytest.mark.parametrize(
    "content", ["[" * 5000, '{"cells": [{"source": 1, "metadata": 3}]}', '{"cells": {"a": 1}}', "\xff"]
)
def test_what_is_no_notebook_is_named(somewhere, content):
    (somewhere / "bad.ipynb").write_text(content, encoding="latin-1")
    assert "bad.ipynb is not a notebook" in ibqlab("run", "bad.ipynb", code=2)
    assert "bad.ipynb is not a notebook" in ibqlab("run", "bad.ipynb", "--help", code=2)


# --- train ---


TINY = """\
data: {source: digits, image_size: 8}
tokenizer:
  autoencoder: {base_channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_resolutions: [],
                resolution: 8, latent_channels: 8}
  quantizer: {name: vq, codebook_size: 4, code_dim: 4}
record: {probe_tokens: 16, snapshot_features: 16, snapshot_images: 1}
batch_size: 2
accelerator: cpu
"""


def test_train_makes_a_run_that_runs_and_show_can_read(somewhere):
    (somewhere / "tiny.yaml").write_text(TINY)
    arguments = ["train", "tiny.yaml", "steps=1", "tokenizer.quantizer.codebook_size=8"]
    assert "finished" in ibqlab(*arguments)
    (folder,) = (somewhere / "runs").iterdir()
    run = Run(folder)
    assert folder.name == f"tiny-{run.config_hash}"
    assert run.config["tokenizer"]["quantizer"]["codebook_size"] == 8 and run.metrics["step"].max() == 1
    assert folder.name in ibqlab("runs") and "finished" in ibqlab("show", folder.name)
    before = (folder / "metrics.jsonl").read_bytes()
    ibqlab(*arguments)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "holds a run with other settings" in ibqlab("train", "tiny.yaml", "--output", folder, code=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny.yaml", "stesp=1"], "recipe tiny.yaml: stesp: unknown key; did you mean 'steps'?"),
        (["tiny.yaml", "steps=x"], "steps: must be an integer; got the text 'x'"),
        (["tiny.yaml", "steps"], "settings are typed key=value"),
        (["tiny.yaml", "tokenizer.quantizer.codebook_size=1"], "codebook_size must be at least 2, got 1"),
        (["none.yaml"], "there is no recipe 'none.yaml'"),
        (["empty.yaml"], "empty.yaml: the file is empty"),
    ],
)
def test_train_says_what_is_wrong_with_a_recipe(somewhere, arguments, says):
    (somewhere / "tiny.yaml").write_text(TINY)
    (somewhere / "empty.yaml").write_text("")
    assert says in ibqlab("train", *arguments, code=2)
    assert not (somewhere / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("steps=1000000000000", "steps must be at most 1,000,000,000"),
        ("batch_size=1000000000", "batch_size must be at most 1,048,576"),
        ("processes=1000000", "processes must be at most"),
        ("data.workers=100000", "data: workers must be at most 256"),
        ("data.image_size=100000", "data: image_size must be at most"),
        ("tokenizer.quantizer.codebook_size=1000000000000", "codebook_size must be at most 16,777,216"),
        ("tokenizer.quantizer.code_dim=1000000000", "code_dim must be at most"),
        ("tokenizer.autoencoder.num_res_blocks=100000", "num_res_blocks must be at most 1,024"),
        ("record.snapshot_images=1000000000", "snapshot_images must be at most"),
        ("record.log_every=1000000000000", "log_every must be at most"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate: must be a finite number; got inf"),
        ("optimizer.learning_rate=.inf", "must be a finite number"),
        ("seed=1" + "0" * 400, "seed: must be a number of at most 64 bits"),
        ("steps=0x10", "steps: must be an integer; got the text '0x10'; write 16"),
        ("steps=1_000", "got the text '1_000'; write 1000"),
        ("accelerator=gpu", "write accelerator=cuda"),
        ("precision=16", "write precision=bf16-mixed"),
        ("a" * 5000 + "=1", "no key has more than 500 letters"),
        (".".join("a" * 100) + "=1", "or 64 parts"),
        ("loss={adversarial_weight: 1, discriminator: {num_layers: 3}}", "need images of at least 24 × 24 pixels"),
        ("data=" + "[" * 1000 + "]" * 1000, "data: cannot read"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_settings_beyond_any_run_are_refused_before_work(somewhere, command, setting, says):
    (somewhere / "tiny.yaml").write_text(TINY)
    errors = ibqlab(command, "tiny.yaml", setting, code=2)
    assert says in errors and len(errors) < 700
    assert not (somewhere / "runs").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["batch_size=1048576", "data.image_size=256"],
        ["tokenizer.quantizer.codebook_size=10000000", "tokenizer.quantizer.code_dim=60000"],
        ["record.snapshot_images=1000000", "data.image_size=16384"],
    ],
)
def test_a_run_that_does_not_fit_into_memory_is_refused_before_anything_is_made(somewhere, settings):
    (somewhere / "tiny.yaml").write_text(TINY)
    assert "this machine has" in ibqlab("train", "tiny.yaml", *settings, code=2)
    assert not (somewhere / "runs").exists()


def test_what_does_not_fit_is_refused_without_the_command_too(somewhere, monkeypatch):
    tokenizer = recipe_config("builtin/smoke", {"batch_size": 1048576, "data.image_size": 256})
    generator = recipe_config("builtin/digits_generator", {"batch_size": 2**20, "generator.width": 2**14})
    for kind, config in ((train, tokenizer), (train_generator, generator)):
        with pytest.raises(ValueError, match=r"one process of this run needs at least .* GiB of memory, this machine"):
            kind(config, somewhere / "run")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK=1 is set in the environment and WORLD_SIZE"):
        train(recipe_config("builtin/smoke"), somewhere / "run")
    assert not (somewhere / "run").exists()


def test_the_plan_itself_decides_where_memory_may_be_short(monkeypatch):
    config = recipe_config("builtin/smoke", {"accelerator": "cpu"})
    planned = count_run(config).memory_bytes
    assert least_bytes(config) < planned
    monkeypatch.setattr("ibqlab.costs.fitting.memory_bytes", lambda: planned)
    require_fits(config)
    monkeypatch.setattr("ibqlab.costs.fitting.memory_bytes", lambda: planned - 1)
    with pytest.raises(ValueError, match="lower batch_size"):
        require_fits(config)


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:x", "cuda:99999", "", "cpu:", "cuda:9999", "cuda:-1"])
@pytest.mark.parametrize("command", ["tokenize", "sample"])
def test_a_device_that_is_not_there_is_named_before_anything_is_opened(somewhere, command, device):
    errors = ibqlab(command, "nothing", "--device", device, code=2)
    loading, message = errors.splitlines()
    assert "loading" in loading and "--device" in message


@pytest.mark.parametrize("command", [["train", "builtin/smoke"], ["tokenize", "nothing"], ["sample", "nothing"]])
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_half_of_a_launchers_variables_is_refused_and_not_waited_for(somewhere, monkeypatch, command, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    errors = ibqlab(*command, code=2)
    assert says in errors and "torchrun" in errors


@pytest.mark.parametrize("speed", ["1e-320", "nan", "inf", "-1", "0", "1e300"])
def test_plan_refuses_a_speed_that_no_gpu_has(somewhere, speed):
    (somewhere / "tiny.yaml").write_text(TINY)
    assert "images per second must lie in" in ibqlab("plan", "tiny.yaml", "--images-per-second", speed, code=2)


# --- runs, show ---


def test_runs_of_nothing_says_how_to_make_one(somewhere):
    assert f"no runs in {somewhere / 'runs'}; make one with: ibqlab train" in ibqlab("runs")
    assert "there is no such folder" in ibqlab("runs", "none", code=2)


def test_runs_and_show_tell_what_is_there(somewhere):
    config = {"tokenizer": {"quantizer": {"name": "ibq", "codebook_size": 262144, "code_dim": 8}}, "seed": 3}
    run = Run.start(somewhere / "runs" / "study" / "a", config)
    Run.start(somewhere / "runs" / "b", {"seed": 1})
    run.log({"step": 10, "loss": 1.23456789, "usage": 0.125, "usage_tokens": 2621440, "note": "x"})
    run.save_snapshot(10, a=np.zeros(1))
    run.save_checkpoint(10, {})
    run.figure_path("collapse.png").write_bytes(b"")
    table = ibqlab("runs", "--wide").splitlines()
    assert len(table) == 3 and "quantizer" in table[0]
    assert all(part in table[2] for part in ("study/a", "running", "ibq", " 262144 ", " 1.235 ", "2621440"))
    assert "–" in table[1] and not any(part in table[1] for part in ("<NA>", "nan", "None"))
    for name in ("study/a", run.path):
        shown = ibqlab("show", name, "--all")
        parts = ("a: running", "codebook_size: 262144", "usage: 12.50 % of codes in 2,621,440 tokens", "note: x")
        for part in (*parts, "collapse.png", "step_00000010.pt", "python:", run.config_hash):
            assert part in shown
    assert "note: x" not in ibqlab("show", run.path)
    assert "there is no such run 'none'" in ibqlab("show", "none", code=2)
    assert "is no run" in ibqlab("show", somewhere, code=2)


def test_show_is_short_and_names_the_command_for_all(somewhere):
    train(recipe_config("builtin/smoke", {"steps": 1}), somewhere / "runs" / "a b", progress=False)
    run = Run(somewhere / "runs" / "a b")
    for step in range(20):
        run.save_snapshot(step, a=np.zeros(1))
        run.figure_path(f"{step}.png").write_bytes(b"")
    shown = ibqlab("show", "a b")
    assert len(shown.splitlines()) <= 40
    assert "tokenizer.quantizer.codebook_size: 64" in shown and "snapshots: 20 steps from 0 to 19" in shown
    assert "codes in 640 tokens" in shown and "20 files in figures" in shown and "start_from" not in shown
    assert "ibqlab show 'a b' --all" in shown
    everything = ibqlab("show", "a b", "--all")
    assert all(part in everything for part in ("lecam_decay: 0.999", "feature_norm_std: ", "19.png", "versions:"))


def test_show_takes_whatever_metrics_hold(somewhere):
    run = Run.start(somewhere / "runs" / "a", {"seed": 1})
    row = '{"step": 1, "usage": [0.1], "usage_tokens": "many", "loss": {"a": 1}, "perplexity": NaN, "dead_codes": %s}'
    (run.path / "metrics.jsonl").write_text(row % ("9" * 400) + "\n")
    shown = ibqlab("show", "a", "--all")
    assert "usage: [0.1]" in shown and "loss: {'a': 1}" in shown and f"dead_codes: {'9' * 100}" in shown


# --- one way to name a run ---


@pytest.fixture
def mine(somewhere):
    """A run in the folder of all runs, one in a study, and one that lies here."""
    for place in ("runs/mine", "runs/study/a", "here"):
        Run.start(somewhere / place, {"seed": 1})
    return somewhere


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mine", "runs/mine"),
        ("runs/mine", "runs/mine"),
        ("study/a", "runs/study/a"),
        ("runs/study/a", "runs/study/a"),
        ("here", "here"),
        ("./here", "here"),
        ("~/here", "here"),
        ("nothing", "nothing"),
        ("./mine", "mine"),
    ],
)
def test_a_run_is_found_by_path_and_by_name(mine, monkeypatch, name, place):
    monkeypatch.setenv("HOME", str(mine))
    monkeypatch.setenv("IBQLAB_RUNS", str(mine / "runs"))
    assert os.path.abspath(locate(name)) == str(mine / place)
    if (mine / place).exists():
        assert find_run(name) == locate(name)
        assert f"{Path(place).name}: running" in ibqlab("show", name)
    else:
        with pytest.raises(FileNotFoundError, match="there is no such run"):
            find_run(name)


@pytest.mark.parametrize("command", ["show", "inspect", "export", "tokenize", "sample", "report"])
def test_every_command_finds_a_run_by_its_name_and_names_the_nearest(mine, command):
    rest = ["x.safetensors"] if command == "export" else []
    assert "did you mean 'mine'?" in ibqlab(command, "mien", *rest, code=2)
    if command not in ("show", "report"):
        for name in ("mine", "runs/mine"):
            says = "mine is no generator" if command == "sample" else "mine has no checkpoint"
            assert says in ibqlab(command, name, *rest, code=2)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x", "runs/x"),
        ("runs/x", "runs/x"),
        ("study/x", "runs/study/x"),
        ("./x", "x"),
        ("~/x", "x"),
        ("../x", "../x"),
        ("", "runs/usual"),
        ("mine", "runs/mine"),
    ],
)
def test_outputs_are_names_below_all_runs_or_plainly_paths(mine, monkeypatch, text, place):
    monkeypatch.setenv("HOME", str(mine))
    assert os.path.abspath(output_folder(text, default="usual")) == os.path.abspath(mine / place)
    if text:
        folder = output_folder(text)
        folder.mkdir(parents=True, exist_ok=True)
        assert locate(text).samefile(folder)
        folder.name == "mine" or folder.rmdir()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *[(text, "must name a folder of its own") for text in (".", "..", "runs", "./runs", "x/..", "/")],
        ("here", "write ./here for the one here, runs/here for a new one there"),
        ("x" * 5000, "at most 200 bytes"),
        ("a\0b", "no zero byte"),
        ("~nobodyhere/x", "write the whole path"),
    ],
)
def test_outputs_that_no_folder_can_have_are_refused_at_every_door(mine, text, says):
    (mine / "tiny.yaml").write_text(TINY)
    with pytest.raises(ValueError, match=re.escape(says)):
        output_folder(text)
    if "\0" not in text:
        assert says in ibqlab("train", "tiny.yaml", "--output", text, code=2)
    with pytest.raises(ValueError, match=re.escape(says)):
        prepare_run(RunParameters(recipe="tiny.yaml", output=text))


def test_a_notebook_and_a_command_mean_the_same_output(somewhere):
    (somewhere / "tiny.yaml").write_text(TINY)
    for text in ("x", "runs/x"):
        assert prepare_run(RunParameters(recipe="tiny.yaml", output=text))[1] == somewhere / "runs" / "x"
        assert open_study("scale_codebook", StudyParameters(preset="smoke", output=text)).folder == somewhere / "runs/x"
        ablations = AblationParameters(preset="smoke", tables=("lfq",), output=text)
        assert open_study("ablations", ablations).folder == somewhere / "runs" / "x"
        assert prepare_pipeline(GeneratorRunParameters(preset="smoke", output=text)).folder == somewhere / "runs" / "x"
        link = LinkParameters(preset="smoke", output=text)
        assert open_study("link_stages", link).folder == somewhere / "runs" / "x"
    ibqlab("train", "tiny.yaml", "steps=1", "--output", "runs/x")
    assert (somewhere / "runs" / "x" / "metrics.jsonl").is_file() and not (somewhere / "runs" / "runs").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_of_runs_fits_the_terminal_and_a_name_takes_one_row(somewhere, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    config = {"tokenizer": {"quantizer": {"name": "ibq", "codebook_size": 262144, "code_dim": 8}}, "seed": 3}
    run = Run.start(somewhere / "runs" / "a\n\x1b[31mb", config)
    run.log(
        {"step": 10, "loss": 1.2, "usage": 0.5, "usage_tokens": 10, "validation_usage": 0.5, "validation_psnr": 9.0}
    )
    table = ibqlab("runs").splitlines()
    assert all(len(line) <= width for line in table[:2]) and r"a\x0a\x1b[31mb" in table[1]
    assert "\x1b" not in ibqlab("runs", "--wide") and "left out: " in table[2]
    assert "usage_tokens" in ibqlab("runs", "--wide")


def test_metrics_are_described_with_units_and_token_counts():
    last = {
        "usage": 0.5,
        "validation_usage": 0.25,
        "validation_tokens": 640,
        "validation_psnr": 20.5,
        "gradient_reach": 1.0,
    }
    assert [describe_metric(name, last) for name in last] == [
        "usage: 50.00 % of codes in an unknown number of tokens",
        "validation_usage: 25.00 % of codes in 640 tokens",
        "validation_tokens: 640",
        "validation_psnr: 20.5 dB",
        "gradient_reach: 100.00 % of codes",
    ]


# --- warnings ---


def test_warnings_of_the_package_are_a_line_each(tmp_path):
    for name in ("2", "10", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
    for name in ("2", "10"):
        for number in range(4):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.png")
    code = """if True:
        import sys, warnings
        from ibqlab import cli
        from ibqlab.cli import training_commands
        from ibqlab.data import DataConfig, open_data

        def loading(command):
            open_data(DataConfig(source=sys.argv[1], image_size=16), "train")
            warnings.warn("another's")

        training_commands.say_loading = loading
        cli.main(["train", "nothing"], standalone_mode=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "images")], capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith("Warning: ")]
    assert len(told) == 2 and "hold no image" in told[0] and "numbered by their names as text" in told[1], done.stderr
    assert not any("site-packages" in line or "classes.py" in line or "folder.py" in line for line in lines)
    assert any("UserWarning: another's" in line for line in lines), done.stderr


# --- provenance ---


def test_the_command_line_of_provenance_can_be_pasted(somewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(somewhere / "home"))
    typed = ["ibqlab", "train", "my recipe.yaml", "data.source=set #2", f"start_from={somewhere / 'old'}"]
    typed += ["--output", str(somewhere / "home" / "x"), "data.validation_source=/elsewhere/secret/val"]
    monkeypatch.setattr(sys, "argv", ["/secret/bin/ibqlab", *typed[1:]])
    facts = provenance()
    # The home folder lies inside the working folder here, which comes first.
    assert shlex.split(facts["command_line"]) == [
        *typed[:4],
        "start_from=./old",
        "--output",
        "./home/x",
        "data.validation_source=…/val",
    ]
    assert facts["folder"] == somewhere.name and "secret" not in json.dumps(facts)
    assert facts["hardware"]["cores"] == os.cpu_count()
    # In the run's own folder nothing is left out.
    facts = provenance(private=True)
    assert shlex.split(facts["command_line"])[-1] == "data.validation_source=/elsewhere/secret/val"
    assert facts["started_in"] == str(Path.cwd())
    monkeypatch.setenv("IBQLAB_COMMAND", "ibqlab run explore_collapse preset=smoke")
    assert provenance()["command_line"] == "ibqlab run explore_collapse preset=smoke"
    monkeypatch.delenv("IBQLAB_COMMAND")
    monkeypatch.setattr(sys, "argv", ["/bin/ipykernel_launcher.py", "-f", "/secret/kernel.json"])
    assert provenance()["command_line"] == "(run in a notebook)"


def test_a_studys_command_says_where_it_went(somewhere):
    study = open_study("scale_codebook", StudyParameters(preset="smoke", output="my study"))
    assert shlex.split(study.command) == ["ibqlab", "run", "scale_codebook", "preset=smoke", "output=my study"]
    assert "output" not in open_study("scale_codebook", StudyParameters(preset="smoke")).command


# --- the program itself ---


def test_bugs_keep_their_traceback(monkeypatch, somewhere):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("ibqlab.runs.runs_root", broken)
    result = CliRunner().invoke(main, ["runs"])
    assert isinstance(result.exception, RuntimeError) and str(result.exception) == "a bug"


def test_help_needs_neither_torch_nor_pandas():
    code = "import sys, ibqlab.cli, click.testing as t; r = t.CliRunner().invoke(ibqlab.cli.main, ['--help']); "
    code += "print(r.output, {'torch', 'pandas', 'papermill', 'matplotlib', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()") and "train" in done.stdout


def test_config_and_runs_need_neither_torch_nor_pandas():
    code = "import sys, ibqlab.config, ibqlab.runs; "
    code += "print({'torch', 'pandas', 'papermill', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_python_m_ibqlab_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "ibqlab", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ibqlab ")


def test_inspect_and_export_account_for_a_checkpoint(somewhere):
    path = golden_file("tokenizer_ema_official_ckpt.ckpt")
    shown = ibqlab("inspect", path)
    assert "279 of 279 keys accounted for" in shown and "codebook_size: 64" in shown
    ibqlab("export", path, "one.safetensors", "--weights", "raw")
    assert "121 of 121 keys" in ibqlab("inspect", "one.safetensors", "--weights", "raw")
    ibqlab("export", path, "again.ckpt")
    assert "279 of 279 keys" in ibqlab("inspect", "again.ckpt", "--weights", "raw")


def test_export_says_what_it_can_write():
    assert ".safetensors" in ibqlab("export", "nothing.ckpt", "x.bin", code=2)
    assert "--weights is for .safetensors" in ibqlab("export", "nothing.ckpt", "x.ckpt", "--weights", "raw", code=2)


def test_download_lists_what_was_published_and_fetches_nothing():
    listed = ibqlab("download")
    assert "IBQ-262144" in listed and "gFID 2.05  IS 286.73" in listed
    assert all(name in listed for name in ("IBQ-AR-XXL", "Open-MAGVIT2-AR-B"))
    assert "IBQ-262144" in ibqlab("download", "IBQ-262143", code=2)


# --- where the command is typed --------------------------------------------------------------------------------------


def in_shell(line, folder, **variables):
    """What a shell's line prints on both channels, and its exit status."""
    line = line.replace("ibqlab ", f"{shlex.quote(sys.executable)} -m ibqlab ")
    done = subprocess.run(
        ["sh", "-c", line],
        check=False,
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr, done.returncode


def test_closed_input_and_output_lead_nowhere(tmp_path):
    """Without numbers 0 to 2 in use, the next file that is opened would get what is meant for the terminal."""
    settings = f"train builtin/smoke steps=2 --no-report --output {tmp_path}/run"
    assert in_shell(f"ibqlab {settings} <&- >&- 2>&-", tmp_path) == ("", 0)
    assert Run(tmp_path / "run").status == "finished"
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"loading" not in file.read_bytes()


def test_a_deleted_folder_is_no_place_to_work_in(tmp_path):
    (tmp_path / "gone").mkdir()
    said, status = in_shell("rmdir ../gone; ibqlab runs", tmp_path / "gone")
    assert (said, status) == ("Error: the current folder has been deleted; go to another one: cd FOLDER\n", 2)


def test_a_file_is_no_folder_of_runs(tmp_path):
    (tmp_path / "file").write_text("")
    said, status = in_shell("ibqlab runs", tmp_path, IBQLAB_RUNS=str(tmp_path / "file"))
    assert status == 2
    assert said == f"Error: IBQLAB_RUNS must name a folder; got {tmp_path}/file, a file. Name another, or unset it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_output_to_a_full_disk_says_so(tmp_path):
    said, status = in_shell("ibqlab --help > /dev/full", tmp_path)
    assert status != 0 and "Traceback" not in said
    said, status = in_shell("ibqlab runs > /dev/full", tmp_path, IBQLAB_RUNS=str(tmp_path))
    assert status != 0 and "is full" in said and "Traceback" not in said
