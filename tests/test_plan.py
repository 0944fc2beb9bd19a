"""Recipes of the paper's tokenizers, how recipes extend each other, and what `ibqlab plan` counts."""

import math
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from golden import golden
from torch import nn

from ibqlab.cli import main
from ibqlab.config import ConfigError
from ibqlab.costs import time_and_price
from ibqlab.costs.run_cost import cost_table, count_recipe, count_run
from ibqlab.costs.shapes import ShapeMeter
from ibqlab.costs.time_and_price import PEAK_OPERATIONS, TrainingSpeed, measured_speeds, speed_of, training_time
from ibqlab.costs.tokenizer_step_cost import count_tokenizer_step
from ibqlab.generator import generator_config, make_generator
from ibqlab.quantizers import available_quantizers, make_quantizer
from ibqlab.recipes import snapshots
from ibqlab.recipes.published import PublishedRow, published_row, published_rows
from ibqlab.recipes.recipe_files import (
    EXPERIMENTS,
    find_recipes,
    load_recipe,
    merge_settings,
    read_recipe,
)
from ibqlab.recipes.snapshots import SNAPSHOTS_BYTES, snapshot_schedule
from ibqlab.studies.run_report import figure_run_codes
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.autoencoder import ResidualBlock, find_blocks
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training import GeneratorTrainConfig, recipe_config, train

IMAGENET = [f"imagenet/{file.stem}" for file in find_recipes("imagenet")]
TINY = {
    "tokenizer.autoencoder.channel_multipliers": [1, 1],
    "tokenizer.autoencoder.num_res_blocks": 1,
    "tokenizer.autoencoder.base_channels": 32,
    "data.image_size": 16,
}


