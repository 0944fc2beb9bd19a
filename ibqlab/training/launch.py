"""The processes and devices of a run."""

import os
from typing import Any

import torch

from ibqlab.losses.errors import TrainingError
from ibqlab.recipes.run_config import RunConfig
from ibqlab.training.fabric import import_fabric


def launch(config: RunConfig) -> Any:
    """Fabric with as many processes as the config asks for.

    Raises:
        TrainingError: another number of processes runs, or there are not as many devices; the message says what to
            type.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != config.processes:
        raise TrainingError(
            f"the config asks for {config.processes} process(es), {started} are running; type: "
            + (
                f"torchrun --nproc-per-node {config.processes} -m ibqlab train RECIPE processes={config.processes}"
                if config.processes > 1
                else f"ibqlab train RECIPE processes={started}"
            )
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started > 1 else 1
    accelerator = _accelerator(config.accelerator, local)
    lightning = import_fabric()
    fabric = lightning.Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=started // local,
        # Fabric's own double precision cuts every output to float32; the networks are double from the start instead.
        precision="32-true" if config.precision == "64-true" else config.precision,
        # A single process must not take a Slurm allocation for a world to join.
        plugins=[lightning.plugins.environments.LightningEnvironment()] if started == 1 else None,
        # Upkeep keeps buffers equal on all processes; sending frozen codes at every step would cost K·D numbers.
        strategy=lightning.strategies.DDPStrategy(broadcast_buffers=False) if started > 1 else "auto",
    )
    fabric.launch()
    if fabric.world_size != config.processes:
        raise TrainingError(f"{fabric.world_size} process(es) came up, the config asks for {config.processes}")
    return fabric


def _accelerator(setting: str, processes: int) -> str:
    """The kind of device for so many processes on this machine: cpu or cuda."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and not devices):
        return "cpu"
    if devices < processes:
        raise TrainingError(
            f"each process needs a CUDA device of its own; {processes} run here and there are {devices}. Start at most "
            f"{max(devices, 1)}, or type accelerator=cpu"
        )
    return "cuda"
