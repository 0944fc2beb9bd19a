"""What a tokenizer's step asks of a device: one look, no activation turned around, fused updates, a graph per shape."""

import functools

import pytest
import torch
from test_speed import DESIGNS, JUDGED
from test_training import assert_equal, smoke
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ibqlab.costs.tokenizer_step_cost import Lpips
from ibqlab.data import to_model_range
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.losses.errors import NonFinite
from ibqlab.tokenizer import group_norm
from ibqlab.tokenizer.autoencoder import find_blocks
from ibqlab.tokenizer.magvit2 import AdaptiveGroupNorm
from ibqlab.training import speed
from ibqlab.training.launch import launch
from ibqlab.training.tokenizer import discriminator_training, step
from ibqlab.training.tokenizer.models import Models, build_models
from ibqlab.training.tokenizer.step import TokenizerStep

LATE = {"loss__discriminator_first": False}
LOOKS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.nonzero.default", "aten.equal.default"}
LOOKS |= {"aten.masked_select.default", "aten.unique_dim.default", "aten._unique2.default"}
ASKING = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@functools.cache
def lpips():
    """LPIPS' network with fresh weights, small; it never learns, so that tests may share it."""
    return Lpips("alex")


def networks(perceptual=False, **settings):
    """A step's networks, with LPIPS' of fresh weights on request."""
    config = smoke(**JUDGED | settings)
    models, _ = build_models(config)
    return TokenizerStep(config, Models(*models[:2], lpips()) if perceptual else models, launch(config))


def learn(ready, number, observe=lambda indices: None):
    torch.manual_seed(number)
    result = ready.learn(number, PIXELS, observe)
    ready.optimizer.zero_grad()
    return result


class Seen(TorchDispatchMode):
    """Operations inside the block, with their first tensors and their result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((str(function), [a for a in args if isinstance(a, torch.Tensor)], result))
        return result


class Asked(TorchFunctionMode):
    """Questions of Python's to tensors inside the block, which wait for a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ASKING:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


# --- the one look ---


@pytest.mark.parametrize(
    "settings",
    [{}, LATE, {"accumulate": 2}, {"loss__adaptive_weight": True}, {"loss__adversarial_weight": 0.0}],
    ids=["first", "late", "parts", "adaptive", "alone"],
)
def test_a_step_waits_for_the_device_once(settings):
    ready = networks(perceptual=True, **settings)
    recorder = Recorder(ready.tokenizer.quantizer, 1000, 64)
    for number in (1, 2):
        learn(ready, number, lambda indices, number=number: recorder.observe(indices, number))
    with Seen() as seen, Asked() as asked:
        learn(ready, 3, lambda indices: recorder.observe(indices, 3))
    assert [name for name, *_ in seen.calls if name in LOOKS] == ["aten._local_scalar_dense.default"]
    assert asked.names == ["__bool__"]
    masks = [args for name, args, _ in seen.calls if name == "aten.index.Tensor" and args[-1].dtype == torch.bool]
    assert not masks


@pytest.mark.parametrize("late", [{}, LATE], ids=["first", "late"])
@pytest.mark.parametrize("culprit", ["images", "term"])
def test_nothing_learns_from_a_broken_batch(monkeypatch, late, culprit):
    ready = networks(**late)
    learn(ready, 1)
    before = [ready.state_dict()[key] for key in ("model", "ema", "discriminator_ema")]
    before = [type(state)((name, value.clone()) for name, value in state.items()) for state in before]
    weights = [value.detach().clone() for value in ready.adversary.discriminator.parameters()]
    moments = {name: value.clone() for name, value in ready.adversary.tensors().items() if name.startswith("Adam")}
    if culprit == "images":
        monkeypatch.setattr(step, "to_model_range", lambda images: to_model_range(images) * float("nan"))
    else:
        broken = {"hinge": lambda real, fake: real.mean() * float("inf")}
        monkeypatch.setattr(discriminator_training, "DISCRIMINATOR_LOSS_FUNCTIONS", broken)
    with pytest.raises(NonFinite) as caught:
        learn(ready, 2)
    # Who comes first is named first.
    named = "the batch of images" if culprit == "images" and late else "the discriminator's 'discriminator'"
    assert caught.value.culprit == named
    state = ready.state_dict()
    after = [state[key] for key in ("model", "ema", "discriminator_ema")]
    assert_equal(before, after)
    assert_equal(weights, [value.detach() for value in ready.adversary.discriminator.parameters()])
    assert_equal(moments, {name: value for name, value in ready.adversary.tensors().items() if name in moments})
    assert moments


@pytest.mark.parametrize("parts", [1, 2])
def test_the_broken_term_is_named_and_not_the_sum(parts):
    ready = networks(**LATE, accumulate=parts)
    learn(ready, 1)
    with torch.no_grad():
        next(ready.adversary.discriminator.parameters()).fill_(float("nan"))
    with pytest.raises(NonFinite) as caught:
        learn(ready, 2)
    assert caught.value.culprit == "the loss term 'adversarial'"


def test_after_a_step_that_was_skipped_the_discriminator_learns_again():
    ready = networks()
    pairs = [(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))]
    weight = ready.adversary.discriminator.main[0].weight
    before = weight.detach().clone()
    ready.adversary.learn(pairs, 1e-3, torch.tensor(1))
    assert torch.equal(weight, before) and not ready.adversary.nonfinite
    ready.adversary.learn(pairs, 1e-3)
    assert not torch.equal(weight, before)


