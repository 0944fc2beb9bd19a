"""Faster ways to compute a step: each gives the same step, under the same names, with several processes, resumed."""

import functools
import subprocess
import sys

import pytest
import torch
import yaml
from test_training import assert_equal, assert_same_run, contents, interrupted, smoke, trained, weights

from ibqlab.losses.tokenizer_loss import tokenizer_loss
from ibqlab.quantizers import Quantizer
from ibqlab.recipes.tokenizer_config import SpeedConfig
from ibqlab.runs import Run, RunError
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.autoencoder import ResidualBlock, find_blocks
from ibqlab.training import speed
from ibqlab.training.launch import launch
from ibqlab.training.optimisation import build_optimizer
from ibqlab.training.tokenizer import discriminator_training as adversary_module
from ibqlab.training.tokenizer import step
from ibqlab.training.tokenizer.models import build_models
from ibqlab.training.tokenizer.step import TokenizerStep

JUDGED = {
    "data__image_size": 32,
    "tokenizer__autoencoder__attention_resolutions": [16],
    "loss__adversarial_weight": 0.1,
    "loss__lecam_weight": 0.05,
    "loss__discriminator": {"base_channels": 4, "num_layers": 1},
}
MAGVIT2 = {
    "tokenizer__autoencoder__design": "magvit2",
    "tokenizer__autoencoder__attention_resolutions": [],
    "tokenizer__autoencoder__latent_channels": 8,
}
DESIGNS = {"vqgan": {}, "magvit2": MAGVIT2, "maskgit": MAGVIT2 | {"tokenizer__autoencoder__design": "maskgit"}}
ALL = {"channels_last": True, "compile": True, "activation_checkpointing": True}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs that were compiled: captured and differentiated as for a GPU, but without a minute in a C++ compiler."""
    found = []

    def compiler(graph, inputs):
        found.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(speed, "COMPILER", compiler)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def learn(steps=2, **settings):
    """Losses and gradients of the last of a few steps in float64, and the state after it."""
    config = smoke(**JUDGED | {"precision": "64-true"} | settings)
    models, _ = build_models(config)
    networks = TokenizerStep(config, models, launch(config))
    size = config.data.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number in range(1, steps + 1):
        torch.manual_seed(number)
        networks.optimizer.zero_grad()
        losses, features = networks.learn(number, pixels, lambda indices: None)
    gradients = {name: p.grad for name, p in networks.tokenizer.named_parameters()}
    return {"losses": losses, "features": features, "gradients": gradients, "state": networks.state_dict()}


def assert_close(left, right, place=""):
    """Two nested states to 1e-9."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_close(left[key], right[key], f"{place}.{key}")
    elif torch.is_tensor(left):
        torch.testing.assert_close(left.double(), right.double(), rtol=1e-9, atol=1e-9, msg=lambda m: f"{place}: {m}")


@functools.cache
def plain_step(design):
    """The first step of a design, computed the ordinary way."""
    return learn(1, **DESIGNS[design])


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("fast", [{"channels_last": True}, {"compile": True}, ALL], ids=["channels", "compile", "all"])
def test_a_fast_step_is_the_same_step(design, fast):
    # Adam divides by a gradient's size, so what is compared after its steps would blow up the gradients' rounding.
    plain, quick = plain_step(design), learn(1, **DESIGNS[design], speed=fast)
    for key in ("losses", "features", "gradients"):
        assert_close(plain[key], quick[key], key)
    states = [run["state"] for run in (plain, quick)]
    for key in ("model", "discriminator", "ema"):
        assert states[0][key].keys() == states[1][key].keys()
    statistics = [{k: v for k, v in state["discriminator"].items() if "running" in k} for state in states]
    assert statistics[0]
    assert_close(*statistics, "discriminator")
    assert_close(states[0]["lecam"], states[1]["lecam"], "lecam")


def test_a_run_with_adaptive_weights_may_follow_one_without():
    """It goes through graphs twice that the first run went through once."""
    adaptive = {"loss__adaptive_weight": True}
    plain = learn(1, **adaptive)
    learn(1, speed={"compile": True})
    compiled = learn(1, **adaptive, speed={"compile": True})
    assert plain["losses"]["adversarial_weight"] > 0
    for key in ("losses", "gradients"):
        assert_close(plain[key], compiled[key], key)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_recomputed_blocks_change_no_bit(dropout, accumulate):
    settings = {"tokenizer__autoencoder__dropout": dropout, "accumulate": accumulate}
    plain, recomputed = learn(**settings), learn(**settings, speed={"activation_checkpointing": True})
    assert_equal(plain, recomputed)


def test_recomputed_blocks_are_called_twice_and_keep_less(monkeypatch):
    calls, kept = [], []
    forward = ResidualBlock.forward
    monkeypatch.setattr(ResidualBlock, "forward", lambda block, x: (calls.append(block), forward(block, x))[1])

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for recomputing in (False, True):
        calls.clear()
        tokenizer = Tokenizer.from_config(smoke().tokenizer)
        speed.prepare_tokenizer(SpeedConfig(activation_checkpointing=recomputing), tokenizer)
        blocks = sum(isinstance(block, ResidualBlock) for block in find_blocks(tokenizer))
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = tokenizer(torch.rand(2, 3, 16, 16))
        out.reconstruction.sum().backward()
        assert len(calls) == blocks * (2 if recomputing else 1)
        calls.clear()
        with torch.no_grad():
            tokenizer(torch.rand(2, 3, 16, 16))
        assert len(calls) == blocks
    assert kept[1] < 0.5 * kept[0]


