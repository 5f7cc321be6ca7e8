"""YAML as people write settings in it."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once only, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                # PyYAML would take the last one without a word.
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""


for _side in (Loader, Dumper):
    # YAML 1.1 wants a dot in the mantissa, and would take 1e-5 for text.
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def parse(text: str) -> Any:
    """What a text says.

    Raises:
        yaml.YAMLError, ValueError, TypeError: it is not YAML, or a key stands twice.
    """
    return Loader(text).get_single_data()
