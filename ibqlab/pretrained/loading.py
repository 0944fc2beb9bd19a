"""Read a trained tokenizer back from its run folder."""

from pathlib import Path

from ibqlab.config import parse
from ibqlab.quantizers.base import require_choice
from ibqlab.runs import Run, RunError
from ibqlab.tokenizer import Tokenizer
from ibqlab.training.config import TrainConfig

WEIGHTS = ("ema", "raw")


def load_tokenizer(path: str | Path, weights: str = "ema") -> Tokenizer:
    """The tokenizer of a run at its last checkpoint, in evaluation mode, on the CPU.

    Args:
        path: a run folder.
        weights: "ema", the averaged weights (published results use them; they need a few thousand steps to mean
            something), or "raw", the weights as trained.
    Returns:
        A tokenizer; move it with `.to(device)`.
    Raises:
        FileNotFoundError, RunError: no run there, no checkpoint yet, or averaged weights that the run did not keep.
        ValueError: another value of weights.
    """
    require_choice("weights", weights, WEIGHTS)
    run = Run(path)
    found = run.load_checkpoint()
    if found is None:
        raise RunError(f"the run {run.name} has no checkpoint yet; let it train to its first one")
    _, state = found
    config = parse(TrainConfig, run.config, source=f"run {run.name}")
    tokenizer = Tokenizer.from_config(config.tokenizer)
    tokenizer.load_state_dict(state["model"], strict=True)
    if weights == "ema":
        if not state["ema"]:
            raise RunError(f'the run {run.name} kept no averaged weights (ema_decay is 0); type weights="raw"')
        parameters = dict(tokenizer.named_parameters())
        for name, shadow in state["ema"].items():
            parameters[name].data.copy_(shadow)
    return tokenizer.eval()
