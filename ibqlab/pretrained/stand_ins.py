"""Pickles read without importing, calling or building anything that they name.

A pickle is a program for a small stack machine. Python's reader runs it, and may then import any name and call it.
This reader runs the same program and keeps numbers, text, lists, tuples and dicts. A name that the pickle wants to
import becomes an inert `StandIn` that records the name. Whatever the pickle does with it – call it, set its state, put
things into it, use it as a key – gives a stand-in again and does nothing. A few names of torch that build tensors are
known by their exact text; calling one gives a `StoredTensor`, which is a description (where its numbers lie, shape,
strides). `mapped_storages` checks the descriptions and makes tensors of those that are wanted.

Why nothing can run:
  * No opcode of Python's reader that calls, imports, sets attributes or looks up a registry is kept. `_Machine` has a
    table of its own with our functions in their places; none of them calls an object from the stack.
  * What is on the stack is a builtin value or one of the three small classes here, without `__call__`, `__setstate__`
    or `__dict__`. So there is no class or function of ours, or of anybody's, that a pickle could reach and change.
  * Keys of dicts are text, numbers and stand-ins, which hash and compare without running code. A key that contains
    other objects becomes a stand-in: hashing tuples that are nested deeply enough ends the process.
  * Work and memory are bounded by STEPS, copying included, and no read is longer than what the file holds.

Python's reader in Python (`pickle._Unpickler`) is subclassed because its table can be replaced; the one in C has no
table, reserves memory for any memo index that a pickle claims, and looks into copyreg's cache by itself.
"""

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

STEPS = 2**21
"""Operations of a file's pickles; those of a checkpoint with 5,000 tensors and an optimiser are fewer than 10⁶."""
READ_BYTES = 2**26
"""Longest text in a pickle."""
LETTERS = 160
"""Letters kept of a name."""
MAX_KEY = 2**63
MAX_DIMENSIONS = 64
STORAGES = {
    ("torch", "DoubleStorage"): "float64",
    ("torch", "FloatStorage"): "float32",
    ("torch", "HalfStorage"): "float16",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "LongStorage"): "int64",
    ("torch", "IntStorage"): "int32",
    ("torch", "ShortStorage"): "int16",
    ("torch", "CharStorage"): "int8",
    ("torch", "ByteStorage"): "uint8",
    ("torch", "BoolStorage"): "bool",
}
"""Module and name of torch's storages, and the number type of each by its name in torch."""
KEPT = (
    *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.PERSID, pickle.BINPERSID),
)
"""Opcodes taken from Python's reader: they make numbers, text, lists and tuples, or ask `find_class` or
`persistent_load`, which are ours."""


class MalformedPickle(ValueError):
    """No pickle, cut short, or one that asks for more work than any checkpoint does."""


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """Stands for a class or function that was not imported, or for an object that was not made.

    Two are equal only if they are one object, so that a stand-in can be a key.
    """

    name: str
    """Module and name as the file has them, such as argparse.Namespace."""
    imported: tuple[str, str] | None = None
    """Module and name apart; None for an object that a call or a set would have been."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Storage:
    """Where numbers of tensors lie in the file; not yet looked at."""

    key: str
    """Its name in the file."""
    dtype: str
    """Number type by its name in torch."""
    numel: int
    """Numbers in it, as the pickle claims."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as the pickle describes it; `mapped_storages` checks the description and makes the tensor."""

    storage: Storage
    offset: int
    """Its first number, counted in numbers of the storage."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    """Steps between neighbours along each dimension, in numbers of the storage."""


class InertReader:
    """Reads the pickles of a file one after another, and collects what they name.

    Args:
        stream: a binary file at its first pickle.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.names: set[str] = set()
        """Classes and functions that were stood in for."""
        self.storages: dict[str, Storage] = {}
        """Those that tensors refer to, by key."""
        self.has_nested_keys = False
        """Whether a dict or a set got a key that contains other objects."""
        self._stream = stream
        self._steps = 0

    def next_content(self) -> Any:
        """What the next pickle holds.

        Raises:
            MalformedPickle: the message says what is wrong.
        """
        try:
            return _Machine(self).load()
        except MalformedPickle:
            raise
        except MemoryError:
            raise MalformedPickle("it asks for more memory than there is") from None
        except Exception as error:  # whatever Python's reader meets: an empty stack, an unknown opcode, no number
            raise MalformedPickle(f"{type(error).__name__}: {error}"[:LETTERS]) from None

    def spend(self, steps: int) -> None:
        """Count work; MalformedPickle where it is more than any checkpoint needs."""
        self._steps += steps
        if self._steps > STEPS:
            raise MalformedPickle(f"it has more than {STEPS:,} operations")

    def read(self, count: int) -> bytes:
        """Up to count bytes; MalformedPickle where no checkpoint has a text of that length."""
        if not 0 <= count <= READ_BYTES:
            raise MalformedPickle(f"it claims a text of {count:,} bytes")
        return self._stream.read(count)

    def readline(self) -> bytes:
        """Up to the end of a line; MalformedPickle where no checkpoint has a line of that length."""
        line = self._stream.readline(READ_BYTES)
        if len(line) == READ_BYTES:
            raise MalformedPickle(f"it has a line of more than {READ_BYTES:,} bytes")
        return line

    def as_key(self, key: Any) -> Any:
        """The key itself where hashing it is harmless, else a stand-in for it."""
        if isinstance(key, str | bytes | float | StandIn | None):
            return key
        if isinstance(key, int) and -MAX_KEY <= key < MAX_KEY:
            return key
        self.has_nested_keys = True
        return StandIn(f"a key of type {type(key).__name__}")

    def put(self, target: Any, keys_and_values: list) -> None:
        """Keys and values in turn put in a dict; a stand-in swallows them."""
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            plain = self.as_key(key)
            if isinstance(target, dict):
                target[plain] = value


