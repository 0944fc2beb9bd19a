"""Every definition of usage on hand-made streams, whose answers can be counted by eye."""

import math

import numpy as np
import pytest
import torch

from ibqlab.diagnostics import (
    USAGE_DEFINITIONS,
    Usage,
    count_indices,
    gradient_reach,
    measure_usage,
    measure_usage_of_counts,
    perplexity,
)


def test_count_indices_counts_any_shape_and_integer_type():
    for dtype in (torch.int64, torch.int32, torch.int16):
        counts = count_indices(torch.tensor([[[0, 3], [3, 1]]], dtype=dtype), 5)
        assert counts.tolist() == [1, 1, 0, 2, 0]
        assert counts.dtype == torch.int64
    assert count_indices(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("stream", [[0, 4], [-1, 2]])
def test_count_indices_refuses_what_is_no_code(stream):
    with pytest.raises(ValueError, match=r"must lie in 0 to 3 .*got -?\d to \d"):
        count_indices(torch.tensor(stream), 4)


def test_any_hit_counts_codes_in_all_tokens():
    usage = measure_usage(torch.tensor([0, 0, 5, 7]), 8)
    assert (usage.value, usage.tokens, usage.definition) == (3 / 8, 4, "any_hit")


def test_one_batch_looks_at_the_first_batch_only():
    stream = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])  # two images of two tokens per batch
    usage = measure_usage(stream, 8, "one_batch", tokens_per_image=2, images_per_batch=2)
    assert (usage.value, usage.tokens) == (2 / 8, 4)


def test_images_256_averages_full_groups_and_leaves_the_rest():
    first = torch.zeros(512, dtype=torch.int64)  # 256 images of 2 tokens: one code
    second = torch.arange(512) % 3  # three codes
    rest = torch.full((10,), 7)
    usage = measure_usage(torch.cat([first, second, rest]), 8, "images_256", tokens_per_image=2)
    assert (usage.value, usage.tokens) == ((1 + 3) / 2 / 8, 512)


def test_window_looks_at_the_last_65536_tokens():
    stream = torch.cat([torch.full((100,), 9), torch.arange(65_536) % 4])
    usage = measure_usage(stream, 10, "window_65536")
    assert (usage.value, usage.tokens, usage.cap) == (0.4, 65_536, 1.0)


def test_window_cannot_exceed_a_quarter_of_262144_codes():
    usage = measure_usage(torch.arange(65_536), 262_144, "window_65536")
    assert usage.value == usage.cap == 0.25
    assert "cannot exceed 25.0 %" in str(usage)


def test_above_uniform_needs_eight_percent_of_the_even_share():
    # 1,000 tokens, 10 codes: uniform 100, threshold 8; those with 892, 51 and 8 hits pass.
    counts = torch.tensor([892, 8, 7, 7, 7, 7, 7, 7, 7, 51])
    indices = torch.repeat_interleave(torch.arange(10), counts)
    assert measure_usage(indices, 10, "above_uniform_8pct").value == 3 / 10
    assert measure_usage(indices, 10, "any_hit").value == 1.0
    assert measure_usage_of_counts(counts.numpy(), "above_uniform_8pct").value == 3 / 10


def test_above_uniform_never_counts_a_code_without_hits():
    assert measure_usage_of_counts(torch.tensor([1, 0, 0, 0]), "above_uniform_8pct").value == 0.25
    assert measure_usage_of_counts(torch.zeros(4, dtype=torch.int64), "above_uniform_8pct").value == 0.0


def test_one_stream_reads_differently_under_every_definition():
    stream = torch.cat([torch.zeros(70_000, dtype=torch.int64), torch.arange(2000)])
    settings = {"tokens_per_image": 4, "images_per_batch": 8}
    values = {name: measure_usage(stream, 4000, name, **settings).value for name in USAGE_DEFINITIONS}
    assert values["any_hit"] == 0.5
    assert values["one_batch"] == 1 / 4000  # the first 32 tokens are one code
    # 70 full groups of 1,024 tokens: 68 of one code, one with 656 more than the zeros, one with 1,024.
    assert values["images_256"] == pytest.approx((68 + 656 + 1024) / 70 / 4000)
    assert values["window_65536"] == 0.5
    assert values["above_uniform_8pct"] == 1 / 4000  # 1.44 hits needed, the others have one


