"""The one door for settings: what comes in right, and what each kind of wrong says."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import yaml

from ibqlab.config import (
    ConfigError,
    apply_overrides,
    check_parameters,
    content_hash,
    dump_yaml,
    load_yaml,
    parse,
    read_parameters,
    to_dict,
)
from ibqlab.config.assignments import split_items
from ibqlab.config.yaml_rules import read_yaml
from ibqlab.quantizers import available_quantizers, quantizer_config
from ibqlab.recipes.run_config import RunConfig, ordered_keys
from ibqlab.tokenizer import TokenizerConfig
from ibqlab.training import GeneratorTrainConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    training: Inner = field(default_factory=Inner)
    second: Inner | None = None
    steps: int = 300
    sizes: tuple[int, ...] = (256,)
    flip: bool = True
    start: Literal["normal", "uniform"] = "normal"
    folder: Path = Path("data")
    limit: int | None = None
    label: str | None = None
    names: tuple[str, ...] = ()


def message(mapping: Any, cls: type = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, mapping, source="recipe x")
    assert str(caught.value).startswith("recipe x: ")
    return str(caught.value)


# --- parse ---


def test_parse_fills_every_kind_of_field():
    got = parse(
        Outer,
        {
            "training": {"learning_rate": 1, "betas": [0.1, 0.2]},
            "second": {},
            "steps": 5,
            "sizes": [1, 2],
            "flip": False,
            "start": "uniform",
            "folder": "a/b",
            "limit": 3,
        },
    )
    assert got == Outer(
        training=Inner(learning_rate=1.0, betas=(0.1, 0.2)),
        second=Inner(),
        steps=5,
        sizes=(1, 2),
        flip=False,
        start="uniform",
        folder=Path("a/b"),
        limit=3,
    )
    assert isinstance(got.training.learning_rate, float) and isinstance(got.sizes, tuple)


def test_parse_takes_ready_made_configs_and_no_settings():
    assert parse(Outer, {"training": Inner(learning_rate=2.0)}).training.learning_rate == 2.0
    assert parse(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"stesp": 3}, "stesp: unknown key; did you mean 'steps'?"),
        ({"training": {"learning_rat": 1.0}}, "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"second": {"zzz": 1.0}}, "second.zzz: unknown key; there are: learning_rate, betas"),
        ({"steps": "3"}, "steps: must be an integer; got the text '3'; write 3 without quotes"),
        ({"steps": 1.5}, "steps: must be an integer; got the number 1.5"),
        ({"steps": 1e3}, "got the number 1000.0; write 1000"),
        ({"steps": True}, "steps: must be an integer; got true"),
        ({"steps": None}, "steps: must be an integer; got null"),
        ({"flip": "true"}, "flip: must be true or false; got the text 'true'; write true without quotes"),
        ({"flip": 1}, "flip: must be true or false; got the number 1"),
        ({"sizes": "256, 1024"}, "sizes: must be a list; got the text '256, 1024'; write [256, 1024]"),
        ({"sizes": [1, "2"]}, "sizes[1]: must be an integer; got the text '2'"),
        ({"training": {"betas": [0.5]}}, "training.betas[1]: must be given"),
        ({"training": 3}, "training: must be a mapping of settings; got the number 3"),
        ({"training": {"learning_rate": "1e-3"}}, "got the text '1e-3'; write 0.001 without quotes"),
        ({"training": {"learning_rate": -1.0}}, "training: learning_rate must be > 0, got -1.0"),
        ({"training": {"learning_rate": math.nan}}, "training.learning_rate: must be a finite number; got NaN"),
        ({"start": "norml"}, "start: must be 'normal' or 'uniform'; got the text 'norml'"),
        ({"steps": object}, "steps: must be a number, text"),
        ([1], "must be settings as `key: value`; got the list [1]"),
        (None, "must be settings as `key: value`; got null"),
    ],
)
def test_parse_says_what_is_wrong(mapping, says):
    assert says in message(mapping)


def test_every_problem_stands_in_one_message():
    text = message({"stesp": 3, "flip": 1, "training": {"learning_rate": "x"}})
    assert "3 problems" in text
    assert all(key in text for key in ("stesp:", "flip:", "training.learning_rate:"))


def test_missing_required_key_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Required:
        recipe: str

    assert "recipe: must be given" in message({}, Required)


# --- registered quantizers inside other settings ---


@pytest.mark.parametrize("name", available_quantizers())
def test_quantizer_configs_survive_the_round_trip(name):
    config = TokenizerConfig(quantizer=quantizer_config({"name": name, "codebook_size": 64}))
    assert next(iter(to_dict(config)["quantizer"])) == "name"
    assert parse(TokenizerConfig, to_dict(config)) == config
    assert parse(TokenizerConfig, yaml.safe_load(dump_yaml(config))) == config


@pytest.mark.parametrize(
    ("quantizer", "says"),
    [
        ({"name": "ibq", "codebook_sise": 2}, "quantizer.codebook_sise: unknown key; did you mean 'codebook_size'?"),
        ({"name": "ibq", "code_dim": "4"}, "quantizer.code_dim: must be an integer; got the text '4'"),
        ({"name": "ibq", "codebook_size": 1}, "quantizer: codebook_size must be at least 2, got 1"),
        ({"name": "ibk"}, "did you mean 'ibq'?"),
        ({"codebook_size": 16}, "a quantizer needs a name"),
    ],
)
def test_quantizer_problems_keep_their_path(quantizer, says):
    @dataclass(frozen=True, kw_only=True)
    class Whole:
        tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    text = message({"tokenizer": {"quantizer": quantizer}}, Whole)
    assert says in text and "tokenizer.quantizer" in text


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2E+4", -20000.0),
        ("1.", 1.0),
        (".5", 0.5),
        (".inf", math.inf),
        ("12", 12),
        ("-012", -12),
        ("262_144", "262_144"),
        ("0x10", "0x10"),
        ("0o17", "0o17"),
        ("true", True),
        ("no", "no"),
        ("=", "="),
        ("1_000.5", "1_000.5"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("'1e-3'", "1e-3"),
        ("", None),
        ("~", None),
        ("[1e-3, a]", [0.001, "a"]),
    ],
)
def test_yaml_values_follow_version_1_2(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(f"key: {text}\n")
    got = load_yaml(tmp_path / "a.yaml")["key"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"a: 1\nb: 2\na: 3\n", "the key 'a' is given twice (line 3"),
        (b"x:\n  a: 1\n  a: 1\n", "the key 'a' is given twice"),
        (b"x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\n", "the key 'b' is given twice"),
        (b"{1: a, '1': b}\n", "the key '1' is given twice"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: 1\nb: [1, }\n", "(line 2, column 8)"),
        (b"a: !!python/object:os.system x\n", "not valid YAML"),
        (b"- 1\n- 2\n", "must hold settings"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"a: \x07\n", "special characters are not allowed in"),
    ],
)
def test_bad_files_are_named(tmp_path, content, says):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_yaml(file)
    assert says in str(caught.value)


DEEP = "[" * 1000 + "]" * 1000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"a: {DEEP}", "nested deeper than 64 levels"),
        ("a: " + "{b: " * 1000 + "1" + "}" * 1000, "nested deeper than 64 levels"),
        (LAUGHS, "its aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "an alias stands inside what it repeats"),
        ("a: &a {b: *a}", "an alias stands inside what it repeats"),
        (CHAIN, "nested deeper than 64 levels"),
        (f"a: {'9' * 5000}", "a number of more than 4,000 digits"),
        ("a: !!float many", "does not fit its tag"),
        ("a: !!bool many", "does not fit its tag"),
        ("a: !!timestamp many", 'failed to construct timestamp from "many" (line 1, column 4)'),
    ],
    ids=["list", "mapping", "laughs", "circle", "circle of mappings", "chain", "digits", "float", "bool", "time"],
)
def test_hostile_files_are_refused_in_a_line(tmp_path, content, says):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML") as caught:
        load_yaml(tmp_path / "bad.yaml")
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_honest_aliases_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="is a pipe; give an ordinary file"):
        load_yaml(tmp_path / "pipe.yaml")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


@pytest.mark.parametrize("loader", [load_yaml, lambda path: yaml.safe_load(path.read_text())])
def test_dumped_yaml_reads_back_equal_with_any_reader(tmp_path, loader: Callable):
    values = {"a": 1e-5, "b": 0.1 + 0.2, "c": 1e300, "d": ["1e-3", "no", "1:30", "12", "0x1", "null", ""], "e": None}
    values |= {"f": {"g": []}, "h": True, "i": [[1], [2]], "j": "τ", "k": math.inf}
    (tmp_path / "a.yaml").write_text(dump_yaml(values), encoding="utf-8")
    assert loader(tmp_path / "a.yaml") == values
    assert list(loader(tmp_path / "a.yaml")) == list(values)


def test_written_yaml_is_what_old_folders_hold():
    """Byte for byte: a run's config.yaml is compared by people and by diff, and recipes are copied from it."""
    values = {"a": 1e-05, "b": 1e17, "c": [1e-05, "no", ["x"]], "d": "a: b", "e": {}, "f": [], "g": "1e-3", "h": "é"}
    values |= {
        "i": "",
        "j": [1, 2.5, None, True],
        "k": {"l": " x", "m": "x, y", "o": "2024-01-02"},
        "o": ["{1..3}", "#"],
    }
    assert dump_yaml(values) == (
        "a: 1.0e-05\nb: 1.0e+17\nc:\n- 1.0e-05\n- 'no'\n- [x]\nd: 'a: b'\ne: {}\nf: []\ng: '1e-3'\nh: é\n"
        "i: ''\nj: [1, 2.5, null, true]\nk:\n  l: ' x'\n  m: x, y\n  o: '2024-01-02'\no: ['{1..3}', '#']\n"
    )


