"""The generators: the published graphs, number for number, what each position may see, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from golden import golden
from torch.nn import functional as F

from ibqlab.config import ConfigError, parse, to_dict
from ibqlab.generator import (
    FactorizedGenerator,
    FactorizedGeneratorConfig,
    Generator,
    GeneratorConfig,
    LlamaGenConfig,
    generator_config,
    make_generator,
)
from ibqlab.generator.attention import rotary_table, rotate
from ibqlab.generator.layers import ClassEmbedding, RMSNorm
from ibqlab.quantizers import join_indices

SMALL = GeneratorConfig(
    vocabulary_size=12, num_classes=3, grid_size=3, depth=2, num_heads=2, width=16, hidden_multiple=8, gate_scale=1.0
)
SMALL_FACTORIZED = FactorizedGeneratorConfig(
    bits=(2, 3),
    num_classes=3,
    grid_size=3,
    spatial_depth=2,
    factorized_depth=2,
    num_heads=2,
    width=16,
    hidden_multiple=8,
)
SMALL_LLAMAGEN = LlamaGenConfig(
    vocabulary_size=12, num_classes=3, grid_size=3, depth=2, num_heads=2, width=16, hidden_multiple=8
)
LABELS = torch.tensor([0, 3])


def make(config):
    """A small generator in eval mode, whose head and norms are no longer where they start."""
    torch.manual_seed(0)
    model = make_generator(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(size: int, *, length: int = 9) -> torch.Tensor:
    return torch.randint(size, (2, length), generator=torch.Generator().manual_seed(1))


def published_weights(tensors):
    prefix = "state_dict/"
    return {name.removeprefix(prefix): w.float() for name, w in tensors.items() if name.startswith(prefix)}


def published_config(given, **settings):
    """A generator's config from the published code's names."""
    return GeneratorConfig(
        vocabulary_size=given["vocab_size"],
        num_classes=given["class_num"],
        grid_size=math.isqrt(given["block_size"]),
        depth=given["n_layer"],
        num_heads=given["n_head"],
        width=given["n_embd"],
        **settings,
    )


def published_generator():
    facts, tensors = golden("gpt_tiny")
    config = published_config(facts["config"], gate_scale=facts["config"]["alng"])
    model = Generator(config).eval()
    model.load_state_dict(published_weights(tensors), strict=True)
    return model, facts, tensors


def assert_close(ours, theirs, tolerance):
    """Relative to the largest of the published values."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# --- the published numbers ---


@pytest.mark.parametrize("case", ["official_16x16_hd64", "toy_4x4_hd16"])
def test_rotary_table_and_rotation_as_published(case):
    facts, tensors = golden("rope")
    table = rotary_table(facts["cases"][case]["grid_size"], facts["cases"][case]["head_dim"])
    assert_close(table, tensors[f"{case}/freqs_cis"], 1e-5)
    x = tensors[f"{case}/x"]
    assert_close(rotate(x, table[: x.shape[1]]), tensors[f"{case}/x_rot"], 1e-5)