def write(folder, **recipes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


class TestExtends:
    def test_a_chain_merges_and_leaves_no_trace(self, tmp_path):
        write(
            tmp_path,
            a={"steps": 1, "optimizer": {"betas": [0.1, 0.2], "learning_rate": 0.5}},
            b={"extends": "a", "optimizer": {"learning_rate": 0.25}, "seed": 3},
            c={"extends": "b.yaml", "optimizer": {"betas": [0.3, 0.4]}},
        )
        assert read_recipe(tmp_path / "c.yaml") == {
            "steps": 1,
            "seed": 3,
            "optimizer": {"betas": [0.3, 0.4], "learning_rate": 0.25},
        }

    def test_another_quantizer_replaces_its_mapping_whole_and_the_same_merges(self):
        base = {"quantizer": {"name": "ibq", "codebook_size": 8, "entropy_weight": 0.05}}
        assert merge_settings(base, {"quantizer": {"name": "vq"}}) == {"quantizer": {"name": "vq"}}
        for changes in ({"codebook_size": 4}, {"name": "ibq", "codebook_size": 4}):
            merged = merge_settings(base, {"quantizer": changes})
            assert merged == {"quantizer": {"name": "ibq", "codebook_size": 4, "entropy_weight": 0.05}}
        assert base["quantizer"]["codebook_size"] == 8

    def test_a_recipe_elsewhere_extends_one_under_experiments(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write(tmp_path / "elsewhere"))
        write(tmp_path, mine={"extends": "builtin/smoke", "steps": 7, "tokenizer": {"quantizer": {"name": "vq"}}})
        config = recipe_config(str(tmp_path / "mine.yaml"), {"seed": 5}, ["batch_size=2"])
        assert (config.steps, config.seed, config.batch_size) == (7, 5, 2)
        assert config.tokenizer.quantizer.config_name == "vq"
        assert config.tokenizer.autoencoder == recipe_config("builtin/smoke").tokenizer.autoencoder

    @pytest.mark.parametrize(
        ("recipes", "says"),
        [
            ({"a": {"extends": "b"}, "b": {"extends": "a"}}, "in a circle: .*a.* → .*b.* → .*a"),
            ({"a": {"extends": "a"}}, "in a circle"),
            ({"a": {"extends": "imagenet/ibq_1638"}}, "no such recipe.*did you mean 'imagenet/ibq_16384'"),
            ({"a": {"extends": ["b"]}}, r"extends must name one recipe.*got \['b'\]"),
            ({"a": {"extends": None}}, "extends must name one recipe.*got None"),
        ],
    )
    def test_bases_that_cannot_be(self, tmp_path, recipes, says):
        write(tmp_path, **recipes)
        with pytest.raises(ConfigError, match=says):
            load_recipe(str(tmp_path / "a.yaml"))

    def test_train_takes_it_and_the_run_keeps_all_settings(self, tmp_path):
        quick = {"extends": "builtin/smoke", "steps": 1, "record": {"snapshot_features": 16, "tokens_per_code": 1}}
        write(tmp_path, quick=quick)
        arguments = ["train", str(tmp_path / "quick.yaml"), "seed=4", "--output", str(tmp_path / "run")]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert "extends" not in stored
        assert (stored["steps"], stored["seed"], stored["batch_size"]) == (1, 4, 4)
        again = train(recipe_config(str(tmp_path / "quick.yaml"), {"seed": 4}), tmp_path / "run", progress=False)
        assert again.status == "finished"


def conv(inputs, outputs, kernel=3):
    return inputs * outputs * kernel**2 + outputs


def residual(inputs, outputs):
    shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + conv(inputs, outputs) + 2 * outputs + conv(outputs, outputs) + shortcut


def attention(channels):
    return 2 * channels + 4 * conv(channels, channels, 1)


def encoder_parameters(blocks):
    """Fact sheet §1.3: five levels, attention after each block of the last, blocks and attention in the middle."""
    widths = [128, 128, 128, 256, 256, 512]
    total = conv(3, 128)
    for inputs, outputs in pairwise(widths):
        total += residual(inputs, outputs) + (blocks - 1) * residual(outputs, outputs)
    total += sum(conv(width, width) for width in widths[1:-1])
    total += blocks * attention(512) + 2 * residual(512, 512) + attention(512)
    return total + 2 * 512 + conv(512, 256)


def decoder_parameters(blocks):
    """Fact sheet §1.4: one block more per level, levels from the lowest resolution up."""
    widths = [512, 512, 256, 256, 128, 128]
    total = conv(256, 512) + 2 * residual(512, 512) + attention(512) + (blocks + 1) * attention(512)
    for inputs, outputs in pairwise(widths):
        total += residual(inputs, outputs) + blocks * residual(outputs, outputs)
    total += sum(conv(width, width) for width in widths[1:-1])
    return total + 2 * 128 + conv(128, 3)


def magvit2_parameters(bits):
    """(encoder, decoder) from the published shapes of the 18-bit tokenizer, its 18 replaced."""
    keys = golden("official_state_dict_keys")[0]["Open-MAGVIT2/imagenet_lfqgan_256_L"]
    return tuple(
        sum(
            math.prod(bits if side == 18 else side for side in shape)
            for key, (shape, _) in keys.items()
            if key.startswith(part)
        )
        for part in ("encoder.", "decoder.")
    )


class TestPaperRecipes:
    def test_the_arithmetic_is_the_published_one(self):
        assert (encoder_parameters(4), decoder_parameters(4)) == (46_752_256, 59_903_875)
        assert sum(magvit2_parameters(18)) == 115_127_829

    @pytest.mark.parametrize("name", IMAGENET)
    def test_builds_with_the_right_number_of_parameters(self, name):
        config = recipe_config(name)
        quantizer, blocks = config.tokenizer.quantizer, config.tokenizer.autoencoder.num_res_blocks
        with torch.device("meta"):
            tokenizer = Tokenizer.from_config(config.tokenizer)
            discriminator = PatchDiscriminator(config.loss.discriminator)
        count = {part: sum(p.numel() for p in getattr(tokenizer, part).parameters()) for part in ("encoder", "decoder")}
        if quantizer.config_name == "lfq":
            expected = sum(magvit2_parameters(quantizer.code_dim))
        else:
            assert count["encoder"] == encoder_parameters(blocks)
            assert count["decoder"] == decoder_parameters(blocks)
            dim = quantizer.code_dim
            expected = encoder_parameters(blocks) + decoder_parameters(blocks) + quantizer.codebook_size * dim
            expected += conv(256, dim, 1) + conv(dim, 256, 1)
        assert sum(p.numel() for p in tokenizer.parameters()) == expected
        assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633

    @pytest.mark.parametrize("name", IMAGENET)
    def test_has_the_published_training(self, name):
        config, lfq = recipe_config(name), "lfq" in name
        epochs, drops, share = (270, (200, 250), 8) if lfq else (330, (250, 300), 4)
        if name.endswith("ibq_8192"):
            epochs, drops = 280, (250,)
        per_epoch = math.ceil(math.ceil(1_281_166 / config.processes) / share)
        assert config.batch_size == 256 == config.processes * share
        assert config.steps == epochs * per_epoch == epochs * 5005
        assert config.optimizer.drop_steps == tuple(drop * 5005 for drop in drops)
        assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-4, (0.5, 0.9))
        loss, data = config.loss, config.data
        adversarial = (0.4, True) if "soft_vq" in name else (0.1, False)
        assert (loss.adversarial_weight, loss.adaptive_weight) == adversarial
        assert (loss.reconstruction_weight, loss.perceptual_weight, loss.lecam_weight) == (1, 1, 0.05)
        assert (loss.discriminator_loss, loss.perceptual_net) == ("hinge", "vgg")
        assert loss.discriminator_first is not lfq
        assert (data.resize, data.flip, data.exclude) == ("pil" if lfq else "opencv", False, ("n06596364_9591.JPEG",))
        assert (config.ema_decay, config.precision) == (0.999, "bf16-mixed")

    def test_the_rows_differ_in_what_their_names_say(self):
        base = recipe_config("imagenet/ibq_16384").tokenizer
        assert base.autoencoder.num_res_blocks == 4 and base.quantizer.double_quantization
        sizes = {size: recipe_config(f"imagenet/ibq_{size}") for size in (1024, 8192, 16384, 262144)}
        assert all(config.tokenizer.quantizer.codebook_size == size for size, config in sizes.items())
        for dim in (32, 64, 128):
            assert recipe_config(f"imagenet/ibq_16384_dim{dim}").tokenizer.quantizer.code_dim == dim
        for blocks in (1, 2):
            autoencoder = recipe_config(f"imagenet/ibq_16384_blocks{blocks}").tokenizer.autoencoder
            assert autoencoder.num_res_blocks == blocks
        single = recipe_config("imagenet/ibq_16384_single").tokenizer
        assert single.autoencoder.num_res_blocks == 2 and not single.quantizer.double_quantization
        assert recipe_config("imagenet/vqgan_16384").tokenizer.quantizer.config_name == "vq"
        assert recipe_config("imagenet/lfq_16384").tokenizer.quantizer.code_dim == 14

    def test_every_row_has_its_published_numbers_and_the_other_way_round(self):
        assert sorted(published_rows()) == sorted(IMAGENET)
        assert published_row("imagenet/ibq_16384").rfid == 1.37
        assert published_row(str(EXPERIMENTS / "imagenet" / "ibq_262144.yaml")).usage == 0.84
        assert "262,122" in published_row("imagenet/ibq_262144").remarks
        assert published_row("builtin/smoke") is None

    def test_heads_of_the_files_tell_the_numbers(self):
        for name, row in published_rows().items():
            head = (EXPERIMENTS / f"{name}.yaml").read_text().partition("\nextends:")[0]
            assert f"{row.rfid:.2f}" in head and (row.lpips is None or f"{row.lpips:.4f}" in head)
            assert f"{100 * row.usage:.3g} %" in head


