"""A user's own quantizer out of a file: in every process, kept with the run, refused where it has changed."""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from registry import SMALL_DIGITS

from ibqlab.cli import main
from ibqlab.config import ConfigError, content_hash, parse, read_parameters, to_dict
from ibqlab.diagnostics.lab import FeaturesLabParameters, PlaygroundParameters, prepare_lab
from ibqlab.generating import GalleryParameters, GeneratorRunParameters, prepare_pipeline
from ibqlab.grids.evaluation_parameters import ComparisonParameters, EvaluationParameters
from ibqlab.grids.evaluation_rules import find_tokenizer
from ibqlab.grids.local import Job
from ibqlab.grids.slurm_work import SlurmWork
from ibqlab.notebooks.catalogue import find_notebook
from ibqlab.notebooks.parameters import read_settings
from ibqlab.plots.style import method_label, styles_for
from ibqlab.pretrained import CheckpointError, export_tokenizer, load_tokenizer
from ibqlab.quantizers import (
    Quantizer,
    QuantizerConfig,
    QuantizerError,
    available_quantizers,
    base,
    build_quantizer,
    check_quantizer,
    quantizer_from,
    register_quantizer,
)
from ibqlab.recipes import plugins
from ibqlab.recipes.plugins import copy_name, import_plugins
from ibqlab.runs import Run, RunError
from ibqlab.studies import StudyError, StudyParameters, open_study
from ibqlab.training import RunParameters, prepare_run, recipe_config, train
from ibqlab.training.plugin_check import warn_of_broken_rules

pytestmark = pytest.mark.usefixtures("warm_start", "own_folder")

SOURCE = """
from torch.nn import functional as F

from ibqlab.quantizers import Assignment, Quantizer, nearest_code, register_quantizer, straight_through


@register_quantizer("mine", label="My own", color="#1B9E77", marker="h")
class Mine(Quantizer):
    def loss_weights(self):
        return {"commitment": WEIGHT}

    def assign(self, features, codebook):
        indices = nearest_code(features, codebook)
        codes = F.embedding(indices, codebook)
        value = straight_through(features, codes) if self.training else codes
        return Assignment(value, indices, {"commitment": F.mse_loss(features, codes)})
"""
TINY = {**SMALL_DIGITS, "steps": 2, "record.log_every": 2, "record.validate_every": 2, "batch_size": 2}
STUDY = {
    **{"preset": "smoke", "recipe": "builtin/smoke", "methods": ("mine",), "steps": 2, "output": "study"},
    **{"initialisations": ("published",), "codebook_sizes": (16,), "code_dims": (4,)},
    "settings": tuple(
        f"{key}={json.dumps(value)}" for key, value in TINY.items() if "quantizer" not in key and key != "steps"
    ),
}
"""Parameters of a study of one run."""


def write_plugin(file, weight=1.0):
    file.write_text(SOURCE.replace("WEIGHT", str(weight)))
    return str(file)


@pytest.fixture
def own_folder(monkeypatch, tmp_path):
    """Plugins stand in the current folder, which a test's own is."""
    monkeypatch.chdir(tmp_path)


def tiny(plugin="my.py", **settings):
    return recipe_config(
        "builtin/smoke", {"tokenizer.quantizer.name": "mine", **TINY, **settings}, plugins=[plugin] if plugin else ()
    )


def forget(monkeypatch):
    """As a new process: nothing is registered and no plugin was run."""
    monkeypatch.setattr(base, "_PRESETS", {n: r for n, r in base._PRESETS.items() if r.module.startswith("ibqlab.")})
    monkeypatch.setattr(plugins, "_LOADED", {})
    monkeypatch.setattr(plugins, "_REGISTERED", {})


