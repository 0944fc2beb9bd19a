"""The recorder behind a monitor: indices wait until a row is due, so that no step waits for its device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PENDING_TOKENS = 2**22
"""Tokens whose indices wait for the next row, at most: 16 MiB."""
_OF_FEATURES = ("feature_norm_mean", "feature_norm_std")
_OF_CODES = ("code_norm_mean", "code_norm_std")
_OF_INDICES = (
    *("step_usage", "step_tokens", "step_usage_even", "usage", "usage_tokens", "perplexity", "dead_codes"),
    *("steps_since_hit", "gradient_reach", "births", "deaths"),
)


class Window:
    """The latest tokens' indices and what a row says of them, of codes and of features.

    Args:
        codebook_size: K.
        tokens: length of the usage window over all processes.
        probe_tokens: tokens on which distances and softmax perplexity are measured.
        processes: how many share the window.
        device: where it lies: that of the indices.
    """

    def __init__(self, codebook_size: int, tokens: int, probe_tokens: int, processes: int, device: torch.device):
        from ibqlab.diagnostics.recorder import PlainCodebook, Recorder

        self.codebook_size, self.device, self.processes = codebook_size, device, processes
        self._codebook = torch.empty(0, 1, device=device)
        self._gradient: Tensor | None = None
        self._norms: tuple[int, Tensor | None] = (-1, None)
        self._pending: list[tuple[int, Tensor]] = []
        self._waiting = 0
        parts = PlainCodebook(size=codebook_size, read=lambda: self._codebook, read_gradient=lambda: self._gradient)
        self.recorder = Recorder(parts, tokens, probe_tokens, processes)

    def add(self, step: int, flat: Tensor) -> None:
        """Indices of a step, (N,) int32, of any value; cheap."""
        self._pending.append((step, flat))
        self._waiting += len(flat)

    def load(self, state: Any) -> bool:
        """Go on with a stored window; False, and nothing changed, where it is of other sizes or no window at all.

        Args:
            state: the recorder's.
        """
        recorder, state = self.recorder, state if isinstance(state, Mapping) else {}
        like = {"window": recorder.window, "last_hit": recorder.last_hit}
        cursor, alive = state.get("cursor"), state.get("alive")
        fits = all(isinstance(state.get(name), Tensor) and state[name].shape == own.shape for name, own in like.items())
        if not fits or type(cursor) is not int or not 0 <= cursor < len(recorder.window):
            return False
        if not -1 <= int(state["window"].min()) <= int(state["window"].max()) < self.codebook_size:
            return False
        if alive is not None and not (isinstance(alive, Tensor) and alive.shape == recorder.last_hit.shape):
            return False
        recorder.load_state_dict(dict(state))
        return True

    @property
    def is_full(self) -> bool:
        """Whether more indices wait than should."""
        return self._waiting > PENDING_TOKENS

    def take_in(self) -> dict[str, int]:
        """Count what waits. Tokens with index −1 have no code and count for nothing.

        Returns:
            How many indices were wrong: "above" (K or more) and "below" (−2 or less), left out; {} if none was.
        """
        wrong = {"above": 0, "below": 0}
        pending, self._pending, self._waiting = self._pending, [], 0  # what cannot be counted is not tried again
        for step, flat in pending:
            in_range = (flat >= 0) & (flat < self.codebook_size)
            codes = flat[in_range]
            if len(codes) < len(flat):
                wrong["above"] += int((flat >= self.codebook_size).sum())
                wrong["below"] += int((flat < -1).sum())
            self.recorder.observe(codes.long().to(self.device), step)
        return {side: count for side, count in wrong.items() if count}

    def hits(self, step: int, has_gradient: bool) -> dict[str, Tensor]:
        """What a snapshot tells of each code's use. Every process asks for it.

        Args:
            step: of the snapshot, whose row was reported.
            has_gradient: whether what `report` was given are gradients, and not how far codes were moved.
        """
        arrays = {"counts": self.recorder.counts(), "last_hit": self.recorder.last_hits()}
        if has_gradient and self._norms[0] == step and self._norms[1] is not None:
            arrays["gradient_norm"] = self._norms[1]
        return arrays

    def report(
        self,
        step: int,
        codes: Tensor | None,
        sample: Tensor | None,
        chosen: Tensor | None = None,
        read_gradient: Callable[[], Tensor | None] | None = None,
    ) -> dict[str, Any]:
        """The recorder's row. Every process asks for one, whatever it was given: sums need all of them.

        Args:
            step: the step just done, whose indices were taken in.
            codes: (K, D), finite; None leaves out what is measured on codes.
            sample: (n, D) features, finite float32; None leaves out what is measured on features.
            chosen: (n,) the sample's codes, −1 where there is none; None leaves out the quantization error.
            read_gradient: gives how the step moves each code; None, or None given, leaves out gradient reach.
        """
        self._codebook = codes if codes is not None else torch.zeros(self.codebook_size, 1, device=self.device)
        self._gradient = read_gradient() if read_gradient else None
        is_whole = codes is not None and sample is not None
        stand_in = torch.zeros(1, self._codebook.shape[1], device=self._codebook.device)
        tokens = sample.to(self._codebook.device) if is_whole else stand_in
        with torch.autocast(tokens.device.type, enabled=False):
            row = self.recorder.report(tokens.T[None, :, None, :], step)  # (1, D, 1, n), as an image of one row
            self._norms = step, self.recorder.gradient_norms()
        self._codebook = torch.empty(0, 1, device=self.device)  # somebody's tensor is not kept alive
        if not is_whole:
            known = _OF_INDICES + (_OF_CODES if codes is not None else ())
            row = {name: row[name] for name in known if name in row}
            if sample is not None:
                norms = sample.norm(dim=1)
                row |= dict(zip(_OF_FEATURES, (float(norms.mean()), float(norms.std(correction=0))), strict=True))
        elif chosen is not None:
            chosen = chosen.to(codes.device).long()
            has_code = (chosen >= 0) & (chosen < self.codebook_size)
            gaps = tokens[has_code] - codes[chosen[has_code]]
            if len(gaps):
                row["quantization_error"] = float(gaps.square().mean())
        if self._gradient is None:
            del row["gradient_reach"]  # nobody knows it
        self._gradient = None
        return row


def follow_gradient(codebook: nn.Parameter, is_wanted: Callable[[], bool]) -> Callable[[], Tensor | None]:
    """A function that gives the norms (K, 1) of a codebook's gradient in the last backward pass, `zero_grad` or not.

    Args:
        codebook: the parameter that is trained.
        is_wanted: whether the step in progress will have a row; the gradient of others is not looked at.
    Raises:
        ValueError: no such parameter.
    """
    if not codebook.is_leaf or not codebook.requires_grad:
        raise ValueError(
            "watch needs the parameter that is trained; got a tensor that was computed from others. Pass a function "
            "that gives the codebook's gradient, (K, D)"
        )
    norms: list[Tensor] = []

    def keep(parameter: Tensor) -> None:
        if is_wanted():
            norms[:] = [torch.linalg.vector_norm(_rows(parameter.grad).float(), dim=1, keepdim=True)]

    codebook.register_post_accumulate_grad_hook(keep)
    return lambda: norms.pop() if norms else None if codebook.grad is None else _rows(codebook.grad)


class Movement:
    """How far codes that take no gradient were moved by a step, which is what moving averages learn by.

    Args:
        read: gives the codebook as it is now.
    """

    def __init__(self, read: Callable[[], Tensor]):
        self._read = read
        self._before: Tensor | None = None
        self.keep()

    def keep(self) -> None:
        """Before a step that will have a row: copy the codebook."""
        self._before = _rows(self._read()).clone()

    def take(self) -> Tensor | None:
        """The displacement since `keep`, (K, D), once; None where nothing was kept."""
        before, self._before = self._before, None
        return None if before is None else _rows(self._read()) - before


def _rows(gradient: Tensor) -> Tensor:
    """(K, D), also of a parameter (1, K, D)."""
    return gradient.detach().flatten(0, -2)