def test_generator_gives_the_published_numbers():
    model, facts, tensors = published_generator()
    indices, labels = tensors["idx"], tensors["cls"].flatten()
    logits = model(indices, labels)
    assert_close(logits, tensors["eval/logits"], 1e-5)
    null = torch.full_like(labels, model.config.num_classes)
    assert_close(model(indices, null), tensors["eval/logits_null_class"], 1e-5)
    assert_close(F.cross_entropy(logits.flatten(0, 1), indices.flatten()), tensors["eval/loss"], 1e-5)
    loss = model.loss(indices, labels)
    assert_close(loss, tensors["eval/loss"], 1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == facts["grad_norms"].keys()
    for name, norm in facts["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    named = [name.removeprefix("eval/grad/") for name in tensors if name.startswith("eval/grad/")]
    assert len(named) == 3
    for name in named:
        assert_close(gradients[name], tensors[f"eval/grad/{name}"], 1e-4)


def test_six_training_steps_as_published():
    """Recorded rates and decays in AdamW, over the generator's own loss: Adam magnifies any gradient that is off."""
    facts, tensors = golden("train_ar_6steps")
    given = facts["gpt_config"]
    config = published_config(
        given,
        hidden_multiple=given["multiple_of"],
        attention_dropout=given["resid_dropout_p"],
        feed_forward_dropout=given["ffn_dropout_p"],
        token_dropout=given["token_drop"],
        label_dropout=0.0,
    )
    model = Generator(config)
    prefix = "transformer."
    start, end = (
        {n.removeprefix(when + prefix): w.float() for n, w in tensors.items() if n.startswith(when)}
        for when in ("init/", "final/")
    )
    model.load_state_dict(start, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8)
    for number, step in enumerate(facts["steps"]):
        batch = slice(2 * (number % 3), 2 * (number % 3) + 2)
        optimizer.param_groups[0] |= {"lr": step["lr"][0], "weight_decay": step["weight_decay"][0]}
        loss = model.loss(tensors["tokens"][batch], tensors["labels"][batch])
        assert loss.item() == pytest.approx(step["loss"], rel=3e-5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), facts["gradient_clip_val"])
        assert norm.item() == pytest.approx(facts["grad_norm_before_clip"][number], rel=1e-4)
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert_close(weight, end[name], 3e-3)


def test_factorized_generator_gives_the_published_numbers():
    facts, tensors = golden("magvit2_gpt_tiny")
    given = facts["config"]
    config = FactorizedGeneratorConfig(
        bits=tuple(given["factorized_bits"]),
        num_classes=given["class_num"],
        grid_size=math.isqrt(given["block_size"]),
        spatial_depth=given["spatial_n_layer"],
        factorized_depth=given["factorized_n_layer"],
        num_heads=given["n_head"],
        width=given["dim"],
        hidden_multiple=given["multiple_of"],
    )
    model = FactorizedGenerator(config).eval()
    model.load_state_dict(published_weights(tensors), strict=True)
    parts = (tensors["idx_pre"], tensors["idx_post"])
    indices, labels = join_indices(parts, config.bits), tensors["cls"].flatten()
    logits = model(indices, labels)
    assert_close(logits.pre, tensors["eval/logits_pre"], 1e-5)
    assert_close(logits.post, tensors["eval/logits_post"], 1e-5)
    for scores, part, name in zip(logits, parts, ("pre", "post"), strict=True):
        assert_close(F.cross_entropy(scores.flatten(0, 1), part.flatten()), tensors[f"eval/loss_{name}"], 1e-5)
    assert_close(model.loss(indices, labels), tensors["eval/loss_pre"] + tensors["eval/loss_post"], 1e-5)


def test_names_and_shapes_of_the_published_base_model():
    keys, _ = golden("official_state_dict_keys")
    prefix = "transformer."
    published = {
        name.removeprefix(prefix): tuple(shape)
        for name, (shape, _) in keys["IBQ-AR/B"].items()
        if name.startswith(prefix)
    }
    with torch.device("meta"):
        model = Generator(GeneratorConfig.preset("B"))
    assert len(published) == 150
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == published


@pytest.mark.parametrize(
    ("name", "parameters"), [("B", 342_994_944), ("L", 649_640_960), ("XL", 1_076_103_168), ("XXL", 2_063_331_840)]
)
def test_presets_have_the_published_sizes(name, parameters):
    config = GeneratorConfig.preset(name)
    with torch.device("meta"):
        model = Generator(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.width == 64 * config.depth and config.num_heads == config.depth and config.num_tokens == 256


@pytest.mark.parametrize(("name", "millions"), [("B", 343.6), ("L", 804.4), ("XL", 1486.7)])
def test_factorized_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = FactorizedGenerator(FactorizedGeneratorConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.config.head_dim == 64


# --- parts ---


def test_the_class_has_no_position_and_tokens_have_row_and_column():
    table = rotary_table(3, 8, dtype=torch.float64)
    assert table.shape == (10, 4, 2) and not table[0].any()
    for token in range(9):
        row, column = divmod(token, 3)
        angles = torch.tensor([row, row / 100, column, column / 100], dtype=torch.float64)
        expected = torch.stack([angles.cos(), angles.sin()], dim=-1)
        assert torch.allclose(table[1 + token], expected, rtol=0, atol=1e-12)


def test_attention_scores_depend_on_the_distance_in_rows_and_columns_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    table = rotary_table(4, 8, dtype=torch.float64)
    q, k = (rotate(x.expand(1, 17, 1, 8), table)[0, 1:, 0] for x in (q, k))
    scores = (q @ k.T).view(4, 4, 4, 4)
    assert torch.allclose(scores[1, 1, 0, 2], scores[3, 0, 2, 1], rtol=0, atol=1e-12)
    assert not torch.allclose(scores[1, 1, 0, 2], scores[1, 1, 2, 0], rtol=0, atol=1e-3)


def test_half_types_are_turned_and_normalised_in_float32():
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 3, 8) * 300).half()
    table = rotary_table(2, 8)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).half())
    norm = RMSNorm(8)
    # 300² is more than float16 holds.
    out = norm.half()(x)
    assert out.dtype == torch.float16
    assert torch.equal(out, norm.float()(x.float()).half())