def test_a_study_in_other_processes_trains_a_plugins_quantizer(tmp_path, monkeypatch):
    write_plugin(tmp_path / "my.py")
    study = open_study("explore_collapse", StudyParameters(**STUDY, plugins=("my.py",)))
    study.run(progress=False).check()
    assert set(study.rows()["method"]) == {"mine"}
    assert (study.folder / "plugins" / "my.py").read_text() == (tmp_path / "my.py").read_text()
    (cell,) = study.cells
    run = Run(study.folder / cell.name)
    assert run.config["plugins"] == ["my.py"]
    assert (run.path / "plugins" / "my.py").is_file()
    (digest,) = run.provenance["plugins"].values()
    assert digest == import_plugins(["my.py"])[0].sha256
    write_plugin(tmp_path / "my.py", weight=2.0)
    with pytest.raises(StudyError, match=r"holds another grid.*plugins"):
        open_study("explore_collapse", study.parameters)
    # The folder is read by its copies, whatever has become of the file.
    (tmp_path / "my.py").unlink()
    forget(monkeypatch)
    again = open_study("study")
    assert list(again.rows()["method"]) == ["mine"]
    assert build_quantizer("mine").loss_weights() == {"commitment": 1.0}
    assert "My own" in again.definition.report(again, False)


class OneJobElsewhere:
    """Stands in for `SlurmLauncher`: what a job runs, as pickled, in a bare process of another folder and cache, after
    the plugin itself is gone."""

    folder, gone = None, None

    def __init__(self, folder, settings=()):
        pass

    def free(self, cell):
        return True

    def find(self, cell, store):
        return None

    def start(self, cell, store):
        self.gone.rename(self.gone.with_suffix(".gone"))
        work = pickle.dumps(SlurmWork(str(store.folder.resolve()), cell.name, cell.config.processes))
        script = "import pickle, sys; sys.exit(pickle.load(sys.stdin.buffer)())"
        environment = os.environ | {"IBQLAB_CACHE": str(self.folder / "cache")}
        done = subprocess.run([sys.executable, "-c", script], input=work, cwd=self.folder, env=environment, check=False)
        assert done.returncode == 0, store.log(cell.name).read_text()
        return Job(cell.name, store)


@pytest.mark.parametrize("plugin", ["my.py", "mypackage.quantizers"])
def test_a_job_of_a_cluster_runs_the_studys_copy_wherever_it_starts(plugin, tmp_path, monkeypatch):
    file = tmp_path / ("my.py" if plugin == "my.py" else "mypackage/quantizers.py")
    file.parent.mkdir(exist_ok=True)
    write_plugin(file)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(OneJobElsewhere, "folder", tmp_path / "elsewhere")
    monkeypatch.setattr(OneJobElsewhere, "gone", file)
    monkeypatch.setattr("ibqlab.studies.study.SlurmLauncher", OneJobElsewhere)
    parameters = StudyParameters(**STUDY, plugins=(plugin,), cluster="slurm")
    study = open_study("explore_collapse", parameters)
    study.run(progress=False).check()
    assert list(study.rows()["method"]) == ["mine"]
    (cell,) = study.cells
    run = Run(study.folder / cell.name)
    copies = [folder / "plugins" / copy_name(plugin) for folder in (study.folder, run.path)]
    assert run.config["plugins"] == [plugin] and list(run.provenance["plugins"]) == [plugin]
    assert copies[0].read_bytes() == copies[1].read_bytes() == file.with_suffix(".gone").read_bytes()
    # Another user, who has never named the code, is asked first.
    forget(monkeypatch)
    monkeypatch.delitem(sys.modules, "mypackage.quantizers", raising=False)
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "another user's cache"))
    with pytest.raises(ConfigError, match="code that comes with a folder is not run unasked"):
        open_study("study")
    (study.folder / "study.json").unlink()  # nor is it where the folder does not say that it is a study's
    with pytest.raises(ConfigError, match="code that comes with a folder is not run unasked"):
        open_study("./runs/study")


@pytest.fixture
def run(tmp_path):
    """A finished run of a plugin's quantizer."""
    write_plugin(tmp_path / "my.py")
    return train(tiny(), "run", progress=False)


