"""Recorded sampling: its kernels, its memory that never moves, and the tokens of the plain loop whatever the batch.

A CUDA graph plays the same operations on the same memory again. `Playback` does that here, on the CPU.
"""

import copy
import gc
import pickle
import sys
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_transformer import LABELS, SMALL, SMALL_FACTORIZED, SMALL_LLAMAGEN, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibqlab.generator import kept_samplers, recording, sampler, sampler_operations
from ibqlab.generator.kept_samplers import SamplerMemoryError, forget_sampler
from ibqlab.generator.sampler import LANES, Request, Sampler
from ibqlab.generator.sampler_operations import Drawing, DrawingForm
from ibqlab.generator.sampling_config import SamplingConfig
from ibqlab.generator.sampling_dtype import sampling_dtype
from ibqlab.generator.token_choice import first_beyond, tokens_at, uniform_numbers

# Scores that are no numbers, in Triton's interpreter, which computes with NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")
CONFIGS = pytest.mark.parametrize(
    "config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"]
)
SETTINGS = [
    {},
    {"cfg_scale": 2.0},
    {"cfg_scale": 3.0, "cfg_schedule": "linear", "cfg_interval": (0.3, 0.7)},
    {"temperature": 0, "cfg_scale": 2.0},
    {"top_k": 3, "temperature": 0.8},
    {"top_p": 0.6, "cfg_scale": 1.5},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.01, "cfg_scale": 2.0},
]
SHORT_GUIDANCE = {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.4)}
PAIRS = {"cfg_scale": (1.5, 2.5), "temperature": (0.0, 0.9)}
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "masked_select", "_unique", "equal")
"""Operations for whose result the host waits."""


class Playback(TorchDispatchMode):
    """A step's operations, played again on the memory that they had when they were recorded, as a CUDA graph does."""

    def __init__(self, step, device, before):
        super().__init__()
        self.calls, self.played = [], 0
        before()
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self):
        self.played += 1
        for func, args, kwargs, result in self.calls:
            for memory, value in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and results in place are the same memory already.
                if isinstance(memory, torch.Tensor) and memory.data_ptr() != value.data_ptr():
                    memory.copy_(value)


def make_request(model, labels, *, prompt=None, seed=0, **settings):
    shape = len(labels), model.config.num_tokens, model.network.parts
    numbers = uniform_numbers(shape[0], shape[1] * shape[2], seed).view(shape)
    return Request(SamplingConfig(**settings), torch.as_tensor(labels), prompt, numbers, shape[1])


def draw(model, labels, *, dtype=torch.float64, lanes=4, recorder=Playback, **settings):
    request = make_request(model, labels, **settings)
    made = Sampler(model, dtype, lanes, is_guided=request.guided_positions() > 0)
    return made.draw(model, request, recorder)


@pytest.fixture
def kernels(monkeypatch):
    """Steps are made of kernels, which Triton's interpreter runs."""
    pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here: test_gpu.py has the same")
    from ibqlab.generator import sampler_kernels  # noqa: PLC0415 - it imports Triton

    monkeypatch.setattr(sampler, "operations_for", lambda device, dtype: sampler_kernels)
    return sampler_kernels


