"""The recorder against hand-made index streams and brute force over plain Python lists."""

import math
import random
import statistics

import pytest
import torch

from ibqlab.diagnostics.geometry import gradient_reach
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.quantizers import build_quantizer
from ibqlab.quantizers.composite import Parts

CODES, DIM = 10, 4


def quantizer_of(name="vq", **settings):
    torch.manual_seed(3)
    return build_quantizer(name, **{"codebook_size": CODES, "code_dim": DIM, "codebook_init": "normal", **settings})


def features_of(tokens):
    """(N, D) tokens as an image of one row."""
    return tokens.T.reshape(1, DIM, 1, -1)


def report_after(stream, window, processes=1):
    """The recorder's numbers after some batches of indices, step after step."""
    recorder = Recorder(quantizer_of(), window, 8, processes)
    for step, batch in enumerate(stream, start=1):
        recorder.observe(torch.tensor(batch), step)
    return recorder, recorder.report(torch.randn(1, DIM, 2, 3), len(stream))


def random_stream(seed, steps, largest):
    """Batches of different lengths that leave some codes out, the more the later."""
    draw = random.Random(seed)
    return [[draw.randrange(max(2, CODES - step)) for _ in range(draw.randint(1, largest))] for step in range(steps)]


@pytest.mark.parametrize("window", [1, 7, 16, 1000])
@pytest.mark.parametrize(("steps", "largest"), [(1, 3), (9, 6), (5, 40)])
def test_window_numbers_equal_brute_force(window, steps, largest):
    stream = random_stream(window * steps, steps, largest)
    recorder, row = report_after(stream, window)
    kept = [code for batch in stream for code in batch][-window:]
    shares = [kept.count(code) / len(kept) for code in set(kept)]
    hits = [max((s for s, batch in enumerate(stream, start=1) if code in batch), default=-1) for code in range(CODES)]
    assert recorder.counts().tolist() == [kept.count(code) for code in range(CODES)]
    assert recorder.last_hits().tolist() == hits
    assert row["usage_tokens"] == len(kept)
    assert row["usage"] == len(set(kept)) / CODES
    assert row["dead_codes"] == CODES - len(set(kept))
    assert row["perplexity"] == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert row["steps_since_hit"] == statistics.median_low([steps - max(hit, 0) for hit in hits])