def test_a_run_whose_plugin_is_gone_or_changed_is_read_by_its_copy(run, tmp_path, monkeypatch):
    before = load_tokenizer("run", "raw")
    write_plugin(tmp_path / "my.py", weight=3.0)
    assert build_quantizer("mine").loss_weights() == {"commitment": 1.0}
    forget(monkeypatch)
    loaded = load_tokenizer("run", "raw")
    assert loaded.quantizer.loss_weights() == {"commitment": 1.0}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in before.state_dict().items())
    (tmp_path / "my.py").unlink()
    forget(monkeypatch)
    assert Run("run").located_config["plugins"] == [str(tmp_path / "run" / "plugins" / "my.py")]
    assert load_tokenizer("run", "raw").quantizer.name == "mine"
    # A run's config.yaml is a recipe: finished, it is left as it is.
    assert train(recipe_config("run/config.yaml"), "run", progress=False).status == "finished"


def test_a_run_is_not_resumed_with_a_changed_plugin(run, tmp_path):
    (first,) = import_plugins(["my.py"])
    write_plugin(tmp_path / "my.py", weight=3.0)
    (second,) = import_plugins(["my.py"])
    says = rf"the plugin my.py has changed .*{first.sha256[:12]}, now {second.sha256[:12]}.*Restore it.*--output FOLDER"
    for steps in (2, 4):
        with pytest.raises(RunError, match=says):
            train(tiny(steps=steps), "run", progress=False)
    write_plugin(tmp_path / "my.py")
    assert train(tiny(steps=3), "run", progress=False).step == 3
    copy = tmp_path / "run" / "plugins" / "my.py"
    copy.write_text(copy.read_text() + "# edited\n")
    with pytest.raises(RunError, match="was edited after the run began"):
        train(tiny(steps=4), "run", progress=False)


def test_recipes_of_before_have_the_same_hash_and_plugins_change_it(tmp_path):
    plain = recipe_config("builtin/smoke")
    assert plain.plugins == ()
    write_plugin(tmp_path / "my.py")
    with_plugin = recipe_config("builtin/smoke", plugins=["my.py"])
    assert content_hash(plain) != content_hash(with_plugin)


def test_a_plugin_beside_its_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    write_plugin(tmp_path / "lab" / "my.py")
    (tmp_path / "lab" / "mine.yaml").write_text(
        "extends: builtin/smoke\nplugins: [my.py]\ntokenizer:\n  quantizer:\n    name: mine\n    codebook_size: 16\n"
    )
    assert recipe_config("lab/mine.yaml").plugins == ("lab/my.py",)
    monkeypatch.chdir(tmp_path / "lab")
    forget(monkeypatch)
    assert recipe_config("mine.yaml").plugins == ("my.py",)


def test_a_plugin_may_lie_anywhere_and_a_notebooks_parameters_take_it(tmp_path, monkeypatch):
    (tmp_path / "far away").mkdir()
    file = write_plugin(tmp_path / "far away" / "my.py")
    settings = ("tokenizer.quantizer.name=mine", "tokenizer.quantizer.codebook_size=16")
    config, folder = prepare_run(RunParameters(preset="smoke", settings=settings, plugins=(file,), output="./run"))
    assert config.plugins == (file,) and str(folder) == "run"
    assert config.tokenizer.quantizer.config_name == "mine"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget(monkeypatch)
    assert to_dict(parse(type(config), to_dict(config))) == to_dict(config)


def test_two_versions_of_a_file_live_side_by_side(tmp_path):
    (tmp_path / "old").mkdir()
    write_plugin(tmp_path / "my.py", weight=2.0)
    write_plugin(tmp_path / "old" / "my.py", weight=1.0)
    new, old = tiny("my.py"), tiny("old/my.py")
    assert [base.make_quantizer(config.tokenizer.quantizer).loss_weights() for config in (new, old)] == [
        {"commitment": 2.0},
        {"commitment": 1.0},
    ]
    import_plugins(["my.py"])
    assert build_quantizer("mine").loss_weights() == {"commitment": 2.0}


