"""LlamaGen's class-conditional generator: its published numbers, names, files and samples, and what is refused."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from golden import golden, golden_file
from safetensors.torch import save_file
from test_pretrained_generators import tiny_tokenizer
from test_transformer import LABELS, SMALL, SMALL_LLAMAGEN, assert_close, make, tokens
from torch.nn import functional as F

from ibqlab.cli import main
from ibqlab.generator import LlamaGenConfig, generator_config, make_generator
from ibqlab.generator.attention import rotary_table
from ibqlab.generator.sampling_config import SAMPLING_CARDS, SamplingConfig
from ibqlab.generator.token_choice import filter_logits, guide
from ibqlab.generator.transformer import Decoding
from ibqlab.pretrained import (
    PUBLISHED_GENERATORS,
    CheckpointError,
    export_generator,
    export_published_generator,
    export_tokenizer,
    is_generator,
    load_first_stage,
    load_generator,
    load_tokenizer,
    read_checkpoint,
)
from ibqlab.pretrained.export import llamagen_state
from ibqlab.pretrained.generator_architecture import infer_generator_config
from ibqlab.pretrained.names import generator_roles, llamagen_name
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.published import published_rows
from ibqlab.runs import Run

OFFICIAL = "peers/llamagen_gpt_official.pt"
SIZES = {"num_heads": 2, "grid_size": 4}
PARAMETERS = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "3B": 3_096_659_200}
"""Of the published models, with 1,000 classes and 16,384 codes (fact sheet, counted with the published code)."""


@pytest.fixture(scope="module")
def values():
    return golden("peers/llamagen_gpt")


def official():
    return load_generator(golden_file(OFFICIAL), **SIZES)


def on_meta(config):
    with torch.device("meta"):
        return make_generator(config)


# --- the published numbers ---


def test_the_settings_are_told_by_the_tensors(values):
    given = values[0]["config"]
    model = official()
    assert model.config == LlamaGenConfig(
        vocabulary_size=given["vocab_size"],
        num_classes=given["num_classes"],
        depth=given["n_layer"],
        num_heads=given["n_head"],
        width=given["dim"],
        grid_size=4,
        hidden_multiple=given["multiple_of"],
        attention_dropout=given["resid_dropout_p"],
        feed_forward_dropout=given["ffn_dropout_p"],
        token_dropout=given["token_dropout_p"],
        label_dropout=given["class_dropout_prob"],
    )
    assert model.blocks[0].feed_forward.w1.out_features == values[0]["ffn_hidden"]
    assert not model.training and model.config.head_dim == values[0]["head_dim"]


@torch.no_grad()
def test_logits_and_loss_are_the_published_ones(values):
    _, tensors = values
    model, indices, labels = official(), tensors["idx"], tensors["cls"]
    assert_close(model(indices, labels), tensors["eval/logits"], 1e-5)
    null = torch.full_like(labels, model.config.num_classes)
    assert_close(model(indices, null), tensors["eval/logits_null_class"], 1e-5)
    assert_close(model.loss(indices, labels), tensors["eval/loss"], 1e-5)
    wide = model.double()
    assert_close(wide(indices, labels), tensors["f64/logits"], 1e-6)
    assert_close(wide.loss(indices, labels), tensors["f64/loss"], 1e-6)


def test_gradients_are_the_published_ones(values):
    facts, tensors = values
    model = official()
    model.loss(tensors["idx"], tensors["cls"]).backward()
    gradients = {llamagen_name(name): parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == facts["grad_norms"].keys()
    for name, norm in facts["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    named = [name.removeprefix("eval/grad/") for name in tensors if name.startswith("eval/grad/")]
    assert len(named) == 4
    for name in named:
        assert_close(gradients[name], tensors[f"eval/grad/{name}"], 1e-4)


def test_the_table_of_positions_is_the_published_one(values):
    table = rotary_table(4, 16)
    assert not table[0].any()  # the class's query and key are zero vectors
    assert_close(table, values[1]["rope/freqs_cis"], 1e-5)


@torch.no_grad()
def test_cached_logits_with_the_null_class_are_the_published_ones(values):
    facts, tensors = values
    model, labels = official(), tensors["cls"]
    decoding = Decoding(model, torch.cat([labels, torch.full_like(labels, model.config.num_classes)]))
    logits, previous = [], None
    for position in range(model.config.num_tokens):
        decoding.advance(previous)
        logits.append(decoding.logits())
        previous = tensors["idx"][:, position].repeat(2)
    logits = torch.stack(logits, dim=1)  # (2B, T, V), the classes first
    assert_close(logits, tensors["decode/logits_cond_uncond"], 1e-5)
    assert_close(guide(*logits.chunk(2), facts["cfg_scale"]), tensors["decode/logits_cfg"], 1e-5)


@pytest.mark.parametrize(
    ("name", "scale", "is_short"),
    [
        ("greedy_cfg", "cfg_scale", False),
        ("greedy_cfg2", "cfg_scale_2", False),
        ("greedy_cfg_interval", "cfg_scale", True),
        ("greedy_no_cfg", None, False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"], ids=["plain loop", "sampler"])
def test_most_probable_tokens_are_the_published_ones(values, name, scale, is_short, dtype):
    facts, tensors = values
    model, settings = official(), {"temperature": 0.0, "cfg_scale": facts[scale] if scale else 1.0}
    if is_short:
        settings["cfg_interval"] = (0.0, (facts["cfg_interval"] + 2) / model.config.num_tokens)
    drawn = model.sample(tensors["cls"], dtype=dtype, **settings)
    assert torch.equal(drawn, tensors[f"sample/{name}"])


def test_guidance_stops_where_the_published_code_stops():
    for interval in range(14):
        config = SamplingConfig(cfg_scale=2.0, cfg_interval=(0.0, (interval + 2) / 16))
        scales = [config.scale_at(position, 16) for position in range(16)]
        assert scales == [2.0] * (interval + 2) + [1.0] * (14 - interval)


@torch.no_grad()
def test_the_published_draw_follows_from_our_logits_and_its_random_numbers(values):
    """Its numbers come from torch's global state, batch after batch, so `sample`, whose images have seeds of their own,
    does not repeat them; drawn as it draws, from our filtered scores, the tokens are the same. Its settings are not
    recorded: temperature 1.1, top-k 32 and top-p 0.95 with the recorded guidance are those that give its tokens."""
    facts, tensors = values
    model, labels = official(), tensors["cls"]
    decoding = Decoding(model, torch.cat([labels, torch.full_like(labels, model.config.num_classes)]))
    drawn = []
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        for _ in range(model.config.num_tokens):
            decoding.advance(drawn[-1].repeat(2) if drawn else None)
            logits = guide(*decoding.logits().chunk(2), facts["cfg_scale"]) / 1.1
            drawn.append(torch.multinomial(filter_logits(logits, top_k=32, top_p=0.95).softmax(-1), 1)[:, 0])
    assert torch.equal(torch.stack(drawn, dim=1), tensors["sample/multinomial_seed1234"])


# --- the published sizes and names ---


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_are_the_published_sizes(preset):
    config = LlamaGenConfig.preset(preset)
    model = on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]
    assert config.head_dim == (100 if preset == "3B" else 64)
    hidden = {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096, "3B": 8704}[preset]
    assert model.blocks[0].feed_forward.w1.out_features == hidden
    shapes = {key: tuple(value.shape) for key, value in llamagen_state(model).items()}
    for grid_size in (16, 24, 32):
        expected = LlamaGenConfig.preset(preset, grid_size=grid_size)
        assert infer_generator_config(shapes, grid_size=grid_size) == expected
    if preset in ("B", "L"):
        with pytest.raises(ValueError, match=rf"published: 16 in c2i_{preset}_256\.pt, 24 in c2i_{preset}_384\.pt\)"):
            infer_generator_config(shapes)
    else:
        assert infer_generator_config(shapes).grid_size == 24
    assert generator_config({"name": "llamagen", "preset": preset, "vocabulary_size": 64}).vocabulary_size == 64


def test_every_key_of_the_full_size_list_is_accounted_for():
    listed = json.loads(golden_file("peers/peers_state_dict_keys.json").read_text())["llamagen/GPT-B"]
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in listed.items()}
    config = infer_generator_config({key: tuple(value.shape) for key, value in tensors.items()}, grid_size=16)
    assert config == LlamaGenConfig.preset("B") == LlamaGenConfig()
    model = on_meta(config)
    roles = generator_roles(tensors)
    assert {role.part for role in roles.values()} == {"generator"}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {roles[key].name: tuple(tensors[key].shape) for key in listed} == ours
    assert list(llamagen_state(model)) == list(listed)


def test_published_files_and_cards_are_those_of_the_authors():
    entries = {name: entry for name, entry in PUBLISHED_GENERATORS.items() if entry.design == "llamagen"}
    files = {entry.file: (entry.preset, entry.grid_size, entry.gfid, entry.sampling.cfg_scale)
             for entry in entries.values()}  # fmt: skip
    assert files == {
        "c2i_B_256.pt": ("B", 16, 5.46, 2.0),
        "c2i_L_256.pt": ("L", 16, 3.80, 2.0),
        "c2i_B_384.pt": ("B", 24, 6.09, 2.0),
        "c2i_L_384.pt": ("L", 24, 3.07, 2.0),
        "c2i_XL_384.pt": ("XL", 24, 2.62, 1.75),
        "c2i_XXL_384.pt": ("XXL", 24, 2.34, 1.75),
        "c2i_3B_384.pt": ("3B", 24, 2.18, 1.65),
    }
    rows = published_rows("generator")
    for name, entry in entries.items():
        assert (rows[name].gfid, rows[name].inception_score) == (entry.gfid, entry.inception_score)
        assert (entry.sampling.temperature, entry.sampling.top_k, entry.sampling.top_p) == (1.0, 0, 1.0)
        assert entry.sampling is SAMPLING_CARDS[f"llamagen_{entry.preset.lower()}"]
    listed = CliRunner().invoke(main, ["download"], catch_exceptions=False).output
    assert "LlamaGen-B-256" in listed and "gFID 5.46\n" in listed and "gFID 2.18  IS 263.33" in listed


# --- files ---


def state():
    return torch.load(golden_file(OFFICIAL))["model"]


CONTAINERS = {
    "training": lambda tensors: {"model": tensors, "optimizer": {"state": {}}, "steps": 7},
    "DeepSpeed": lambda tensors: {"module": tensors, "global_steps": 7},
    "Lightning": lambda tensors: {"state_dict": tensors},
    "FSDP": lambda tensors: tensors,
    "compiled and parallel": lambda tensors: {"model": {f"module._orig_mod.{k}": v for k, v in tensors.items()}},
}


@torch.no_grad()
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_opens(tmp_path, values, container):
    torch.save(CONTAINERS[container](state()), tmp_path / "gpt.pt")
    model = load_generator(tmp_path / "gpt.pt", **SIZES)
    assert_close(model(values[1]["idx"], values[1]["cls"]), values[1]["eval/logits"], 1e-5)
    report = model.load_report
    assert report.accounted == report.keys == len(report.renamed) == 18
    assert report.used["layers.1.ffn_norm.weight"] == "blocks.1.ffn_norm.weight"
    assert "with published names of LlamaGen" in str(report)
    assert is_generator(tmp_path / "gpt.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_file(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in state().items()}
    save_file(tensors, tmp_path / "gpt.safetensors")
    model = load_generator(tmp_path / "gpt.safetensors", **SIZES)
    again = llamagen_state(model)
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == dtype and torch.equal(again[name], value) for name, value in tensors.items())


def test_caches_of_sampling_are_left(tmp_path):
    caches = {f"layers.{i}.attention.kv_cache.{kind}_cache": torch.zeros(4, 2, 24, 16) for i in (0, 1) for kind in "kv"}
    torch.save({"model": state() | caches}, tmp_path / "gpt.pt")
    report = load_generator(tmp_path / "gpt.pt", **SIZES).load_report
    assert report.left == {"caches of keys and values": tuple(caches)} and report.accounted == report.keys == 22


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "output.weight"), r"1 missing \(output\.weight\)"),
        (lambda s: without(s, "layers.1.attention.wo.weight"), r"1 missing \(layers\.1\.attention\.wo\.weight\)"),
        (lambda s: without(s, "layers.0.feed_forward.w1.weight"), r"'layers\.0\.feed_forward\.w1\.weight' is missing"),
        (lambda s: {**s, "extra.bias": torch.zeros(1)}, r"1 unknown \(extra\.bias\)"),
        (lambda s: {**s, "norm.weight": torch.zeros(3)}, r"1 of another shape \(norm\.weight \(3,\), not \(32,\)\)"),
        (
            lambda s: {**s, "layers.0.attention.wqkv.weight": torch.zeros(64, 32)},
            r"1 of another shape \(layers\.0\.attention\.wqkv\.weight \(64, 32\), not \(96, 32\)\)",
        ),
        (
            lambda s: (
                without(s, "cls_embedding.embedding_table.weight")
                | {"cls_embedding.cap_proj.fc1.weight": torch.zeros(32, 8)}
            ),
            r"LlamaGen's generator of images from text \(cls_embedding\.cap_proj",
        ),
        (
            lambda s: without(s, "cls_embedding.embedding_table.weight"),
            r"none of LlamaGen's, which has tok_embeddings\.weight and cls_embedding",
        ),
        (lambda s: make(SMALL).state_dict() | s, "are two names of one"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_the_names_in_them(tmp_path, change, says):
    torch.save({"model": change(state())}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=rf"bad\.pt: .*({says})"):
        load_generator(tmp_path / "bad.pt", **SIZES)


def test_what_shapes_do_not_tell_is_asked_for(tmp_path):
    path = golden_file(OFFICIAL)
    with pytest.raises(ValueError, match=r"published none of the width 32 .*Give num_heads=… \(--num-heads\)"):
        load_generator(path, grid_size=4)
    with pytest.raises(ValueError, match=r"published: none of this width.*Give grid_size=16 for images of 256 pixels"):
        load_generator(path, num_heads=2)
    with pytest.raises(ValueError, match="got 3 heads for the width 32"):
        load_generator(path, num_heads=3, grid_size=4)
    with pytest.raises(CheckpointError, match="grid_size must be at least 1; got 0"):
        load_generator(path, num_heads=2, grid_size=0)


def test_a_generator_is_no_tokenizer_and_a_tokenizer_no_generator(tmp_path):
    from_text = without(state(), "cls_embedding.embedding_table.weight")
    from_text["cls_embedding.cap_proj.fc1.weight"] = torch.zeros(32, 8)
    torch.save({"model": from_text}, tmp_path / "t2i.pt")
    for path in (golden_file(OFFICIAL), tmp_path / "t2i.pt"):
        with pytest.raises(
            CheckpointError, match="this is a generator of LlamaGen, not a tokenizer; use load_generator"
        ):
            load_tokenizer(path)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*load_tokenizer"):
        load_first_stage(golden_file(OFFICIAL))
    for name in ("llamagen_vq_official.pt", "vqgan_lc_official.pth", "taming_vqgan_official.ckpt"):
        tensors = torch.load(golden_file(f"peers/{name}"), weights_only=False)
        tensors = next(tensors[entry] for entry in ("state_dict", "model") if entry in tensors)
        torch.save(tensors, tmp_path / name)
        assert not is_generator(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"this is a tokenizer, not a generator.*use load_tokenizer"):
            load_generator(tmp_path / name, **SIZES)


@pytest.mark.parametrize("names", ["LlamaGen's", "ours"])
def test_a_generator_beside_a_tokenizer_in_one_file_is_refused(tmp_path, names):
    generator = state() if names == "LlamaGen's" else make(SMALL).state_dict()
    torch.save(generator | {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"tokenizer .* and of a generator stand side by side"):
        load_generator(tmp_path / "both.pt", num_heads=2, grid_size=4)


def test_published_exports_have_the_published_names_and_order(tmp_path):
    model = official()
    path = export_published_generator(model, tmp_path / "out.pt")
    content = torch.load(path)
    assert list(content) == ["model"] and list(content["model"]) == list(state())
    assert all(torch.equal(content["model"][name], value) for name, value in state().items())
    with pytest.raises(ValueError, match="holds the generator alone; got a tokenizer, too"):
        export_published_generator(model, tmp_path / "other.pt", tiny_tokenizer())
    own = export_generator(model, tmp_path / "own.safetensors")
    again = load_generator(own)
    assert again.config == model.config and read_checkpoint(own, "generator").report.accounted == 18
    assert list(torch.load(export_published_generator(own, tmp_path / "third.pt"))["model"]) == list(state())
    sizes = ["--num-heads", "2", "--grid-size", "4"]
    for name in ("by_command.safetensors", "by_command.ckpt"):
        command = ["export", str(path), str(tmp_path / name), *sizes]
        CliRunner().invoke(main, command, catch_exceptions=False)
    assert load_generator(tmp_path / "by_command.safetensors").config == model.config
    assert list(torch.load(tmp_path / "by_command.ckpt")["model"]) == list(state())
    shown = CliRunner().invoke(main, ["inspect", str(path), *sizes], catch_exceptions=False).output
    assert "name: llamagen" in shown and "18 of 18 keys accounted for" in shown


def test_a_run_of_one_is_read_and_exported_without_its_tokenizer(tmp_path):
    model = make(SMALL_LLAMAGEN)
    run = Run.start(tmp_path / "run", GeneratorTrainConfig(generator=SMALL_LLAMAGEN))
    run.save_checkpoint(3, {"model": model.state_dict()})
    export_tokenizer(tiny_tokenizer(), run.path / "tokenizer.safetensors")
    assert load_generator(run.path).config == SMALL_LLAMAGEN
    CliRunner().invoke(main, ["export", str(run.path), str(tmp_path / "a.ckpt")], catch_exceptions=False)
    again = load_generator(tmp_path / "a.ckpt", num_heads=2, grid_size=3)
    assert again.config == replace(SMALL_LLAMAGEN, hidden_multiple=16)  # the largest that gives the same hidden width
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_images_are_drawn_from_an_export_with_the_published_card(tmp_path):
    generator = export_generator(make(SMALL_LLAMAGEN), tmp_path / "gen.safetensors")
    tokenizer = export_tokenizer(tiny_tokenizer(), tmp_path / "tok.safetensors")
    command = ["sample", str(generator), "--card", "llamagen_3b", "--tokenizer", str(tokenizer), "--classes", "0,2"]
    command += ["--images-per-class", "1", "--output", str(tmp_path / "out")]
    CliRunner().invoke(main, command, catch_exceptions=False)
    sampling = json.loads((tmp_path / "out" / "manifest.json").read_text())["sampling"]
    assert (sampling["cfg_scale"], sampling["top_k"], sampling["temperature"]) == (1.65, 0, 1.0)


# --- the network ---


def test_a_new_generator_has_no_idea_and_the_class_is_its_first_token():
    torch.manual_seed(0)
    model, indices = make_generator(SMALL_LLAMAGEN), tokens(12)
    assert model.loss(indices, LABELS).item() == pytest.approx(torch.tensor(12.0).log().item())
    assert not any("ada_lin" in name for name in model.state_dict())
    trained = make(SMALL_LLAMAGEN)
    with torch.no_grad():
        before = trained(indices, LABELS)
        other = indices.clone()
        other[:, 4] = (other[:, 4] + 1) % 12
        change = (trained(other, LABELS) - before).abs().amax((0, 2))
        assert not change[:5].any() and (change[5:] > 0).all()
        assert ((trained(indices, LABELS.flip(0)) - before).abs().amax(2) > 0).all()


def test_it_learns():
    model, indices = make(SMALL_LLAMAGEN).train(), tokens(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = partial(model.loss, indices, LABELS)
    first = step().item()
    for _ in range(30):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(indices, LABELS).flatten(0, 1), indices.flatten())
    assert loss < first / 2