def test_hand_made_stream():
    recorder, row = report_after([[0, 0, 1], [2, 2], [3]], window=4)
    assert recorder.counts().tolist() == [0, 1, 2, 1, 0, 0, 0, 0, 0, 0]
    assert recorder.last_hits().tolist() == [1, 1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert (row["usage"], row["dead_codes"], row["usage_tokens"]) == (0.3, 7, 4)
    assert row["steps_since_hit"] == 3  # six of ten codes were never hit


@pytest.mark.parametrize("parts", [1, 3])
def test_a_steps_own_usage_remembers_nothing(parts):
    """A collapse between two steps shows in the next row, while the window still holds what was before."""
    recorder = Recorder(quantizer_of(), window_tokens=1000, probe_tokens=8)
    shares = []
    for step, codes in enumerate([range(10), range(10), [4, 4, 4, 4, 4, 4]], start=1):
        for part in torch.tensor(list(codes)).chunk(parts):
            recorder.observe(part, step)
        row = recorder.report(torch.randn(1, DIM, 2, 3), step)
        shares.append((row["step_usage"], row["step_tokens"], row["usage"]))
    assert shares == [(1.0, 10, 1.0), (1.0, 10, 1.0), (pytest.approx(0.1), 6, 1.0)]


def test_a_steps_usage_stands_beside_that_of_even_use():
    recorder, row = report_after([[3] * 7, list(range(6))], window=100)
    assert row["step_usage_even"] == pytest.approx(1 - 0.9**6)
    draws = torch.randint(CODES, (4000, 6), generator=torch.Generator().manual_seed(0))
    drawn = statistics.mean(len(set(draw.tolist())) / CODES for draw in draws)
    assert row["step_usage_even"] == pytest.approx(drawn, abs=0.005)
    later = recorder.report(torch.randn(1, DIM, 2, 3), 3)  # nothing was observed in that step
    assert (later["step_usage"], later["step_tokens"], later["step_usage_even"]) == (0, 0, 0)


def test_a_row_is_of_one_forward_pass():
    """Norms and the softmax's spread are of the codes that the step's tokens met, not of those it left behind."""
    quantizer = quantizer_of("ibq")
    recorder = Recorder(quantizer, 100, 8)
    tokens = torch.randn(6, DIM, generator=torch.Generator().manual_seed(2))
    recorder.before_step()
    before = Recorder(quantizer, 100, 8).report(features_of(tokens), 1)
    with torch.no_grad():
        quantizer.codes.weight *= 3  # the optimiser's step
    row = recorder.report(features_of(tokens), 1)
    for name in ("code_norm_mean", "softmax_perplexity", "feature_to_code_distance"):
        assert row[name] == before[name]
    assert recorder.report(features_of(tokens), 2)["code_norm_mean"] == pytest.approx(3 * before["code_norm_mean"])


def test_indices_of_any_shape_are_taken_in():
    recorder = Recorder(quantizer_of(), 100, 8)
    recorder.observe(torch.arange(8).reshape(2, 2, 2), 1)
    assert recorder.counts().tolist() == [1] * 8 + [0, 0]


def test_before_anything_was_seen():
    row = Recorder(quantizer_of(), 100, 8).report(torch.randn(1, DIM, 2, 3), 0)
    assert (row["usage"], row["usage_tokens"], row["dead_codes"], row["gradient_reach"]) == (0, 0, CODES, 0)
    assert math.isnan(row["perplexity"])


@pytest.mark.parametrize("window", [6, 12, 18, 600])
def test_two_recorders_that_share_a_stream_are_one(window):
    draw = random.Random(5)
    stream = [[draw.randrange(CODES - step) for _ in range(6)] for step in range(8)]
    whole, _ = report_after(stream, window)
    left, right = (report_after([batch[part] for batch in stream], window, 2)[0] for part in (slice(3), slice(3, 6)))
    assert torch.equal(left.counts() + right.counts(), whole.counts())
    assert torch.equal(left.last_hit.maximum(right.last_hit), whole.last_hit)


def test_a_window_that_processes_do_not_divide_is_rounded_up():
    assert [len(Recorder(quantizer_of(), 13, 8, processes).window) for processes in (1, 2, 4)] == [13, 7, 4]


def test_state_goes_round():
    stream = random_stream(11, 12, 5)
    whole, _ = report_after(stream, 16)
    first, _ = report_after(stream[:7], 16)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in first.state_dict().items()}
    second = Recorder(quantizer_of(), 16, 8)
    second.load_state_dict(state)
    for step, batch in enumerate(stream[7:], start=8):
        second.observe(torch.tensor(batch), step)
    assert torch.equal(second.window, whole.window)
    assert torch.equal(second.last_hit, whole.last_hit)
    assert second.cursor == whole.cursor


@pytest.mark.parametrize("chosen", [[4], [0, 3, 9], list(range(CODES))])
def test_vq_reaches_the_codes_its_tokens_chose(chosen):
    quantizer = quantizer_of()
    recorder = Recorder(quantizer, 100, 8)
    # One token at the same distance from each chosen code: gradients of equal length.
    tokens = quantizer.codebook.detach()[chosen] + 0.01
    recorder.before_step()
    out = quantizer(features_of(tokens))
    assert out.indices.flatten().tolist() == chosen
    out.loss.backward()
    recorder.observe(out.indices, 1)
    row = recorder.report(features_of(tokens), 1)
    assert row["gradient_reach"] == pytest.approx(len(chosen) / CODES)


def test_moving_averages_reach_the_codes_that_move():
    quantizer = quantizer_of("vq_ema")
    recorder = Recorder(quantizer, 100, 8)
    tokens = quantizer.codebook[[1, 2, 7]] + torch.tensor([[0.1], [0.05], [1e-6]])
    before = quantizer.codebook.clone()
    recorder.before_step()
    assert quantizer(features_of(tokens)).indices.flatten().tolist() == [1, 2, 7]
    moved = (quantizer.codebook - before).norm(dim=1)
    row = recorder.report(features_of(tokens), 1)
    assert row["gradient_reach"] == pytest.approx(float((moved > 1e-3 * moved.max()).float().mean())) == 0.2
    assert recorder.report(features_of(tokens), 1)["gradient_reach"] == 0  # nothing was kept to compare with


