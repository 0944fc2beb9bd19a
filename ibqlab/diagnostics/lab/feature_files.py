"""Your features in the lab: rows of a file, drawn without reading all of it.

    .npy            mapped, whatever its size
    .npz            one array of it, read whole
    .safetensors    one tensor of it, mapped
    .parquet        a column of lists, or all columns of numbers; read whole, needs pyarrow
    an array        NumPy's, a memory map or a tensor

Some rows are kept for validation, the same ones for every method: one in ten and at most 65,536, but half of them where
that is less than 5,000. A usage that is counted in few rows reads low, whatever the codebook does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import CODE_DIM, SEED, memory_bytes, require, require_at_most, require_memory, whole_number
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, expanded, open_ordinary, read_npz, why_not
from ibqlab.quantizers.vectors import check_in_memory

LEAST_ROWS = 10
ENOUGH_ROWS, MOST_ROWS = 5_000, 65_536
"""Kept for validation: half of a small file up to so many rows, a tenth of a large one up to so many."""
CHECKED_NUMBERS = 2**26
"""Of files with so many numbers at most every one is looked at when the file is opened; of larger ones those that are
drawn."""
_DEVIATIONS = (1e-36, 1e36)
"""Least and largest standard deviation that features are divided by."""
_FILE_BYTES = 2**36
"""Largest file that is read whole."""
_SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")


class FeatureFile:
    """Features of any kind – images, speech, text – one vector per row, as the lab takes them.

    Args:
        source: a file (.npy, .npz, .safetensors, .parquet), or an array or tensor (rows, D) of floats.
        column: which array of an .npz, tensor of a .safetensors or column of a .parquet, where there are several.
        standardise: subtract the mean vector and divide by one number, so that the mean variance of a dimension is 1.
            Codes that start at N(0, 1) then lie among the features.
        seed: of the rows that a step draws.
        name: what an array is called in tables and messages; a file has its own.
    Raises:
        FileNotFoundError: there is no such file; the message says in which folder it was looked for.
        ValueError: a file of another kind, without rows of floats, with fewer than ten rows, or with NaN, infinity or
            masked numbers; the message names it, the rule, and what to type. A file has no masks: NumPy leaves them out
            when it writes one.
    """

    def __init__(
        self,
        source: str | Path | np.ndarray | Tensor,
        column: str = "",
        *,
        standardise: bool = False,
        seed: int = 0,
        name: str = "",
    ):
        require(isinstance(column, str), f"column must be a name in quotes; got {column!r}")
        require(isinstance(standardise, bool), f"standardise must be True or False; got {standardise!r}")
        self.seed, self.column, self.standardise = whole_number("seed", seed, 0, SEED), column, standardise
        is_file = isinstance(source, str | Path)
        self.path = expanded(source) if is_file else None
        self.name = self.path.name if self.path else name or "an array"
        if is_file:
            self._rows = _open(self.path, column)
        else:
            require(not column, f"column names a part of a file; {self.name} has none: leave column out")
            self._rows = source
        self._rows = _checked(self._rows, self.name)
        self.rows, self.dim = self._rows.shape
        share = max(min(self.rows // 2, ENOUGH_ROWS), min(self.rows // 10, MOST_ROWS))
        self._held = np.sort(np.random.default_rng((0, self.rows)).choice(self.rows, share, replace=False))
        """Rows for validation."""
        self._shift, self._scale = np.zeros(self.dim, np.float32), np.float32(1)
        if self.rows * self.dim <= CHECKED_NUMBERS:
            for start in range(0, self.rows, 65_536):
                self._read(np.arange(start, min(start + 65_536, self.rows)))
        if standardise:
            sample = self._read(self._training_rows(np.random.default_rng(0), 10_000)).astype(np.float64)
            self._shift, deviation = sample.mean(0).astype(np.float32), sample.var(0).mean() ** 0.5
            require(
                deviation > 0,
                f"{self.name}: all rows are equal in float32, so they cannot be standardised; standardise=False, or "
                "features - features.mean(0) in float64 first",
            )
            require(
                _DEVIATIONS[0] <= deviation <= _DEVIATIONS[1],
                f"{self.name}: features that are to be standardised must have a standard deviation of "
                f"{_DEVIATIONS[0]:g} to {_DEVIATIONS[1]:g}, which float32 can divide by; theirs is {deviation:.1e}. "
                "Use features.astype('float64') / features.astype('float64').std()",
            )
            self._scale = np.float32(1 / deviation)

    def points(self, count: int, step: int, *, validation: bool = False) -> Float[Tensor, "count D"]:
        """Rows of a step, drawn with replacement; for validation without, and so no more than are kept for it.

        Args:
            count: how many, at least 1.
            step: of the run, ≥ 0.
            validation: of the rows that training never sees.
        Raises:
            ValueError: one of them holds NaN or infinity.
        """
        generator = np.random.default_rng((self.seed, 2 if validation else 1, step))
        rows = generator.permutation(self._held)[:count] if validation else self._training_rows(generator, count)
        with np.errstate(over="ignore"):
            features = (self._read(rows) - self._shift) * self._scale
        require(
            bool(np.isfinite(features).all()),
            f"{self.name}: a row lies so far from the others that float32 cannot hold it once standardised; leave it "
            "out, or standardise=False",
        )
        return torch.from_numpy(features)

    def features(self, points: Float[Tensor, "N D"], progress: float) -> Float[Tensor, "N D"]:
        """The rows themselves, at any share of the run."""
        return points

    def networks(self, code_dim: int) -> None:
        """Features of a file have no encoder that could learn.

        Args:
            code_dim: as for a world.
        """

    def settings(self) -> dict[str, Any]:
        """As a run's config.yaml holds them."""
        facts = {"name": self.name, "rows": self.rows, "dim": self.dim, "seed": self.seed}
        return {"features": facts | {"column": self.column, "standardise": self.standardise}}

    def describe(self) -> str:
        """In a few words, for captions."""
        column = f", {self.column}" if self.column else ""
        return f"{self.rows:,} rows of {self.name}{column}{', standardised' if self.standardise else ''}"

    def _training_rows(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of rows that are not held out: the n-th of them lies behind the held-out rows before it."""
        chosen = generator.integers(self.rows - len(self._held), size=count)
        return chosen + np.searchsorted(self._held - np.arange(len(self._held)), chosen, side="right")

    def _read(self, rows: np.ndarray) -> Float[np.ndarray, "R D"]:
        """Some rows in float32, each checked to be finite."""
        if isinstance(self._rows, Tensor):
            picked = self._rows[torch.from_numpy(rows)].float().numpy()
        else:
            with np.errstate(over="ignore"):  # numbers that float32 does not hold become infinity, which is refused
                picked = np.asarray(self._rows[rows], dtype=np.float32)
        finite = np.isfinite(picked).all(1)
        if not finite.all():
            row = int(rows[~finite].min())
            raise ValueError(
                f"{self.name}: features must be finite in float32; row {row:,} holds NaN or infinity, and so do "
                f"{int((~finite).sum()):,} of {len(rows):,} rows looked at. Leave them out: "
                "features[numpy.isfinite(features).all(1)]"
            )
        return picked


def _open(path: Path, column: str) -> Any:
    """The array behind a file's rows, mapped where the format allows it."""
    try:
        open_ordinary(path).close()  # a pipe or folder is refused
    except FileNotFoundError:
        folder = path.absolute().parent
        where = f"in {folder}" if folder.is_dir() else f"and no folder {folder}"
        raise FileNotFoundError(f"{path.name}: there is no such file {where}; write its whole path") from None
    suffix = path.suffix.lower()
    require(
        suffix in _SUFFIXES,
        f"{path.name}: features are read from {', '.join(_SUFFIXES)}; got {suffix or 'a name without ending'}. Save "
        "them with numpy.save('features.npy', features)",
    )
    require(
        suffix != ".npy" or not column, f"{path.name} holds one array; column belongs to other formats: leave it out"
    )
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            arrays = read_npz(path, min(_FILE_BYTES, memory_bytes() or _FILE_BYTES))
            return arrays[_chosen(path, column, list(arrays), "array")]
        if suffix == ".safetensors":
            return _open_safetensors(path, column)
        return _open_parquet(path, column)
    except (UnreadableFile, FileNotFoundError):
        raise
    except OSError as error:
        raise UnreadableFile(f"{path.name}: {why_not(error)}") from None
    except (ValueError, EOFError) as error:
        if str(error).startswith(path.name):
            raise
        if "pickle" in str(error) or "Python objects" in str(error):  # the first NumPy says of any file not its own
            raise ValueError(
                f"{path.name} is no {suffix} file, or holds Python objects, which could run code; write the features "
                "with numpy.save('features.npy', features.astype('float32'))"
            ) from None
        reason = for_terminal(str(error).splitlines()[0] if str(error) else type(error).__name__, 160)
        raise ValueError(f"{path.name} is no whole {suffix} file of numbers ({reason}); write it again") from None


def _open_safetensors(path: Path, column: str) -> Tensor:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only this format needs it

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(_chosen(path, column, list(file.keys()), "tensor"))
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is no whole .safetensors file ({for_terminal(error, 160)}); write it again"
        ) from None


