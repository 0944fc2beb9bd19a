"""Who may import whom: the layers of pyproject.toml hold, and no package has a circle inside."""

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