def test_index_backpropagation_reaches_more_than_it_chose():
    quantizer = quantizer_of("ibq", entropy_weight=0.0)
    tokens = 0.1 * torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    out = quantizer(features_of(tokens))
    (out.loss + out.quantized.square().sum()).backward()
    row = Recorder(quantizer, 100, 8).report(features_of(tokens), 1)
    norms = quantizer.codebook.grad.norm(dim=1)
    assert row["gradient_reach"] == pytest.approx(float((norms > 1e-3 * norms.max()).float().mean()))
    assert row["gradient_reach"] > len(out.indices.unique()) / CODES


def test_norms_and_distances_are_those_of_codes_and_probe_tokens():
    quantizer = quantizer_of()
    codes = quantizer.codebook.detach()
    tokens = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1))
    row = Recorder(quantizer, 100, 6).report(features_of(tokens), 1)
    gaps = torch.cdist(codes, tokens)
    assert row["code_norm_mean"] == pytest.approx(float(codes.norm(dim=1).mean()), rel=1e-5)
    assert row["feature_norm_std"] == pytest.approx(float(tokens.norm(dim=1).std(correction=0)), rel=1e-5)
    assert row["feature_to_code_distance"] == pytest.approx(float(gaps.amin(0).mean()), rel=1e-5)
    assert row["code_to_feature_distance"] == pytest.approx(float(gaps.amin(1).mean()), rel=1e-5)
    fewer = Recorder(quantizer, 100, 2).report(features_of(tokens), 1)
    assert fewer["feature_norm_mean"] == pytest.approx(float(tokens[[0, 3]].norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["residual", "grouped", "multi_scale"])
def test_a_composite_is_measured_part_by_part_and_its_combinations_are_never_made(name, monkeypatch):
    torch.manual_seed(0)
    inner = {"name": "vq", "codebook_size": 8, "code_dim": 4, "codebook_init": "normal"}
    quantizer = build_quantizer(name, inner=inner, shared=False)
    monkeypatch.setattr(Parts, "forward", None)
    monkeypatch.setattr(Parts, "joined_gradient", None)
    features = torch.randn(2, quantizer.config.code_dim, 4, 4, requires_grad=True)
    recorder = Recorder(quantizer, window_tokens=640, probe_tokens=16)
    recorder.before_step()
    out = quantizer(features)
    (out.loss + out.quantized.square().sum()).backward()
    with torch.no_grad():
        for part in quantizer.parts:
            part.codes.weight.add_(0.5)
    recorder.observe(out.indices, 1)
    row = recorder.report(features, 1)
    assert row["code_drift"] == pytest.approx(0.5 * 4**0.5) and row["dead_codes"] > 0
    assert len(recorder.counts()) == 8**2
    reached = [gradient_reach(part.codebook_gradient) for part in quantizer.parts]
    assert 0 < row["gradient_reach"] == pytest.approx(statistics.mean(reached))
    codes = [part.codebook.detach() - 0.5 for part in quantizer.parts]
    norms = [float(one.norm(dim=1).mean()) for one in codes]
    assert row["code_norm_mean"] == pytest.approx(statistics.mean(norms), rel=1e-5)
    nearest = []
    for one, tokens in zip(codes, quantizer.part_features(features[:1].detach()), strict=True):
        nearest.append(float(torch.cdist(tokens, one).min(1).values.mean()))
    assert row["feature_to_code_distance"] == pytest.approx(statistics.mean(nearest), rel=1e-4)
    error = (features - quantizer.decode(out.indices))[:, :, :, ::2].square().mean()  # every second token
    assert row["quantization_error"] == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["residual", "grouped", "multi_scale"])
def test_parts_are_measured_by_the_features_that_they_quantize(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(
        name, inner={"name": "vq", "codebook_size": 8, "code_dim": 4, "codebook_init": "normal"}
    )
    features, seen = torch.randn(2, quantizer.config.code_dim, 4, 4), []
    for part in quantizer.codes.parts:
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    quantizer(features)
    for tokens, grid in zip(quantizer.part_features(features), seen, strict=True):
        torch.testing.assert_close(tokens, grid.permute(0, 2, 3, 1).flatten(0, 2))
