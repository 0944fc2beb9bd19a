"""Who may import whom: the layers of pyproject.toml hold, and no package has a circle inside."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(cache_dir=None))"


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", RUN], cwd=folder, capture_output=True, text=True, check=False)


def test_every_package_imports_only_what_is_below_it():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("base/resources.py", "from ibqlab.runs import Run", "ibqlab.base is not allowed to import ibqlab.runs"),
        ("plots/norms.py", "from ibqlab import metrics", "ibqlab.plots is not allowed to import ibqlab.metrics"),
        ("quantizers/indices.py", "from ibqlab.quantizers import base", "No cycles are allowed in ibqlab.quantizers"),
        ("extra/__init__.py", "", "extra"),
    ],
)
def test_an_import_from_above_is_found(tmp_path, module, line, broken):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for file in (ROOT / "ibqlab").rglob("*.py"):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    changed = tmp_path / "ibqlab" / module
    changed.parent.mkdir(exist_ok=True)
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0 and broken in " ".join(done.stdout.split()), done.stdout + done.stderr


def unseen_imports(source: str) -> list[str]:
    """Lines that reach a package of the library past the linter: by its name as text, or through the root."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        by_text = isinstance(node, (ast.Call, ast.Subscript)) and any(
            isinstance(leaf, ast.Constant) and re.fullmatch(r"ibqlab(\.\w+)+", str(leaf.value))
            for leaf in ([node.slice] if isinstance(node, ast.Subscript) else node.args)
        )
        of_root = isinstance(node, ast.Import) and any(name.name == "ibqlab" for name in node.names)
        is_name = isinstance(node, ast.ImportFrom) and node.module == "ibqlab" and not node.level
        of_root |= is_name and any(not (ROOT / "ibqlab" / name.name).is_dir() for name in node.names)
        if by_text or of_root:
            lines.append(ast.unparse(node))
    return lines


def test_no_package_is_reached_past_the_linter():
    files = [file for file in (ROOT / "ibqlab").rglob("*.py") if file.name != "__main__.py"]
    found = {str(file): lines for file in files if (lines := unseen_imports(file.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'import_module("ibqlab.runs")',
        '__import__("ibqlab.runs.run")',
        'sys.modules["ibqlab.runs"]',
        "import ibqlab",
        "from ibqlab import Run",
    ],
)
def test_ways_past_the_linter_are_found(line):
    assert unseen_imports(line)
    assert not unseen_imports("from ibqlab import runs\nimport ibqlab.runs\nimport_module(name)")