def test_recipes_survive_being_written_and_read_again(tmp_path):
    recipes = sorted((Path(__file__).parents[1] / "experiments").glob("**/*.yaml"))
    assert len(recipes) > 20
    for recipe in recipes:
        (tmp_path / "again.yaml").write_text(dump_yaml(load_yaml(recipe)), encoding="utf-8")
        assert load_yaml(tmp_path / "again.yaml") == to_dict(load_yaml(recipe))


# --- values that no setting has ---


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate: must be a finite number; got inf"),
        ({"training": {"betas": [0.5, -math.inf]}}, "training.betas[1]: must be a finite number; got -inf"),
        ({"steps": 10**400}, "steps: must be a number of at most 64 bits; got one of 1,329 bits"),
        ({"steps": 2**63}, "steps: must be a number of at most 64 bits"),
        (
            {"training": {"learning_rate": 1e300}},
            "training.learning_rate: must be a number that float32 holds, to 3.4e+38; got 1e+300",
        ),
        ({"label": "caf\udce9"}, r"label: must be text in UTF-8; got 'caf\\udce9'"),
        ({"steps": "0x10"}, "steps: must be an integer; got the text '0x10'; write 16"),
        ({"steps": "0o17"}, "steps: must be an integer; got the text '0o17'; write 15"),
        ({"steps": "1_000"}, "steps: must be an integer; got the text '1_000'; write 1000"),
        ({"a\nb\x1b[31m": 1}, r"a\x0ab\x1b[31m: unknown key"),
    ],
)
def test_values_that_no_setting_has_are_named(mapping, says):
    assert says in message(mapping)