def drawn(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def some_drawing(lanes, *, positions=5, parts=1, position=0, active=None, prompt_length=0):
    whole = [torch.tensor([number]) for number in (position, prompt_length, lanes if active is None else active)]
    shape = lanes, positions, parts
    return Drawing(
        *whole,
        tokens=torch.zeros(shape[:2], dtype=torch.int64),
        numbers=torch.rand(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64),
        scales=1 + torch.arange(positions * parts, dtype=torch.float32).view(positions, parts),
        temperatures=0.7 + torch.arange(parts, dtype=torch.float32),
        top_p=torch.tensor([0.9]),
        log_min_p=torch.tensor([-2.0]),
        broken=torch.zeros(lanes, dtype=torch.uint8),
    )


# --- kernels, in Triton's interpreter ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has", [("update", "gate", "scale"), ("scale",), ("update",), ()])
def test_a_residual_and_its_norm_are_the_same_as_a_kernel(kernels, dtype, has):
    x, weight = drawn((3, 20), seed=1), drawn((20,), dtype, 2)
    update, gate, scale, shift = (drawn((3, 20), dtype, seed) for seed in (3, 4, 5, 6))
    given = (x, update if "update" in has else None, gate if "gate" in has else None)
    modulation = {"scale": scale, "shift": shift} if "scale" in has else {}
    expected = sampler_operations.add_and_normalise(*given, weight=weight, **modulation)
    got = kernels.add_and_normalise(x.clone(), *given[1:], weight=weight, **modulation)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 1, 16, 17, 39])
