"""YAML that holds plain values only, each said once, and not more of them than fit."""

from __future__ import annotations

from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

MOST_VALUES = 1_000_000
"""Values in a text, each counted as often as aliases repeat it."""


class BadYaml(Exception):
    """Text that is no YAML of plain values; what it says is one line."""


def plain_yaml(text: str) -> Any:
    """Return the plain values in a YAML text; no tag can make anything else. Raises `BadYaml`."""
    try:
        value = yaml.load(text, _PlainLoader)
    except ConstructorError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadYaml(where + " ".join(str(error.problem).split())) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise BadYaml(" ".join(str(error).split()) or type(error).__name__) from None
    waiting, seen = [value], 0
    while waiting:
        part, seen = waiting.pop(), seen + 1
        if seen > MOST_VALUES:  # aliases may nest: a few lines unfold to billions, or into themselves without end
            raise BadYaml(f"its aliases unfold to more than {MOST_VALUES:,} values")
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple | set):
            waiting += part
    return value


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that is there twice, and says so where a tag would make an object."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def refused(self, node: yaml.Node) -> NoReturn:
        problem = f"the tag {node.tag} is refused: only plain values are read, and no objects made"
        raise ConstructorError(None, None, problem, node.start_mark)


_PlainLoader.add_constructor(None, _PlainLoader.refused)
