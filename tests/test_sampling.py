"""Tokens from the generator: cached decoding, guidance, filters and draws, against the published ones and by hand."""

import math

import numpy as np
import pytest
import torch
from golden import golden
from test_transformer import (
    LABELS,
    SMALL,
    SMALL_FACTORIZED,
    SMALL_LLAMAGEN,
    assert_close,
    make,
    published_generator,
    tokens,
)

from ibqlab.generator.factorized import FactorizedDecoding
from ibqlab.generator.sampling_config import SamplingConfig
from ibqlab.generator.token_choice import choose_tokens, draw_tokens, filter_logits, guide
from ibqlab.generator.transformer import Decoding
from ibqlab.quantizers import join_indices


def decode(model, indices, labels):
    """Logits of all positions, one after another."""
    decoding = Decoding(model, labels)
    logits = []
    for tokens_before in [None, *indices.T[:-1]]:
        decoding.advance(tokens_before)
        logits.append(decoding.logits())
    return torch.stack(logits, dim=1)


# --- the published numbers ---


@torch.no_grad()
def test_cached_decoding_and_guidance_as_published():
    model, facts, tensors = published_generator()
    labels = tensors["cls"].flatten()
    both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    logits = decode(model, tensors["idx"].repeat(2, 1), both)
    assert_close(logits, tensors["decode/logits_cond_uncond"], 1e-5)
    assert_close(guide(*logits.chunk(2), facts["cfg_scale"]), tensors["decode/logits_cfg"], 1e-5)


def test_greedy_samples_as_published():
    model, facts, tensors = published_generator()
    labels = tensors["cls"].flatten()
    assert torch.equal(model.sample(labels, cfg_scale=facts["cfg_scale"], top_k=1), tensors["sample/greedy"])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (10, 0.5), (1, 1.0)])
def test_filters_as_published(top_k, top_p):
    _, tensors = golden("gpt_tiny")
    logits = tensors["filter/logits"]
    before = logits.clone()
    assert torch.equal(filter_logits(logits, top_k, top_p), tensors[f"filter/k{top_k}_p{top_p}"])
    assert torch.equal(logits, before)


# --- parts ---


@torch.no_grad()
def test_cached_decoding_is_the_forward_pass():
    model, indices = make(SMALL).double(), tokens(12)
    assert torch.allclose(decode(model, indices, LABELS), model(indices, LABELS), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_decoding_stops_at_the_last_position():
    decoding = Decoding(make(SMALL), LABELS)
    for _ in range(9):
        decoding.advance(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="an image has 9 tokens"):
        decoding.advance(torch.tensor([1, 2]))


def test_a_token_stays_where_those_before_it_have_exactly_top_p():
    # Four equal logits have shares of exactly a quarter: before the third token there is exactly a half.
    assert filter_logits(torch.zeros(1, 4), top_p=0.5).isfinite().sum() == 3


def test_filters_by_hand():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]).log()
    left = [
        ({"top_k": 2}, [[0, 2], [0, 1, 2, 3]]),
        ({"top_k": 9}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"top_p": 0.01}, [[0], None]),
        ({"top_p": 0.6}, [[0, 2], None]),
        ({"top_p": 0.8}, [[0, 2, 3], None]),
        # The two that stay by rank have 4/7 and 3/7 of what is left.
        ({"top_k": 2, "top_p": 0.5}, [[0], None]),
    ]
    for settings, expected in left:
        for row, places in zip(filter_logits(logits, **settings).isfinite(), expected, strict=True):
            assert places is None or row.nonzero().flatten().tolist() == places, settings


def test_draws_are_as_frequent_as_probable_and_never_ruled_out():
    chances = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw_tokens(chances.log().expand(1000, -1), numbers)
    assert drawn.bincount(minlength=6).tolist() == [0, 200, 0, 500, 300, 0]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(chances.log().expand(2, -1), ends).tolist() == [1, 4]


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 3.0])
def test_samples_are_those_of_whole_forward_passes(cfg_scale):
    """Without cache, with the logits of both classes each time."""
    model = make(SMALL).double()
    settings = {"temperature": 1.3, "top_k": 6, "top_p": 0.8}
    got = model.sample(LABELS, cfg_scale=cfg_scale, seed=5, **settings)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    numbers = torch.stack([torch.rand(9, generator=seed, dtype=torch.float64) for seed in seeds])
    expected = torch.zeros(2, 9, dtype=torch.int64)
    for place in range(9):
        given, null = model(expected, LABELS)[:, place], model(expected, torch.tensor([3, 3]))[:, place]
        logits = filter_logits((null + cfg_scale * (given - null)) / 1.3, 6, 0.8)
        expected[:, place] = draw_tokens(logits, numbers[:, place])
    assert torch.equal(got, expected)