def _open_parquet(path: Path, column: str) -> np.ndarray:
    try:
        import pyarrow as arrow  # noqa: PLC0415 - only this format needs it
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise ValueError(
            f"{path.name}: reading Parquet needs pyarrow: pip install pyarrow. Or save the features with numpy.save"
        ) from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        schema = file.schema_arrow
        lists = [field.name for field in schema if _is_list(arrow, field.type)]
        numbers = [field.name for field in schema if arrow.types.is_floating(field.type)]
        rows = file.metadata.num_rows
        if column or lists:
            name = _chosen(path, column, lists + numbers if column else lists, "column")
            values = file.read(columns=[name]).column(name).combine_chunks()
            if name in numbers:
                return values.to_numpy(zero_copy_only=False)[:, None]
            flat = values.flatten().to_numpy(zero_copy_only=False)
            width = len(flat) // max(1, rows)
            even = width * rows == len(flat) and not values.null_count
            lengths = values.value_lengths().to_numpy(zero_copy_only=False) if even else np.zeros(1)
            require(
                even and (lengths == width).all(),
                f"{path.name}, column {for_terminal(name)!r}: all lists must have one length, the dimension D; theirs "
                "differ or are missing. Cut or leave out the odd ones",
            )
            return flat.reshape(rows, width)
        require(
            len(numbers) > 0,
            f"{path.name}: features need a column of lists of floats, or columns of floats; got "
            f"{for_terminal(', '.join(f'{field.name} ({field.type})' for field in schema), 160)}",
        )
        require_memory(4 * rows * len(numbers), f"{path.name}", "choose fewer columns, or save it as .npy")
        table = file.read(columns=numbers)
        return np.stack([table.column(name).to_numpy().astype(np.float32) for name in numbers], axis=1)
    except arrow.ArrowException as error:
        raise ValueError(f"{path.name} is no whole Parquet file ({for_terminal(error, 160)}); write it again") from None