def test_a_module_is_a_plugin_too(tmp_path, monkeypatch):
    write_plugin(tmp_path / "lab_quantizers.py")
    config = tiny("lab_quantizers")
    run = train(config, "run", progress=False)
    assert (run.path / "plugins" / "lab_quantizers.py").is_file()
    monkeypatch.delitem(sys.modules, "lab_quantizers")
    (tmp_path / "lab_quantizers.py").unlink()
    forget(monkeypatch)
    assert load_tokenizer("run", "raw").quantizer.name == "mine"


@pytest.mark.parametrize(
    ("module", "line"),
    [("own.quantizers", "from .layers import x"), ("own.quantizers", "import own.layers"), ("alone", "import layers")],
)
def test_a_module_that_needs_files_beside_it_is_refused(tmp_path, monkeypatch, module, line):
    """A run keeps one file of it, and would break where the others are not."""
    (tmp_path / "own").mkdir()
    for file in ("own/__init__.py", "own/layers.py", "layers.py"):
        (tmp_path / file).write_text("x = 1\n")
    (tmp_path / f"{module.replace('.', '/')}.py").write_text(f"{line}\n{SOURCE.replace('WEIGHT', '1.0')}")
    before, loaded = available_quantizers(), set(sys.modules)
    try:
        with pytest.raises(ConfigError, match=r"line 1 imports .*A run keeps one file of a plugin.*put what it needs"):
            import_plugins([module])
        assert available_quantizers() == before
    finally:
        for name in set(sys.modules) - loaded:
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def broken(:\n", r"plugin bad.py: it cannot be run: SyntaxError at line 1"),
        ("\n1 / 0\n", r"plugin bad.py: it cannot be run: ZeroDivisionError at line 2"),
        ("import there_is_no_such_module\n", "A plugin is one file, which a run copies"),
        (
            "import sys\nsys.exit()\n",
            r"it cannot be run: SystemExit at line 2\. .*must not end the program",
        ),
        ("class Own(BaseException): pass\nraise Own('x')\n", r"plugin bad.py: it cannot be run: Own at line 2: x"),
        ("x = '\0'\n", "plugin bad.py: it cannot be run: SyntaxError"),
        ("from ibqlab.recipes.plugins import import_plugins as run\nrun(['bad.py'])\n", "it names itself as a plugin"),
        ("import layers\n", r"plugin bad.py: line 1 imports layers of the same .*A run keeps one file of a plugin"),
        ("from .layers import x\n", r"plugin bad.py: line 1 imports .layers of the same package or folder"),
        ("def f():\n    import folder.x\n", r"plugin bad.py: line 2 imports folder.x of the same package or folder"),
        (SOURCE.replace('"mine"', '"vq"'), r"a quantizer named 'vq' exists already"),
        (SOURCE.replace('"h"', '"%"'), "marker must be one of"),
        (SOURCE.replace("#1B9E77", "green"), "#RRGGBB"),
    ],
)
def test_a_plugin_that_cannot_be_run_is_named_and_registers_nothing(tmp_path, text, says):
    (tmp_path / "bad.py").write_text(text)
    (tmp_path / "layers.py").write_text("x = 1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.py").write_text("")
    before = available_quantizers()
    with pytest.raises(ConfigError, match=says):
        import_plugins(["bad.py"])
    assert available_quantizers() == before