def test_a_seed_repeats_its_samples_and_leaves_the_model_as_it_was():
    model = make(SMALL).train()
    state = torch.get_rng_state()
    first = model.sample(LABELS, cfg_scale=2.0, seed=1)
    assert torch.equal(first, model.sample(LABELS, cfg_scale=2.0, seed=1))
    assert not torch.equal(first, model.sample(LABELS, cfg_scale=2.0, seed=2))
    assert first.shape == (2, 9) and first.dtype == torch.int64
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_holds_the_images_of_its_seeds_alone():
    model = make(SMALL).double()
    labels = torch.arange(64) % 4
    together = model.sample(labels, cfg_scale=2.0, seed=10)
    for image in (0, 1, 40, 63):
        assert torch.equal(model.sample(labels[image : image + 1], cfg_scale=2.0, seed=10 + image)[0], together[image])


def test_every_image_can_have_a_seed_of_its_own():
    model = make(SMALL).double()
    labels = torch.tensor([1, 1, 2])
    got = model.sample(labels, seed=[7, 7, 3])
    assert torch.equal(got[0], got[1]) and torch.equal(got[2:], model.sample(labels[2:], seed=3))
    with pytest.raises(ValueError, match="one per image, here 3; got 2"):
        model.sample(labels, seed=[1, 2])


def test_temperature_0_takes_the_most_probable_token():
    model = make(SMALL).double()
    assert torch.equal(model.sample(LABELS, temperature=0), model.sample(LABELS, top_k=1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cfg_scale": math.inf}, "cfg_scale must be a finite number; got inf"),
        ({"cfg_scale": 1e5}, r"cfg_scale must be 0 to 10,000; got 100000\.0\. Use 1\.0"),
        ({"cfg_scale": -1.0}, "cfg_scale must be 0 to 10,000; got -1"),
        ({"temperature": -0.5}, r"temperature must be 0 or finite and at least 0\.0001; got -0\.5\. Use 0"),
        ({"temperature": math.nan}, "temperature must be a finite number; got nan"),
        ({"temperature": 1e300}, "temperature must be 0 or"),
        ({"temperature": 1e-300}, r"temperature must be 0 or finite and at least 0\.0001; got 1e-300\. Use 0"),
        ({"temperature": (0, 1, 5)}, r"temperature must be one number, or two .* got 3: \(0, 1, 5\)"),
        ({"temperature": (1.1, 1.0)}, "temperature must be one number for this generator, whose tokens have one part"),
        ({"cfg_scale": 1e300}, "cfg_scale must be 0 to 10,000"),
        ({"cfg_interval": (0.0, 0.5, 1.0)}, r"two shares .* got \(0\.0, 0\.5, 1\.0\)"),
        ({"seed": [[1, 2]]}, "seed must be one number, or one per image"),
        ({"seed": 1.5}, "seed must be whole numbers"),
        ({"labels": "abc"}, "labels must be whole numbers in a tensor, an array, or lists"),
        ({"labels": [1, [2]]}, "labels must be whole numbers in a tensor, an array, or lists of equal length"),
        ({"top_k": -1}, r"top_k must be ≥ 0; got -1\. Use 0"),
        ({"top_p": 0.0}, r"top_p must lie above 0 to 1; got 0\.0\. Use 1\.0"),
        ({"top_p": 1.5}, "top_p must lie above 0 to 1"),
        ({"min_p": 1.5}, "min_p must lie in 0 to 1"),
        ({"cfg_schedule": "cos"}, "cfg_schedule must be one of"),
        ({"cfg_power": 0.0}, "cfg_power must be > 0"),
        ({"cfg_interval": (0.5, 0.5)}, r"0 ≤ first < last ≤ 1; got \(0\.5, 0\.5\)"),
        ({"cfg_interval": (-0.1, 0.5)}, "0 ≤ first < last ≤ 1"),
        ({"cfg_scale": (1.0, -1.0)}, "cfg_scale must be 0 to"),
        ({"tempreature": 1.0}, "did you mean 'temperature'"),
        ({"prompt": torch.zeros(2, 9, dtype=torch.int64)}, "with 1 to 8 tokens given"),
        ({"prompt": torch.full((2, 3), 12)}, "indices must lie in 0 to 11; got 12 to 12"),
        ({"labels": torch.tensor([4])}, "labels must lie in 0 to 3; got 4 to 4; 3 is the null class"),
        ({"labels": torch.tensor([[1]])}, r"labels must be \(B,\).* got \(1, 1\)\. Use labels\.flatten"),
        ({"labels": torch.tensor([0.5])}, r"labels must be whole numbers; got torch\.float32"),
    ],
)
def test_settings_with_which_nothing_can_be_drawn_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        make(SMALL).sample(**{"labels": LABELS, **settings})


