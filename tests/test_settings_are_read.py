"""A setting that nothing reads is found, for every class that recipes, files or notebooks are parsed into."""

import ast
import dataclasses
import importlib
import json
import pkgutil
import textwrap
import typing
from pathlib import Path

import pytest

import ibqlab

ROOT = Path(ibqlab.__file__).resolve().parents[1]
DOORS = {"parse", "read_parameters"}
"""Functions that make settings of text; the class is their first argument."""
NO_SETTINGS = {"TokenManifest", "SplitManifest"}
"""Records of what was made, which people read, too."""


def modules():
    for info in pkgutil.walk_packages(ibqlab.__path__, "ibqlab."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def code_of_notebooks():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        yield "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def trees():
    """The program's and the notebooks' syntax trees."""
    for module in modules():
        yield ast.parse(Path(module.__file__).read_text())
    yield from map(ast.parse, code_of_notebooks())


def dataclasses_in(hint):
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in dataclasses_in(inner)]


def subclasses(cls):
    return [cls, *(deeper for below in cls.__subclasses__() for deeper in subclasses(below))]


def settings_classes():
    """Every class that a door is called with by name, and every class that one of their fields may hold."""
    known = {}
    for module in modules():
        known |= {name: one for name, one in vars(module).items() if dataclasses.is_dataclass(one)}
    names = {
        node.args[0].id
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name)
        if getattr(node.func, "id", getattr(node.func, "attr", "")) in DOORS
    }
    waiting, classes = [known[name] for name in names if name in known], set()
    while waiting:
        for cls in subclasses(waiting.pop()):
            if cls not in classes:
                classes.add(cls)
                waiting += [inner for hint in typing.get_type_hints(cls).values() for inner in dataclasses_in(hint)]
    return {cls for cls in classes if cls.__module__.startswith("ibqlab.") and cls.__name__ not in NO_SETTINGS}


class Reads(ast.NodeVisitor):
    """Names of attributes that code reads. A check of a setting is no use of it.

    `self.x` counts for the class that it stands in, every other `….x` for all classes.
    """

    def __init__(self):
        self.anywhere, self.of_self, self.inside = set(), set(), []

    def visit_ClassDef(self, node):
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_FunctionDef(self, node):
        if node.name != "__post_init__" and not node.name.startswith(("check_", "_check_")):
            self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                self.of_self.add((self.inside[-1] if self.inside else "", node.attr))
            else:
                self.anywhere.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        if getattr(node.func, "id", "") == "getattr" and isinstance(node.args[1], ast.Constant):
            self.anywhere.add(node.args[1].value)
        self.generic_visit(node)


def unread(classes, reads):
    return {
        f"{cls.__name__}.{field.name}"
        for cls in classes
        for field in dataclasses.fields(cls)
        if field.name not in reads.anywhere
        and not any((one.__name__, field.name) in reads.of_self for one in (*cls.__mro__, *subclasses(cls)))
    }


@pytest.fixture(scope="module")
def reads():
    visitor = Reads()
    for tree in trees():
        visitor.visit(tree)
    return visitor


def test_the_classes_are_those_of_every_door():
    names = {cls.__name__ for cls in settings_classes()}
    assert names >= {
        "TrainConfig",
        "GeneratorTrainConfig",
        "DataConfig",
        "LossConfig",
        "OptimizerConfig",
        "SpeedConfig",
    }
    assert names >= {"GeneratorConfig", "FactorizedGeneratorConfig", "SamplingConfig", "DiscriminatorConfig"}
    assert names >= {"RunParameters", "EvaluationParameters", "ComparisonParameters", "GalleryParameters"}
    assert names >= {"IndexBackpropQuantizerConfig", "SoftVectorQuantizerConfig", "PublishedRow", "TableRow"}
    assert len(names) >= 40


def test_every_setting_is_read_somewhere(reads):
    assert not unread(settings_classes(), reads)


def test_a_setting_that_nothing_but_its_check_reads_is_found(reads):
    @dataclasses.dataclass
    class Forgotten:
        used_by_nobody: int = 0
        only_checked: int = 0
        in_a_method: int = 0

    code = """
        class Forgotten:
            def __post_init__(self):
                require(self.only_checked >= 0)

            def half(self):
                return self.in_a_method / 2

        class Another:
            def half(self):
                return self.used_by_nobody / 2
    """
    visitor = Reads()
    visitor.visit(ast.parse(textwrap.dedent(code)))
    assert unread({Forgotten}, visitor) == {"Forgotten.used_by_nobody", "Forgotten.only_checked"}
    assert unread({Forgotten}, reads) == {
        f"Forgotten.{name}" for name in ("used_by_nobody", "only_checked", "in_a_method")
    }