def test_labels_are_dropped_in_training_only_and_as_often_as_said():
    torch.manual_seed(0)
    embedding = ClassEmbedding(3, 4, 0.1)
    labels = torch.zeros(20_000, dtype=torch.int64)
    null, kept = embedding.embedding_table.weight[3], embedding.embedding_table.weight[0]
    got = embedding(labels)[:, 0]
    is_null = (got == null).all(1)
    assert torch.equal(is_null, ~(got == kept).all(1))
    assert 0.09 < is_null.float().mean() < 0.11
    assert (embedding.eval()(labels)[:, 0] == kept).all()


def test_a_dropped_label_is_dropped_for_both_of_its_uses():
    model = make(replace(SMALL, label_dropout=1.0))
    indices = tokens(12)
    expected = model(indices, torch.full((2,), 3))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert torch.equal(model(indices, torch.tensor([0, 1])), expected)


@pytest.mark.parametrize("setting", ["attention_dropout", "feed_forward_dropout", "token_dropout"])
def test_each_dropout_acts_in_training_only(setting):
    off = dict.fromkeys(("attention_dropout", "feed_forward_dropout", "token_dropout", "label_dropout"), 0.0)
    for config, size in ((SMALL, 12), (SMALL_FACTORIZED, 32)):
        without = make(replace(config, **off))
        model = make(replace(config, **{**off, setting: 0.5}))
        indices = tokens(size)
        expected = without(indices, LABELS)
        assert same(model(indices, LABELS), expected) and same(without.train()(indices, LABELS), expected)
        assert not same(model.train()(indices, LABELS), expected)


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- start ---


def test_weights_start_as_published():
    torch.manual_seed(0)
    config = GeneratorConfig(
        vocabulary_size=512, num_classes=200, depth=1, num_heads=4, width=128, gate_scale=1e-2, grid_size=3
    )
    model = Generator(config)
    gates, rest = model.blocks[0].ada_lin[1].weight.split([2 * 128, 4 * 128])
    stds = {
        model.tok_emb.weight: 0.02,
        model.class_emb.embedding_table.weight: 0.02,
        model.blocks[0].attention.wqkv.weight: 0.02,
        model.blocks[0].attention.wo.weight: 0.02,
        model.blocks[0].feed_forward.w2.weight: 0.02,
        gates: 0.02e-2,
        rest: 0.01,
        model.head_nm.ada_lin[1].weight: 0.01,
    }
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 and not any(bias.any() for bias in biases)
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 3 and all((norm == 1).all() for norm in norms)
    loss = model.loss(tokens(512), LABELS)
    assert loss.item() == pytest.approx(math.log(512), rel=1e-6)


def test_factorized_loss_starts_at_the_bits():
    torch.manual_seed(0)
    model = FactorizedGenerator(SMALL_FACTORIZED)
    assert model.loss(tokens(32), LABELS).item() == pytest.approx(5 * math.log(2), rel=1e-6)


# --- what a position sees ---


def test_positions_see_the_class_and_earlier_tokens_only():
    model, indices = make(SMALL), tokens(12)
    before = model(indices, LABELS)
    assert before.shape == (2, 9, 12)
    for place in range(9):
        other = indices.clone()
        other[:, place] = (other[:, place] + 1) % 12
        change = (model(other, LABELS) - before).abs().amax((0, 2))
        assert not change[: place + 1].any() and (change[place + 1 :] > 0).all()
    assert ((model(indices, LABELS.flip(0)) - before).abs().amax(2) > 0).all()