def _is_list(arrow: Any, kind: Any) -> bool:
    """Whether a column holds lists of floats."""
    types = arrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_floating(kind.value_type)


def _chosen(path: Path, column: str, names: list[str], kind: str) -> str:
    """The part of a file that holds the features."""
    listed = for_terminal(", ".join(names), 160) or "none"
    if column:
        require(column in names, f"{path.name} has no {kind} {for_terminal(column)!r} of floats; there are: {listed}")
        return column
    require(len(names) > 0, f"{path.name} holds no {kind}; save the features (rows, D) in it")
    require(len(names) == 1, f"{path.name} holds several {kind}s: {listed}. Say which: column={names[0]!r}")
    return names[0]


def _checked(rows: Any, name: str) -> np.ndarray | Tensor:
    """Rows of floats in the memory of this machine or on its disk, refused where they are something else."""
    is_array = isinstance(rows, np.ndarray | Tensor)
    require(
        is_array,
        f"{name}: features are a file's path, an array or a tensor; got {type(rows).__name__}. Use "
        "numpy.asarray(features, dtype='float32')",
    )
    check_in_memory(rows, f"{name}: features", "features")
    rows = rows.detach().cpu() if isinstance(rows, Tensor) else rows
    shape = tuple(rows.shape)
    is_float = rows.is_floating_point() if isinstance(rows, Tensor) else rows.dtype.kind == "f"
    require(is_float, f"{name}: features must be floating-point numbers; got {rows.dtype}. {_how_to_float(rows)}")
    require(
        len(shape) == 2 and shape[1] >= 1,
        f"{name}: features must be (rows, D), one vector per row; got {shape}. Features (B, D, h, w) become rows by "
        ".permute(0, 2, 3, 1).reshape(-1, D), a single list of numbers by [:, None]",
    )
    require(
        shape[0] >= LEAST_ROWS,
        f"{name}: features need at least {LEAST_ROWS} rows, since some are kept for validation; got {shape[0]}",
    )
    require_at_most("dimension of the features", shape[1], CODE_DIM)
    return rows


def _how_to_float(rows: np.ndarray | Tensor) -> str:
    """How numbers of another kind become floats."""
    is_complex = rows.is_complex() if isinstance(rows, Tensor) else rows.dtype.kind == "c"
    if is_complex:
        return "Put both parts side by side: numpy.concatenate([features.real, features.imag], axis=1)"
    if str(rows.dtype).endswith("bool"):
        return "Use features.astype('float32'), of a tensor features.float()"
    return (
        "Indices are what a quantizer makes of features; pixels become floats by .astype('float32') / 255, of a tensor "
        ".float() / 255"
    )