def smoke(**settings):
    return recipe_config("builtin/smoke", {key.replace("__", "."): value for key, value in settings.items()})


@cache
def counted(**settings):
    return count_tokenizer_step(smoke(**settings))


@cache
def planned(**settings):
    return count_run(smoke(**settings))


def frozen_bytes(cost):
    """Of a run on one process with averages: what its state holds beside five float32 numbers per learned one."""
    return cost.state_bytes - 5 * 4 * cost.parameters.trained


def operations_by_hand(tokenizer, image):
    """Convolutions and attention of one pass, from the shapes that really flow through."""
    total = []

    def convolution(layer, inputs, output):
        kernel = layer.in_channels * math.prod(layer.kernel_size)
        total.append(2 * kernel * output.numel())

    def attend(block, inputs, output):
        positions = output.shape[2] * output.shape[3]
        total.append(2 * 2 * positions**2 * output.shape[1])

    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif type(module).__name__ == "AttentionBlock":
            module.register_forward_hook(attend)
    tokenizer.eval()(image)
    return sum(total)


class TestCounts:
    def test_forward_operations_are_those_of_the_layers(self):
        config = smoke()
        size, quantizer = config.data.image_size, config.tokenizer.quantizer
        tokens = (size // 2) ** 2
        by_hand = operations_by_hand(Tokenizer.from_config(config.tokenizer), torch.zeros(1, 3, size, size))
        lookup = 2 * tokens * quantizer.codebook_size * quantizer.code_dim
        assert count_tokenizer_step(config).forward.of(1) == by_hand + lookup

    def test_index_backpropagation_counts_five_products(self):
        few, many = (
            counted(tokenizer__quantizer__codebook_size=size, tokenizer__quantizer__code_dim=128).training
            for size in (64, 1088)
        )
        expected = 10 * 64 * 1024 * 128
        assert many.of(3) - few.of(3) == pytest.approx(3 * expected, rel=0.05)
        assert many.of(3) - few.of(3) >= 3 * expected

    def test_a_convolution_costs_three_times_as_much_to_train(self):
        cost = counted()
        assert cost.training.of(1) / cost.forward.of(1) == pytest.approx(3, rel=0.05)

    def test_activations_are_what_a_real_pass_keeps(self):
        config = smoke(precision="32-true")
        tokenizer = Tokenizer.from_config(config.tokenizer)
        weights = {tensor.untyped_storage().data_ptr() for tensor in tokenizer.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.zeros(4, 3, 16, 16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = tokenizer(images)
            loss = nn.functional.l1_loss(out.reconstruction, images) + out.quantizer.loss
        assert loss.requires_grad
        assert count_tokenizer_step(config).activations.of(4) == pytest.approx(sum(kept.values()), rel=0.02)

    def test_precision_moves_activations_and_only_float64_the_weights(self):
        single, double = planned(), planned(precision="64-true")
        assert double.state_bytes == 2 * single.state_bytes
        assert double.activations.per_image == pytest.approx(2 * single.activations.per_image, rel=0.02)
        mixed, full = counted(precision="bf16-mixed"), counted()
        assert mixed.activations.fixed == pytest.approx(
            2 * (full.parameters.trained - full.parameters.codebook), rel=0.05
        )
        # Norms and swish stay in float32 and their result is kept once more in bfloat16, so less than half is saved.
        assert 0.7 < mixed.activations.per_image / full.activations.per_image < 1.3

    def test_adversary_and_perceptual_loss_cost_what_they_do(self):
        image = {"data__image_size": 32}
        plain, judged = counted(**image), counted(loss__adversarial_weight=0.1, **image)
        seen = counted(loss__perceptual_weight=1.0, **image)
        assert judged.parameters.discriminator == 2_765_633
        assert seen.parameters.perceptual == 14_714_688 + 64 + 128 + 256 + 512 + 512
        with torch.device("meta"):
            trunk = PatchDiscriminator(recipe_config("imagenet/ibq_16384").loss.discriminator)
        forward = operations_by_hand(trunk, torch.zeros(1, 3, 32, 32, device="meta"))
        # Two calls forward and back to weights and inputs, but not to images; one forward and back to inputs.
        extra = judged.training.of(1) - plain.training.of(1)
        first = 2 * 3 * 16 * 16 * 16 * 64
        assert extra == 2 * (3 * forward - first) + 2 * forward
        assert seen.training.of(1) > plain.training.of(1)
        assert plain.parameters.perceptual == plain.parameters.discriminator == frozen_bytes(plain) == 0

    def test_parts_cost_another_reconstruction(self):
        settings = {"loss__adversarial_weight": 0.1, "data__image_size": 32}
        whole, parts = counted(**settings), counted(accumulate=2, **settings)
        assert parts.training.of(1) - whole.training.of(1) == pytest.approx(whole.forward.of(1), rel=1e-3)
        later = counted(accumulate=2, loss__discriminator_first=False, **settings)
        assert later.training.of(1) == whole.training.of(1)

    def test_blocks_computed_again_cost_operations_and_save_memory(self):
        plain, again = counted(), counted(speed__activation_checkpointing=True)
        operations = []
        tokenizer = Tokenizer.from_config(smoke().tokenizer)

        def convolution(layer, _, out):
            operations.append(2 * out[0].numel() * layer.weight[0].numel())

        def attention(layer, inputs, _):
            operations.append(2 * 2 * inputs[0][0, 0].numel() ** 2 * inputs[0].shape[1])

        for block in find_blocks(tokenizer):
            residual = isinstance(block, ResidualBlock)
            for layer in (block.conv1,) if residual else (block.q, block.k, block.v):
                layer.register_forward_hook(convolution)
            if not residual:
                block.register_forward_hook(attention)
        tokenizer(torch.zeros(1, 3, 16, 16))
        # A block's last convolution is not computed again: nothing waits for its result.
        assert again.training.of(1) - plain.training.of(1) == sum(operations) > 0
        assert again.forward == plain.forward
        assert again.activations.of(4) < 0.6 * plain.activations.of(4)

    @pytest.mark.parametrize("name", available_quantizers())
    def test_every_quantizer_can_be_planned(self, name):
        settings = {"tokenizer.quantizer": {"name": name, "codebook_size": 64}} | TINY
        config = recipe_config("builtin/smoke", settings)
        plan = count_run(config, name)
        built = make_quantizer(config.tokenizer.quantizer)
        assert plan.parameters.codebook == sum(parameter.numel() for parameter in built.parameters())
        assert 0 < plan.forward_operations < plan.training_operations
        assert plan.memory_bytes > plan.state_bytes > 0

    def test_a_codebook_of_moving_averages_is_planned_with_blocks_computed_again(self):
        settings = {"tokenizer.quantizer": {"name": "vq_ema", "codebook_size": 64}} | TINY
        plain, again = (
            count_run(recipe_config("builtin/smoke", settings | {"speed.activation_checkpointing": checkpointing}))
            for checkpointing in (False, True)
        )
        assert again.activations.per_image < plain.activations.per_image

    def test_counting_leaves_random_numbers_and_default_type_alone(self):
        before = torch.get_rng_state()
        count_tokenizer_step(smoke(precision="64-true"))
        assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32

    def test_images_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="multiples of the downsampling"):
            count_run(smoke(data__image_size=17))


def calls_of_each_kind(dtype):
    """Results of new memory, of several tensors, in place and as views, each of them asked for with other numbers."""
    images = torch.empty(2, 8, 4, 6, dtype=dtype, device="meta")
    weight, vector = images.new_empty(3, 8, 2, 2), images.new_empty(8)
    turned = images.permute(0, 2, 3, 1)
    normed = torch.native_group_norm(images, vector, vector, 2, 8, 24, 4, 1e-5)
    halves = [images * 2, images.to(torch.int64) * 2, images.to(torch.int64) * 2.0, images + images.float()]
    views = [images.flatten(1), turned, images[:1], images.expand_as(images)]
    assert all(view.untyped_storage()._cdata == images.untyped_storage()._cdata for view in views)
    assert images.add_(1) is images and torch.mul(images, 2, out=images) is images
    copies = [torch.cat([images, images]), torch.empty_like(turned), turned.contiguous(), turned.sum(3)]
    convolved = [torch.nn.functional.conv2d(images, weight, stride=step) for step in (1, 2)]
    tensors = [*normed, *halves, *views, *copies, *convolved]
    return [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


def test_a_call_made_from_memory_has_the_results_and_operations_of_the_first():
    types = (torch.float32, torch.bfloat16, torch.float64)
    expected = [calls_of_each_kind(dtype) for dtype in types]
    with ShapeMeter() as meter:
        for repetition in (1, 2, 3):
            assert [calls_of_each_kind(dtype) for dtype in types] == expected
            # Two convolutions of 2 × 2 × 8 numbers per result, 3 × 5 and 2 × 3 places, 3 channels, 2 images.
            assert meter.operations == repetition * len(types) * 2 * 32 * (15 + 6) * 3 * 2


class TestPlan:
    def test_checkpoints_are_as_large_as_a_real_one(self, tmp_path):
        config = smoke(steps=1, record__tokens_per_code=1, loss__adversarial_weight=0.1, data__image_size=32)
        train(config, tmp_path / "run", progress=False)
        size = next((tmp_path / "run" / "checkpoints").glob("*.pt")).stat().st_size
        assert count_run(config).checkpoint_bytes == pytest.approx(size, rel=0.05)

    def test_snapshots_are_as_many_and_as_large_as_the_real_ones(self, tmp_path):
        config = smoke(steps=7, record__validate_every=3, record__tokens_per_code=1)
        run = train(config, tmp_path / "run", progress=False)
        schedule = count_run(config).snapshots
        assert run.snapshot_steps == [0, 2, 3, 6, 7]
        assert schedule.count == 5 and schedule.every == 3
        size = (run.path / "snapshots" / "step_00000003.npz").stat().st_size
        # Names and headers of an .npz file of seven arrays.
        assert schedule.bytes_each <= size <= schedule.bytes_each + 3000

    @pytest.mark.parametrize("steps", [1, 4999, 5000, 1_651_650, 10**8])
    @pytest.mark.parametrize("size", [1024, 262_144])
    def test_snapshots_stay_below_their_bound_and_few_are_not_thinned(self, steps, size):
        settings = {"steps": steps, "tokenizer.quantizer.codebook_size": size, "record.early_snapshots": [50, 200]}
        schedule = snapshot_schedule(recipe_config("imagenet/ibq_262144", settings))
        assert schedule.total_bytes <= SNAPSHOTS_BYTES
        assert schedule.every % 5000 == 0
        everywhere = schedule.bytes_each * (steps // 5000 + 4)
        assert (schedule.every == 5000) == (everywhere <= SNAPSHOTS_BYTES)
        if steps < 10_000:
            assert schedule.count == sum(map(schedule.includes, range(steps + 1)))

    def test_the_largest_codebook_keeps_a_snapshot_of_every_thirteenth_validation(self):
        told = count_run(recipe_config("imagenet/ibq_262144")).describe()
        assert "30 snapshots, thinned to one every 65,000 steps (one at each validation would be 335)" in told

    def test_a_thinned_run_validates_as_ever_and_resumes_to_the_same_snapshots(self, tmp_path, monkeypatch):
        config = smoke(steps=24, record__validate_every=3, record__tokens_per_code=1, record__checkpoint_every=4)
        whole = train(config, tmp_path / "whole", progress=False)
        monkeypatch.setattr(snapshots, "SNAPSHOTS_BYTES", 6 * count_run(config).snapshots.bytes_each)
        thinned = train(config, tmp_path / "thinned", progress=False)
        assert thinned.snapshot_steps == [0, 2, 9, 18, 24]
        assert (
            whole.metrics["validation_usage"].dropna().tolist() == thinned.metrics["validation_usage"].dropna().tolist()
        )

        def stop(row):
            if row["step"] == 14:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(config, tmp_path / "stopped", progress=False, watch=stop)
        resumed = train(config, tmp_path / "stopped", progress=False)
        assert resumed.snapshot_steps == thinned.snapshot_steps
        for step in resumed.snapshot_steps:
            ours, theirs = resumed.snapshot(step), thinned.snapshot(step)
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        assert figure_run_codes(thinned, method="pca").axes

    def test_time_and_price_are_arithmetic(self):
        plan = planned(steps=900, batch_size=8)
        cost = training_time(plan, 2.0, gpus=4, gpu_hour_price=3.0)
        assert (cost.gpu_hours, cost.price) == (1.0, 3.0)
        assert cost.days == pytest.approx(1 / 96)
        assert cost.describe() == "time: 1 GPU-hours = 0.01 days on 4 GPUs, cost 3"
        assert training_time(plan, 20.0).describe() == "time: 6 GPU-minutes on 1 GPU"
        assert training_time(plan, 2.0).gpus == plan.processes == 1
        assert training_time(plan, 2.0).price is None

    @pytest.mark.parametrize(
        ("speed", "gpus", "price", "says"),
        [(0, 1, 1.0, "images per second"), (1, 0, 1.0, "gpus"), (1, 1, -1.0, "price")],
    )
    def test_impossible_costs(self, speed, gpus, price, says):
        with pytest.raises(ValueError, match=says):
            training_time(planned(), speed, gpus, price)

    def test_state_counts_each_copy(self):
        plain = planned(ema_decay=0.0)
        per_number = 4 * plain.parameters.trained
        assert plain.state_bytes == 4 * per_number
        assert planned().state_bytes == 5 * per_number
        assert planned(processes=2).state_bytes == 6 * per_number


class TestCommand:
    def ask(self, *arguments):
        return CliRunner().invoke(main, ["plan", *arguments])

    def test_the_paper_tokenizer(self):
        told = self.ask(
            "imagenet/ibq_16384", "--images-per-second", "100", "--gpus", "8", "--gpu-hour-price", "2"
        ).output
        for words in ("46,752,256", "59,903,875", "4,194,304", "110,982,019", "2,765,633", "14,716,160"):
            assert words in told
        assert "rFID 1.37" in told and "1,651,650 steps, 422,822,400 images = 330.0 ×" in told
        assert "1,175 GPU-hours = 6.12 days on 8 GPUs, cost 2,349" in told

    def test_no_speed_is_made_up(self):
        told = self.ask("builtin/smoke", "batch_size=6").output
        assert "GPU-hours" not in told and "ImageNet" not in told
        assert "ibqlab train builtin/smoke steps=200 processes=1 batch_size=6` prints images/s" in told
        refused = self.ask("builtin/smoke", "--gpus", "2")
        assert refused.exit_code == 2 and "add --images-per-second" in refused.output

    def test_without_a_measured_gpu_hours_are_a_bound_and_say_so(self, monkeypatch):
        monkeypatch.setattr(time_and_price, "measured_speeds", dict)
        told = self.ask("imagenet/ibq_1024", "--gpus", "64").output
        plan = count_run(recipe_config("imagenet/ibq_1024"))
        hours = plan.images * plan.training_operations / PEAK_OPERATIONS / 3600
        assert f"{hours:,.0f} GPU-hours" in told and "no speed was measured on a GPU" in told
        assert "measure a speed on the GPU" in self.ask("imagenet/ibq_1024").output

    def test_measured_speeds_are_used_and_scaled_by_operations(self, tmp_path):
        place = tmp_path / "results" / "training_step"
        place.mkdir(parents=True)
        lines = [
            "recipe,images,quantizer,images_per_second,device",
            "imagenet/ibq_1024,4,as configured,50,NVIDIA H200",
            "imagenet/ibq_1024,16,as configured,80,NVIDIA H200",
            "imagenet/ibq_1024,64,as configured,,NVIDIA H200",
            "imagenet/ibq_1024,16,published form,900,NVIDIA H200",
            'imagenet/ibq_8192,16,as configured,999,"Some CPU, 2 cores"',
        ]
        (place / "gpu.csv").write_text("\n".join(lines) + "\n")
        speeds = measured_speeds(tmp_path)
        assert {name: speed.images_per_second for name, speed in speeds.items()} == {"imagenet/ibq_1024": 80.0}
        assert speeds["imagenet/ibq_1024"].origin == "measured on NVIDIA H200, 16 images a step"
        measured, other = (
            count_run(recipe_config(name), name) for name in ("imagenet/ibq_1024", "imagenet/ibq_16384_blocks1")
        )
        scaled = speed_of(other, speeds, [measured])
        ratio = measured.training_operations / other.training_operations
        assert scaled.images_per_second == pytest.approx(80 * ratio)
        assert scaled.origin == "by operations from imagenet/ibq_1024" and not scaled.is_bound

    def test_hours_are_the_recipes_own_measured_ones_unless_it_is_changed(self, monkeypatch):
        speed = TrainingSpeed(images_per_second=100.0, origin="measured on a card")
        speeds = {"imagenet/ibq_1024": speed, "imagenet/no_longer_there": speed}
        monkeypatch.setattr(time_and_price, "measured_speeds", lambda: speeds)
        own = count_run(recipe_config("imagenet/ibq_1024"))
        told = self.ask("imagenet/ibq_1024").output
        assert f"{own.images / 100 / 3600:,.0f} GPU-hours" in told and "(measured on a card)" in told
        changed = self.ask("imagenet/ibq_1024", "tokenizer.autoencoder.num_res_blocks=1").output
        other = count_run(recipe_config("imagenet/ibq_1024", {"tokenizer.autoencoder.num_res_blocks": 1}))
        hours = other.images / 100 / 3600 * other.training_operations / own.training_operations
        assert f"{hours:,.0f} GPU-hours" in changed and "(by operations from imagenet/ibq_1024)" in changed
        table = self.ask("imagenet").output
        assert "measured on a card" in table and "by operations from imagenet/ibq_1024" in table
        # Of generators nothing was measured, and a tokenizer says nothing about them.
        assert "GPU-hours =" not in self.ask("generators/ibq_b").output

    def test_hours_in_the_experiments_readme_are_those_of_plan(self):
        """Every row of the paper's tokenizers; a star where no speed of the recipe itself was measured."""
        page = (EXPERIMENTS / "README.md").read_text()
        pattern = r"\(imagenet/(\w+)\.yaml\) .*\| ([\d,]+)( \*)? \| (\d+) \| [^|]+\|$"
        rows = re.findall(pattern, page, re.MULTILINE)
        speeds = measured_speeds()
        costs = {name: count_recipe(str(EXPERIMENTS / f"{name}.yaml")) for name in speeds}
        for recipe, hours, star, hours_on_64 in rows:
            name = f"imagenet/{recipe}"
            cost = costs.get(name) or count_recipe(str(EXPERIMENTS / f"{name}.yaml"))
            speed = speeds.get(name) or speed_of(cost, speeds, list(costs.values()))
            time = training_time(cost, speed.images_per_second, 64)
            assert (hours, hours_on_64) == (f"{time.gpu_hours:,.0f}", f"{24 * time.days:.0f}"), name
            assert bool(star) == (name not in speeds)
        assert len(rows) == len(list((EXPERIMENTS / "imagenet").glob("*.yaml")))

    @pytest.mark.parametrize(
        ("recipes", "columns"),
        [("imagenet", ("rfid", "lpips", "usage")), ("generators", ("gfid", "inception_score"))],
    )
    def test_numbers_of_the_paper_are_called_so(self, recipes, columns):
        head = self.ask(recipes).output.splitlines()[0]
        assert all(f"paper's {name}" in head for name in columns)

    def test_a_folder_gives_one_row_per_recipe(self, tmp_path):
        write(tmp_path, one={"extends": "builtin/smoke"}, two={"extends": "builtin/smoke", "steps": 24})
        told = self.ask(str(tmp_path), "--images-per-second", "1")
        assert told.exit_code == 0, told.output
        lines = told.output.splitlines()
        assert len(lines) == 3 and "gpu_hours" in lines[0] and "rfid" not in lines[0]
        assert "one" in lines[1] and "two" in lines[2]
        refused = self.ask(str(write(tmp_path / "empty")))
        assert refused.exit_code == 2 and "holds no recipe" in refused.output

    def test_misspelt_recipes_and_settings_are_answered(self):
        assert "did you mean" in self.ask("imagenet/ibq_16348").output
        assert "did you mean 'batch_size'" in self.ask("builtin/smoke", "batch_sise=2").output

    def test_the_table_has_a_row_per_plan(self):
        table = cost_table([count_run(smoke(), "a", published_row("imagenet/ibq_1024"))])
        assert table.loc[0, ["recipe", "rfid", "steps"]].tolist() == ["a", 2.24, 12]


def test_a_published_row_is_a_tokenizers_or_a_generators():
    printed = {"table": "table 1", "source": "a paper"}
    assert PublishedRow(rfid=1.5, lpips=0.2, usage=0.5, **printed).describe() == (
        "rFID 1.50, LPIPS 0.2000, usage 50 % (a paper, table 1)"
    )
    assert PublishedRow(gfid=2.0, inception_score=250, precision=0.8, recall=0.6, **printed).describe() == (
        "gFID 2.00, IS 250.00, precision 0.80, recall 0.60 (a paper, table 1)"
    )
    assert PublishedRow(gfid=2.0, **printed).describe() == "gFID 2.00 (a paper, table 1)"
    for numbers in ({}, {"inception_score": 250}, {"rfid": 1.0, "gfid": 2.0}, {"rfid": 1.0, "inception_score": 250}):
        with pytest.raises(ValueError, match="a published row has rfid"):
            PublishedRow(**numbers, **printed)


def test_the_experiments_page_lists_every_imagenet_recipe_with_what_plan_counts():
    page = (EXPERIMENTS / "README.md").read_text()
    rows = {line.split("](")[1].partition(")")[0]: line for line in page.splitlines() if "](imagenet/" in line}
    assert sorted(rows) == sorted(f"{name}.yaml" for name in IMAGENET)
    for name, row in published_rows().items():
        assert f"| {row.rfid:.2f} |" in rows[f"{name}.yaml"] or "soft_vq" in name
    plan = count_run(recipe_config("imagenet/ibq_1024"))
    line = rows["imagenet/ibq_1024.yaml"]
    printed = [float(number.replace(",", "")) for cell in line.split("|")[6:9] for number in cell.split("/")]
    assert printed == pytest.approx(
        [
            plan.parameters.total / 1e6,
            plan.forward_operations / 1e9,
            plan.training_operations / 1e9,
            plan.activations.per_image / 2**30,
            plan.memory_bytes / 2**30,
        ],
        rel=0.01,
    )


TINY_GENERATOR = {
    "generator": {
        "name": "ibq",
        "vocabulary_size": 64,
        "num_classes": 3,
        "grid_size": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "hidden_multiple": 8,
    },
    "batch_size": 8,
    "steps": 5,
}
TINY_FACTORIZED = {
    **{key: value for key, value in TINY_GENERATOR["generator"].items() if key not in ("vocabulary_size", "depth")},
    **{"name": "magvit2", "bits": [2, 4], "spatial_depth": 2, "factorized_depth": 1},
}
TINY_LLAMAGEN = {**TINY_GENERATOR["generator"], "name": "llamagen"}


class TestGenerators:
    """Plans and recipes of generators."""

    def plan(self, **settings):
        dotted = {key.replace("__", "."): value for key, value in settings.items()}
        return count_run(recipe_config("builtin/digits_generator", TINY_GENERATOR | dotted))

    def test_parameters_are_those_of_the_generator(self):
        for settings in (TINY_GENERATOR["generator"], TINY_LLAMAGEN, TINY_FACTORIZED):
            plan = self.plan(generator=settings)
            assert plan.parameters.total == sum(
                p.numel() for p in make_generator(generator_config(settings)).parameters()
            )
            assert min(plan.parameters.embeddings, plan.parameters.blocks, plan.parameters.head) > 0

    def test_operations_are_the_matrix_products(self):
        plan, (width, hidden, tokens, heads, words) = self.plan(), (16, 48, 16, 2, 64)
        # Per token and block: qkv and output, feed-forward; per image and block: the class's part and the attention.
        block = tokens * (4 * width**2 + 3 * width * hidden) + 6 * width**2 + 2 * heads * tokens**2 * (width // heads)
        image = 2 * (2 * block + tokens * words * width + 2 * width**2)
        assert plan.forward_operations == image
        assert plan.training_operations == pytest.approx(3 * image, rel=0.02)

    def test_a_class_that_modulates_nothing_costs_no_operations(self):
        ibq, llamagen = self.plan(), self.plan(generator=TINY_LLAMAGEN)
        width, depth = 16, 2
        # The class's part: 6C × C for each block, 2C × C for the norm before the head, and their biases.
        assert ibq.forward_operations - llamagen.forward_operations == 2 * (6 * depth + 2) * width**2
        assert ibq.parameters.total - llamagen.parameters.total == (6 * depth + 2) * (width**2 + width)

    def test_memory_shrinks_with_shards_and_checkpoints(self):
        two = self.plan(processes=2)
        shards = self.plan(processes=2, speed__sharded=True)
        item = 4 * two.parameters.total
        assert (two.state_bytes, shards.state_bytes) == (5 * item, 2 * item)
        assert (two.checkpoint_bytes, self.plan(precision="64-true").checkpoint_bytes) == (3 * item, 6 * item)
        deep = {**TINY_GENERATOR["generator"], "depth": 6}
        plain = self.plan(generator=deep)
        again = self.plan(generator=deep, speed__activation_checkpointing=True)
        assert again.activations.per_image < plain.activations.per_image / 2
        assert again.training_operations > 1.2 * plain.training_operations
        assert plain.cache_bytes == 2 * 4 * 6 * 16 * 16

    @pytest.mark.parametrize("name", [f"generators/{file.stem}" for file in find_recipes("generators")])
    def test_published_recipes_are_the_published_models(self, name):
        config, printed = recipe_config(name), published_row(name)
        assert type(config) is GeneratorTrainConfig and printed.gfid > 2
        assert config.batch_size == 768 and config.batch_size % config.processes == 0
        assert config.generator.head_dim == 64 or config.generator.config_name == "magvit2"
        with torch.device("meta"):
            model = make_generator(config.generator)
        millions = {"ibq_b": 343, "ibq_l": 650, "ibq_xl": 1076, "ibq_xxl": 2063}
        millions |= {"magvit2_b": 344, "magvit2_l": 804, "magvit2_xl": 1487}
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions[name.split("/")[1]]

    def test_published_schedules_have_the_published_steps(self):
        facts = golden("lr_schedules")[0]["lr_wd_annealing"]
        for name, size in (("IBQ-B", "b"), ("IBQ-XXL", "xxl")):
            config = recipe_config(f"generators/ibq_{size}")
            assert config.steps == facts[name]["max_it"]
            assert round(config.optimizer.warmup_share * config.steps) == facts[name]["wp_it"]
            assert config.optimizer.final_share == facts[name]["wpe"]
            assert config.optimizer.final_weight_decay == (facts[name]["twde"] or facts[name]["weight_decay"])

    def test_the_command_plans_both_kinds(self):
        settings = [f"generator.{key}={value}" for key, value in TINY_GENERATOR["generator"].items()]
        one = CliRunner().invoke(main, ["plan", "builtin/digits_generator", *settings], catch_exceptions=False)
        assert "generator, all" in one.output and "published: nothing" in one.output
        folder = CliRunner().invoke(main, ["plan", "builtin"], catch_exceptions=False)
        assert folder.exit_code == 0
        assert "builtin/digits_generator" in folder.output and "builtin/photos" in folder.output
        assert "images_per_second" not in folder.output