def test_convolutions_and_pictures_lie_with_channels_last(monkeypatch):
    seen = []
    monkeypatch.setattr(
        step,
        "tokenizer_loss",
        lambda config, images, out, **rest: (
            seen.extend([images, out.reconstruction]),
            tokenizer_loss(config, images, out, **rest),
        )[1],
    )
    state = learn(1, speed={"channels_last": True})["state"]
    seen += [state[key][name] for key in ("model", "ema") for name in ("encoder.conv_in.weight",)]
    seen += [state["discriminator"]["main.0.weight"], state["optimizer"]["state"][0]["exp_avg"]]
    for tensor in seen:
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_a_run_compiles_its_training_graphs_once_and_nothing_else(tmp_path, graphs):
    quick = trained(tmp_path / "quick", smoke(**JUDGED, speed={"compile": True}, steps=3))
    # Residual and attention blocks at two resolutions each; the discriminator as it learns, and as it judges, when its
    # weights stand still.
    assert len(graphs) == 6
    # The next run of a study has the same networks around another quantizer, and takes the same graphs.
    trained(tmp_path / "next", smoke("vq", **JUDGED, speed={"compile": True}, steps=2))
    assert len(graphs) == 6
    plain = trained(tmp_path / "plain", smoke(**JUDGED, steps=3))
    assert weights(quick).keys() == weights(plain).keys()
    assert quick.metrics["l1"].iloc[1:3].tolist() == pytest.approx(plain.metrics["l1"].iloc[1:3].tolist(), rel=1e-4)


@pytest.mark.parametrize("fast", [{"compile": True, "channels_last": True}, {"activation_checkpointing": True}])
def test_a_fast_run_that_was_interrupted_is_the_same_run(fast, tmp_path):
    config = smoke(**JUDGED, speed=fast, steps=4, record__checkpoint_every=3)
    whole = trained(tmp_path / "whole", config)
    assert_same_run(whole, interrupted(tmp_path / "cut", config, 2))


TOGETHER = """
import sys
import torch
from ibqlab.cli import main
from ibqlab.training import speed

torch.set_num_threads(1)
torch.optim.AdamW = lambda groups, lr, **rest: torch.optim.SGD(groups, lr=lr, fused=True)
speed.COMPILER = "aot_eager"
settings = ["steps=3", "processes=2", "precision=64-true", "tokenizer.autoencoder.base_channels=96"]
settings += ["loss.adversarial_weight=0.1", "loss.discriminator={base_channels: 4, num_layers: 1}"]
fast = ["speed={channels_last: true, compile: true, activation_checkpointing: true}"]
for name, more in (("plain", []), ("quick", fast)):
    output = ["--no-report", "--output", f"{sys.argv[1]}/{name}"]
    assert main(["train", "builtin/smoke", *settings, *more, *output], standalone_mode=False) is None
"""


@pytest.mark.usefixtures("warm_start")
def test_two_processes_take_the_same_fast_steps(tmp_path):
    # Wide enough for several of the buckets in which gradients are exchanged, at which compiled graphs are cut.
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain, quick = (weights(Run(tmp_path / name)) for name in ("plain", "quick"))
    torch.testing.assert_close(quick, plain, rtol=1e-9, atol=1e-9)


def test_in_mixed_precision_quantizer_and_losses_get_float32(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        step,
        "tokenizer_loss",
        lambda config, images, out, **rest: (
            given.setdefault("reconstruction", out.reconstruction.dtype),
            given.setdefault("images", images.dtype),
            result := tokenizer_loss(config, images, out, **rest),
            given.update({name: term.dtype for name, term in result[1].items()}),
            result,
        )[-1],
    )
    assign = Quantizer.forward
    hinge = adversary_module.DISCRIMINATOR_LOSS_FUNCTIONS["hinge"]

    def judged(real, fake):
        given["logits"] = real.dtype if real.dtype == fake.dtype else None
        return hinge(real, fake)

    def quantized(quantizer, features):
        out = assign(quantizer, features)
        given["quantized"] = out.quantized.dtype
        return out

    monkeypatch.setitem(adversary_module.DISCRIMINATOR_LOSS_FUNCTIONS, "hinge", judged)
    monkeypatch.setattr(Quantizer, "forward", quantized)
    run = trained(tmp_path / "run", smoke(**JUDGED, precision="bf16-mixed", steps=1, speed={"channels_last": True}))
    assert run.status == "finished"
    assert {"l1", "adversarial", "term_sample_entropy", "term_codebook", "quantizer_loss", "logits"} <= given.keys()
    assert set(given.values()) == {torch.float32}


def test_adam_is_fused_and_equals_adam():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(7, 5).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    config = smoke(optimizer__weight_decay=0.1).optimizer
    fused = build_optimizer(layers[0], config)
    plain = torch.optim.AdamW(
        layers[1].parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=0.1,
        fused=False,
        foreach=False,
    )
    assert fused.param_groups[0]["fused"]
    for _ in range(5):
        gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        for layer, optimizer in zip(layers, (fused, plain), strict=True):
            layer.weight.grad, layer.bias.grad = gradient.clone(), gradient[:, 0].clone()
            optimizer.step()
    assert_close(layers[0].state_dict(), layers[1].state_dict())


def test_a_folder_from_before_these_settings_goes_on(tmp_path):
    done = trained(tmp_path / "run", smoke(steps=2))
    settings = yaml.safe_load((done.path / "config.yaml").read_text())
    del settings["speed"]
    (done.path / "config.yaml").write_text(yaml.safe_dump(settings))
    done.write_provenance(config_hash=Run(done.path).config_hash)
    before = contents(done.path)
    assert trained(tmp_path / "run", smoke(steps=2)).status == "finished"
    assert contents(done.path) == before
    with pytest.raises(RunError, match=r"There → yours: speed\.channels_last: False → True\. Choose"):
        trained(tmp_path / "run", smoke(steps=2, speed={"channels_last": True}))
