"""What must hold on a CUDA device, too. Skipped where there is none."""

import pytest
import torch
from oracle import algorithm_1, entropies
from registry import small_settings
from test_transformer import LABELS, SMALL, SMALL_FACTORIZED, make

from ibqlab.generator import linear_cross_entropy
from ibqlab.quantizers import available_quantizers, blocks, build_quantizer, index_backprop
from ibqlab.training import recipe_config, train, train_generator

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


@pytest.mark.parametrize("config", [SMALL, SMALL_FACTORIZED], ids=["ibq", "magvit2"])
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
