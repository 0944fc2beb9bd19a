"""Settings: typed dataclasses, read once and strictly from YAML, command lines and notebook parameters.

Whatever comes in becomes plain dictionaries first and is then checked against a dataclass (`parse`): an unknown key, a
wrong type or an impossible value is an error that says what to write instead. Start with `checking`; `yaml_files` reads
recipes, `assignments` reads `key=value`, and `parameters` is the third cell of every notebook.
"""

from ibqlab.config.annotations import alternatives, field_types
from ibqlab.config.assignments import (
    apply_overrides,
    as_list,
    read_as,
    read_assigned,
    read_value,
    split_assignment,
    split_items,
)
from ibqlab.config.checking import completed, parse
from ibqlab.config.parameters import check_parameters, read_parameters
from ibqlab.config.plain_values import content_hash, to_dict
from ibqlab.config.problems import ConfigError, Problem, nearest
from ibqlab.config.yaml_files import dump_yaml, load_yaml

__all__ = [
    "ConfigError",
    "Problem",
    "alternatives",
    "apply_overrides",
    "as_list",
    "check_parameters",
    "completed",
    "content_hash",
    "dump_yaml",
    "field_types",
    "load_yaml",
    "nearest",
    "parse",
    "read_as",
    "read_assigned",
    "read_parameters",
    "read_value",
    "split_assignment",
    "split_items",
    "to_dict",
]