def test_factorized_positions_see_their_own_first_part_in_the_second_only():
    model, indices = make(SMALL_FACTORIZED), tokens(32)
    before = model(indices, LABELS)
    assert before.pre.shape == (2, 9, 4) and before.post.shape == (2, 9, 8)
    # A first part has 2 bits, so 1 changes it and 4 the second part alone.
    for step, own in ((1, True), (4, False)):
        other = indices.clone()
        other[:, 4] = (other[:, 4] // 4 * 4 + (other[:, 4] + step) % 4) if own else (other[:, 4] + step) % 32
        after = model(other, LABELS)
        pre, post = ((a - b).abs().amax((0, 2)) for a, b in zip(after, before, strict=True))
        assert not pre[:5].any() and (pre[5:] > 0).all()
        assert not post[:4].any() and bool(post[4] > 0) is own and (post[5:] > 0).all()


@pytest.mark.parametrize(("config", "size"), [(SMALL, 12), (SMALL_FACTORIZED, 32)])
def test_a_beginning_of_an_image_gives_a_beginning_of_the_scores(config, size):
    model, indices = make(config), tokens(size)
    whole, part = model(indices, LABELS), model(indices[:, :4], LABELS)
    if isinstance(config, GeneratorConfig):
        whole, part = (whole,), (part,)
    for a, b in zip(part, whole, strict=True):
        assert torch.allclose(a, b[:, :4], atol=1e-5)


@pytest.mark.parametrize(("config", "size"), [(SMALL, 12), (SMALL_FACTORIZED, 32)])
def test_loss_without_logits_is_the_loss_of_the_logits(config, size):
    model, indices = make(config).double(), tokens(size)
    scores = model(indices, LABELS)
    if isinstance(config, GeneratorConfig):
        expected = F.cross_entropy(scores.flatten(0, 1), indices.flatten())
    else:
        parts = (indices % 4, indices // 4)
        expected = sum(F.cross_entropy(s.flatten(0, 1), p.flatten()) for s, p in zip(scores, parts, strict=True))
    loss = model.loss(indices, LABELS)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    for name, a, b in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name
        assert a.abs().sum() > 0, name


# --- settings and what is refused ---


def test_presets_take_changes_and_unknown_ones_are_named():
    config = GeneratorConfig.preset("XL", vocabulary_size=1024)
    assert (config.depth, config.width, config.gate_scale, config.vocabulary_size) == (24, 1536, 1e-4, 1024)
    assert GeneratorConfig.preset("B") == GeneratorConfig()
    assert FactorizedGeneratorConfig.preset("B") == FactorizedGeneratorConfig()
    with pytest.raises(ValueError, match="preset must be one of 'B', 'L', 'XL', 'XXL', got 'XLL'"):
        GeneratorConfig.preset("XLL")
    with pytest.raises(ValueError, match="preset must be one of 'B', 'L', 'XL', got 'XXL'"):
        FactorizedGeneratorConfig.preset("XXL")


@pytest.mark.parametrize("config", [SMALL, SMALL_FACTORIZED])
def test_settings_survive_the_round_trip(config):
    assert generator_config(to_dict(config)) == config
    assert generator_config(config) is config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": 2}, "a generator needs a name, one of ibq, llamagen, magvit2"),
        ({"name": "ibp"}, "generator name must be one of .*did you mean 'ibq'"),
        ({"name": "ibq", "preset": "XLL"}, "preset must be one of"),
        ({"name": "ibq", "preset": "XL", "dept": 2}, "dept: unknown key; did you mean 'depth'"),
    ],
)
def test_a_generator_is_named_in_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        generator_config(settings)


