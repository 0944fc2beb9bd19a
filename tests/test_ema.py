"""Averaged weights: the published sequence and what a checkpoint keeps."""

import pytest
import torch
from golden import golden
from torch import nn

from ibqlab.pretrained import load_tokenizer
from ibqlab.runs import Run
from ibqlab.training import recipe_config, train
from ibqlab.training.ema import WeightAverage


def published_module():
    """A module whose parameters are named like those of the golden sequence."""
    module = nn.Module()
    module.a = nn.Linear(3, 2)
    module.sub = nn.Module()
    module.sub.b_1 = nn.Conv2d(2, 2, 1)
    return module


@torch.no_grad()
def set_weights(module, values, step):
    for name, parameter in module.named_parameters():
        parameter.copy_(values[f"step{step}/param/{name}"])


def test_shadows_follow_the_published_code_to_the_last_place():
    description, values = golden("ema_sequence")
    module = published_module()
    set_weights(module, values, 0)
    average = WeightAverage(module, description["decay"])
    assert average.decay == float(values["step1/ema/decay"])
    for step in range(1, 5):
        set_weights(module, values, step)
        average.update()
        for name, shadow in average.shadows.items():
            published = values[f"step{step}/ema/{name.replace('.', '')}"]
            # The published code rounds twice where lerp may round once: one unit in the last place.
            torch.testing.assert_close(shadow, published, rtol=torch.finfo(torch.float32).eps, atol=0)


def test_only_trainable_parameters_are_averaged_and_names_must_match():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.9)
    assert list(average.state_dict()) == ["weight"]
    average.load_state_dict({"weight": torch.ones(2, 2)})
    assert torch.equal(average.shadows["weight"], torch.ones(2, 2))
    with pytest.raises(ValueError, match="bias"):
        average.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})


def test_a_run_keeps_the_average_after_every_step(tmp_path):
    settings = {"steps": 3, "ema_decay": 0.75, "record.checkpoint_every": 1, "record.validate_every": 100}
    run = train(recipe_config("builtin/smoke", settings), tmp_path / "run", progress=False)
    before, last = (torch.load(run.path / f"checkpoints/step_0000000{n}.pt")["state"] for n in (2, 3))
    moved = 0
    for name, shadow in last["ema"].items():
        expected = before["ema"][name].lerp(last["model"][name], 0.25)
        torch.testing.assert_close(shadow, expected, rtol=0, atol=0)
        moved += int((shadow != last["model"][name]).sum())
    assert moved > 0
    averaged = dict(load_tokenizer(run.path, weights="ema").named_parameters())
    assert averaged.keys() == last["ema"].keys()
    assert all(torch.equal(averaged[name], shadow) for name, shadow in last["ema"].items())


def test_no_decay_keeps_no_average(tmp_path):
    run = train(recipe_config("builtin/smoke", {"steps": 1, "ema_decay": 0}), tmp_path / "run", progress=False)
    assert Run(run.path).load_checkpoint()[1]["ema"] == {}