def test_plugins_that_are_not_there_or_clash_are_refused(tmp_path):
    write_plugin(tmp_path / "my.py")
    (tmp_path / "other.py").write_text(SOURCE.replace("WEIGHT", "5.0"))
    (tmp_path / "sub").mkdir()
    write_plugin(tmp_path / "sub" / "my.py", weight=4.0)
    for names, says in (
        (["absent.py"], "there is no file absent.py"),
        (["absent_module"], "there is no module 'absent_module'"),
        (["my"], None),
        (["my.py", "other.py"], "both register the quantizer 'mine'"),
        (["my.py", "sub/my.py"], "have one file name"),
        ([""], "got an empty name"),
        (["."], r"got the folder '\.'. Give a file in it, such as my.py"),
        (["sub"], r"got the folder 'sub'. Give a file in it, such as sub/my.py"),
        (["./sub"], r"got the folder './sub'"),
        (["..x"], r"got '..x', which names neither"),
        (["a b"], r"got 'a b', which names neither. Give my_quantizer.py or package.module"),
        (["ibqlab.quantizers"], "which is this library: its quantizers are known. Leave it out"),
    ):
        if says:
            with pytest.raises(ValueError, match=says):
                import_plugins(names)
    with pytest.raises(ConfigError, match="plugins: must be a list"):
        recipe_config("builtin/smoke", {"plugins": 3})


def test_ctrl_c_in_a_plugin_stays_ctrl_c_and_a_module_that_exits_is_named(tmp_path):
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt\n")
    (tmp_path / "exiting.py").write_text("raise SystemExit(3)\n")
    for name in ("stopped.py", "stopped"):
        with pytest.raises(KeyboardInterrupt):
            import_plugins([name])
    with pytest.raises(ConfigError, match=r"plugin exiting: it cannot be run: SystemExit at line 1: 3\. A plugin is"):
        import_plugins(["exiting"])


def test_a_module_is_run_again_once_it_has_been_mended(tmp_path, monkeypatch):
    (tmp_path / "layers.py").write_text("x = 1\n")
    (tmp_path / "mended.py").write_text(f"import layers\n{SOURCE.replace('WEIGHT', '1.0')}")
    with pytest.raises(ConfigError, match="line 1 imports layers"):
        import_plugins(["mended"])
    write_plugin(tmp_path / "mended.py", weight=2.5)
    import_plugins(["mended"])
    assert build_quantizer("mine").loss_weights() == {"commitment": 2.5}
    for name in ("mended", "layers"):
        monkeypatch.delitem(sys.modules, name)


def test_code_that_comes_with_a_folder_is_not_run_unasked(run, monkeypatch, tmp_path):
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "another user's cache"))
    forget(monkeypatch)
    with pytest.raises(ConfigError, match=r"code that comes with a folder is not run unasked.*ibqlab check --plugin"):
        load_tokenizer("run", "raw")
    plugins.allow_plugins(["run/plugins/my.py"])
    assert load_tokenizer("run", "raw").quantizer.name == "mine"


def test_a_quantizer_of_this_process_alone_is_refused_by_a_study(tmp_path):
    namespace = {"__name__": "__main__"}
    exec(SOURCE.replace("WEIGHT", "1.0"), namespace)
    parameters = StudyParameters(preset="smoke", recipe="builtin/smoke", methods=("mine",), steps=2, output="study")
    with pytest.raises(
        ConfigError, match=r"'mine' is known to this notebook or script alone: put its class into a file"
    ):
        open_study("explore_collapse", parameters).run(progress=False)
    assert not (tmp_path / "runs" / "study").exists()
    assert train(tiny(plugin=""), "here", progress=False).status == "finished"


def test_an_export_names_the_plugin_that_it_needs(run, tmp_path, monkeypatch):
    export_tokenizer("run", "mine.safetensors", "raw")
    assert load_tokenizer("mine.safetensors", "raw").quantizer.name == "mine"
    forget(monkeypatch)
    assert load_tokenizer("mine.safetensors", "raw").quantizer.name == "mine"
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "another user's cache"))
    forget(monkeypatch)
    says = r"'mine' is registered by the plugin my.py \(sha256 [0-9a-f]{12}.*--plugin my.py"
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer("mine.safetensors", "raw")
    write_plugin(tmp_path / "my.py", weight=2.0)
    import_plugins(["my.py"])
    with pytest.warns(UserWarning, match="was made with the plugin my.py of sha256"):
        load_tokenizer("mine.safetensors", "raw")


