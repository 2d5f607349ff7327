"""YAML as plain data, from files that strangers may have made."""

from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 50_000  # ten times what any of ours holds; for what is nested deep the reader takes seconds
MOST_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe, and small: an alias can make gigabytes of a line or two, and so can a number when it is printed."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not taken")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of more than {MOST_DIGITS} digits")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Dictionaries, lists, texts, numbers, dates.

    Raises:
        ValueError: not valid YAML, or more than a description of something can be; its text says what in one line.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS} characters")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises many kinds on what is damaged: KeyError, RecursionError, AttributeError
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Any:
    """What `parse_yaml` gives of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: not UTF-8, or as `parse_yaml`.
    """
    with open(path, encoding="utf-8") as file:
        return parse_yaml(file.read(MOST_CHARACTERS + 1))
