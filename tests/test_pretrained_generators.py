"""Published checkpoints of generators, runs and exports: read strictly, inferred, refused, and written back."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from golden import golden, golden_file
from test_transformer import LABELS, SMALL, SMALL_FACTORIZED, SMALL_LLAMAGEN, assert_close, make, tokens

from ibqlab.cli import main
from ibqlab.generator import GeneratorConfig, generator_config, make_generator
from ibqlab.pretrained import (
    PUBLISHED,
    PUBLISHED_GENERATORS,
    CheckpointError,
    export_generator,
    export_published_generator,
    export_tokenizer,
    load_first_stage,
    load_generator,
    load_tokenizer,
    read_checkpoint,
)
from ibqlab.pretrained.export import llamagen_state, published_generator_state
from ibqlab.pretrained.generator_architecture import infer_generator_config
from ibqlab.pretrained.names import FIRST_STAGE
from ibqlab.pretrained.tokenizer_architecture import empty_tokenizer
from ibqlab.quantizers import join_indices, quantizer_config
from ibqlab.runs import Run, RunError
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig
from ibqlab.training import GeneratorTrainConfig

PREFIX = "state_dict/"


def published_file(folder, name, prefix="transformer."):
    """A golden generator's weights as the published code saves them."""
    facts, tensors = golden(name)
    state = {prefix + key.removeprefix(PREFIX): w for key, w in tensors.items() if key.startswith(PREFIX)}
    path = folder / f"{name}.ckpt"
    torch.save({"state_dict": state, "epoch": 1, "global_step": 7}, path)
    return path, facts, tensors


def write(path, state):
    torch.save({"state_dict": state}, path)
    return path


def tiny_tokenizer(design="vqgan"):
    torch.manual_seed(1)
    magvit2 = design == "magvit2"
    autoencoder = AutoencoderConfig(
        design=design,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=256,
        latent_channels=5 if magvit2 else 4,
    )
    quantizer = {"name": "lfq", "codebook_size": 32, "code_dim": 5} if magvit2 else {"name": "ibq", "codebook_size": 12}
    quantizer = quantizer if magvit2 else {**quantizer, "code_dim": 4}
    return Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer_config(quantizer))).eval()


# --- published ---


@torch.no_grad()
def test_a_published_generator_gives_the_published_logits(tmp_path):
    path, facts, tensors = published_file(tmp_path, "gpt_tiny")
    given = facts["config"]
    model = load_generator(path, num_heads=given["n_head"], grid_size=math.isqrt(given["block_size"])).float()
    assert model.config.depth == given["n_layer"] and not model.training
    assert_close(model(tensors["idx"], tensors["cls"].flatten()), tensors["eval/logits"], 1e-5)
    assert model.load_report.accounted == model.load_report.keys == len(model.state_dict())
    assert "used" in str(model.load_report) and "global_step" in str(model.load_report)


@torch.no_grad()
def test_a_published_factorized_generator_gives_the_published_logits(tmp_path):
    path, facts, tensors = published_file(tmp_path, "magvit2_gpt_tiny")
    given = facts["config"]
    model = load_generator(path, num_heads=given["n_head"], grid_size=math.isqrt(given["block_size"])).float()
    assert model.config.bits == tuple(given["factorized_bits"])
    indices = join_indices((tensors["idx_pre"], tensors["idx_post"]), model.config.bits)
    logits = model(indices, tensors["cls"].flatten())
    assert_close(logits.pre, tensors["eval/logits_pre"], 1e-5)
    assert_close(logits.post, tensors["eval/logits_post"], 1e-5)


def test_names_and_shapes_are_those_of_the_published_file():
    published = golden_keys("IBQ-AR/B")
    mine = {key.removeprefix("transformer."): shape for key, shape in published.items() if "transformer." in key}
    with torch.device("meta"):
        state = make_generator(infer_generator_config(mine)).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == mine


def golden_keys(name):
    import json  # noqa: PLC0415

    keys = json.loads(golden_file("official_state_dict_keys.json").read_text())[name]
    return {key: tuple(shape) for key, (shape, _) in keys.items()}


# --- first stage, caches, exports ---