def command(*words):
    done = CliRunner().invoke(main, list(words))
    return done.exit_code, done.output


def test_commands_take_plugins(tmp_path, monkeypatch):
    write_plugin(tmp_path / "my.py")
    code, text = command("check", "--plugin", "my.py")
    assert code == 0 and "mine: none of" in text and "✗" not in text
    forget(monkeypatch)
    assert command("check", "mine")[0] == 2
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()] + ["tokenizer.quantizer.name=mine"]
    code, text = command("train", "builtin/smoke", *settings, "--plugin", "my.py", "--output", "./run", "--no-report")
    assert code == 0, text
    forget(monkeypatch)
    for words in (["inspect", "./run", "--weights", "raw"], ["plan", "run/config.yaml"]):
        code, text = command(*words)
        assert code == 0, text
    code, text = command("export", "./run", "out.safetensors", "--weights", "raw")
    assert code == 0, text
    forget(monkeypatch)
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "another user's cache"))
    code, text = command("inspect", "out.safetensors", "--weights", "raw")
    assert code == 2 and "give --plugin my.py" in text
    assert command("inspect", "out.safetensors", "--weights", "raw", "--plugin", "my.py")[0] == 0


def test_a_broken_quantizer_is_told_and_ends_the_command_with_1(tmp_path):
    (tmp_path / "bad.py").write_text(SOURCE.replace("value = ", "value = codes  # ").replace("WEIGHT", "1.0"))
    code, text = command("check", "mine", "--plugin", "bad.py")
    assert code == 1
    assert "✗ the gradient reaches the encoder" in text and "the encoder learns nothing from the reconstruction" in text
    assert "mine: 1 of" in text
    # A training of it says so beforehand, once, and goes on all the same.
    with pytest.warns(UserWarning, match=r"'mine' breaks rules .*the gradient reaches the encoder: .*--plugin bad.py"):
        _, folder = prepare_run(
            RunParameters(preset="smoke", settings=("tokenizer.quantizer.name=mine",), plugins=("bad.py",))
        )
    assert not folder.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_broken_rules([tiny("bad.py"), tiny("")])


def test_one_cause_is_told_once_and_an_unknown_name_asks_for_its_file(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from ibqlab.quantizers import quantizer_from\n@quantizer_from\ndef mine(features, codebook):\n"
        "    return (features @ codebook.T).argmax(1) + (99 if len(features) < 24 else 0)\n"
    )
    code, text = command("check", "mine", "--plugin", "bad.py")
    assert code == 1 and text.count("Choose rows of the codebook") == 1
    assert re.search("For the same cause these could not be looked at: zero features .*; one token is enough", text)
    code, text = command("check", "mind")
    assert code == 2 and "ibqlab check mind --plugin FILE.py" in text


def test_what_follows_from_a_choice_at_random_is_not_blamed_on_something_else(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import torch\nfrom ibqlab.quantizers import quantizer_from\n@quantizer_from\ndef mine(features, codebook):\n"
        "    return torch.randint(len(codebook), (len(features),))\n"
    )
    code, text = command("check", "mine", "--plugin", "bad.py")
    assert code == 1 and "choose different codes" in text and "a choice by number" not in text
    assert re.search("These follow from it: encode gives .*; permuting the codes .*; the state dict", text)
    assert "register_buffer" not in text


def test_ones_own_quantizer_is_checked_inside_a_composite(tmp_path):
    write_plugin(tmp_path / "my.py")
    code, text = command("check", "residual", "inner.name=mine", "--plugin", "my.py")
    assert code == 0 and "residual inner.name=mine: none of 20 rules broken" in text
    code, text = command("check", "residual", "codebook_size=64")
    assert code == 2 and "leave codebook_size= out" in text


def test_a_notebooks_command_hands_plugins_to_its_parameters(tmp_path):
    write_plugin(tmp_path / "my.py")
    notebook = find_notebook("explore_collapse")
    settings = ["plugins=[my.py]", "methods=[mine]", "preset=smoke"]
    assert read_settings(notebook, settings)["plugins"] == ["my.py"]


