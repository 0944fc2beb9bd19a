"""How long an atlas takes to build, and how soon its page answers when the codebook is large.

    python experiments/benchmarks/atlas.py --output atlas.csv

Build: a tokenizer of 16,384 codes × 64, which are features of photographs, so that many codes are in use; 2,000 crops
of 64 × 64 pixels on the published grid of 16 × 16 tokens. Once from nothing, and once more from what is stored.
Page: a monitored codebook of 262,144 codes, all in use, at five snapshots, without pictures, opened from disk in a
headless Chromium without a graphics card. Beside the seconds of the clock stand those of the processor, in which
this process computed and not the browser: on a busy machine the clock tells how busy it is. Prints a table.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from rows import origin_columns

from ibqlab.data import DataConfig, open_data, to_model_range
from ibqlab.data.batches import readable_batches
from ibqlab.monitor import CodebookMonitor
from ibqlab.pretrained import export_tokenizer
from ibqlab.tokenizer import Tokenizer
from ibqlab.training import recipe_config
from ibqlab.views.atlas import AtlasSettings, write_atlas

SEED, SIDE, DIM, STEPS, PER_IMAGE = 0, 64, 64, 8, 16
COLUMNS = ("what", "codes", "images", "tokens", "seconds", "processor_seconds")
LAUNCH = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def make_checkpoint(file: Path, codes: int) -> Path:
    """A tokenizer whose codes are features of photographs."""
    network = {"autoencoder.resolution": SIDE, "autoencoder.latent_channels": DIM}
    method = {"quantizer.name": "vq", "quantizer.codebook_size": codes, "quantizer.code_dim": DIM}
    settings = {f"tokenizer.{key}": value for key, value in (network | method).items()} | {"data.image_size": SIDE}
    tokenizer = Tokenizer.from_config(recipe_config("builtin/photos", settings).tokenizer)
    source = open_data(DataConfig(source="photos", image_size=SIDE), "validation")
    features = []
    with torch.no_grad():
        for batch in readable_batches(source, max(1, codes // PER_IMAGE)):
            encoded = tokenizer.quant_conv(tokenizer.encoder(to_model_range(batch.images)))
            tokens = encoded.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h · w, D)
            features.append(tokens[:, torch.randperm(tokens.shape[1])[:PER_IMAGE]].flatten(0, 1))
        tokenizer.quantizer.codes.weight.copy_(torch.cat(features)[:codes])
    return export_tokenizer(tokenizer, file)


def make_monitored(folder: Path, codes: int) -> Path:
    """A run folder of a codebook that drifts, with every code in use."""
    codebook = torch.randn(codes, 8)
    with CodebookMonitor(folder, codebook_size=codes, snapshot_every=1, steps=STEPS) as monitor:
        for step in range(1, STEPS + 1):
            codebook += 0.05 * torch.randn_like(codebook)
            indices = torch.cat([torch.randperm(codes), torch.randint(codes, (codes,))])
            features = codebook[indices] + 0.1 * torch.randn(len(indices), 8)
            monitor.update(step, indices=indices, features=features, codebook=codebook)
    return folder


def timed(what: str, work: Callable[[], object], **facts: int) -> dict[str, object]:
    """One row."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - began
    return {"what": what, **facts, "seconds": round(seconds, 3), "processor_seconds": round(spent, 2)}


def measure_build(root: Path, codes: int, images: int) -> list[dict[str, object]]:
    """An atlas from nothing, and again."""
    file = make_checkpoint(root / "tokenizer.safetensors", codes)
    settings = AtlasSettings(images="photos", count=images, weights="raw")
    facts = {"codes": codes, "images": images, "tokens": images * (SIDE // 4) ** 2}
    return [
        timed(what, lambda: write_atlas(file, root / "build", settings), **facts) for what in ("build", "build again")
    ]


def measure_page(root: Path, codes: int) -> list[dict[str, object]]:
    """What a reader waits for, in the browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only this part needs a browser

    run = make_monitored(root / "monitored", codes)
    rows = [timed("build without images", lambda: write_atlas(run, root / "page"), codes=codes, images=0, tokens=0)]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=list(LAUNCH))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        address = (root / "page" / "index.html").as_uri()
        acts = {
            "open": lambda: page.goto(address),
            "scroll the table to its middle": lambda: page.evaluate(
                "at => { at.scrollTop = at.scrollHeight / 2 }", page.query_selector("#scroll")
            ),
            "sort by a column": lambda: page.click("#head button[data-by=norm]"),
            "open a card": lambda: page.click(".line >> nth=3"),
            "move the slider": lambda: page.evaluate(
                "() => { const slider = document.getElementById('step'); slider.value = 3; slider.oninput(); }"
            ),
            "zoom the map": lambda: page.click("#nearer"),
        }
        for what, act in acts.items():
            rows.append(timed(what, lambda act=act: (act(), page.evaluate(SETTLED)), codes=codes, images=0, tokens=0))
        browser.close()
    return rows


SETTLED = """async () => {
  const waits = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  do await waits(); while (!document.querySelector('#card h2') || !document.querySelector('#map-words').textContent);
  while (map.shownFrame() !== Number(document.querySelector('#step').value)) await waits();
  await waits();
}"""
"""Waits until card and map are drawn; what takes the page's own thread delays it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=16_384, help="of the atlas that is built")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--page-codes", type=int, default=262_144, help="of the page; 0: no browser")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_build(Path(folder), options.codes, options.images)
        if options.page_codes:
            rows += measure_page(Path(folder), options.page_codes)
    table = pd.DataFrame(rows, columns=COLUMNS)
    print(table.to_string(index=False))
    if options.output:
        table.assign(**origin_columns(SEED)).to_csv(options.output, index=False)


if __name__ == "__main__":
    main()
