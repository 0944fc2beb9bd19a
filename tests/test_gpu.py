"""What must hold on a CUDA device, too. Skipped where there is none."""

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from oracle import algorithm_1, entropies
from registry import small_settings
from test_sampler import SETTINGS, assert_near, drawn, make_request, some_drawing
from test_transformer import LABELS, SMALL, SMALL_FACTORIZED, SMALL_LLAMAGEN, make

from ibqlab.generator import GeneratorConfig, kept_samplers, linear_cross_entropy, sampler, sampler_operations
from ibqlab.generator.recording import record
from ibqlab.generator.sampler_operations import DrawingForm
from ibqlab.losses.lpips_layer import layer_distance
from ibqlab.quantizers import (
    available_quantizers,
    blocks,
    build_quantizer,
    index_backprop,
    mixture_of_codes,
    nearest_code,
)
from ibqlab.quantizers.index_backprop_rows import (
    IN_PLACE,
    EntropyGradient,
    kernel_functions,
    score_gradient_in_place,
)
from ibqlab.quantizers.lfq import sign_entropies
from ibqlab.quantizers.products import CodebookOperand, ProductForm, multiplying, product_form, side_by_side
from ibqlab.tokenizer.group_norm import lies_channels_last, normalise
from ibqlab.training import recipe_config, train, train_generator
from ibqlab.training.launch import launch
from ibqlab.training.tokenizer.models import build_models
from ibqlab.training.tokenizer.step import TokenizerStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def test_index_backprop_equals_algorithm_1():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(300, 16, generator=generator, dtype=torch.float64).cuda().requires_grad_()
    c = torch.randn(700, 16, generator=generator, dtype=torch.float64).cuda().requires_grad_()
    out = index_backprop(z, c)
    z_q, index, _ = algorithm_1(z, c)
    sample, average = entropies(z, c, 0.01)
    assert torch.equal(out.indices, index)
    ours = torch.autograd.grad(out.quantized.sin().sum() + out.sample_entropy - out.average_entropy, (z, c))
    theirs = torch.autograd.grad(z_q.sin().sum() + sample - average, (z, c))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_index_backprop_of_any_type_is_near_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    z = (0.3 * torch.randn(1000, 64, generator=generator)).cuda().to(dtype).requires_grad_()
    c = torch.randn(3000, 64, generator=generator).cuda().to(dtype).requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in (z, c)]
    out, truth = index_backprop(z, c, 0.1), index_backprop(*exact, 0.1)
    assert torch.equal(out.indices, (z.double() @ c.double().T).argmax(1))
    gradients = (
        torch.autograd.grad((o.quantized.sin().sum() + o.sample_entropy - o.average_entropy), inputs)
        for o, inputs in ((out, (z, c)), (truth, exact))
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        limit = 1e-4 if dtype == torch.float32 else 3e-2
        assert (ours.double() - theirs).abs().max() < limit * theirs.abs().max()


def test_repetitions_are_equal_in_every_bit_on_request(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 32, generator=generator).cuda().requires_grad_()
    c = torch.randn(2000, 32, generator=generator).cuda().requires_grad_()

    def gradients():
        out = index_backprop(z, c)
        return torch.autograd.grad(out.quantized.sin().sum() + out.sample_entropy - out.average_entropy, (z, c))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", available_quantizers())
def test_every_quantizer_chooses_as_on_the_cpu(name):
    torch.manual_seed(0)
    quantizer = build_quantizer(name, **small_settings(name, 64, 8)).eval()
    features = torch.randn(2, 8, 4, 4)
    there = quantizer(features)
    here = quantizer.cuda()(features.cuda())
    assert torch.equal(here.indices.cpu(), there.indices)


def test_a_run_trains_in_bfloat16(tmp_path):
    config = recipe_config("builtin/smoke", {"accelerator": "cuda", "precision": "bf16-mixed"})
    run = train(config, tmp_path / "run", progress=False)
    assert run.status == "finished"
    assert run.metrics["loss"].dropna().iloc[-1] < run.metrics["loss"].dropna().iloc[0]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_a_run_with_an_adversary_trains_in_bfloat16(tmp_path, fast):
    adversarial = {"adversarial_weight": 0.1, "lecam_weight": 0.05, "discriminator": {"base_channels": 8}}
    speed = {"channels_last": fast, "compile": fast, "activation_checkpointing": fast}
    settings = {"accelerator": "cuda", "precision": "bf16-mixed", "data.image_size": 32, "loss": adversarial}
    run = train(recipe_config("builtin/smoke", settings | {"speed": speed}), tmp_path / "run", progress=False)
    assert run.status == "finished"
    assert run.metrics[["loss", "discriminator", "lecam", "adversarial"]].iloc[1:].notna().all(axis=None)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_by_blocks_equals_the_naive_form(monkeypatch, dtype, autocast):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 100)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).to("cuda", dtype) for size in (250, 1000))
    targets = torch.randint(1000, (250,), generator=generator).cuda()
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*exact), targets)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(*inputs, targets)
    half = autocast or dtype != torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3 if autocast else 1e-5, atol=0)
    gradients = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < (3e-2 if half else 1e-5) * theirs.abs().max()


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_samples_are_those_of_the_cpu(config, compiled):
    """Guidance ends midway, so the compiled step (CUDA graphs) is recorded for both batch sizes."""
    model = make(config).double()
    settings = {"cfg_scale": 2.0, "cfg_interval": (0.0, 0.7), "seed": 6}
    there = model.sample(LABELS, **settings)
    here = model.cuda().sample(LABELS.cuda(), compiled=compiled, **settings)
    assert torch.equal(here.cpu(), there)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_a_generator_trains_in_bfloat16(tmp_path, fast):
    tokenizer = train(recipe_config("builtin/smoke", {"accelerator": "cuda"}), tmp_path / "tok", progress=False)
    settings = {
        "tokenizer": str(tokenizer.path),
        "accelerator": "cuda",
        "precision": "bf16-mixed",
        "speed": {"compile": fast, "activation_checkpointing": fast},
    }
    run = train_generator(recipe_config("builtin/smoke_generator", settings), tmp_path / "run", progress=False)
    losses = run.metrics["validation_loss"].dropna()
    assert run.status == "finished" and losses.iloc[-1] < losses.iloc[0]


