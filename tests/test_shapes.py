"""The shapes written in signatures are the shapes that arrive: checked at run time, in a process of their own."""

import subprocess
import sys
import textwrap

from ibqlab.quantizers import available_quantizers

SCRIPT = """
import torch
from jaxtyping import TypeCheckError, install_import_hook

import ibqlab.config  # before the hook: it holds no tensors, and beartype does not know pydantic's generic types

torch.set_num_threads(1)
with install_import_hook("ibqlab", "beartype.beartype"):
    from ibqlab.data import DataConfig, open_data, to_model_range, training_batches, validation_batches
    from ibqlab.diagnostics import softmax_perplexity
    from ibqlab.diagnostics.recorder import Recorder
    from ibqlab.generator import FactorizedGenerator, FactorizedGeneratorConfig
    from ibqlab.generator import Generator, GeneratorConfig, LlamaGenConfig
    from ibqlab.quantizers import available_quantizers, build_quantizer, index_backprop, quantizer_config
    from ibqlab.quantizers import factorize_indices, join_indices
    from ibqlab.tokenizer import Tokenizer, TokenizerConfig
    from ibqlab.tokenizer.autoencoder import AutoencoderConfig
    from ibqlab.tokens import ModelCost, index_permutation, report_tokens
    from ibqlab.recipes.tokenizer_config import LossConfig
    from ibqlab.training.ema import WeightAverage
    from ibqlab.training.tokenizer.validation import take_snapshot, validate
    from ibqlab.losses.tokenizer_loss import name_first_nonfinite, tokenizer_loss

settings = [(name, {}) for name in available_quantizers()]
settings += [("vq", {"codebook_init": "kmeans", "revive_after": 1}), ("vq_ema", {"revive_after": 1})]
settings += [("vq", {"gradient": "rotation"}), ("ibq", {"entropy_weight": 0.0})]
for name, extra in settings:
    sizes = type(quantizer_config({"name": name})).sized(12, 8)
    quantizer = build_quantizer(name, **sizes, **extra)
    recorder = Recorder(quantizer, 120, 16)
    for step in (1, 2):
        features = torch.randn(2, 8, 3, 4, requires_grad=True)
        recorder.before_step()
        out = quantizer(features)
        (out.loss + out.quantized.sum()).backward()
        assert features.grad.shape == features.shape
        recorder.observe(out.indices, step)
        assert recorder.report(features, step)["usage_tokens"] == 24 * step
    quantizer.eval()
    out = quantizer(features)
    assert torch.equal(quantizer.decode(out.indices), out.quantized), name
    print("checked", name)

for temperature in (0.01, None):
    z, codebook = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = index_backprop(z, codebook, temperature)
    (out.quantized.sum() + (out.sample_entropy or 0.0)).backward()

autoencoder = AutoencoderConfig(
    base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(8,), resolution=8,
    latent_channels=8,
)
quantizer = quantizer_config({"name": "ibq", "codebook_size": 12, "code_dim": 8})
tokenizer = Tokenizer.from_config(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer))
average = WeightAverage(tokenizer, 0.9)
data = DataConfig(source="digits", image_size=8)
batch = next(iter(training_batches(open_data(data, "train"), batch_size=2, seed=0, start_step=0, steps=1)))
images = to_model_range(batch.images)
out = tokenizer(images)
loss, parts = tokenizer_loss(LossConfig(), images, out)
loss.backward()
name_first_nonfinite(images, tokenizer, out, parts)
average.update()
tokenizer.encode(batch.images), tokenizer.decode_indices(out.quantizer.indices)
held_out = open_data(data, "validation")
result = validate(tokenizer, validation_batches(held_out, images=5, batch_size=2), torch.device("cpu"))
assert result.row()["validation_tokens"] == 80
last_hit = torch.zeros(12, dtype=torch.int64)
arrays = take_snapshot(tokenizer, batch.images, counts=result.counts, last_hit=last_hit, features=20, images=1)
assert arrays["features"].shape == (20, 8) and arrays["images"].shape == (1, 8, 8, 3)
print("checked tokenizer")

autoencoder = AutoencoderConfig(
    design="magvit2", base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(),
    latent_channels=4,
)
quantizer = quantizer_config({"name": "lfq", "codebook_size": 16})
tokenizer = Tokenizer.from_config(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer))
out = tokenizer(images)
out.reconstruction.sum().backward()
parts = factorize_indices(out.quantizer.indices, (1, 3), codebook_size=16)
assert torch.equal(join_indices(parts, (1, 3)), out.quantizer.indices)
print("checked magvit2")

sequence = {"num_classes": 3, "grid_size": 2, "num_heads": 2, "width": 16, "hidden_multiple": 8}
tokens, labels = torch.randint(32, (2, 4)), torch.tensor([0, 3])
plain = Generator(GeneratorConfig(vocabulary_size=32, depth=1, **sequence))
(plain(tokens, labels).sum() + plain.loss(tokens, labels)).backward()
assert plain.sample(labels, cfg_scale=2.0, top_k=5, top_p=0.9).shape == (2, 4)
unmodulated = Generator(LlamaGenConfig(vocabulary_size=32, depth=1, **sequence))
unmodulated.loss(tokens, labels).backward()
factorized = FactorizedGenerator(
    FactorizedGeneratorConfig(bits=(2, 3), spatial_depth=1, factorized_depth=1, **sequence)
)
assert factorized(tokens, labels).post.shape == (2, 4, 8)
factorized.loss(tokens, labels).backward()
for generator in (plain, unmodulated, factorized):
    assert generator.sample(labels, cfg_scale=2.0, min_p=0.1, dtype="bfloat16").shape == (2, 4)  # by a sampler
print("checked generators")

stream = torch.randint(9, (20, 6))
kinds = torch.arange(20) % 3
for tokens, classes in ((stream, kinds), (stream.numpy().astype("uint16"), kinds.numpy())):
    assert index_permutation(9, 0)[tokens if torch.is_tensor(tokens) else tokens.astype(int)].shape == (20, 6)
    costs = {"a": ModelCost(bits=2.0), "b": ModelCost(bits=torch.ones(6).numpy())}
    report = report_tokens(tokens, tokens[:5], 9, (2, 3), (4, 6), labels=(classes, classes[:5]), models=costs)
    assert len(report.table) == 10
print("checked tokens")

wrong = [
    lambda: plain.sample(labels[0]),
    lambda: softmax_perplexity(torch.randn(3, 4), torch.randn(5, 6)),
    lambda: index_backprop(torch.randn(3, 4, 1), torch.randn(5, 4)),
    lambda: build_quantizer("vq").decode(torch.zeros(3, dtype=torch.int64)),
    lambda: take_snapshot(tokenizer, batch.images, counts=result.counts[None], last_hit=last_hit, features=1, images=1),
]
for call in wrong:
    try:
        call()
    except TypeCheckError:
        print("refused")
"""


def test_shapes_in_signatures_hold_at_run_time():
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    for name in (*available_quantizers(), "tokenizer", "magvit2", "generators", "tokens"):
        assert f"checked {name}" in lines
    assert lines.count("refused") == 5  # a wrong shape is seen, so a right one was looked at
