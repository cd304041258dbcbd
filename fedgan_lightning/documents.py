"""Settings in YAML: read so that a slip is an error that names file and line, and not another experiment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedgan_lightning.errors import ConfigurationError, message


def read_settings(path: str | Path) -> str:
    """Return the text of a file of settings, which is YAML without a key that is written twice.

    Raises:
        ConfigurationError: If it is anything else; names the file, and the lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            message("a configuration must be a file of text", received=f"{path} ({why})", fix="check the path")
        ) from error
    check_settings(text, name=str(path))
    return text


def check_settings_file(path: str | Path) -> None:
    """Refuse a file that is not a mapping from groups to their settings.

    Raises:
        ConfigurationError: If it is not YAML, empty, a list, or a text.
    """
    import yaml

    found = yaml.safe_load(read_settings(path))
    listed = [key for key, own in found.items() if isinstance(own, list)] if isinstance(found, dict) else []
    if isinstance(found, dict) and not listed:
        return
    kind = "empty" if found is None else f"a {'list' if isinstance(found, list) else 'text'}"
    raise ConfigurationError(
        message(
            "a configuration must have groups of settings, such as model: and data:",
            received=f"{path}, which is {kind}" if not listed else f"{path} with a list below {listed[0]}:",
            fix="start from the output of --print_config",
        )
    )


def check_settings(text: str, *, name: str) -> None:
    """Refuse what is not YAML, and keys that are written twice: YAML readers keep the last one and say nothing.

    Args:
        text: The settings.
        name: What they are called in the error.

    Raises:
        ConfigurationError: If it is so.
    """
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = next(_twice(yaml.compose(text, Loader=loader)), None)
        yaml.load(text, Loader=loader)  # refuses tags that would build objects, and keys that cannot be keys
    except yaml.YAMLError as error:
        raise ConfigurationError(
            message(
                "settings must be YAML",
                received=f"{name}{_place(error)}",
                fix="indent with spaces, close brackets and quotes, and write a space after each colon",
            )
        ) from error
    except RecursionError as error:
        raise ConfigurationError(
            message("settings must be nested a few levels deep", received=f"{name} with hundreds", fix="flatten it")
        ) from error
    if found is not None:
        key, first, second = found
        raise ConfigurationError(
            message(
                "a key of the settings must be written once",
                received=f"{name} with {key} in line {first} and again in line {second}",
                fix="put both under one key, or remove one",
            )
        )


def _place(error: Any) -> str:
    """Return line and problem, as far as the parser knows them."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    problem = " ".join(problem.split())
    return f" ({problem})" if mark is None else f", line {mark.line + 1}, column {mark.column + 1} ({problem})"


def _twice(root: Any) -> Iterator[tuple[str, int, int]]:
    """Yield every key that a mapping has twice, with the lines of both."""
    import yaml

    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:  # an alias, perhaps of what contains it
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in lines:
                        yield key.value, lines[key.tag, key.value], line
                    lines[key.tag, key.value] = line
            waiting += [own for pair in reversed(node.value) for own in reversed(pair)]