# --- recorded sampling ---

WIDE = GeneratorConfig(
    vocabulary_size=1000, num_classes=10, grid_size=8, depth=3, num_heads=4, width=256, gate_scale=1.0
)


def on_card(values):
    return type(values)(*(value.cuda() for value in values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_step_give_what_the_operations_give(dtype):
    """At the published sizes: 128 rows, 1,024 channels in 16 heads, 256 positions."""
    from ibqlab.generator import sampler_kernels as kernels  # noqa: PLC0415 - it imports Triton

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    rows, width, heads, positions = 128, 1024, 16, 256
    x = drawn((rows, width)).cuda()
    update, gate, scale, shift = (drawn((rows, width), dtype, seed).cuda() for seed in (1, 2, 3, 4))
    weight = drawn((width,), dtype, 5).cuda()
    modulation = {"weight": weight, "scale": scale, "shift": shift}
    expected = sampler_operations.add_and_normalise(x, update, gate, **modulation)
    for ours, theirs in zip(kernels.add_and_normalise(x.clone(), update, gate, **modulation), expected, strict=True):
        assert_near(ours, theirs, tolerance)
    qkv, table = drawn((rows, 3 * width), dtype).cuda(), drawn((positions, 32, 2)).cuda()
    cache = [drawn((rows, heads, positions, 64), dtype, seed).cuda() for seed in (1, 2)]
    for position in (0, 1, 63, 64, 65, 255):
        place, drawing = torch.tensor([position]).cuda(), on_card(some_drawing(64))
        theirs = [values.clone() for values in cache]
        expected = sampler_operations.attend(qkv, theirs, table, place, drawing)
        assert_near(kernels.attend(qkv, cache, table, place, drawing), expected, tolerance)
        for ours, other in zip(cache, theirs, strict=True):
            assert_near(ours, other, tolerance)
    both = drawn((rows, 2 * 2816), dtype).cuda()
    assert_near(kernels.gate_hidden(both), sampler_operations.gate_hidden(both), tolerance)


@pytest.mark.parametrize("vocabulary", [64, 16384, 262144])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_kernel_draws_what_the_operations_draw(vocabulary, greedy):
    from ibqlab.generator import sampler_kernels as kernels  # noqa: PLC0415 - it imports Triton

    scores, form = 3 * drawn((128, vocabulary)).cuda(), DrawingForm((greedy,), 0, False, False)
    drawings = [on_card(some_drawing(64, position=2)) for _ in range(2)]
    expected = sampler_operations.choose(scores, drawings[0], form, 0)
    # A sum in another order may round to the other side of a number, once in millions of draws.
    assert (kernels.choose(scores, drawings[1], form, 0) != expected).sum() <= 1
    scores[3] = torch.nan
    kernels.choose(scores, drawings[1], form, 0)
    assert drawings[1].broken.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("config", [SMALL, SMALL_LLAMAGEN, SMALL_FACTORIZED], ids=["ibq", "llamagen", "magvit2"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_graph_of_kernels_draws_the_tokens_of_the_plain_loop(config, settings):
    model = make(config)
    expected = model.sample(LABELS, seed=3, **settings)
    assert torch.equal(model.cuda().sample(LABELS, seed=3, dtype="float32", **settings).cpu(), expected)
    prompt = expected[:, :4]
    assert torch.equal(model.sample(LABELS, seed=3, dtype="float32", prompt=prompt, **settings).cpu(), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tokens_are_the_same_in_every_batch_bit_by_bit(dtype):
    model, labels = make(WIDE).cuda(), torch.arange(130) % 10
    settings = {"dtype": dtype, "cfg_scale": 2.0, "cfg_interval": (0.0, 0.8)}
    together = model.sample(labels, seed=10, **settings)
    for images in (1, 3, 64, 65):
        assert torch.equal(model.sample(labels[:images], seed=10, **settings), together[:images])
    for image in (1, 40, 63, 64, 129):
        alone = model.sample(labels[image : image + 1], seed=10 + image, **settings)
        assert torch.equal(alone[0], together[image])


def test_on_a_gpu_images_are_drawn_in_bfloat16_by_a_graph_that_is_kept(monkeypatch):
    made = []
    monkeypatch.setattr(kept_samplers, "record", lambda *given: made.append(1) or record(*given))
    model, labels = make(WIDE).cuda(), torch.arange(10)
    first = model.sample(labels, seed=1, cfg_scale=2.0)
    assert len(made) == 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert torch.equal(model.sample(labels, seed=1, cfg_scale=2.0, dtype="bfloat16", compiled=True), first)
    model.sample(labels.repeat(9), seed=2, cfg_scale=1.5, temperature=0.9)
    assert len(made) == 1
    assert torch.cuda.memory_allocated() == before
    model.train()
    assert torch.cuda.memory_allocated() < before


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_host_never_waits_inside_a_step(settings):
    model = make(SMALL).cuda()
    request = make_request(model, LABELS.cuda(), **settings)
    made = sampler.Sampler(model, torch.bfloat16, 64, is_guided=True)
    made.draw(model, request, None)
    made._load(model, request, slice(0, 2))
    operations = sampler.operations_for(made.device, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.take_step(made.network, made.network.rows, made.drawing, request.drawing_form(), operations)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.drawing.position.item() == 1


def test_without_triton_the_graph_is_made_of_the_operations(monkeypatch):
    monkeypatch.setattr(sampler, "kernels_run_on", lambda device: False)
    model = make(SMALL)
    expected = model.sample(LABELS, cfg_scale=2.0)
    assert torch.equal(model.cuda().sample(LABELS, cfg_scale=2.0, dtype="float32").cpu(), expected)


def test_memory_that_is_not_enough_is_one_clear_error():
    model = make(GeneratorConfig(vocabulary_size=1000, num_classes=10, depth=16, num_heads=16, width=1024)).cuda()
    # Room for 64 MiB beside what the process has; keys and values alone take 2 GiB.
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / card)
    try:
        with pytest.raises(kept_samplers.SamplerMemoryError, match='compiled=False and dtype="float32"'):
            model.sample([1], cfg_scale=2.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.sample([1], cfg_scale=2.0).shape == (1, 256)


def test_filters_of_a_large_vocabulary_are_recorded():
    """Torch sorts long rows by other kernels than short ones, which take memory to work in."""
    config = replace(WIDE, vocabulary_size=16384, grid_size=4, depth=1)
    model, labels = make(config).cuda().double(), torch.arange(70) % 10
    settings = {"cfg_scale": 2.0, "top_k": 6000, "top_p": 0.9, "min_p": 1e-4, "seed": 5}
    assert torch.equal(model.sample(labels, **settings), model.sample(labels, compiled=False, **settings))


def test_a_graph_that_goes_leaves_the_others_their_memory():
    """Other torch versions free cuBLAS's memory of a graph's stream with the graph."""
    models, labels = [make(WIDE).cuda() for _ in range(3)], torch.arange(10)
    expected = [model.sample(labels, cfg_scale=2.0, seed=4) for model in models]
    for model in models[:2]:
        model.train()
        torch.cuda.empty_cache()
    filler = torch.full((2**26,), torch.nan, device="cuda")
    assert torch.equal(models[2].sample(labels, cfg_scale=2.0, seed=4), expected[2])
    assert filler.isnan().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    model = make(WIDE).cuda()
    expected = model.sample([1, 2], cfg_scale=2.0)
    assert torch.equal(model.to("cuda:1").sample([1, 2], cfg_scale=2.0).cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


# --- the tokenizer's training step ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 128, 64, 64), (2, 512, 16, 16), (3, 96, 7, 9)])
def test_group_norm_with_a_swish_reads_and_writes_channels_last(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, slope, skip = (
        torch.randn(shape, generator=generator).to("cuda", dtype, memory_format=torch.channels_last) for _ in range(3)
    )
    norm = torch.nn.GroupNorm(32, shape[1], eps=1e-6).cuda()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
    exact_norm, exact_x = copy.deepcopy(norm).double(), x.double().requires_grad_()
    normed, same = normalise(norm, x.requires_grad_(), swish=True)
    assert type(normed.grad_fn).__name__ == "_GroupNormBackward"
    exact = torch.nn.functional.silu(exact_norm(exact_x))
    torch.autograd.backward([normed, same], [slope, skip])
    torch.autograd.backward([exact, exact_x], [slope.double(), skip.double()])
    limit = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    pairs = [(normed, exact), (x.grad, exact_x.grad)]
    for ours, theirs in pairs:
        assert ours.dtype == dtype and lies_channels_last(ours)
        assert (ours.double() - theirs).abs().max() < limit * theirs.abs().max()
    for ours, theirs in zip(norm.parameters(), exact_norm.parameters(), strict=True):
        assert (ours.grad.double() - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()


@pytest.mark.parametrize("channels", [64, 192, 512])
def test_lpips_comparison_is_torchs(channels):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, channels, 9, 11, generator=generator).relu() for _ in range(2))
    x, y = (value.to("cuda", memory_format=torch.channels_last) for value in (x, y))
    weight = torch.rand(1, channels, 1, 1, generator=generator).cuda()
    exact = y.double().requires_grad_()
    ours, theirs = layer_distance(x, y.requires_grad_(), weight), layer_distance(x.double(), exact, weight.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    ours.sum().backward()
    theirs.sum().backward()
    assert lies_channels_last(y.grad)
    passed = y > 0
    assert ((y.grad - exact.grad) * passed).abs().max() < 1e-4 * (exact.grad * passed).abs().max()


STEPS = {"plain": {}, "channels": {"channels_last": True}, "compiled": {"channels_last": True, "compile": True}}
MAGVIT2 = {"tokenizer.autoencoder": {"design": "magvit2", "attention_resolutions": (), "latent_channels": 8}}


def step_networks(form, precision, more):
    """A small recipe's networks with an adversary, on the card."""
    adversarial = {"adversarial_weight": 0.1, "lecam_weight": 0.05, "discriminator": {"base_channels": 8}}
    settings = {"accelerator": "cuda", "precision": precision, "data.image_size": 32, "loss": adversarial}
    config = recipe_config("builtin/smoke", settings | {"speed": STEPS[form]} | more)
    return TokenizerStep(config, build_models(config)[0], launch(config))


def pictures():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("more", [{}, MAGVIT2], ids=["vqgan", "magvit2"])
@pytest.mark.parametrize("form", ["channels", "compiled"])
def test_a_fast_step_has_the_plain_steps_losses(form, more):
    losses = []
    for name in ("plain", form):
        ready = step_networks(name, "32-true", more)
        losses.append({key: value.item() for key, value in ready.learn(1, pictures(), lambda indices: None)[0].items()})
    plain, fast = losses
    # Convolutions may be taken in TF32.
    assert fast == pytest.approx(plain, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("form", ["channels", "compiled"])
@pytest.mark.parametrize("more", [{}, {"accumulate": 2}], ids=["whole", "parts"])
def test_a_step_waits_for_the_card_once(form, more):
    ready = step_networks(form, "bf16-mixed", more)
    images = pictures()
    for number in (1, 2, 3):
        ready.learn(number, images, lambda indices: None)
        ready.optimizer.zero_grad()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            ready.learn(4, images, lambda indices: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in told if "synchronizing" in str(warning.message)]) == 1


def test_the_cards_adam_skips_a_broken_batch():
    ready = step_networks("channels", "bf16-mixed", {})
    pairs = [tuple(torch.rand(4, 3, 32, 32, device="cuda") for _ in range(2))]
    weight = ready.adversary.discriminator.main[0].weight
    ready.adversary.learn(pairs, 1e-3)
    before, moments = weight.detach().clone(), ready.adversary.optimizer.state[weight]["exp_avg"].clone()
    ready.adversary.learn([(pairs[0][0] * float("nan"), pairs[0][1])], 1e-3)
    assert torch.equal(weight, before)
    assert torch.equal(ready.adversary.optimizer.state[weight]["exp_avg"], moments)
    assert ready.adversary.nonfinite == 1 and "discriminator" in ready.adversary.culprit()


@pytest.fixture(scope="module")
def row_kernels():
    return pytest.importorskip("ibqlab.quantizers.row_kernels", reason="needs Triton, which torch brings on Linux")


def scores_of(tokens=300, codes=9000, *, seed=0, scale=1.0):
    """A block of scores with two NaN, ties and infinities."""
    generator = torch.Generator().manual_seed(seed)
    scores = (scale * torch.randn(tokens, codes, generator=generator)).cuda()
    scores[1, [codes // 3, codes - 1]] = torch.nan
    scores[2, [codes // 4, codes // 2]] = 100.0
    scores[3, codes // 5] = torch.inf
    return scores


@pytest.mark.parametrize("codes", [2, 511, 4096, 9000, 70000])
def test_the_kernels_best_codes_are_those_of_max(row_kernels, codes):
    scores = scores_of(40, codes)
    top, indices = row_kernels.best_codes(scores)
    expected = scores.cpu().max(1, keepdim=True)
    assert torch.equal(indices.cpu(), expected.indices[:, 0])
    torch.testing.assert_close(top.cpu(), expected.values, rtol=0, atol=0, equal_nan=True)
    offset = torch.randn(codes, generator=torch.Generator().manual_seed(1)).cuda()
    assert torch.equal(row_kernels.best_codes(scores, offset)[1], (2 * scores + offset).max(1).indices)


@pytest.mark.parametrize("temperature", [None, 0.01, 1.0])
@pytest.mark.parametrize("scale", [1.0, 16.0, 1e-3])
def test_the_kernels_statistics_and_gradients_are_those_of_the_form_in_place(row_kernels, temperature, scale):
    scores = scores_of(scale=scale)[4:]
    gains = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).cuda()
    kernels, average = kernel_functions(row_kernels), torch.zeros(9000, device="cuda")
    found = kernels.statistics(scores.clone(), temperature, average)
    exact_average = torch.zeros(9000, device="cuda", dtype=torch.float64)
    exact = IN_PLACE.statistics(scores.double(), temperature, exact_average)
    assert torch.equal(found.indices, exact.indices)
    entropies = exact_entropies = None
    if temperature:
        torch.testing.assert_close(average.double(), exact_average, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-4)
        by_code = torch.randn(9000, generator=torch.Generator().manual_seed(3)).cuda()
        entropies = EntropyGradient(by_code, torch.tensor(0.3, device="cuda"), temperature)
        exact_entropies = EntropyGradient(by_code.double(), entropies.slope.double(), temperature)
    whole = [slice(0, 9000)]
    truth = score_gradient_in_place(scores.double(), gains.double(), exact, exact_entropies)
    for form in (ProductForm(torch.float32), ProductForm(torch.bfloat16), ProductForm(torch.bfloat16, 3)):
        panels = whole if form.parts == 1 else [slice(0, 4096), slice(4096, 9000)]
        changes = kernels.changes(scores.clone(), gains.clone(), found, entropies, form=form, panels=panels)
        parts = [change.float().view(form.parts, len(scores), -1).sum(0) for _, change in changes]
        limit = 1e-4 if form.parts == 3 or form.dtype == torch.float32 else 2e-2
        assert (torch.cat(parts, 1).double() - truth).abs().max() < limit * truth.abs().max()


def test_parts_are_made_by_rounding_on_the_card_as_by_pytorch():
    values = torch.randn(100, 300, generator=torch.Generator().manual_seed(0)).cuda()
    values[0, :4] = torch.tensor([torch.nan, torch.inf, torch.finfo(torch.float32).max, 1e-30])
    form = ProductForm(torch.bfloat16, 3)
    for order in (form.left, form.right, form.change, form.against_change):
        for view in (values, values.T, values[:, 7:200]):
            on_card, here = side_by_side(form, view, order), side_by_side(form, view.cpu(), order)
            assert torch.equal(on_card.cpu().nan_to_num(9.0), here.nan_to_num(9.0))


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("dim", [16, 256])
def test_scores_from_parts_are_nearer_to_float64_than_ieee_float32(dim, scale):
    generator = torch.Generator().manual_seed(0)
    features = (scale * torch.randn(512, dim, generator=generator)).cuda()
    codebook = torch.randn(20000, dim, generator=generator).cuda()
    truth, form = features.double() @ codebook.double().T, product_form(torch.float32, features.device)
    assert form == ProductForm(torch.bfloat16, 3)
    ours = torch.empty(512, 20000, device="cuda")
    CodebookOperand(codebook, form).multiply([side_by_side(form, features, form.left)], [ours])
    with multiplying(ProductForm(torch.float32), features.device):
        theirs = features @ codebook.T
    errors = [(value.double() - truth).square().mean().sqrt() for value in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("matmul", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.05, None])
def test_every_promise_about_products_is_kept(matmul, temperature):
    generator = torch.Generator().manual_seed(0)
    case = [(0.5 * torch.randn(many, 64, generator=generator)).cuda() for many in (600, 5000)]

    def gradients(dtype, **settings):
        inputs = [value.to(dtype).requires_grad_() for value in case]
        out = index_backprop(*inputs, temperature, **settings)
        loss = out.quantized.sin().sum()
        if temperature:
            loss = loss + out.sample_entropy - out.average_entropy
        return torch.autograd.grad(loss, inputs)

    for ours, truth in zip(gradients(torch.float32, matmul=matmul), gradients(torch.float64), strict=True):
        limit = {"float32": 1e-4, "tf32": 3e-2, "bfloat16": 0.2}[matmul]
        assert (ours.double() - truth).square().mean().sqrt() < limit * truth.square().mean().sqrt()


def test_results_do_not_depend_on_the_shape_that_came_first():
    """In a process of its own each, so that nothing has been compiled before."""
    script = (
        "import sys, torch\n"
        "from ibqlab.quantizers import index_backprop\n"
        "for tokens, codes in eval(sys.argv[1]):\n"
        "    generator = torch.Generator().manual_seed(tokens)\n"
        "    z = torch.randn(tokens, 32, generator=generator).cuda().requires_grad_()\n"
        "    c = torch.randn(codes, 32, generator=generator).cuda().requires_grad_()\n"
        "    out = index_backprop(z, c)\n"
        "    loss = out.quantized.sin().sum() + out.sample_entropy - out.average_entropy\n"
        "    sums = [value.double().abs().sum().item() for value in torch.autograd.grad(loss, (z, c))]\n"
        "print(out.indices.tolist(), sums)\n"
    )
    told = [
        subprocess.run([sys.executable, "-c", script, shapes], capture_output=True, text=True, check=True).stdout
        for shapes in ("[(7, 333), (500, 5000)]", "[(500, 5000)]")
    ]
    (indices, sums), (others, other_sums) = (
        [json.loads(part) for part in line.replace("] [", "]\n[").splitlines()] for line in told
    )
    assert indices == others
    assert sums == pytest.approx(other_sums, rel=1e-4)


def test_one_step_asks_the_host_for_nothing():
    """Index backpropagation never waits for the card."""
    z = torch.randn(300, 32, device="cuda", requires_grad=True)
    c = torch.randn(5000, 32, device="cuda", requires_grad=True)

    def step():
        out = index_backprop(z, c)
        (out.quantized.sin().sum() + out.sample_entropy - out.average_entropy).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert z.grad.isfinite().all() and c.grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_a_card_that_is_not_the_current_one_computes_the_same():
    generator = torch.Generator().manual_seed(0)
    features, codebook = (torch.randn(many, 32, generator=generator) for many in (300, 5000))
    found = [index_backprop(features.to(card), codebook.to(card)) for card in ("cuda:0", "cuda:1")]
    assert found[1].indices.device == torch.device("cuda:1")
    assert torch.equal(found[0].indices.cpu(), found[1].indices.cpu())
    assert found[1].average_entropy.item() == pytest.approx(found[0].average_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_nearest_codes_are_those_of_float64(metric):
    generator = torch.Generator().manual_seed(0)
    features, codebook = (torch.randn(many, 32, generator=generator).cuda() for many in (300, 20000))
    codebook[10000:10100] = codebook[:100]
    features[:100] = codebook[10000:10100]
    exact = nearest_code(features.double(), codebook.double(), metric)
    assert torch.equal(nearest_code(features, codebook, metric), exact)
    assert metric == "dot" or torch.equal(exact[:100].cpu(), torch.arange(100))


def test_mixtures_and_table_products_are_near_float64():
    generator = torch.Generator().manual_seed(0)
    case = [torch.randn(many, 16, generator=generator).cuda() for many in (300, 5000)]

    def values(dtype):
        inputs = [value.to(dtype).requires_grad_() for value in case]
        loss = mixture_of_codes(*inputs, 0.5).sin().sum() + 100 * sign_entropies(0.1 * inputs[0], 0.5)[1]
        return loss, *torch.autograd.grad(loss, inputs)

    for ours, truth in zip(values(torch.float32), values(torch.float64), strict=True):
        assert (ours.double() - truth).abs().max() < 1e-4 * truth.abs().max()