def test_a_preset_in_settings_can_be_changed():
    assert generator_config({"name": "ibq", "preset": "XL", "vocabulary_size": 64}) == GeneratorConfig.preset(
        "XL", vocabulary_size=64
    )


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (GeneratorConfig, {"width": 1000}, r"multiple of 4·num_heads = 64.* got 1000\. Use width=1024"),
        (GeneratorConfig, {"depth": 0}, r"depth must be at least 1; got 0\. Published: 16"),
        (GeneratorConfig, {"grid_size": 0}, "grid_size must be at least 1"),
        (GeneratorConfig, {"vocabulary_size": 1}, "vocabulary_size must be at least 2"),
        (GeneratorConfig, {"gate_scale": -1.0}, "gate_scale must be ≥ 0"),
        (GeneratorConfig, {"token_dropout": 1.0}, "token_dropout must lie in 0 to below 1"),
        (GeneratorConfig, {"label_dropout": 1.5}, "label_dropout must lie in 0 to 1"),
        (GeneratorConfig, {"dept": 2}, "did you mean 'depth'"),
        (FactorizedGeneratorConfig, {"bits": (0, 12)}, r"bits must be two numbers .* got \(0, 12\)"),
        (FactorizedGeneratorConfig, {"bits": (6,)}, r"bits\[1\]: must be given"),
        (FactorizedGeneratorConfig, {"factorized_depth": 0}, "factorized_depth must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(config, settings, says):
    with pytest.raises(ConfigError, match=says):
        parse(config, settings)


@pytest.mark.parametrize("config", [SMALL, SMALL_FACTORIZED])
@pytest.mark.parametrize(
    ("indices", "labels", "says"),
    [
        (torch.zeros(2, 3, 3).long(), LABELS, r"\(B, T\) .* got \(2, 3, 3\)\. Use indices\.flatten\(1\)"),
        (torch.zeros(2, 10).long(), LABELS, r"T in 1 to 9 \(grid_size 3\)"),
        (torch.zeros(2, 0).long(), LABELS, "T in 1 to 9"),
        (torch.zeros(0, 9).long(), LABELS[:0], "at least one image"),
        (torch.zeros(2, 9).long(), LABELS[:, None], r"labels must be \(B,\).*\(2,\); got \(2, 1\)\. Use labels\.flat"),
        (torch.zeros(2, 9).long(), LABELS[:1], r"got \(1,\)"),
        (torch.zeros(2, 9), LABELS, r"indices must be whole numbers; got torch\.float32\. Use indices\.long\(\)"),
        (torch.zeros(2, 9).long(), LABELS.float(), "labels must be whole numbers"),
        (torch.full((2, 9), 32), LABELS, r"indices must lie in 0 to \d+; got 32 to 32; .* another tokenizer"),
        (torch.full((2, 9), -1), LABELS, "got -1 to -1"),
        (torch.zeros(2, 9).long(), LABELS + 1, "labels must lie in 0 to 3; got 1 to 4; 3 is the null class"),
        (torch.zeros(2, 9).long(), -LABELS, "labels must lie in 0 to 3; got -3 to 0"),
    ],
)
def test_wrong_inputs_are_refused(config, indices, labels, says):
    model = make(config)
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=says):
            call(indices, labels)


def test_head_dim_without_pairs_for_rows_and_columns_is_refused():
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 4.* got 6\. Use 8"):
        rotary_table(4, 6)


@pytest.mark.parametrize(
    ("design", "settings", "says"),
    [
        (GeneratorConfig, {"depth": 10**6}, "depth must be at most 1,024; got 1,000,000"),
        (GeneratorConfig, {"vocabulary_size": 10**12}, "vocabulary_size must be at most 16,777,216"),
        (GeneratorConfig, {"width": 2**40}, "width must be at most 65,536"),
        (GeneratorConfig, {"grid_size": 10**6}, "grid_size must be at most 1,024"),
        (GeneratorConfig, {"num_classes": 10**9}, "num_classes must be at most 1,048,576"),
        (FactorizedGeneratorConfig, {"spatial_depth": 10**6}, "spatial_depth must be at most 1,024"),
        (FactorizedGeneratorConfig, {"factorized_depth": 10**6}, "factorized_depth must be at most 1,024"),
        (FactorizedGeneratorConfig, {"bits": (30, 12)}, "bits of a part must be at most 24; got 30"),
    ],
)
def test_settings_beyond_every_honest_use_are_refused(design, settings, says):
    with pytest.raises(ValueError, match=says):
        design(**settings)