class _Machine(pickle._Unpickler):
    """Python's reader without any opcode that imports, calls, hashes freely, copies freely or sets an attribute."""

    dispatch: dict[int, Callable] = {}  # noqa: RUF012 - the name and the form that Python's reader looks for

    def __init__(self, reader: InertReader) -> None:
        super().__init__(reader, fix_imports=False, encoding="utf-8", errors="replace")
        self.reader = reader
        self.imported: dict[tuple[str, str], StandIn] = {}

    def find_class(self, module: str, name: str) -> StandIn:
        """A stand-in for the name; nothing is imported."""
        found = (module[:LETTERS], name[:LETTERS])
        text = ".".join(found)
        if found not in BUILDERS and found not in STORAGES:
            self.reader.names.add(text)
        return self.imported.setdefault(found, StandIn(text, found))

    def persistent_load(self, pid: Any) -> Storage | StandIn:
        """The storage that a tensor refers to: ("storage", its class, key, device, length, no view)."""
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and pid[5:] in ((), (None,)):
            _, kind, key, _, numel = pid[:5]
            dtype = STORAGES.get(kind.imported) if isinstance(kind, StandIn) else None
            if dtype and isinstance(key, str) and _is_count(numel):
                storage = Storage(key, dtype, numel)
                if self.reader.storages.setdefault(key, storage) != storage:
                    raise MalformedPickle(f"the storage {key[:LETTERS]} has two types or two lengths")
                return storage
        self.reader.names.add("storage of an unknown kind")
        return StandIn("storage of an unknown kind")

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for the result of a call; nothing is called but the builders of this file."""
        if not isinstance(function, StandIn):
            raise MalformedPickle(f"it calls a {type(function).__name__}")
        builder = BUILDERS.get(function.imported)
        if builder is None:
            return StandIn(function.name)
        built = builder(self.reader, arguments) if isinstance(arguments, tuple) else None
        if built is None:  # arguments that torch does not write
            self.reader.names.add(function.name)
            return StandIn(function.name)
        return built


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_KEY


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS and all(map(_is_count, values))


def _build_tensor(_: InertReader, arguments: tuple) -> StoredTensor | StandIn | None:
    if len(arguments) < 4:
        return None
    storage, offset, size, stride = arguments[:4]
    if isinstance(storage, StandIn):  # of an unknown kind, which was told where it stands
        return StandIn("a tensor of an unknown kind")
    are_shapes = _are_counts(size) and _are_counts(stride) and len(size) == len(stride)
    if not (isinstance(storage, Storage) and _is_count(offset) and are_shapes):
        return None
    return StoredTensor(storage, offset, size, stride)


def _build_parameter(_: InertReader, arguments: tuple) -> StoredTensor | None:
    return arguments[0] if arguments and isinstance(arguments[0], StoredTensor) else None


def _build_with_attributes(reader: InertReader, arguments: tuple) -> StoredTensor | StandIn | None:
    """A tensor or parameter that somebody set an attribute on; the attribute is left out."""
    function, arguments = (arguments[0], arguments[2]) if len(arguments) == 4 else (None, None)
    builder = BUILDERS.get(function.imported) if isinstance(function, StandIn) else None
    known = builder in (_build_tensor, _build_parameter) and isinstance(arguments, tuple)
    return builder(reader, arguments) if known else None


def _build_bytes(_: InertReader, arguments: tuple) -> StandIn:
    """Bytes as protocol 2 writes them. They are not made: no weights are bytes, and a codec may make any length."""
    return StandIn("bytes")


def _build_size(_: InertReader, arguments: tuple) -> tuple | None:
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else None


def _build_dict(reader: InertReader, arguments: tuple) -> dict | None:
    """An empty dict, or one of the pairs that Python 2 wrote for an OrderedDict."""
    made: dict = {}
    if arguments and isinstance(arguments[-1], list):
        reader.spend(len(arguments[-1]))  # one list may be given to many calls
        for pair in arguments[-1]:
            if not (isinstance(pair, list | tuple) and len(pair) == 2):
                return None
            reader.put(made, list(pair))
    return made


BUILDERS: dict[Any, Callable[[InertReader, tuple], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _build_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
    ("torch._utils", "_rebuild_parameter"): _build_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _build_parameter,
    ("torch.nn.parameter", "Parameter"): _build_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _build_with_attributes,
    ("torch", "Size"): _build_size,
    ("_codecs", "encode"): _build_bytes,
    ("collections", "OrderedDict"): _build_dict,
    ("collections", "defaultdict"): _build_dict,
}
"""The names whose calls give something: tensors' descriptions and plain containers."""


