"""The monitor as a callback of two training libraries; each class is made when it is first asked for.

    Trainer(callbacks=[LightningCallback(monitor)])        # lightning.pytorch or pytorch_lightning
    Trainer(…, callbacks=[TransformersCallback(monitor)])  # transformers, whose Trainer runs on Accelerate

Both need a monitor that was attached to the quantizer (`CodebookMonitor.attach`). A loop of one's own, under
Accelerate, torchrun or neither, calls `update` itself and needs no callback.
"""

import importlib
from functools import cache
from typing import Any

from torch import Tensor

NAMES = ("LightningCallback", "TransformersCallback")


def __getattr__(name: str) -> type:
    if name in NAMES:
        return _lightning_callback() if name == "LightningCallback" else _transformers_callback()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _import_one(*modules: str) -> Any:
    """The first of some modules that is installed."""
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and not module.startswith(error.name):
                raise
    raise ImportError(f"this callback needs {' or '.join(modules)}, and neither is installed: pip install {modules[0]}")


@cache
def _lightning_callback() -> type:
    library = _import_one("lightning.pytorch", "pytorch_lightning")

    class LightningCallback(library.Callback):
        """Updates a monitor after each batch of a Lightning Trainer, with the loss that `training_step` returned.

        Args:
            monitor: attached to the quantizer.
            metrics: names of logged metrics that rows are to hold besides.
        """

        def __init__(self, monitor: Any, metrics: tuple[str, ...] = ()):
            self.monitor, self.metrics = monitor, tuple(metrics)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            numbers = {"loss": loss} if isinstance(loss, Tensor) and loss.numel() == 1 else {}
            logged = trainer.callback_metrics
            numbers |= {name: logged[name] for name in self.metrics if name in logged}
            self.monitor.update(trainer.global_step, **numbers)
            if self.monitor.stopped:
                trainer.should_stop = True

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.monitor.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.monitor.close("stopped" if isinstance(exception, KeyboardInterrupt) else "failed")

        def state_dict(self) -> dict[str, Any]:
            return self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.monitor.load_state_dict(state_dict)

    return LightningCallback


@cache
def _transformers_callback() -> type:
    library = _import_one("transformers")

    class TransformersCallback(library.TrainerCallback):
        """Updates a monitor after each step of a Transformers Trainer; what the Trainer logs has a row of its own.

        Args:
            monitor: attached to the quantizer.
        """

        def __init__(self, monitor: Any):
            self.monitor = monitor

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.update(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.update(state.global_step)
            if self.monitor.stopped:
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.monitor.log(state.global_step, loss=logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.close()

    return TransformersCallback