@pytest.mark.parametrize("kind", ["list", "array", "uint8"])
def test_labels_prompts_and_seeds_are_taken_as_people_have_them(kind):
    model, prompt = make(SMALL), tokens(12)[:, :3]
    expected = model.sample(LABELS, prompt=prompt, seed=[4, 9])
    convert = {
        "list": torch.Tensor.tolist,
        "array": lambda values: values.numpy().astype(">i2"),
        "uint8": lambda values: values.to(torch.uint8),
    }[kind]
    got = model.sample(convert(LABELS), prompt=convert(prompt), seed=convert(torch.tensor([4, 9])))
    assert torch.equal(got, expected)
    assert torch.equal(model.sample(LABELS, seed=np.int64(3)), model.sample(LABELS, seed=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_temperatures_in_half_precision_take_the_most_probable_token(dtype):
    logits = torch.tensor([[1.0, 60.0, -60.0, 59.0]], dtype=dtype)
    config = SamplingConfig(temperature=1e-4)
    assert choose_tokens(logits, torch.tensor([0.999], dtype=torch.float64), config).tolist() == [1]


# --- schedules, prompts, ways to compute ---


def test_schedules_by_hand():
    def scales(**settings):
        config = SamplingConfig(cfg_scale=3.0, **settings)
        return [config.scale_at(position, 5) for position in range(5)]

    assert scales() == [3.0] * 5
    assert scales(cfg_schedule="linear") == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    cosine = [1 + (1 - math.cos(math.pi * u / 4)) for u in range(5)]
    assert scales(cfg_schedule="cosine") == pytest.approx(cosine)
    assert scales(cfg_schedule="power", cfg_power=2.0) == pytest.approx([1 + 2 * (u / 4) ** 2 for u in range(5)])
    assert scales(cfg_interval=(0.2, 0.6)) == [1.0, 3.0, 3.0, 1.0, 1.0]
    pair = SamplingConfig(cfg_scale=(1.5, 2.0), temperature=(1.1, 0.9))
    assert [pair.scale_at(0, 5, part) for part in (0, 1)] == [1.5, 2.0]
    assert [pair.temperature_of(part) for part in (0, 1)] == [1.1, 0.9]
    assert SamplingConfig(cfg_scale=2.0, cfg_schedule="linear").scale_at(0, 1) == 1.0


def test_min_p_by_hand():
    logits = torch.tensor([[0.5, 0.26, 0.24]]).log()
    for min_p, left in ((0.0, [0, 1, 2]), (0.5, [0, 1]), (0.6, [0]), (1.0, [0])):
        assert filter_logits(logits, min_p=min_p).isfinite()[0].nonzero().flatten().tolist() == left


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7), (0.6, 1.0)])
def test_scheduled_samples_are_those_of_whole_forward_passes(config, interval):
    model = make(config).double()
    settings = {"cfg_schedule": "linear", "cfg_interval": interval, "temperature": 0.9, "min_p": 0.05}
    got = model.sample(LABELS, cfg_scale=4.0, seed=3, **settings)
    sampling, parts = SamplingConfig(cfg_scale=4.0, **settings), 1 if config is not SMALL_FACTORIZED else 2
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    numbers = torch.stack([torch.rand(9 * parts, generator=seed, dtype=torch.float64) for seed in seeds])
    expected = torch.zeros(2, 9, dtype=torch.int64)
    for place in range(9):
        drawn = [torch.zeros(2, dtype=torch.int64)] * parts
        for part in range(parts):
            expected[:, place] = drawn[0] if parts == 1 else join_indices(drawn, model.config.bits)
            given, null = (model(expected, labels) for labels in (LABELS, torch.tensor([3, 3])))
            given, null = (logits if parts == 1 else logits[part] for logits in (given, null))
            logits = guide(given[:, place], null[:, place], sampling.scale_at(place, 9, part)) / 0.9
            drawn[part] = draw_tokens(filter_logits(logits, min_p=0.05), numbers[:, place * parts + part])
        expected[:, place] = drawn[0] if parts == 1 else join_indices(drawn, model.config.bits)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_cached_decoding_of_two_parts_is_the_forward_pass():
    model, indices = make(SMALL_FACTORIZED).double(), tokens(32)
    logits, decoding = model(indices, LABELS), FactorizedDecoding(model, LABELS)
    previous = None
    for place in range(9):
        decoding.advance(previous)
        previous = indices[:, place]
        first = previous % 4
        assert torch.allclose(decoding.logits(), logits.pre[:, place], rtol=1e-12, atol=1e-12)
        assert torch.allclose(decoding.logits([first]), logits.post[:, place], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_cached_and_uncached_logits_agree_in_float32():
    model, indices = make(SMALL), tokens(12)
    assert (decode(model, indices, LABELS) - model(indices, LABELS)).abs().max() < 1e-5


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}, {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.3)}])
def test_going_on_from_its_own_first_rows_gives_the_same_image(config, settings):
    model = make(config).double()
    whole = model.sample(LABELS, seed=4, **settings)
    for given in (1, 3, 8):
        again = model.sample(LABELS, seed=4, prompt=whole[:, :given], **settings)
        assert torch.equal(again, whole)
    other = whole[:, :3].flip(1)
    assert torch.equal(model.sample(LABELS, seed=4, prompt=other, **settings)[:, :3], other)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, [2] * 9),
        ({"cfg_scale": 2.0}, [4] * 9),
        ({"cfg_scale": 2.0, "cfg_interval": (0.0, 0.5)}, [4] * 5 + [2] * 4),
        ({"cfg_scale": 2.0, "cfg_interval": (0.5, 1.0)}, [4] * 9),
        ({"cfg_scale": 1.0, "cfg_schedule": "linear"}, [2] * 9),
    ],
)
def test_the_null_class_is_computed_only_as_long_as_it_is_needed(settings, rows):
    model, seen = make(SMALL), []
    model.blocks[0].feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.sample(LABELS, **settings)
    assert seen == rows