def test_usage_says_how_many_tokens_and_whether_they_are_enough():
    enough = Usage(value=0.7314, tokens=10_240, codebook_size=1024, definition="any_hit")
    assert str(enough) == "73.1 % of 1,024 codes in 10,240 tokens"
    assert enough.enough_tokens
    few = Usage(value=0.7314, tokens=10_239, codebook_size=1024, definition="any_hit")
    assert not few.enough_tokens
    assert "too few tokens: at least 10·K = 10,240" in str(few)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"definition": "lively"}, "must be one of 'any_hit'.*got 'lively'"),
        ({"definition": "one_batch", "tokens_per_image": 2}, "needs images_per_batch"),
        ({"definition": "images_256"}, "needs tokens_per_image"),
        ({"definition": "images_256", "tokens_per_image": 1}, "counts 256 tokens; got 4"),
        ({"definition": "window_65536"}, "counts 65,536 tokens; got 4"),
    ],
)
def test_measure_usage_says_what_is_missing(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_usage(torch.tensor([0, 1, 2, 3]), 8, **arguments)


def test_counts_refuse_definitions_that_need_the_order():
    with pytest.raises(ValueError, match="needs the tokens in order"):
        measure_usage_of_counts(torch.tensor([1, 2]), "window_65536")
    with pytest.raises(ValueError, match="whole number ≥ 0"):
        measure_usage_of_counts(torch.tensor([1, -2]))


def test_perplexity_of_known_distributions():
    assert perplexity(torch.full((64,), 5)) == pytest.approx(64)
    assert perplexity(np.array([0, 9, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([2, 1, 1])) == pytest.approx(2**1.5)
    assert math.isnan(perplexity(torch.zeros(4, dtype=torch.int64)))


def test_masks_are_neither_counts_nor_indices():
    mask = torch.tensor([True, False])
    message = r"no mask of codes|must be whole numbers|[Tt]ype-check error"
    for call in (lambda: perplexity(mask), lambda: measure_usage_of_counts(mask), lambda: count_indices(mask, 2)):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_gradient_reach_counts_codes_above_a_thousandth_of_the_largest():
    gradient = torch.zeros(8, 3)
    gradient[0, 0] = 10
    gradient[1, 1] = -0.02
    gradient[2, 2] = 0.009  # below 10⁻³ of 10
    assert gradient_reach(gradient) == 2 / 8
    assert gradient_reach(gradient, threshold=1e-4) == 3 / 8
    assert gradient_reach(gradient.to(torch.bfloat16)) == 2 / 8


def test_gradient_reach_does_not_depend_on_the_scale():
    gradient = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 50)[:, None]
    expected = gradient_reach(gradient)
    assert 0.3 < expected < 0.7
    for scale in (1e-25, 1e25):
        assert gradient_reach(gradient * scale) == expected


def test_gradient_reach_without_a_usable_gradient():
    assert gradient_reach(None) == 0.0
    assert gradient_reach(torch.zeros(4, 2)) == 0.0
    assert math.isnan(gradient_reach(torch.tensor([[1.0], [math.nan]])))
    assert math.isnan(gradient_reach(torch.tensor([[1.0], [math.inf]])))
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        gradient_reach(torch.ones(2, 2), threshold=1.0)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, ">i4", np.uint64])
def test_indices_and_counts_of_any_integer_type(kind):
    indices, counts = np.array([[0, 1], [1, 3]], kind), np.array([1, 2, 0, 1], kind)
    assert count_indices(indices, 4).tolist() == [1, 2, 0, 1]
    assert measure_usage(indices, 4).value == measure_usage_of_counts(counts).value == 0.75
    assert perplexity(counts) == perplexity(torch.tensor([1, 2, 0, 1]))


def test_indices_and_counts_in_lists():
    assert count_indices([[0, 1], [1, 3]], 4).tolist() == [1, 2, 0, 1]
    assert measure_usage([torch.tensor([0, 1]), torch.tensor([1, 3])], 4).value == 0.75
    assert perplexity([1, 1]) == pytest.approx(2)
    with pytest.raises(ValueError, match="indices must be whole numbers"):
        measure_usage([[0, 1], [1]], 4)