def test_notebooks_that_read_runs_take_the_plugins_of_their_quantizers(run, tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "another user's cache"))
    tiny = {"preset": "smoke", "plugins": ("my.py",)}
    forget(monkeypatch)
    evaluation = EvaluationParameters(**tiny, checkpoint="./run")
    assert find_tokenizer("run", evaluation.checkpoint).config.quantizer.config_name == "mine"
    for parameters in (ComparisonParameters, GalleryParameters):
        forget(monkeypatch)
        parameters(**tiny)
        assert build_quantizer("mine").name == "mine"
    for name in ("evaluate_tokenizer", "compare_published", "generation_gallery", "train_generator"):
        assert read_settings(find_notebook(name), ["plugins=[my.py]"])["plugins"] == ["my.py"]


@pytest.mark.parametrize("parameters", [PlaygroundParameters, FeaturesLabParameters])
def test_notebooks_of_the_lab_take_plugins(parameters, tmp_path, monkeypatch):
    write_plugin(tmp_path / "my.py")
    name = parameters.use
    typed = read_settings(find_notebook(name), ["plugins=[my.py]", "methods=[mine]", "preset=smoke", "steps=2"])
    assert typed["plugins"] == ["my.py"]
    if name == "features_lab":
        np.save("features.npy", np.random.default_rng(0).normal(size=(600, 4)).astype("float32"))
        typed["source"] = "features.npy"
    lab = prepare_lab(read_parameters(parameters, typed))
    assert "'plugins=[\"my.py\"]'" in lab.command
    assert list(lab.run(progress=False).runs) == ["mine"]
    assert (lab.folder / "mine" / "plugins" / "my.py").read_text() == (tmp_path / "my.py").read_text()
    # What was computed with other code is not taken for that of this one.
    write_plugin(tmp_path / "my.py", weight=2.0)
    with pytest.raises(RunError, match=r"lab\.plugin"):
        prepare_lab(read_parameters(parameters, typed))
    forget(monkeypatch)
    with pytest.raises(ValueError, match="methods must be one of"):
        prepare_lab(parameters(preset="smoke", methods=("mine",)))


def test_a_generators_notebook_trains_a_plugins_tokenizer_first(tmp_path, monkeypatch):
    file = write_plugin(tmp_path / "my.py")
    settings = ("tokenizer.quantizer.name=mine",)
    pipeline = prepare_pipeline(GeneratorRunParameters(preset="smoke", tokenizer_settings=settings, plugins=(file,)))
    assert pipeline.tokenizer.tokenizer.quantizer.config_name == "mine"
    assert pipeline.tokenizer.plugins == pipeline.generator.plugins == (file,)


def test_training_names_a_quantizer_that_raises(tmp_path):
    (tmp_path / "bad.py").write_text(SOURCE.replace("value = ", "value = codes.no_such_thing  # "))
    with pytest.raises(QuantizerError, match=r"'mine' raised in assign \(bad.py, line 15\): AttributeError"):
        train(tiny("bad.py"), "run", progress=False)
    assert Run("run").status == "failed"


