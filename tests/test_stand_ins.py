"""Files that name classes open, and nothing that they name is imported, called or made."""

import argparse
import copyreg
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ibqlab.pretrained import CheckpointError, stand_ins
from ibqlab.pretrained.tensor_files import load_pickle, open_tensor_file

NUMBERS = torch.arange(4, dtype=torch.float32)


# --- an assembler of pickles ---


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def integer(number: int) -> bytes:
    digits = pickle.encode_long(number)
    return b"\x8a" + bytes([len(digits)]) + digits


def numbers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def tensor(*, key="0", kind="FloatStorage", numel=4, offset=0, size=(4,), stride=(1,)) -> bytes:
    storage = b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + integer(numel) + b"tQ"
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage, integer(offset), numbers(size), numbers(stride), b"\x89", hooks)


def content(weight: bytes = tensor(), key: bytes = text("extra"), extra: bytes = b"N") -> bytes:
    """{"state_dict": {"layer.weight": weight}, key: extra}."""
    weights = b"}" + text("layer.weight") + weight + b"s"
    return b"\x80\x02}" + text("state_dict") + weights + b"s" + key + extra + b"s."


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A file as torch.save lays it out."""
    storages = {"0": NUMBERS.numpy().tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for entry, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"archive/{entry}", data)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
    return path


# --- attacks: each makes a folder when Python's reader reads it ---


class Acts:  # noqa: PLW1641 - it has a hash, under another name
    """Makes a folder whatever is done with it."""

    mark = ""

    def __new__(cls, *arguments, **named):
        if arguments or named:
            os.mkdir(cls.mark)
        return super().__new__(cls)

    def _act(self, *_):
        os.mkdir(self.mark)
        return 0

    __setstate__ = __setitem__ = __hash__ = append = extend = add = __call__ = _act

    def __eq__(self, other):
        return self is other


MADE = name(__name__, "Acts") + b")\x81"
MAKE = name("posix", "mkdir")
ATTACKS = {
    "reduce": lambda mark: call(MAKE, mark),
    "inst": lambda mark: b"(" + mark + b"iposix\nmkdir\n",
    "obj": lambda mark: b"(" + MAKE + mark + b"o",
    "stack_global": lambda mark: text("posix") + text("mkdir") + b"\x93(" + mark + b"tR",
    "dotted": lambda mark: b"\x80\x04" + text("shutil") + text("os.mkdir") + b"\x93(" + mark + b"tR",
    "newobj": lambda mark: name(__name__, "Acts") + b"(" + mark + b"t\x81",
    "newobj_ex": lambda mark: name(__name__, "Acts") + b")}" + text("a") + mark + b"s\x92",
    "eval": lambda mark: call(name("builtins", "eval"), text(f"__import__('os').mkdir({mark[5:].decode()!r})")),
    "exec": lambda mark: call(name("builtins", "exec"), text(f"import os; os.mkdir({mark[5:].decode()!r})")),
    "getattr": lambda mark: call(
        call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")), text("mkdir")), mark
    ),
    "partial": lambda mark: call(call(name("functools", "partial"), MAKE, mark)),
    "attrgetter": lambda mark: call(
        call(call(name("operator", "attrgetter"), text("mkdir")), call(name("builtins", "__import__"), text("os"))),
        mark,
    ),
    "methodcaller": lambda mark: call(
        call(name("operator", "methodcaller"), text("mkdir"), mark), call(name("builtins", "__import__"), text("os"))
    ),
    "map": lambda mark: call(name("builtins", "list"), call(name("builtins", "map"), MAKE, b"]" + mark + b"a")),
    "build": lambda mark: MADE + b"}b",
    "setitem": lambda mark: MADE + text("a") + b"Ns",
    "setitems": lambda mark: MADE + b"(" + text("a") + b"Nu",
    "append": lambda mark: MADE + b"Na",
    "appends": lambda mark: MADE + b"(Ne",
    "additems": lambda mark: b"\x80\x04" + MADE + b"(N\x90",
    "key": lambda mark: b"}" + MADE + b"Ns",
    "key_of_dict": lambda mark: b"(" + MADE + b"Nd",
    "in_a_set": lambda mark: b"\x80\x04\x8f(" + MADE + b"\x90",
    "in_a_frozenset": lambda mark: b"\x80\x04(" + MADE + b"\x91",
    "called": lambda mark: call(MADE, b"N"),
    "loads": lambda mark: call(
        name("_pickle", "loads"), b"C" + bytes([len(call(MAKE, mark)) + 1]) + call(MAKE, mark) + b"."
    ),
    "slots": lambda mark: (
        call(name("argparse", "Namespace")) + b"}}" + text("run") + MAKE + b"s\x86b0" + call(MAKE, mark)
    ),
    "copyreg": lambda mark: b"\x82\xf0(" + mark + b"tR",
    "numpy": lambda mark: pickle.dumps(np.array([Made(mark[5:].decode())], dtype=object), 2)[2:-1],
}


class Made:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def mark(tmp_path):
    """The folder that attacks make."""
    Acts.mark = str(tmp_path / "made")
    copyreg.add_extension("posix", "mkdir", 0xF0)
    yield Path(Acts.mark)
    copyreg.remove_extension("posix", "mkdir", 0xF0)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_attack_runs(tmp_path, mark, attack):
    program = attack(text(str(mark)))
    try:
        pickle.loads(b"\x80\x02" + program + b".")
    except Exception as error:  # some fail after what they did
        assert mark.is_dir(), error
    assert mark.is_dir(), "the attack is none"
    shutil.rmtree(mark)
    opened = open_tensor_file(archive(tmp_path / "attack.ckpt", content(extra=program)))
    assert torch.equal(opened.tensors["layer.weight"], NUMBERS)
    assert opened.entries == ("extra",) and opened.stand_ins
    assert not mark.exists()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_in_the_place_of_weights_is_refused(tmp_path, mark, attack):
    weights = b"}" + text("layer.weight") + tensor() + b"s" + text("layer.bias") + attack(text(str(mark))) + b"s"
    program = b"\x80\x02}" + text("state_dict") + weights + b"s."
    with pytest.raises(CheckpointError, match=r"layer\.bias"):
        open_tensor_file(archive(tmp_path / "attack.ckpt", program))
    assert not mark.exists()


def test_no_module_is_imported(tmp_path):
    for module in ("this", "torch.hub", "antigravity"):
        sys.modules.pop("this", None)
        file = archive(tmp_path / f"{module}.ckpt", content(extra=call(name(module, "load"), text("a"))))
        assert open_tensor_file(file).stand_ins == (f"{module}.load",)
    assert not {"this", "antigravity"} & set(sys.modules)


# --- files of the time ---


def saved(path: Path, extra: dict, *, old: bool = False) -> Path:
    weights = {
        "a": NUMBERS.reshape(2, 2).t(),
        "half": NUMBERS.half(),
        "brain": NUMBERS.bfloat16(),
        "n": torch.tensor(7),
    }
    weights |= {"parameter": torch.nn.Parameter(NUMBERS * 2), "part": (NUMBERS + 1)[1:3], "none": torch.zeros(0, 3)}
    torch.save({"state_dict": weights, **extra}, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before_torch_1.6"])
def test_tensors_beside_classes_are_those_that_were_saved(tmp_path, old):
    extra = {
        "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(path=Path("a"))),
        "callbacks": {argparse.Namespace: {"best": torch.ones(2)}},
        "pairs": {(1, (2, 3)): {4}, frozenset({5}): 6},
    }
    opened = open_tensor_file(saved(tmp_path / "args.ckpt", extra, old=old))
    plain = torch.load(saved(tmp_path / "plain.ckpt", {}), weights_only=True)["state_dict"]
    assert opened.tensors.keys() == plain.keys()
    for key, value in plain.items():
        assert opened.tensors[key].dtype == value.dtype and torch.equal(opened.tensors[key], value), key
    assert opened.stand_ins == ("__builtin__.frozenset", "__builtin__.set", "argparse.Namespace", "pathlib.PosixPath")
    assert opened.entries == ("args", "callbacks", "pairs")
    assert not open_tensor_file(tmp_path / "plain.ckpt").stand_ins


def test_both_readers_agree_on_every_number_type(tmp_path):
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    state = {kind: torch.arange(6).to(getattr(torch, kind)).reshape(2, 3) for kind in kinds}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "args.pt")
    plain, stood_in = open_tensor_file(tmp_path / "plain.pt"), open_tensor_file(tmp_path / "args.pt")
    assert stood_in.stand_ins and not plain.stand_ins
    for kind in kinds:
        assert plain.tensors[kind].dtype == stood_in.tensors[kind].dtype
        assert torch.equal(plain.tensors[kind], stood_in.tensors[kind])


# --- files made to exhaust or to mislead ---

DEEP = b")" + b"\x85" * 200_000
BENIGN = {
    "a key nested so deeply that hashing it ends the process": content(key=DEEP),
    "a list nested as deeply": content(extra=b"]" * 200_000 + b"a" * 199_999),
    "a key of 2⁶⁰ parts": content(key=b")" + b"2\x86" * 60),
    "a number of many digits as a key": content(key=integer(10**300)),
    "a memo index of 2³²": content(extra=b"Nr\xff\xff\xff\xff"),
    "a dict that holds itself": content(extra=b"}q\x01" + text("a") + b"h\x01s"),
    "no tensor of torch's, by its name alone": content(extra=name("torch", "_utils._rebuild_tensor_v2") + b")R"),
    "a builder with other arguments": content(extra=call(name("torch._utils", "_rebuild_tensor_v2"), b"N")),
    "a persistent object": content(extra=b"NQ"),
    "a persistent object that torch asserts about": content(extra=integer(7) + b"Q"),
}
TOO_MUCH = {
    "a text of 2⁶²": (content(extra=b"\x8d" + struct.pack("<Q", 2**62)), "claims a text"),
    "bytes of 2⁶²": (content(extra=b"\x8e" + struct.pack("<Q", 2**62)), "claims a text"),
    "a buffer of 2⁴⁰": (content(extra=b"\x96" + struct.pack("<Q", 2**40)), "nothing in it was run"),
    "a frame of 2⁶²": (b"\x80\x04\x95" + struct.pack("<Q", 2**62), "claims a text"),
    "a number of 2³⁰ bytes": (content(extra=b"\x8b" + struct.pack("<i", 2**30)), "claims a text"),
    "operations without end": (b"\x80\x02" + b"}0" * 30_000 + content()[2:], "more than 50,000 operations"),
    "copies without end": (
        content(
            extra=b"]q\x01("
            + (text("a") + b"N\x86") * 2000
            + b"e"
            + call(name("collections", "OrderedDict"), b"h\x01") * 30
        ),
        "more than 50,000 operations",
    ),
    "an empty program": (b"", "nothing in it was run"),
    "an end without a beginning": (b"\x80\x02.", "nothing in it was run"),
    "a call of a list": (content(extra=b"])R"), "nothing in it was run"),
}
TENSORS = {
    "a storage that is not there": (tensor(key="9"), "does not hold its storage '9'"),
    "a storage too short": (tensor(numel=5), "has 16 bytes, not 5 numbers"),
    "a storage of another type": (tensor(kind="DoubleStorage"), "has 16 bytes, not 4 numbers"),
    "a number behind the end": (tensor(size=(5,)), "its number 4 lies outside its storage of 4"),
    "an offset behind the end": (tensor(offset=4, size=(1,)), "lies outside"),
    "an offset before the beginning": (tensor(offset=-1), r"layer\.weight.*_rebuild_tensor_v2"),
    "steps backwards": (tensor(stride=(-1,)), r"layer\.weight.*_rebuild_tensor_v2"),
    "steps beyond": (tensor(size=(2,), stride=(2**40,)), "lies outside"),
    "a claim of 2⁴⁰ numbers": (tensor(size=(2**40,), stride=(0,)), "claims 4,398,046,511,104 bytes"),
    "a claim beyond what can be counted": (tensor(size=(2**40, 2**40), stride=(0, 0)), "claims|cannot be read"),
    "more dimensions than torch has": (tensor(size=(1,) * 65, stride=(1,) * 65), r"layer\.weight"),
    "more steps than dimensions": (tensor(stride=(1, 1)), r"layer\.weight"),
    "a size that is a list": (tensor().replace(numbers((4,)), b"]" + integer(4) + b"a", 1), r"layer\.weight"),
    "numpy's": (call(name("numpy.core.multiarray", "_reconstruct"), b"N"), r"layer\.weight.*numpy\.core\.multiarray"),
}
BESIDE = call(name("argparse", "Namespace"))
"""Something that torch's reader refuses, so that ours reads the file."""


