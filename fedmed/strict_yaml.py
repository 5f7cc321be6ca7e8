"""YAML as people write settings in it."""

from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: one of the two would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.MarkedYAMLError(problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


def parse(text: str) -> Any:
    """What a text says.

    Raises:
        yaml.YAMLError, ValueError, TypeError: it is not YAML, or a key stands twice.
    """
    return Loader(text).get_single_data()