def test_settings_nested_too_deep_or_in_a_circle_are_refused():
    deep, circle = {}, []
    for _ in range(1000):
        deep = {"a": deep}
    circle.append(circle)
    for mapping in (deep, {"sizes": circle}):
        with pytest.raises(ConfigError, match="64 levels deep at most"):
            parse(Outer, mapping)


def test_a_message_lists_twenty_problems_and_counts_the_others():
    text = message({"sizes": ["x"] * 1000})
    assert "1000 problems" in text and text.count("\n") == 21 and "… and 980 more" in text


def test_numbers_of_numpy_are_numbers():
    got = parse(Outer, {"steps": np.int64(64), "training": {"learning_rate": np.float32(0.5)}})
    assert got.steps == 64 and got.training.learning_rate == 0.5


# --- to_dict, content_hash ---


def test_to_dict_is_plain():
    @dataclass(frozen=True, kw_only=True)
    class Named(Inner):
        config_name: ClassVar[str] = "special"

    got = to_dict(Outer(training=Named()))
    assert got["training"] == {"name": "special", "learning_rate": 1e-4, "betas": [0.5, 0.9]}
    assert got["folder"] == "data" and got["sizes"] == [256] and got["second"] is None


def test_content_hash_sees_values_only():
    assert content_hash({"a": 1, "b": {"c": 2, "d": 3}}) == content_hash({"b": {"d": 3.0, "c": 2}, "a": 1})
    assert content_hash(Outer()) == content_hash(to_dict(Outer())) == content_hash(Outer(training=Inner()))
    assert len({content_hash({"a": value}) for value in (1, 2, "1", 1.5, None, True, [1])}) == 7
    assert len(content_hash({})) == 12 and int(content_hash({}), 16) >= 0


# --- apply_overrides ---