@pytest.mark.parametrize("program", BENIGN.values(), ids=BENIGN)
def test_what_looks_dangerous_and_is_not_opens(tmp_path, program):
    opened = open_tensor_file(archive(tmp_path / "file.ckpt", program))
    assert torch.equal(opened.tensors["layer.weight"], NUMBERS) and len(opened.entries) == 1


@pytest.mark.parametrize(("program", "says"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_asks_for_too_much_is_refused(tmp_path, monkeypatch, program, says):
    monkeypatch.setattr(stand_ins, "STEPS", 50_000)
    with pytest.raises(CheckpointError, match=says):
        open_tensor_file(archive(tmp_path / "file.ckpt", program))


@pytest.mark.parametrize(("weight", "says"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_in_the_file_are_refused(tmp_path, weight, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        open_tensor_file(archive(tmp_path / "file.ckpt", content(weight, extra=BESIDE)))
    assert "layer.weight" in str(caught.value)


def test_one_storage_of_two_types_is_refused(tmp_path):
    program = content(tensor(), extra=b"]" + BESIDE + b"a" + tensor(kind="IntStorage") + b"a")
    with pytest.raises(CheckpointError, match="two types"):
        open_tensor_file(archive(tmp_path / "file.ckpt", program))


def test_numbers_of_the_other_byte_order_are_refused(tmp_path):
    file = archive(tmp_path / "file.ckpt", content(extra=BESIDE))
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(tmp_path / "big.ckpt", "w") as bad:
        for entry in good.namelist():
            bad.writestr(entry, b"big" if entry.endswith("byteorder") else good.read(entry))
    with pytest.raises(CheckpointError):
        open_tensor_file(tmp_path / "big.ckpt")


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before_torch_1.6"])
def test_files_cut_anywhere_are_one_error(tmp_path, old):
    whole = saved(tmp_path / "whole.ckpt", {"args": argparse.Namespace(a=1)}, old=old).read_bytes()
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            open_tensor_file(tmp_path / "cut.ckpt")


def test_random_changes_give_an_error_or_tensors(tmp_path):
    """A pickle with any byte changed is read or refused; nothing else is raised."""
    program, generator = content(extra=BESIDE), torch.Generator().manual_seed(0)
    for place in range(2, len(program) - 1):
        changed = bytearray(program)
        changed[place] = int(torch.randint(256, (), generator=generator))
        try:
            opened = open_tensor_file(archive(tmp_path / "file.ckpt", bytes(changed)))
        except CheckpointError:
            continue
        assert all(value.numel() <= 4 for value in opened.tensors.values())


def test_a_model_saved_whole_says_so(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"an object of torch\.nn\.modules\.linear\.Linear.*model\.state_dict"):
        open_tensor_file(tmp_path / "model.pt")
    torch.save({"state_dict": torch.nn.Linear(2, 2), "epoch": 1}, tmp_path / "under.pt")
    with pytest.raises(
        CheckpointError, match=r"'state_dict' must be weights and is an object of torch\.nn\.modules\.linear\.Linear"
    ):
        open_tensor_file(tmp_path / "under.pt")


# --- what torch's weights-only reader takes and must not be given ---

DEEP = b")" + b"\x85" * 200_000
"""A tuple so deep that hashing it ends the process."""
TORCH_TAKES = {
    "a counter of nested tuples": name("collections", "Counter") + b"]" + DEEP + b"a\x85R",
    "a set of nested tuples": name("builtins", "set") + b"]" + DEEP + b"a\x85R",
    "zeros of any length": call(name("builtins", "bytearray"), integer(2**50)),
    "text twice as long with every call": name("_codecs", "encode") + text("aaaa") + text("hex") + b"\x86R",
    "a dict with methods of the file's": call(name("collections", "OrderedDict")) + b"}" + text("get") + b"Nsb",
}


@pytest.mark.parametrize("program", TORCH_TAKES.values(), ids=TORCH_TAKES)
def test_what_torch_would_make_is_not_made(tmp_path, monkeypatch, program):
    monkeypatch.setattr(torch, "load", None)  # a call would fail
    file = archive(tmp_path / "made.ckpt", content(extra=program))
    assert torch.equal(open_tensor_file(file).tensors["layer.weight"], NUMBERS)
    if b"OrderedDict" not in program and b"encode" not in program:
        with pytest.raises(CheckpointError, match="beside tensors it holds"):
            load_pickle(file)


def test_an_archive_in_which_torch_finds_another_program_is_refused(tmp_path):
    file = archive(tmp_path / "two.ckpt", content())
    with zipfile.ZipFile(file, "a") as target:
        target.writestr("ARCHIVE/DATA.PKL", content(extra=text("other")))  # torch's reader ignores case
    with pytest.raises(CheckpointError, match="two tables of contents"):
        open_tensor_file(file)


def test_a_parameter_with_an_attribute_opens(tmp_path):
    weight = torch.nn.Parameter(NUMBERS.clone())
    weight.tag = "mine"
    torch.save({"state_dict": {"layer.weight": weight}}, tmp_path / "tagged.ckpt")
    tensors = open_tensor_file(tmp_path / "tagged.ckpt").tensors
    assert torch.equal(tensors["layer.weight"], NUMBERS)
    assert not tensors["layer.weight"].requires_grad


@pytest.mark.parametrize("size", [(2**62,), (2**31, 2**31), (2**33,)])
def test_repeated_numbers_beyond_any_memory_are_refused(tmp_path, size):
    claims = tensor(size=size, stride=(0,) * len(size))
    with pytest.raises(CheckpointError, match=r"claims .* bytes"):
        open_tensor_file(archive(tmp_path / "claims.ckpt", content(weight=claims)))
