"""The table of published files: what it says fits what is known of them, and what cannot be fetched says how it can."""

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from golden import golden

from ibqlab.cli import main
from ibqlab.config import load_yaml
from ibqlab.generator import (
    FactorizedGeneratorConfig,
    GeneratorConfig,
    LlamaGenConfig,
    make_generator,
)
from ibqlab.metrics import PROTOCOLS
from ibqlab.pretrained import (
    PUBLISHED,
    PUBLISHED_GENERATORS,
    CheckpointError,
    available_families,
    download_published,
    list_published,
)
from ibqlab.recipes.published import published_rows
from ibqlab.recipes.published_files import PublishedNumbers, published_files, published_systems
from ibqlab.recipes.recipe_files import EXPERIMENTS

LISTED = {
    "taming/vqgan_imagenet_f16_16384": "VQGAN-16384",
    "taming/vqgan_gumbel_f8": "VQGAN-Gumbel-f8",
    "ldm/vq-f16": "LDM-VQ-f16",
    "ldm/vq-f4-noattn": "LDM-VQ-f4-noattn",
    "llamagen/VQ-16": "LlamaGen-VQ-16",
    "vqgan-lc/f16": "VQGAN-LC-100K",
    "1d-tokenizer/maskgit-vqgan-imagenet-f16-256": "MaskGIT-VQGAN",
    "1d-tokenizer/titok_s128": "TiTok-S-128",
    "1d-tokenizer/titok_bl64_vq8k": "TiTok-BL-64",
    "maskbit/maskbit_tokenizer_14bit": "MaskBit-14bit",
    "maskbit/vqgan_plus_12bit": "VQGAN+-12bit",
    "simvq/simvq_1k": "SimVQ-1k",
}
"""Models of the list of full sizes, and their rows."""
BESIDE = ("loss.", "discriminator.", "perceptual_loss.", "model_ema.")
BUFFERS = ("quantize.codebook_used", "quantize.bits_to_indices", "quantize.codebook")
TABLE_1 = {
    "VQGAN-1024": "VQGAN, K = 1,024",
    "VQGAN-16384": "VQGAN, K = 16,384",
    "LDM-VQ-f16": "SD-VQGAN, K = 16,384, D = 8",
    "MaskGIT-VQGAN": "MaskGIT, K = 1,024",
    "LlamaGen-VQ-16": "LlamaGen, K = 16,384, D = 8",
    "VQGAN-LC-100K": "VQGAN-LC, K = 100,000, D = 8",
    "MaskBit-14bit": "MaskBit, K = 16,384",
    "TiTok-L-32": "TiTok-L, 32 tokens",
    "TiTok-B-64": "TiTok-B, 64 tokens",
    "TiTok-S-128": "TiTok-S, 128 tokens",
}
RECIPES = {
    "IBQ-16384": "imagenet/ibq_16384",
    "IBQ-262144": "imagenet/ibq_262144",
    "Open-MAGVIT2-256": "imagenet/lfq_262144",
}


def test_parameters_are_those_of_the_published_configurations():
    listed, _ = golden("peers/peers_state_dict_keys")
    for model, name in LISTED.items():
        keys = {key: shape for key, (shape, _) in listed[model].items() if not key.startswith(BESIDE)}
        assert PUBLISHED[name].parameters == sum(math.prod(keys[key]) for key in keys if key not in BUFFERS), name


@pytest.mark.parametrize("name", PUBLISHED_GENERATORS)
def test_parameters_of_generators_are_those_of_their_presets(name):
    entry = PUBLISHED_GENERATORS[name]
    settings = {"ibq": GeneratorConfig, "magvit2": FactorizedGeneratorConfig, "llamagen": LlamaGenConfig}[entry.design]
    with torch.device("meta"):
        network = make_generator(settings.preset(entry.preset))
    assert entry.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert entry.system in published_systems() and entry.tokenizer in PUBLISHED


def test_rows_name_families_protocols_and_systems_that_exist():
    assert {entry.system for entry in PUBLISHED.values()} <= set(published_systems())
    assert {entry.family for entry in PUBLISHED.values()} <= set(available_families())
    numbers = [numbers for entry in PUBLISHED.values() for numbers in (entry.own, entry.table_1) if numbers]
    assert {one.protocol for one in numbers} <= {"", *PROTOCOLS}
    for name, entry in PUBLISHED.items():
        assert entry.repository.count("/") == 1 and entry.file if entry.repository else entry.name_there, name
        if entry.family in ("magvit2", "maskbit"):
            assert entry.codebook_size == 2**entry.code_dim