def test_overrides_replace_and_keep():
    before = {"training": {"learning_rate": 1.0, "keep": [1]}, "empty": None}
    after = apply_overrides(before, ["training.learning_rate=1e-3", "a.b.c=[1, x]", "empty.k=", "text=a=b"])
    assert after == {
        "training": {"learning_rate": 0.001, "keep": [1]},
        "empty": {"k": None},
        "a": {"b": {"c": [1, "x"]}},
        "text": "a=b",
    }
    after["training"]["keep"].append(2)
    assert before == {"training": {"learning_rate": 1.0, "keep": [1]}, "empty": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, text) for text in ("set #2", "my: pics", "*.png", "photo's", "{0..9}.tar", "a,b", "&x", "!x", "@x")],
        *[("2024-01-02", "2024-01-02"), ("0x10", "0x10"), ("0o17", "0o17"), ("1_000", "1_000"), ("no", "no")],
        *[("'2024'", "2024"), ('"a b"', "a b"), ("2024", 2024), ("1e-3", 0.001), ("true", True), ("null", None)],
        *[("", None), ("[1, x]", [1, "x"]), ("{a: 1e-3}", {"a": 0.001}), ("(0.9,0.95)", "(0.9,0.95)")],
    ],
)
def test_untyped_values_are_text_unless_plainly_something_else(text, value):
    got = apply_overrides({}, [f"key={text}"])["key"]
    assert got == value and type(got) is type(value)


FOLDERS = ("set #2", "my: pics", "2024", "[old]", "{0..9}.tar", "*.png", "1e5", "true", "a, b", "0x10", "(x)", "~/p")


@pytest.mark.parametrize("text", FOLDERS)
def test_text_stays_text_where_a_setting_takes_text(text):
    changed = apply_overrides({}, [f"data.source={text}", "data.source=x", f"data.source={text}"], TrainConfig)
    assert changed == {"data": {"source": text}}
    assert parse(TrainConfig, changed).data.source == text


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optimizer.betas=(0.9,0.95)", [0.9, 0.95]),
        ("optimizer.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("optimizer.betas=0.9,0.95", [0.9, 0.95]),
        ("optimizer.drop_steps=5", [5]),
        ("data.exclude=*.png", ["*.png"]),
        ("data.exclude=[*.png, set #2, a: b, 2024]", ["*.png", "set #2", "a: b", "2024"]),
        ("data.validation_source=none", None),
        ("data.validation_source=2024", "2024"),
        ("start_from=", ""),
        ("precision=16", "16"),
        ("tokenizer.quantizer.codebook_init=1", "1"),
        ("tokenizer.quantizer.codebook_size=64", 64),
        ("tokenizer.quantizer={name: vq}", {"name": "vq"}),
        ("steps=0x10", "0x10"),
        ("nothing.like=5", 5),
    ],
)
def test_values_are_read_as_the_setting_wants_them(assignment, value):
    changed = apply_overrides({}, [assignment], TrainConfig)
    for key in assignment.partition("=")[0].split("."):
        changed = changed[key]
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize("key", ["a" * 5000, ".".join("a" * 5000), ".".join("a" * 100)])
def test_keys_beyond_any_length_are_refused(key):
    with pytest.raises(ConfigError, match="no key has more than 500 letters or 64 parts") as caught:
        apply_overrides({}, [f"{key}=1"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a, b", ["a", "b"]),
        ("a, [1, 2], (3, 4), {b: 5, c: 6}", ["a", "[1, 2]", "(3, 4)", "{b: 5, c: 6}"]),
        ("'a, b', \"c, d\", photo's, e", ["'a, b'", '"c, d"', "photo's", "e"]),
        ("", []),
        ("a,", ["a"]),
    ],
)
def test_lists_are_cut_outside_quotes_and_brackets(text, items):
    assert split_items(text) == items


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps", "typed key=value"),
        ("=3", "the key is missing"),
        ("a..b=3", "the key is missing"),
        ("a=[1", "a: cannot read '[1' as a value"),
        ("steps.x=3", "steps holds the number 300, it has no settings"),
    ],
)
def test_bad_overrides_are_named(assignment, says):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"steps": 300}, [assignment])
    assert says in str(caught.value)


# --- notebook parameters ---


