"""Tokens from the generator: cached decoding, guidance, filters and draws, against the published ones and by hand."""

import math

import pytest
import torch
from golden import golden
from test_transformer import LABELS, SMALL, assert_close, make, published_generator, tokens

from ibqlab.generator.sampling import draw_tokens, filter_logits, guide
from ibqlab.generator.transformer import Decoding


def decode(model, indices, labels):
    """Logits of all positions, one after another."""
    decoding = Decoding(model, labels)
    steps = [None, *indices.T[:-1]]
    return torch.stack([decoding.next_logits(step) for step in steps], dim=1)


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
        decoding.next_logits(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="an image has 9 tokens"):
        decoding.next_logits(torch.tensor([1, 2]))


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


def test_temperature_0_takes_the_most_probable_token():
    model = make(SMALL).double()
    assert torch.equal(model.sample(LABELS, temperature=0), model.sample(LABELS, top_k=1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cfg_scale": math.inf}, r"cfg_scale must be ≥ 0 and finite; got inf\. Use 1\.0"),
        ({"cfg_scale": -1.0}, "cfg_scale must be ≥ 0"),
        ({"temperature": -0.5}, r"temperature must be ≥ 0 and finite; got -0\.5\. Use 0"),
        ({"temperature": math.nan}, "temperature must be ≥ 0"),
        ({"top_k": -1}, r"top_k must be ≥ 0; got -1\. Use 0"),
        ({"top_p": 0.0}, r"top_p must lie above 0 to 1; got 0\.0\. Use 1\.0"),
        ({"top_p": 1.5}, "top_p must lie above 0 to 1"),
        ({"labels": torch.tensor([4])}, "labels must lie in 0 to 3; got 4 to 4; 3 is the null class"),
        ({"labels": torch.tensor([[1]])}, r"labels must be \(B,\).* got \(1, 1\)\. Use labels\.flatten"),
        ({"labels": torch.tensor([0.5])}, r"labels must be whole numbers; got torch\.float32"),
    ],
)
def test_settings_with_which_nothing_can_be_drawn_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        make(SMALL).sample(**{"labels": LABELS, **settings})