class TestFunctions:
    def test_indices_alone_make_a_quantizer_that_keeps_every_rule(self):
        @quantizer_from
        def dot_vq(features, codebook):
            """The largest dot product."""
            return (features @ codebook.T).argmax(dim=1)

        assert not [finding for finding in check_quantizer("dot_vq") if finding.broken]
        torch.manual_seed(0)
        z = torch.randn(2, 8, 3, 3)
        ours = build_quantizer("dot_vq", codebook_size=16, code_dim=8)
        theirs = build_quantizer("vq", metric="dot", codebook_size=16, code_dim=8)
        ours.load_state_dict(theirs.state_dict())
        for mine, other in zip(ours(z), theirs(z), strict=True):
            assert mine == other if isinstance(mine, dict) else torch.equal(mine, other)

    def test_vectors_and_terms_take_the_place_of_the_default_ones(self):
        @quantizer_from(name="three", label="Three")
        def function(features, codebook):
            indices = torch.cdist(features, codebook).argmin(1)
            codes = codebook[indices]
            return features + (codes - features).detach(), indices, {"pull": (features - codes).square().mean()}

        quantizer = build_quantizer("three", codebook_size=16, code_dim=8)
        out = quantizer(torch.randn(2, 8, 3, 3))
        assert set(out.terms) == {"pull"} and out.loss == out.terms["pull"]
        assert not [finding for finding in check_quantizer("three") if finding.broken]

    @pytest.mark.parametrize(
        ("result", "says"),
        [
            (lambda z, c: z, r"whole indices of shape \(N,\)"),
            (lambda z, c: (z, z, {}, 1), "got a tuple of 4"),
            (lambda z, c: None, "got NoneType"),
            (lambda z, c: z.argmax(1) > 2, r"got \(18,\) of torch.bool"),
            (lambda z, c: z.argmax(1) - 9, r"'odd': indices must lie in 0 … 15, got -\d … -\d. Choose rows"),
            (lambda z, c: z.argmax(1) + 99, r"indices must lie in 0 … 15, got \d+ … 1\d\d"),
            (lambda z, c: z.argmax(1).to("meta"), "indices on the features' device, cpu; got meta"),
            (lambda z, c: (z / 0 * 0, z.argmax(1)), "NaN or infinity in quantized for 18 of 18 tokens"),
            (lambda z, c: (z, z.argmax(1), {"t": z.sum().to("meta")}), "loss term 't' on the features' device"),
            (lambda z, c: sys.exit(), r"'odd' raised in assign \(test_plugins.py, line \d+\): SystemExit"),
            (lambda z, c: (z[:, :2], z.argmax(1)), r"quantized of shape \(N, D\)"),
        ],
    )
    def test_what_is_no_choice_is_refused_by_name(self, result, says):
        quantizer_from(result, name="odd")
        with pytest.raises(QuantizerError, match=says) as caught:
            build_quantizer("odd", codebook_size=16, code_dim=8)(torch.randn(2, 8, 3, 3))
        assert "'odd'" in str(caught.value)

    def test_a_function_without_a_name_is_asked_for_one(self):
        with pytest.raises(ValueError, match="a lambda has no name"):
            quantizer_from(lambda z, c: None)
        for function, says in {
            3: "takes a function",
            Quantizer: "got the class Quantizer; write @register_quantizer",
            (lambda z: None): r"by position; got <lambda>\(z\)\. Write def",
            (lambda *, features, codebook: None): "by position",
        }.items():
            with pytest.raises(ValueError, match=says):
                quantizer_from(function, name="odd")


class TestLooks:
    def test_figures_show_what_the_registration_says(self, tmp_path):
        write_plugin(tmp_path / "my.py")
        import_plugins(["my.py"])
        styles = styles_for(["mine, N(0, 1)", "mine", "vq"])
        assert method_label("mine") == styles["mine"].label == "My own"
        assert styles["mine, N(0, 1)"].label == "My own, N(0, 1)"
        assert styles["mine, N(0, 1)"].color == "#1B9E77" and styles["mine"].marker == "h"

    def test_without_a_colour_it_takes_the_next_one(self):
        quantizer_from(lambda z, c: None, name="plain", label="Plain")
        styles = styles_for(["plain", "unknown"])
        assert styles["plain"].label == "Plain" and styles["unknown"].label == "unknown"
        assert styles["plain"].color != styles["unknown"].color

    @pytest.mark.parametrize("word", ["label", "color", "marker"])
    def test_a_setting_of_such_a_name_is_refused(self, word):
        config = make_dataclass("Own", [(word, str, "x")], bases=(QuantizerConfig,), frozen=True, kw_only=True)
        with pytest.raises(ValueError, match=f"`{word}` is for figures"):
            register_quantizer("own", config)