@pytest.mark.parametrize(
    ("name", "arrives", "becomes"),
    [
        ("sizes", "[256, 1024]", (256, 1024)),
        ("sizes", "256,1024", (256, 1024)),
        ("sizes", "256", (256,)),
        ("sizes", 256, (256,)),
        ("sizes", (1, 2), (1, 2)),
        ("names", "vq, ibq", ("vq", "ibq")),
        ("names", "[vq]", ("vq",)),
        ("names", "vq", ("vq",)),
        ("names", "[source=set #2, betas=[0.5, 0.9]]", ("source=set #2", "betas=[0.5, 0.9]")),
        ("names", '["a, b", c]', ("a, b", "c")),
        ("sizes", "(256, 1024)", (256, 1024)),
        ("label", "[old]", "[old]"),
        ("limit", "none", None),
        ("limit", "null", None),
        ("limit", "7", 7),
        ("label", "None", None),
        ("label", "7", "7"),
        ("start", "uniform", "uniform"),
        ("flip", "false", False),
    ],
)
def test_parameters_may_arrive_as_text(name, arrives, becomes):
    got = getattr(check_parameters(Outer, {name: arrives}, "parameters"), name)
    assert got == becomes and type(got) is type(becomes)


@pytest.mark.parametrize(
    ("name", "arrives", "says"),
    [
        ("steps", "many", "steps: must be an integer; got the text 'many'"),
        ("steps", "[1, 2]", "steps: must be an integer"),
        ("sizes", "256 1024", "sizes[0]: must be an integer; got the text '256 1024'"),
        ("sizes", "[256", "sizes[0]: must be an integer; got the text '[256'"),
        ("sizes", True, "sizes[0]: must be an integer; got true"),
        ("flip", "perhaps", "flip: must be true or false"),
        ("steps", "none", "steps: must be an integer; got the text 'none'"),
        ("setps", 3, "setps: unknown key; did you mean 'steps'?"),
    ],
)
def test_text_that_does_not_fit_is_an_error(name, arrives, says):
    with pytest.raises(ConfigError, match=r"^parameters: ") as caught:
        check_parameters(Outer, {name: arrives}, "parameters")
    assert says in str(caught.value)


def test_read_parameters_takes_fields_and_defaults():
    namespace = {"steps": 5, "sizes": "1,2", "np": math, "In": ["", "steps = 5"]}
    assert read_parameters(Outer, namespace) == Outer(steps=5, sizes=(1, 2))


def test_read_parameters_finds_what_papermill_only_warns_about():
    injected = "# Parameters\nsteps = 5\nstesp: int = 7\n"
    with pytest.raises(ConfigError, match="stesp: no such parameter; did you mean 'steps'"):
        read_parameters(Outer, {"steps": 5, "stesp": 7, "In": ["", "steps = 1", injected]})


def test_read_parameters_judges_the_last_injected_cell():
    cells = ["# Parameters\nstesp = 7\n", "# Parameters\nsteps = 5\n", "helper = 1"]
    assert read_parameters(Outer, {"steps": 5, "In": cells}).steps == 5


def test_read_parameters_names_a_value_that_is_no_setting():
    with pytest.raises(ConfigError, match="notebook parameters: steps: must be a number"):
        read_parameters(Outer, {"steps": math})


@pytest.mark.parametrize(
    ("cls", "hashed", "keys"),
    [
        (
            TrainConfig,
            "c97a0964a0be",
            "data tokenizer loss optimizer record speed steps batch_size accumulate processes accelerator precision "
            "ema_decay ema_codebook_start start_from start_family start_num_heads start_weights "
            "grow_codes grow_noise seed plugins",
        ),
        (
            GeneratorTrainConfig,
            "9d8c2ab13e81",
            "tokenizer tokenizer_weights data tokens index_permutation generator optimizer record speed steps "
            "batch_size accumulate processes accelerator precision seed plugins",
        ),
    ],
)
def test_settings_of_runs_keep_the_order_of_their_keys_and_their_hash(cls, hashed, keys):
    assert list(to_dict(cls())) == keys.split() and content_hash(cls()) == hashed
    assert issubclass(cls, RunConfig)


def test_an_order_of_keys_names_every_field():
    with pytest.raises(ValueError, match="Short has the fields first, second; order them all"):

        @ordered_keys("second")
        @dataclass(frozen=True, kw_only=True)
        class Short:
            first: int = 0
            second: int = 0


def test_what_is_read_belongs_to_the_reader():
    first = read_yaml("a: {b: [1, 2]}")
    first["a"]["b"].append(3)
    assert read_yaml("a: {b: [1, 2]}") == {"a": {"b": [1, 2]}}