@pytest.mark.parametrize(
    ("config", "design"), [(SMALL, "vqgan"), (SMALL_FACTORIZED, "magvit2")], ids=["ibq", "magvit2"]
)
def test_export_and_import_with_the_first_stage(tmp_path, config, design):
    model, tokenizer = make(config), tiny_tokenizer(design)
    path = export_published_generator(model, tmp_path / "out.ckpt", tokenizer)
    sizes = {"num_heads": config.num_heads, "grid_size": config.grid_size}
    again, first = load_generator(path, **sizes), load_first_stage(path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert first.fingerprint() == tokenizer.fingerprint()
    report = again.load_report
    assert report.accounted == report.keys and len(report.left["first stage (tokenizer)"]) > 50
    keys = list(torch.load(path)["state_dict"])
    assert {key.split(".")[0] for key in keys} == {"first_stage_model", "transformer"}
    assert keys.index("transformer.class_emb.embedding_table.weight") > keys.index(
        "first_stage_model.decoder.conv_in.weight"
    )
    with pytest.raises(FileExistsError):
        export_published_generator(model, path, tokenizer)
    with pytest.raises(ValueError, match="got a generator alone"):
        export_published_generator(model, tmp_path / "other.ckpt")


def test_caches_are_recognised_and_left(tmp_path):
    model = make(SMALL)
    state = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    state["transformer.blocks.0.attention.kv_cache.k_cache"] = torch.zeros(1)
    found = load_generator(write(tmp_path / "a.ckpt", state), num_heads=2, grid_size=3)
    assert found.load_report.left == {"caches of keys and values": ("transformer.blocks.0.attention.kv_cache.k_cache",)}


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
def test_exports_come_back_equal(tmp_path, config):
    model = make(config)
    path = export_generator(model, tmp_path / "out.safetensors")
    again = load_generator(path)
    assert again.config == config
    size = config.vocabulary_size
    for one, other in zip(again(tokens(size), LABELS), model(tokens(size), LABELS), strict=True):
        assert torch.equal(one, other)
    twice = export_generator(path, tmp_path / "twice.safetensors")
    assert load_generator(twice).config == config
    with pytest.raises(ValueError, match="num_heads is asked of published files"):
        load_generator(path, num_heads=4)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_generator(model, tmp_path / "out.bin")
    with pytest.raises(CheckpointError, match="is a generator's export, not a tokenizer's; use load_generator"):
        load_tokenizer(path)


def test_runs_are_read_with_their_tokenizer(tmp_path):
    model, tokenizer = make(SMALL), tiny_tokenizer()
    run = Run.start(tmp_path / "run", GeneratorTrainConfig(generator=SMALL))
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_generator(run.path)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.safetensors"):
        load_first_stage(run.path)
    for state in ({}, {"model": {}}, {"optimizer": {}}, {"model": [1]}):
        run.save_checkpoint(3, state)
        with pytest.raises(CheckpointError, match="must hold tensors by name under 'model'"):
            load_generator(run.path)
    run.save_checkpoint(3, {"model": tokenizer.state_dict()})
    with pytest.raises(CheckpointError, match="must be those of a generator"):
        load_generator(run.path)
    run.save_checkpoint(3, {"model": model.state_dict(), "optimizer": {}})
    export_tokenizer(tokenizer, run.path / "tokenizer.safetensors")
    again = load_generator(run.path)
    assert again.config == SMALL and "run at step 3" in str(again.load_report)
    assert load_first_stage(run.path).fingerprint() == tokenizer.fingerprint()
    with pytest.raises(CheckpointError, match="is a generator's run; its tokenizer is load_first_stage"):
        load_tokenizer(run.path)
    published = export_published_generator(run.path, tmp_path / "out.ckpt")
    assert load_first_stage(published).fingerprint() == tokenizer.fingerprint()


def test_weights_are_the_generators_own(tmp_path):
    path = export_generator(make(SMALL), tmp_path / "out.safetensors")
    model = load_generator(path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train().loss(tokens(12), LABELS).backward()


def test_one_opener_says_what_a_generators_file_holds(tmp_path):
    model = make(SMALL)
    path = export_generator(model, tmp_path / "out.safetensors")
    checkpoint = read_checkpoint(path, "generator")
    assert checkpoint.network == "generator" and checkpoint.config == SMALL
    assert checkpoint.part("generator").keys() == model.state_dict().keys()
    assert checkpoint.report.accounted == checkpoint.report.keys == len(model.state_dict())
    with pytest.raises(ValueError, match=r"network must be one of .*generator"):
        read_checkpoint(path, "generators")
    with pytest.raises(FileNotFoundError, match="IBQ-AR-B is a published generator and no file here; fetch it first"):
        load_generator("IBQ-AR-B")


# --- refused ---


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "head.weight"), "1 missing \\(head.weight\\)"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "1 unknown \\(extra.weight\\)"),
        (lambda s: {**s, "head.weight": torch.zeros(13, 16)}, "1 of another shape \\(head.weight"),
        (lambda s: without(s, "class_emb.embedding_table.weight"), "'class_emb.embedding_table.weight' is missing"),
        (lambda s: {**s, "tok_emb.weight": torch.zeros(3)}, "must have 2 dimensions"),
        (lambda s: {"layer.weight": torch.zeros(2)}, "no generator of IBQ's or Open-MAGVIT2's design"),
        (lambda s: {"encoder.conv_in.weight": torch.zeros(2)}, "this is a tokenizer.*use load_tokenizer"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, change, says):
    path = write(tmp_path / "bad.ckpt", change(make(SMALL).state_dict()))
    with pytest.raises(CheckpointError, match=f"bad.ckpt: .*{says}"):
        load_generator(path, num_heads=2, grid_size=3)