# --- opcodes of ours ---


def _reduce(machine: _Machine) -> None:
    arguments = machine.stack.pop()
    machine.stack[-1] = machine.call(machine.stack[-1], arguments)


def _make_with_names(machine: _Machine) -> None:
    machine.stack.pop()  # named arguments
    _reduce(machine)


def _call_above_mark(machine: _Machine) -> None:
    function, *arguments = machine.pop_mark()
    machine.append(machine.call(function, tuple(arguments)))


def _import_and_call(machine: _Machine) -> None:
    module, name = (machine.readline()[:-1].decode("utf-8", "replace") for _ in range(2))
    arguments = tuple(machine.pop_mark())  # before `append` is looked up, which it replaces
    machine.append(machine.call(machine.find_class(module, name), arguments))


def _extension(machine: _Machine, width: int) -> None:
    machine.append(machine.find_class("copyreg", f"extension {int.from_bytes(machine.read(width), 'little')}"))


def _set_state(machine: _Machine) -> None:
    machine.stack.pop()  # such as a state dict's _metadata; nothing takes it


def _append(machine: _Machine, values: list) -> None:
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].extend(values)


def _set_items(machine: _Machine, keys_and_values: list) -> None:
    machine.reader.put(machine.stack[-1], keys_and_values)


def _last_two(machine: _Machine) -> list:
    value = machine.stack.pop()
    return [machine.stack.pop(), value]


def _make_dict(machine: _Machine) -> None:
    pairs = machine.pop_mark()
    machine.append({})
    _set_items(machine, pairs)


def _make_set(machine: _Machine) -> None:
    machine.append(StandIn("set"))


def _add_to_set(machine: _Machine) -> None:
    for value in machine.pop_mark():
        machine.reader.as_key(value)  # a set keeps nothing; torch's reader would hash what is in it


def _make_frozen_set(machine: _Machine) -> None:
    _add_to_set(machine)
    _make_set(machine)


OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _reduce,
    pickle.NEWOBJ_EX: _make_with_names,
    pickle.OBJ: _call_above_mark,
    pickle.INST: _import_and_call,
    pickle.EXT1: functools.partial(_extension, width=1),
    pickle.EXT2: functools.partial(_extension, width=2),
    pickle.EXT4: functools.partial(_extension, width=4),
    pickle.BUILD: _set_state,
    pickle.APPEND: lambda machine: _append(machine, [machine.stack.pop()]),
    pickle.APPENDS: lambda machine: _append(machine, machine.pop_mark()),
    pickle.SETITEM: lambda machine: _set_items(machine, _last_two(machine)),
    pickle.SETITEMS: lambda machine: _set_items(machine, machine.pop_mark()),
    pickle.DICT: _make_dict,
    pickle.EMPTY_SET: _make_set,
    pickle.ADDITEMS: _add_to_set,
    pickle.FROZENSET: _make_frozen_set,
}
"""Opcodes of ours, in place of Python's."""


def _counted(operation: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
    """An opcode that counts as work."""

    def step(machine: _Machine) -> None:
        machine.reader.spend(1)
        operation(machine)

    return step


_Machine.dispatch = {
    code[0]: _counted(operation)
    for code, operation in ({code: pickle._Unpickler.dispatch[code[0]] for code in KEPT} | OPERATIONS).items()
}
