"""explore_collapse as its reader sees it: in JupyterLab, in a browser, with a hand on the slider."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

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
LAB = (
    *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
    *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
    "--LabApp.extension_manager=readonly",
)
KERNEL_IDLE = "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# Braces: a promise that comes back would be awaited, and this one ends only when all cells have run.
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }"
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
    .map(error => `${error.ename}: ${error.evalue}`)"""
SHOWN_OR_FAILED = f"() => document.querySelector('.ibqlab-code-map img') || ({ERRORS})().length"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page():
    """A page of a real browser, without anything of its owner's."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install ibqlab[dev]"
    )
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, headless=True, args=list(QUIET))
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.fixture(scope="module")
def lab(page, tmp_path_factory):
    """Address, in a JupyterLab of its own, of the notebook under its smallest preset."""
    folder = tmp_path_factory.mktemp("lab")
    copy_notebook(folder / "work")
    write_settings(folder / "config" / "lab" / "user-settings" / "@jupyterlab")
    port = free_port()
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [*LAB, f"--port={port}"],
            cwd=folder / "work",
            env=os.environ | folders_of_its_own(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            await_server(f"http://127.0.0.1:{port}/api", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}/doc/tree/explore_collapse.ipynb"
        finally:
            stop(server)


def copy_notebook(folder):
    notebook = nbformat.read(ROOT / "notebooks" / "explore_collapse.ipynb", as_version=4)
    cell = notebook.cells[1]
    for name, value in (("preset", "smoke"), ("projection", "pca")):
        line = rf'^{name}: str = ".*?"'
        cell.source, found = re.subn(line, f'{name}: str = "{value}"', cell.source, flags=re.MULTILINE)
        assert found == 1, f"the parameters cell has no {name}"
    folder.mkdir()
    nbformat.write(notebook, folder / "explore_collapse.ipynb")


def write_settings(folder):
    for name, values in SETTINGS.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(values))


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
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_server(address, server, log):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within a minute:\n{log.read_text()[-3000:]}")


def numbers_change_to(page, text):
    """The line of numbers, once it speaks of another snapshot."""
    page.wait_for_function("text => document.querySelector('.ibqlab-numbers').innerText.includes(text)", arg=text)
    return page.locator(".ibqlab-numbers").inner_text()


def test_the_slider_moves_through_training(page, lab):
    page.goto(lab)
    page.wait_for_function(KERNEL_IDLE, timeout=120_000)
    page.evaluate(RUN_ALL)
    page.wait_for_function(SHOWN_OR_FAILED, timeout=180_000)
    assert page.evaluate(ERRORS) == []
    code_map, histogram = page.locator(".ibqlab-code-map img"), page.locator(".ibqlab-histogram img")
    last = numbers_change_to(page, "VQ from U(±1/K), step 12: usage")
    shown = {"map": code_map.get_attribute("src"), "histogram": histogram.get_attribute("src")}

    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    earlier = numbers_change_to(page, "VQ from U(±1/K), step 6: usage")
    assert code_map.get_attribute("src") != shown["map"]
    assert histogram.get_attribute("src") != shown["histogram"]
    assert "step 6" in code_map.get_attribute("alt")
    assert code_map.evaluate("picture => picture.complete && picture.naturalWidth") > 400
    assert earlier.split(":")[1] != last.split(":")[1]

    page.keyboard.press("ArrowRight")
    numbers_change_to(page, "step 12: usage")
    assert code_map.get_attribute("src") == shown["map"]

    page.locator(".widget-dropdown select").first.select_option(label="IBQ")
    numbers_change_to(page, "IBQ from N(0, 1), step 12: usage")
    assert code_map.get_attribute("src") != shown["map"]