def test_heads_that_cannot_be_are_refused(tmp_path):
    path = write(tmp_path / "a.ckpt", make(SMALL).state_dict())
    with pytest.raises(ValueError, match=r"does not divide this one's width 16\. Give num_heads="):
        load_generator(path)
    with pytest.raises(ValueError, match="got 3 heads for the width 16"):
        load_generator(path, num_heads=3)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or run folder"):
        load_generator(tmp_path / "nowhere")
    (tmp_path / "cut.ckpt").write_bytes(write(tmp_path / "a.ckpt", make(SMALL).state_dict()).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_generator(tmp_path / "cut.ckpt")
    torch.save({"state_dict": {"tok_emb.weight": print}}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match=r"object of __builtin__\.print, which is not made here"):
        load_generator(tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_first_stage(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="this is a tokenizer"):
        load_generator(golden_file("tokenizer_ema_official_ckpt.ckpt"))
    tokenizer = export_tokenizer(tiny_tokenizer(), tmp_path / "tok.safetensors")
    with pytest.raises(CheckpointError, match="is a tokenizer's export"):
        load_generator(tokenizer)


# --- commands ---


def test_inspect_and_export_take_generators(tmp_path):
    path = export_published_generator(make(SMALL), tmp_path / "a.ckpt", tiny_tokenizer())
    shown = CliRunner().invoke(main, ["inspect", str(path), "--num-heads", "2"], catch_exceptions=False)
    assert "first stage (tokenizer)" in shown.output and "vocabulary_size: 12" in shown.output
    run = Run.start(tmp_path / "run", GeneratorTrainConfig(generator=SMALL))
    run.save_checkpoint(3, {"model": make(SMALL).state_dict()})
    export_tokenizer(tiny_tokenizer(), run.path / "tokenizer.safetensors")
    for name in ("b.safetensors", "b.ckpt"):
        done = CliRunner().invoke(main, ["export", str(run.path), str(tmp_path / name)], catch_exceptions=False)
        assert done.exit_code == 0 and (tmp_path / name).is_file()
    assert load_generator(tmp_path / "b.safetensors").config == SMALL
    refused = CliRunner().invoke(main, ["export", str(run.path), str(tmp_path / "c.ckpt"), "--weights", "ema"])
    assert refused.exit_code == 2 and "--weights is for tokenizers" in refused.output


def test_export_asks_what_a_published_file_does_not_tell(tmp_path):
    path = str(export_published_generator(make(SMALL), tmp_path / "a.ckpt", tiny_tokenizer()))
    refused = CliRunner().invoke(main, ["export", path, str(tmp_path / "b.safetensors")])
    assert refused.exit_code and "Give num_heads=" in refused.output + str(refused.exception)
    assert not (tmp_path / "b.safetensors").exists()
    sizes = ["--num-heads", str(SMALL.num_heads), "--grid-size", str(SMALL.grid_size)]
    for name in ("b.safetensors", "b.ckpt"):
        CliRunner().invoke(main, ["export", path, str(tmp_path / name), *sizes], catch_exceptions=False)
    found = load_generator(tmp_path / "b.safetensors").config
    assert (found.num_heads, found.grid_size) == (SMALL.num_heads, SMALL.grid_size)
    one, other = torch.load(path)["state_dict"], torch.load(tmp_path / "b.ckpt")["state_dict"]
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    shown = CliRunner().invoke(main, ["inspect", path, *sizes], catch_exceptions=False)
    assert f"grid_size: {SMALL.grid_size}" in shown.output


# --- the published generators ---


@pytest.mark.parametrize("name", PUBLISHED_GENERATORS)
def test_published_generators_fit_their_tokenizers_and_are_inferred(name):
    entry = PUBLISHED_GENERATORS[name]
    config = generator_config({"name": entry.design, "preset": entry.preset, "grid_size": entry.grid_size})
    with torch.device("meta"):
        model = make_generator(config)
    llamagen = entry.design == "llamagen"
    size = 16384 if llamagen else PUBLISHED[entry.tokenizer].codebook_size
    assert config.vocabulary_size == size
    state = llamagen_state(model) if llamagen else model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    found = infer_generator_config(shapes, grid_size=entry.grid_size if llamagen else None)
    if entry.design == "ibq":
        # The scale of the gates at the start is no part of a trained architecture.
        found = replace(found, gate_scale=config.gate_scale)
    assert found == config
    assert (entry.sampling.top_k, entry.sampling.top_p, entry.sampling.cfg_schedule) == (0, 1.0, "constant")


def test_the_table_of_generators_is_that_of_the_papers():
    papers = {name: entry for name, entry in PUBLISHED_GENERATORS.items() if entry.design != "llamagen"}
    assert {name: (entry.gfid, entry.inception_score) for name, entry in papers.items()} == {
        "IBQ-AR-B": (2.88, 254.73),
        "IBQ-AR-L": (2.45, 267.48),
        "IBQ-AR-XL": (2.14, 278.99),
        "IBQ-AR-XXL": (2.05, 286.73),
        "Open-MAGVIT2-AR-B": (3.08, 258.26),
        "Open-MAGVIT2-AR-L": (2.51, 271.70),
        "Open-MAGVIT2-AR-XL": (2.33, 271.77),
    }
    small = PUBLISHED_GENERATORS["IBQ-AR-B"].sampling
    assert (small.temperature, small.cfg_scale) == (1.1, 2.25)
    large = PUBLISHED_GENERATORS["Open-MAGVIT2-AR-XL"].sampling
    assert (large.temperature, large.cfg_scale) == ((1.1, 1.0), (1.75, 1.85))


def test_the_exported_keys_are_those_of_the_published_file():
    listed = golden_keys("IBQ-AR/B")
    with torch.device("meta"):
        generator = make_generator(GeneratorConfig.preset("B"))
    state = published_generator_state(generator, empty_tokenizer(TokenizerConfig()))
    assert {key: tuple(value.shape) for key, value in state.items()} == listed
    assert list(state) == list(listed)


def test_first_stages_are_accounted_for_and_other_weights_are_left(tmp_path):
    tokenizer = tiny_tokenizer()
    state = published_generator_state(make(SMALL), tokenizer)
    count = sum(key.startswith(FIRST_STAGE) for key in state)
    state[f"{FIRST_STAGE}model_ema.decay"] = torch.tensor(0.999)
    state[f"{FIRST_STAGE}loss.discriminator.main.0.bias"] = torch.zeros(2)
    first = load_first_stage(write(tmp_path / "a.ckpt", state))
    assert first.fingerprint() == tokenizer.fingerprint() and not first.training
    report = first.load_report
    assert len(report.used) == count and report.accounted == report.keys == count + 2
    assert report.left["discriminator"] == ("loss.discriminator.main.0.bias",)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_generator_is_no_tokenizer(tmp_path, prefix):
    state = {prefix + name: value for name, value in make(SMALL).state_dict().items()}
    path = write(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError, match=r"autoregressive generator.*load_first_stage\(path\)"):
        load_tokenizer(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")
def test_large_files_need_little_more_than_what_is_taken(tmp_path):
    config = GeneratorConfig(vocabulary_size=1024, depth=12, width=768, num_heads=12)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in make_generator(config).state_dict().items()}
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    state = {f"transformer.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    file = tmp_path / "large.ckpt"
    optimizer = {"optimizer_states": [{"exp_avg": torch.zeros(size // 4)}]}
    torch.save({"state_dict": state, **optimizer}, file)
    del state, optimizer
    found = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    file.unlink()
    peak = int(found.stdout)
    assert size > 3e8
    assert peak <= 1.3 * size, f"{peak / size:.2f} times the generator"


PEAK = """
import sys
from ibqlab.pretrained import load_generator
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
before = status("VmRSS")
generator = load_generator(sys.argv[1])
print(status("VmHWM") - before)
"""