def test_numbers_of_table_1_are_those_of_the_table():
    rows, recipes = load_yaml(EXPERIMENTS / "tables" / "tokenizers.yaml")["rows"], published_rows()
    expected = {name: rows[row]["published"] for name, row in TABLE_1.items()}
    expected |= {
        name: {"rfid": recipes[recipe].rfid, "lpips": recipes[recipe].lpips, "usage": recipes[recipe].usage}
        for name, recipe in RECIPES.items()
    }
    printed = {name: entry.table_1 for name, entry in PUBLISHED.items() if entry.table_1}
    assert printed.keys() == expected.keys()
    for name, numbers in printed.items():
        assert {key: getattr(numbers, key) for key in ("rfid", "lpips", "usage")} == {
            "lpips": None,
            "usage": None,
            **expected[name],
        }, name


def test_the_list_has_every_file_with_licence_size_and_checksum():
    listed = CliRunner().invoke(main, ["download"], catch_exceptions=False).output
    assert listed.strip() == list_published()
    heads = [line.partition(" (")[0] for line in listed.splitlines() if "licence of the code" in line]
    assert heads == list(published_systems())
    for name in (*PUBLISHED, *PUBLISHED_GENERATORS):
        (line,) = [line for line in listed.splitlines() if line.startswith(f"  {name} ")]
        assert "MB" in line or "size not stated" in line
    assert "of the weights: for research purposes only" in listed and "of the weights: not stated" in listed
    assert "Checksums: none is published" in listed
    assert "  TiTok-L-32                    K   4,096  D  12   about 2,564 MB  rFID 2.21  32 tokens per image" in listed


def test_a_published_checksum_is_listed(monkeypatch):
    import ibqlab.pretrained.hub as hub_module  # noqa: PLC0415 - its table is replaced here

    rows = {"IBQ-1024": replace(published_files()["IBQ-1024"], sha256="ab" * 32)}
    monkeypatch.setattr(hub_module, "published_files", lambda: rows)
    assert f"sha256 of IBQ-1024 {'ab' * 32}; of the others none is published" in list_published()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("VQGAN-16384", r"CompVis/taming-transformers.*load_tokenizer\(\"path/to/last\.ckpt\", family=\"vqgan\"\)"),
        ("LDM-VQ-f8", r"Fetch vq-f8\.zip .*, unpack it.*family=\"ldm\""),
        ("VQGAN-LC-100K-f8", r"zh460045050/VQGAN-LC.*load_tokenizer\(\"path/to/its file\"\)"),
        ("SimVQ-1k", "do not say how its file is called"),
    ],
)
def test_what_is_on_no_hub_says_what_to_do(name, says):
    with pytest.raises(CheckpointError, match=says):
        download_published(name)


def test_a_folder_of_two_files_comes_whole(monkeypatch, tmp_path):
    import huggingface_hub  # noqa: PLC0415 - its functions are replaced here

    digest, asked = hashlib.sha256(b"content").hexdigest(), []

    def download(repository, file, *, revision, local_dir):
        asked.append((repository, file, revision))
        local_dir.mkdir(exist_ok=True)
        (local_dir / file).write_bytes(b"content")
        return str(local_dir / file)

    metadata = SimpleNamespace(etag=digest, commit_hash="abc", size=7)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    path = download_published("TiTok-B-64", tmp_path)
    assert path == tmp_path / "TiTok-B-64" / "model.safetensors" and (path.parent / "config.json").is_file()
    assert asked == [
        ("yucornetto/tokenizer_titok_b64_imagenet", file, "abc") for file in ("model.safetensors", "config.json")
    ]


def test_numbers_say_their_protocol():
    assert PUBLISHED["MaskBit-14bit"].own.describe() == (
        "rFID 1.37, PSNR 21.50 dB, SSIM 0.56, usage 100 % (maskbit README; protocol maskbit)"
    )
    assert "protocol not stated; printed with D 16" in PUBLISHED["TiTok-L-32"].table_1.describe()
    with pytest.raises(ValueError, match="usage is a share between 0 and 1; got 97"):
        PublishedNumbers(usage=97)
