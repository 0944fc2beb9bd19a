"""A real browser for tests, and servers that have nothing of their owner's.

Nothing here depends on how fast the machine is: every step waits for what it needs to see. `conftest.py` makes the
fixture `browser` of `chromium`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SETTINGS = {
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    # Off the screen, cells would be left out of the page.
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
OURS = "share/jupyter/lab/settings/overrides.d/ibqlab.json"
LAB = (
    *("-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
    *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
    "--LabApp.extension_manager=readonly",
)
OWN_ADDRESS = re.compile(r"(https?|wss?)://127\.0\.0\.1:|data:|blob:|about:")
PATIENCE = 300
"""Seconds after which what was waited for is taken to be broken: on a busy machine all takes many times longer."""
KERNEL_IDLE = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# Braces: a promise that comes back would be awaited, and this one ends only when all cells have run.
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
INTERRUPT = "() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel') }"
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
    .map(error => `${error.ename}: ${error.evalue}`)"""
OUTPUTS_SHOWN = """() => document.querySelectorAll('.jp-OutputArea-output').length
    && !document.body.innerText.includes('Loading widget')"""


@contextmanager
def chromium():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install ibqlab[dev]"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, headless=True, args=list(QUIET))
        yield started
        started.close()


@contextmanager
def running_lab(folder):
    """Address of a JupyterLab on folder/work."""
    settings = folder / Path(OURS).parents[1]
    with serving([*LAB, f"--LabApp.app_settings_dir={settings}"], folder, "api") as address:
        yield f"{address}/doc/tree"


@contextmanager
def serving(command, folder, page):
    """Address of a server, in folder/work, that a Python command with `--port` starts and whose page has answered."""
    port, log_file = free_port(), folder / "server.log"
    with open(log_file, "w") as log:
        server = subprocess.Popen(
            [sys.executable, *command, f"--port={port}"],
            cwd=folder / "work",
            env=os.environ | folders_of_its_own(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            await_server(f"http://127.0.0.1:{port}/{page}", server, log_file)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


def copy_notebook(folder, notebook, **values):
    """A notebook with other values of its parameters."""
    copy = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4)
    cell = copy.cells[1]
    for name, value in values.items():
        line = rf"^({name}: \w+ =) [^#\n]*"
        cell.source, found = re.subn(line, rf"\1 {json.dumps(value)}  ", cell.source, flags=re.MULTILINE)
        assert found == 1, f"the parameters cell has no {name}"
    folder.mkdir(exist_ok=True)
    nbformat.write(copy, folder / f"{notebook}.ipynb")


def write_settings(folder):
    """The user's settings, and ours where an installed package has them."""
    for name, values in SETTINGS.items():
        file = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / name
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    (source,) = (source for source, target in wheel["shared-data"].items() if target == OURS)
    (folder / OURS).parent.mkdir(parents=True)
    shutil.copy(ROOT / source, folder / OURS)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def folders_of_its_own(folder):
    names = {f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("config", "data", "runtime")}
    names |= {"IPYTHONDIR": "ipython", "IBQLAB_RUNS": "runs"}
    return {variable: str(folder / name) for variable, name in names.items()}


def stop(server):
    """End the server, which ends its kernels; by force if it does not listen."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_server(address, server, log):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not answer within {PATIENCE} s:\n{log.read_text()[-3000:]}")


@contextmanager
def opened(browser, address, notebook):
    """A page with a notebook, as `visited`."""
    with visited(browser, f"{address}/{notebook}.ipynb") as shown:
        yield shown


@contextmanager
def visited(browser, address):
    """A page, the errors that its console tells, and what it asked other machines for.

    Of slowness the console warns on a busy machine: that is no error.
    """
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    errors, elsewhere = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if OWN_ADDRESS.match(request.url) else elsewhere.append(request.url))
    page.goto(address)
    try:
        yield SimpleNamespace(page=page, errors=errors, elsewhere=elsewhere)
    finally:
        page.close()


def run_all(page):
    page.wait_for_function(KERNEL_IDLE)
    page.evaluate(RUN_ALL)