def test_attention_is_the_same_as_a_kernel_that_reads_what_is_filled(kernels, monkeypatch, dtype, position):
    monkeypatch.setattr(kernels, "TILE_BYTES", 1)  # tiles of 16 positions: none, one, or several of them
    rows, heads, positions, channels = 4, 2, 40, 12
    qkv, table = drawn((rows, 3 * heads * channels), dtype), drawn((positions, channels // 2, 2))
    cache = [drawn((rows, heads, positions, channels), dtype, seed) for seed in (1, 2)]
    place = torch.tensor([position])
    expected_cache = [values.clone() for values in cache]
    expected = sampler_operations.attend(qkv, expected_cache, table, place, some_drawing(2))
    for values in cache:
        values[:, :, position:] = torch.nan
    idle = [values[1].clone() for values in cache]
    # Two lanes under guidance, of which the second has no image.
    got = kernels.attend(qkv, cache, table, place, some_drawing(2, active=1))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row in (0, 2):
        assert_near(got[row], expected[row], tolerance)
        for values, theirs in zip(cache, expected_cache, strict=True):
            # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
            assert_near(values[row, :, : position + 1], theirs[row, :, : position + 1], tolerance)
    assert got[1].eq(0).all() and got[3].eq(0).all()
    assert all(torch.equal(values[1].isnan(), before.isnan()) for values, before in zip(cache, idle, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_hidden_layer_is_the_same_as_a_kernel(kernels, dtype):
    both = drawn((3, 2 * 1100), dtype)
    expected = sampler_operations.gate_hidden(both)
    torch.testing.assert_close(
        kernels.gate_hidden(both), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("vocabulary", [7, 128, 5000])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_tokens_are_chosen_alike_by_a_kernel(kernels, vocabulary, guided, greedy, part):
    lanes = 5
    scores = 3 * drawn((lanes * (1 + guided), vocabulary))
    form = DrawingForm((greedy, greedy), 0, False, False)
    drawings = [some_drawing(lanes, parts=2, position=3) for _ in range(2)]
    expected = sampler_operations.choose(scores, drawings[0], form, part)
    assert torch.equal(kernels.choose(scores, drawings[1], form, part), expected)
    assert not drawings[1].broken.any()


@pytest.mark.parametrize("score", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("as_kernel", [False, True])
def test_scores_that_are_no_numbers_are_noted_behind_the_prompt(kernels, score, as_kernel):
    operations = kernels if as_kernel else sampler_operations
    scores = drawn((3, 40))
    scores[1] = score
    form = DrawingForm((False,), 0, False, False)
    for prompt_length, expected in ((0, [0, 1, 0]), (2, [0, 1, 0]), (3, [0, 0, 0])):
        drawing = some_drawing(3, position=2, prompt_length=prompt_length)
        token = operations.choose(scores, drawing, form, 0)
        assert drawing.broken.tolist() == expected
        assert ((token >= 0) & (token < 40)).all()


def test_filters_leave_the_kernel_to_the_operations(kernels):
    scores, form = drawn((4, 40)), DrawingForm((False,), 3, True, True)
    drawings = [some_drawing(4) for _ in range(2)]
    expected = sampler_operations.choose(scores, drawings[0], form, 0)
    assert torch.equal(kernels.choose(scores, drawings[1], form, 0), expected)
    assert all(token in row.topk(3).indices for row, token in zip(scores, expected, strict=True))


@pytest.mark.parametrize("as_kernel", [False, True])
def test_tokens_are_joined_and_written_behind_the_prompt(kernels, as_kernel):
    operations = kernels if as_kernel else sampler_operations
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 0, 5])
    for position, prompt_length in ((0, 0), (2, 2), (1, 2)):
        drawing = some_drawing(3, position=position, prompt_length=prompt_length)
        drawing.tokens[:] = 99
        got = operations.write_tokens([first, second], 8, drawing)
        expected = [99] * 3 if position < prompt_length else [33, 2, 43]
        assert got.tolist() == drawing.tokens[:, position].tolist() == expected
        assert (drawing.tokens == 99).sum() == 15 - 3 * (position >= prompt_length)
    assert operations.write_tokens([first], 1, some_drawing(3)).tolist() == [1, 2, 3]


# --- the draw ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 100, 1000, 2049, 16384])
def test_draws_are_those_of_the_whole_vocabulary_in_float64(dtype, vocabulary):
    logits = 4 * drawn((500, vocabulary), dtype)
    logits[:, vocabulary // 3 : vocabulary // 2] = -torch.inf
    numbers = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    goal = numbers * cumulative[:, -1]
    expected = torch.searchsorted(cumulative, goal[:, None], right=True)[:, 0]
    got = tokens_at(logits, numbers)
    assert logits.gather(1, got[:, None]).isfinite().all()
    # Float32 rounds a sum by 10⁻⁷ or so; a number that near to a border may fall on its other side.
    distance = torch.minimum(
        (cumulative.gather(1, expected[:, None])[:, 0] - goal).abs(),
        (torch.nn.functional.pad(cumulative, (1, 0)).gather(1, expected[:, None])[:, 0] - goal).abs(),
    )
    assert (distance[got != expected] < (1e-6 if dtype == torch.float32 else 1e-14)).all()
    assert (got != expected).sum() <= 2


@pytest.mark.parametrize("vocabulary", [300, 3000])
def test_what_is_ruled_out_is_never_drawn_at_any_number(vocabulary):
    logits = torch.full((4, vocabulary), -torch.inf)
    logits[:, [130, 200]] = torch.tensor([0.0, -80.0])  # e^−80 is lost beside 1 in every sum
    ends = torch.tensor([0.0, 0.5, 1 - 1e-12, 1 - 2**-53], dtype=torch.float64)
    assert set(tokens_at(logits, ends).tolist()) <= {130, 200}


def test_a_goal_between_two_roundings_falls_on_no_token_without_weight():
    weights = torch.tensor([[0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    rounded = torch.tensor([[0.25 + 1e-16, 0.25, 1.0, 1.0]], dtype=torch.float64)
    for goal, expected in ((0.1, 0), (0.5, 2), (1.0, 2), (2.0, 2)):
        assert first_beyond(torch.tensor([[goal]], dtype=torch.float64), rounded, weights).item() == expected


# --- the same tokens as the plain loop ---


@CONFIGS
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recorded_step_draws_the_tokens_of_the_plain_loop(config, settings, dtype):
    model, labels = make(config).to(dtype), torch.tensor([0, 3, 1])
    expected = model.sample(labels, seed=3, compiled=False, **settings)
    for images in (1, 3):
        got = draw(model, labels[:images], dtype=dtype, seed=3, **settings)
        assert torch.equal(got, expected[:images])


@pytest.mark.parametrize("settings", [PAIRS, PAIRS | {"top_k": 2}])
def test_pairs_of_settings_are_those_of_the_plain_loop(settings):
    model = make(SMALL_FACTORIZED).double()
    assert torch.equal(draw(model, LABELS, **settings), model.sample(LABELS, compiled=False, **settings))


@CONFIGS
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}, SHORT_GUIDANCE], ids=str)
def test_a_prompt_goes_through_the_same_step(config, settings):
    model = make(config).double()
    for given in (1, 3, 8):
        prompt = tokens(model.config.vocabulary_size)[:, :given]
        expected = model.sample(LABELS, seed=4, prompt=prompt, compiled=False, **settings)
        assert torch.equal(draw(model, LABELS, seed=4, prompt=prompt, **settings), expected)


@CONFIGS
@pytest.mark.parametrize(
    "settings", [{}, {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.4)}, {"top_k": 4}, {"temperature": 0}]
)
def test_a_step_of_kernels_draws_them_too(kernels, config, settings):
    model = make(config)
    expected = model.sample(LABELS, seed=3, compiled=False, **settings)
    assert torch.equal(draw(model, LABELS, dtype=torch.float32, lanes=2, recorder=None, seed=3, **settings), expected)


@CONFIGS
def test_the_first_tokens_alone(config):
    model = make(config).double()
    whole = make_request(model, LABELS, cfg_scale=2.0, cfg_schedule="linear")
    request = whole._replace(numbers=whole.numbers[:, :4])
    expected = model.sample_plainly(whole)[:, :4]
    assert torch.equal(model.sample_plainly(request), expected)
    assert torch.equal(Sampler(model, torch.float64, 2, is_guided=True).draw(model, request, Playback), expected)


def test_an_image_of_a_single_token():
    model = make(replace(SMALL, grid_size=1)).double()
    assert torch.equal(draw(model, LABELS, cfg_scale=2.0), model.sample(LABELS, cfg_scale=2.0, compiled=False))


# --- one type, any batch ---


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_the_same_in_every_batch_bit_by_bit(config, dtype):
    model, labels = make(config), torch.arange(LANES + 1) % 4
    settings = {"dtype": dtype, "lanes": LANES, "cfg_scale": 2.0}
    together = draw(model, labels, seed=10, **settings)
    for images in (1, 3, LANES):
        assert torch.equal(draw(model, labels[:images], seed=10, **settings), together[:images])
    for image in (2, 40, LANES):
        assert torch.equal(draw(model, labels[image : image + 1], seed=10 + image, **settings)[0], together[image])


def test_half_types_are_the_same_in_every_batch_without_a_recording():
    model, labels = make(SMALL), torch.arange(9) % 4
    together = model.sample(labels, dtype="bfloat16", seed=5, cfg_scale=2.0)
    assert torch.equal(model.sample(labels[6:8], dtype=torch.bfloat16, seed=11, cfg_scale=2.0), together[6:8])
    assert torch.equal(
        model.bfloat16().sample(labels[:2], seed=5, cfg_scale=2.0), model.sample(labels, seed=5, cfg_scale=2.0)[:2]
    )


def test_kernels_draw_the_same_in_every_batch(kernels):
    model, labels = make(SMALL), torch.arange(5) % 4
    together = draw(model, labels, dtype=torch.bfloat16, lanes=3, recorder=None, seed=10)
    for image in (0, 1, 4):
        alone = draw(model, labels[image : image + 1], dtype=torch.bfloat16, lanes=3, recorder=None, seed=10 + image)
        assert torch.equal(alone[0], together[image])


# --- memory that never moves, and one call per position ---


def memory_of(value):
    """Every tensor that a sampler holds, by the way to it."""
    if isinstance(value, torch.Tensor):
        return {"": value.data_ptr()}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        items = vars(value).items() if hasattr(value, "__dict__") and not callable(value) else ()
    return {f"{name}.{way}": address for name, inner in items for way, address in memory_of(inner).items()}


@CONFIGS
def test_nothing_moves_and_every_position_is_one_call(config):
    model = make(config)
    made = Sampler(model, torch.float32, 2, is_guided=True)
    before = memory_of(made.network) | memory_of(made.drawing)
    recordings = []

    def recorder(*given):
        recordings.append(Playback(*given))
        return recordings[-1]

    settings = {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.5)}
    for labels in ([1], [0, 1, 2, 3, 0], [2, 2]):  # 1 + 3 + 1 portions
        made.draw(model, make_request(model, labels, **settings), recorder)
    assert [recording.played for recording in recordings] == [5 * 5, 5 * 4]  # guided positions, and those after them
    made.draw(model, make_request(model, [1], temperature=0.7), recorder)  # numbers differ, what is built in does not
    assert [recording.played for recording in recordings] == [5 * 5, 5 * 4 + 9]
    assert memory_of(made.network) | memory_of(made.drawing) == before
    assert len(before) > 30


@CONFIGS
@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_the_host_never_waits_inside_a_step(config, settings):
    model, recordings = make(config), []

    def recorder(*given):
        recordings.append(Playback(*given))
        return recordings[-1]

    draw(model, LABELS, dtype=torch.float32, recorder=recorder, **settings)
    names = {func.overloadpacket.__name__ for recording in recordings for func, *_ in recording.calls}
    assert "index_select" in names and not names & set(WAITS)


def test_a_block_is_eight_launches(kernels, monkeypatch):
    launches, products = [], []
    for name in ("add_and_normalise", "attend", "gate_hidden", "choose", "write_tokens", "score"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _f=function, _n=name, **k: launches.append(_n) or _f(*a, **k))
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: products.append(1) or linear(*a))
    model = make(SMALL)
    made = Sampler(model, torch.float32, 1, is_guided=True)
    made.network.copy_weights(model)
    made._load(model, make_request(model, [1], cfg_scale=2.0), slice(0, 1))
    launches.clear(), products.clear()
    form = DrawingForm((False,), 0, False, False)
    sampler.take_step(made.network, made.network.rows, made.drawing, form, kernels)
    outside = {"choose", "write_tokens", "score"}
    in_blocks = [name for name in launches if name not in outside][:-1]  # the last norm is the head's
    head = 1  # `score` is a product
    assert (len(in_blocks) + len(products) - head) / SMALL.depth == 8
    assert [launches.count(name) for name in sorted(outside)] == [1, 1, 1]


def test_recordings_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(sampler, "MOST_RECORDINGS", 2)
    model, made = make(SMALL), []
    kept = Sampler(model, torch.float32, 2, is_guided=False)

    def recorder(*given):
        made.append(Playback(*given))
        return made[-1]

    for top_k in (1, 2, 3, 3, 2, 1):
        kept.draw(model, make_request(model, [1], top_k=top_k), recorder)
    assert len(made) == 4  # 1 was dropped when 3 came


# --- recording ---


@pytest.fixture
def cuda_calls(monkeypatch):
    """What a recording asks of torch.cuda, by name, with the stream that it concerns; a list of them."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name if isinstance(name, str) else f"side {name}"

        def wait_stream(self, other):
            told.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self):
            told.append("replay")

    @contextmanager
    def stream(chosen):
        told.append(("on", chosen.name))
        yield

    @contextmanager
    def graph(_, *, stream, capture_error_mode):
        told.append(("captured on", stream.name, capture_error_mode))
        yield

    monkeypatch.setattr(recording, "_free_streams", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, value in {"CUDAGraph": Graph, "Stream": Stream, "stream": stream, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return told


def test_a_graph_is_captured_after_runs_that_warm_up_on_a_stream_of_its_device(cuda_calls):
    device = torch.device("cuda", 1)
    play = recording.record(lambda: cuda_calls.append("step"), device, lambda: cuda_calls.append("before"))
    warm_up = [("side 1", "waits for", "current"), ("on", "side 1"), *["before", "step"] * recording.WARM_UPS]
    capture = [("current", "waits for", "side 1"), ("captured on", "side 1", "thread_local"), "step"]
    assert cuda_calls == warm_up + capture
    cuda_calls.clear()
    play(), play()
    assert cuda_calls == ["replay", "replay"]


def test_work_that_failed_to_warm_up_is_waited_for_before_its_memory_goes(cuda_calls):
    def step():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        recording.record(step, torch.device("cuda", 1), lambda: None)
    assert cuda_calls[-1] == ("current", "waits for", "side 1")


def test_a_stream_has_one_recording_at_a_time_and_serves_the_next_one(cuda_calls):
    streams = recording._free_streams[1]
    first, second = (recording.record_graph(lambda: None, lambda: None) for _ in range(2))
    assert not streams
    del first
    assert len(streams) == 1
    (freed,) = streams
    third = recording.record_graph(lambda: None, lambda: None)
    assert not streams
    del second, third
    assert len(streams) == 2 and freed in streams


def test_float64_and_devices_without_kernels_have_the_operations(monkeypatch):
    assert sampler.operations_for(torch.device("cpu"), torch.float32) is sampler_operations
    monkeypatch.setattr(sampler, "kernels_run_on", lambda device: device.type == "cuda")
    card = torch.device("cuda", 1)
    assert sampler.operations_for(card, torch.float64) is sampler_operations
    pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
    assert sampler.operations_for(card, torch.bfloat16) is sys.modules["ibqlab.generator.sampler_kernels"]


# --- kept between calls ---


@pytest.fixture
def recorded(monkeypatch):
    """`compiled` plays back instead of compiling; a list of all recordings made."""
    made = []

    def recorder(*given):
        made.append(Playback(*given))
        return made[-1]

    monkeypatch.setattr(kept_samplers, "record", recorder)
    return made


def test_a_second_call_records_nothing(recorded):
    model = make(SMALL)
    first = model.sample(LABELS, compiled=True, seed=1, cfg_scale=2.0)
    assert len(recorded) == 1
    assert torch.equal(model.sample(LABELS, compiled=True, seed=1, cfg_scale=2.0), first)
    model.sample(LABELS, compiled=True, seed=2, cfg_scale=1.5, temperature=0.5)
    assert len(recorded) == 1


def test_what_is_kept_serves_inside_and_outside_of_inference_mode(recorded):
    model = make(SMALL)
    with torch.inference_mode():
        inside = model.sample(LABELS, compiled=True, cfg_scale=2.0)
    assert torch.equal(model.sample(LABELS, compiled=True, cfg_scale=2.0), inside)
    with torch.inference_mode():
        assert torch.equal(model.sample(LABELS, compiled=True, cfg_scale=2.0), inside)
    assert len(recorded) == 1


@CONFIGS
def test_new_weights_are_seen_however_they_were_written(recorded, config):
    model = make(config).double()
    model.sample(LABELS, compiled=True)
    for write in (
        lambda: model.load_state_dict({name: values * 1.3 for name, values in model.state_dict().items()}),
        lambda: next(model.parameters()).data.mul_(-2),
    ):
        write()
        assert torch.equal(model.sample(LABELS, compiled=True), model.sample(LABELS, compiled=False))
    assert len(recorded) == 1


def test_copies_files_and_states_know_nothing_of_it(recorded):
    model = make(SMALL)
    names, sizes = set(vars(model)), len(pickle.dumps(model))
    model.sample(LABELS, compiled=True)
    assert set(vars(model)) == names and len(pickle.dumps(model)) == sizes
    assert copy.deepcopy(model) not in kept_samplers._samplers
    assert model in kept_samplers._samplers


def test_memory_goes_with_training_with_its_generator_and_when_asked(recorded):
    model = make(SMALL)
    for go in (model.train, lambda: forget_sampler(model)):
        model.eval().sample(LABELS, compiled=True)
        assert model in kept_samplers._samplers
        go()
        assert model not in kept_samplers._samplers
    model.train().sample(LABELS, compiled=True)  # in training mode nothing is kept
    assert model not in kept_samplers._samplers and model.training
    count = len(kept_samplers._samplers)
    model.eval().sample(LABELS, compiled=True)
    assert len(kept_samplers._samplers) == count + 1
    del model
    gc.collect()
    assert len(kept_samplers._samplers) == count


@pytest.mark.parametrize("as_kernel", [False, True])
def test_after_broken_weights_it_starts_from_nothing(monkeypatch, as_kernel, request):
    if as_kernel:
        request.getfixturevalue("kernels")
    monkeypatch.setattr(kept_samplers, "record", None if as_kernel else Playback)
    model = make(SMALL)
    expected = model.sample(LABELS, compiled=False)
    weight = model.blocks[0].attention.wqkv.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaN \(not a number\) or infinite for 2 of 2"):
        model.sample(LABELS, dtype="float32", compiled=True)
    assert model not in kept_samplers._samplers
    with torch.no_grad():
        weight.copy_(good)
    assert torch.equal(model.sample(LABELS, compiled=True), expected)


def test_memory_that_is_not_enough_is_one_clear_error(monkeypatch):
    model = make(SMALL)

    made = []

    def too_large(sampler, *given, **settings):
        made.append(weakref.ref(sampler))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(kept_samplers.Sampler, "draw", too_large)
    with pytest.raises(
        SamplerMemoryError, match=r"out of memory: drawing in bfloat16 .* of 4 images.*compiled=False"
    ) as error:
        model.sample(LABELS, dtype="bfloat16")
    assert "Tried to allocate 2.00 GiB" in str(error.value) and error.value.__context__ is None
    gc.collect()
    assert len(made) == 1 and made[0]() is None  # though the error and its traceback are held here
    assert model not in kept_samplers._samplers


# --- the number type ---


def test_types_are_taken_by_name_and_refused_where_there_is_no_such(monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    assert sampling_dtype(None, torch.float32, cpu) == sampling_dtype("auto", torch.float32, cpu) == torch.float32
    assert sampling_dtype("bfloat16", torch.float32, cpu) == sampling_dtype(torch.bfloat16, torch.float32, cpu)
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("ibqlab.generator.sampling_dtype.has_bfloat16", lambda device, has=has: has)
        assert sampling_dtype(None, torch.float32, card) == expected
        assert sampling_dtype(None, torch.float16, card) == torch.float16
    with pytest.raises(ValueError, match=r"bfloat16 needs a card from A100 on.*dtype=\"float16\""):
        sampling_dtype("bfloat16", torch.float32, card)
    for wrong in ("bfloat", torch.int64, 16):
        with pytest.raises(ValueError, match="dtype must be one of 'auto', 'float32'"):
            make(SMALL).sample(LABELS, dtype=wrong)


@CONFIGS
def test_another_type_than_the_weights(config):
    model = make(config)
    expected = copy.deepcopy(model).double().sample(LABELS, cfg_scale=2.0)
    assert torch.equal(model.sample(LABELS, cfg_scale=2.0, dtype="float64"), expected)
    assert next(model.parameters()).dtype == torch.float32


@CONFIGS
def test_the_compiled_step_of_a_cpu(config, monkeypatch):
    compile_it = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_it(function, backend="aot_eager", fullgraph=True)
    )
    model = make(config).double()
    # One compilation of each code is allowed: recordings do not count as compilations of each other.
    with torch._dynamo.config.patch(recompile_limit=1):
        for settings in (SHORT_GUIDANCE, {"top_k": 4, "top_p": 0.8, "min_p": 0.01}):
            assert torch.equal(model.sample(LABELS, compiled=True, **settings), model.sample(LABELS, **settings))