# --- channels-last ---


def lies_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def is_turned(source, result):
    """Whether a copy of a batch of images or activations lies another way than its source."""
    if source.ndim != 4 or len(source) != len(PIXELS):
        return False
    return not (lies_last(source) and lies_last(result)) and not (source.is_contiguous() and result.is_contiguous())


def turned_around(seen):
    """(C, H, W) of what is copied into another order, or arrives in another one than it is used."""
    turned = []
    for name, sources, result in seen.calls:
        if name.split(".")[1] in ("clone", "_to_copy", "copy_") and is_turned(sources[-1], result):
            turned.append(tuple(result.shape[1:]))
        # A convolution turns its inputs around itself: images, and in the backward pass what comes back as well.
        used = {"aten.convolution.default": sources[:1], "aten.convolution_backward.default": sources[:2]}
        turned += [tuple(t.shape[1:]) for t in used.get(name, []) if not lies_last(t)]
    return turned


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_no_activation_is_turned_around(monkeypatch, design):
    """From stored pictures to gradients, whatever has more channels than a picture and is larger than the codes' grid.

    Before the kernels, each of the published tokenizer's 111 norms was turned around and back in both directions: 1,870
    copies in a step by a GPU's profile. Traced as here the same step has 746: 720 are weights and their gradients
    between float32 and bfloat16, 24 pictures, logits and code vectors likewise, and two lie in another order.
    """
    pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
    calls = []
    forward = group_norm._forward
    monkeypatch.setattr(group_norm, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(group_norm, "_forward", lambda *args: (calls.append(args), forward(*args)))
    small = {"data__image_size": 16, "precision": "bf16-mixed", "speed": {"channels_last": True}}
    ready = networks(**small | design)
    norms = sum(isinstance(m, torch.nn.GroupNorm | AdaptiveGroupNorm) for m in ready.tokenizer.modules())
    with Seen() as seen:
        ready.learn(1, PIXELS[:, :, :16, :16].contiguous(), lambda indices: None)
    assert len(calls) == norms
    turned = turned_around(seen)
    # Pictures as they are stored, and L1's gradient, which torch makes from one number: three channels each. And the
    # quantizer's grid of vectors, which it takes and gives with the channels apart. No activation of a block.
    assert set(turned) == {(3, 16, 16), (8, 8, 8)}
    assert turned.count((3, 16, 16)) <= 2 and turned.count((8, 8, 8)) <= 4


def test_lpips_turns_nothing_around():
    x, y = (torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    network = lpips().to(memory_format=torch.channels_last)
    with Seen() as seen:
        network(x, y).sum().backward()
    assert lies_last(y.grad) and not y.grad.is_contiguous()
    assert sum(name.startswith("aten.convolution") for name, *_ in seen.calls) > 20
    assert turned_around(seen) == []


@pytest.mark.parametrize("loaded", [False, True])
def test_moments_and_averages_lie_as_their_weights_do(loaded):
    # Else torch's fused and foreach kernels refuse them or fall back to one small kernel per tensor.
    ready = networks(speed={"channels_last": True})
    learn(ready, 1)
    if loaded:
        other = networks(speed={"channels_last": True})
        other.load_state_dict(ready.state_dict())
        ready = other
    ready.learn(2, PIXELS, lambda indices: None)
    adversary, compared = ready.adversary, 0
    for module, optimizer, average in (
        (ready.tokenizer, ready.optimizer, ready.average),
        (adversary.discriminator, adversary.optimizer, adversary.average),
    ):
        for name, parameter in module.named_parameters():
            state = optimizer.state[parameter]
            tensors = [state["exp_avg"], state["exp_avg_sq"], average.shadows[name], parameter.grad]
            assert {t.stride() for t in tensors if t is not None} == {parameter.stride()}, name
            compared += parameter.stride() != parameter.detach().contiguous().stride()
    assert compared > 10
    learn(ready, 3)
    assert all(p.grad is None for p in ready.tokenizer.parameters())


# --- regional compilation ---


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that were compiled, run as they were captured."""
    found = []
    monkeypatch.setattr(speed, "COMPILER", lambda graph, inputs: found.append(graph) or graph)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_of_one_shape_share_a_graph(graphs, parts, monkeypatch):
    """More shapes than torch's limit of 8, and many more blocks than shapes."""
    deep = {"base_channels": 32, "channel_multipliers": [1, 1, 2, 2, 4], "num_res_blocks": 2}
    deep = {f"tokenizer__autoencoder__{name}": value for name, value in deep.items()}
    deep["tokenizer__autoencoder__attention_resolutions"] = [2]
    ready = networks(**deep, accumulate=parts, speed={"compile": True})
    shapes, blocks = set(), list(find_blocks(ready.tokenizer))
    for block in blocks:
        kinds = (type(block), *(tuple(p.shape) for p in block.parameters()))
        block.register_forward_pre_hook(
            lambda _, inputs, kinds=kinds: shapes.add((kinds, inputs[0].shape, torch.is_grad_enabled()))
        )
    for number in (1, 2):
        learn(ready, number)
        # And the discriminator as it learns, and as it judges.
        assert len(graphs) == len(shapes) + 2
    assert 8 < len(shapes) == 11 * parts and len(blocks) == 36
    assert torch._dynamo.config.recompile_limit == 8