def test_the_class_is_worked_out_once_per_image():
    model, calls = make(SMALL), []
    model.blocks[0].ada_lin.register_forward_pre_hook(lambda *_: calls.append(1))
    model.sample(LABELS, cfg_scale=2.0)
    assert len(calls) == 1


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
def test_a_compiled_step_draws_the_same_tokens(config, monkeypatch):
    compile_it = torch.compile
    # The C++ behind it is torch's; what could differ is the traced graph with its fixed caches and masks.
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_it(function, backend="aot_eager", fullgraph=True)
    )
    model = make(config).double()
    settings = {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.7), "seed": 6}
    assert torch.equal(model.sample(LABELS, compiled=True, **settings), model.sample(LABELS, **settings))


def test_progress_is_shown_on_request(capfd):
    make(SMALL).sample(LABELS, progress=True)
    assert "sampling" in capfd.readouterr().err
    make(SMALL).sample(LABELS)
    assert capfd.readouterr().err == ""


def test_labels_without_numbers_are_refused():
    with pytest.raises(ValueError, match="labels must have their numbers in memory; got a tensor on meta"):
        make(SMALL).sample(torch.zeros(2, dtype=torch.int64, device="meta"))


# --- scores that are no numbers ---


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_nothing_is_drawn_from_scores_that_are_no_numbers(score):
    logits = torch.zeros(3, 5)
    logits[1, 2] = score
    with pytest.raises(ValueError, match=r"NaN .* for 1 of 3 images"):
        draw_tokens(logits, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_generator_whose_weights_are_broken_says_so(temperature):
    model = make(SMALL)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"the generator's scores are NaN \(not a number\) or infinite for \d of"):
        model.sample(LABELS, temperature=temperature)
