"""The parser of the command line: every slip of the user is one line that names the option, the value and the fix."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser

import fedgan_lightning
from fedgan_lightning.documents import check_settings, check_settings_file
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import expanded
from fedgan_lightning.gan import networks, priors

logger = logging.getLogger("fedgan_lightning")

#: What is in memory can be written without its module path in a configuration: every public name, and these.
SHORT_NAMES = (
    networks,
    priors,
    *(getattr(fedgan_lightning, name) for name in (*fedgan_lightning.__all__, *fedgan_lightning.SUBMODULES)),
)
HELP = "See --help, or --print_config for all settings."
#: Lines in which jsonargparse recounts every alternative it tried.
RECOUNTED = re.compile(
    r"Does not validate against|^Subtypes:|^Errors:?$|<class 'NoneType'>|^Given value type:|NestedArg|not accessible"
)
#: Kinds of values in words.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "collections.abc.Sequence": "a list",
}
#: How a report begins that names a part of what was given.
PART = re.compile(r"(?!a )[\w.]+ must ")
#: A class by the module that it is in.
CLASS_PATH = re.compile(r"(?!.*\.ya?ml$)[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
#: What settings are called that come as one text.
INLINE = "the value of an option, or the file that it names,"


class OneLineParser(LightningArgumentParser):
    """Reports a bad argument in one line and without the usage text; takes no abbreviations, and no key twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a file of settings; whatever is wrong with it names the file."""
        path = expanded(str(cfg_path))
        check_settings_file(path)
        return super().parse_path(str(path), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ConfigurationError(explained(str(message))) from ex


def where_data_class_is_named(arguments: Sequence[str]) -> Literal["option", "file"] | None:
    """Return where arguments say ``data`` by a class: as ``--data package.Class``, or in a file as ``class_path``.

    Then settings below ``data`` are those of that class; otherwise they are those of ``FederatedDataModule``.
    """
    found: Literal["option", "file"] | None = None
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        if option == "--data" and CLASS_PATH.fullmatch(value):
            return "option"
        settings = _settings_of(value) if option in ("--data", "--config", "-c") else None
        group = settings if option == "--data" or settings is None else settings.get("data")
        if isinstance(group, dict) and "class_path" in group:
            found = "file"
    return found


def _settings_of(value: str) -> Any:
    """Return settings given inline or as a file; ``None`` where they cannot be read, which the parser will say."""
    try:
        path = expanded(value)
        found = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else value)
    except (OSError, ValueError, yaml.YAMLError, ConfigurationError):
        return None
    return found if isinstance(found, dict) else None


def strict_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, and refuse a key that is written twice: it would keep the last, silently."""
    if ":" in text:
        check_settings(text, name=INLINE)
    return _lenient(text)


_lenient = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", strict_yaml, exceptions=(yaml.YAMLError,))


class OwnDataParser(OneLineParser):
    """The parser where ``--data`` names a class: what files say of the data of another is not used."""

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = expanded(str(cfg_path))
        check_settings_file(path)
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "data" not in settings or "class_path" in (settings["data"] or {}):
            return super().parse_path(cfg_path, *args, **kwargs)
        logger.info(f"data of {path.name} is not used: --data names a class")
        del settings["data"]
        return self.parse_string(yaml.safe_dump(settings), str(path), *args, **kwargs)


# ---------------------------------------------------------------------- what a parser's report means


def one_line(text: str) -> str:
    """Return what matters of a parser's report in one line."""
    lines = [line.replace(HELP, "").strip(" -.:\t") for line in text.splitlines()]
    kept = [line for line in lines if line and not RECOUNTED.search(line)]
    return "; ".join(dict.fromkeys(kept))


def explained(text: str) -> str:
    """Return a parser's report as rule, value and fix, or as one line at least."""
    keys = re.findall(r'Parser key "([^"]+)"', text)
    within = next((line.strip(" -") for line in text.splitlines() if "; got " in line), None)
    if within is not None:  # of a part, which has been explained
        key = _joined(keys)
        return within if not key or key in within else f"{key}{'.' if PART.match(within) else ': '}{within}"
    for explain in (_missing, _beside_init_args, _several_of, _wrong_kind, _no_class):
        if keys and (found := explain(_joined(keys), text)):
            return found
    return text if "; got " in text and "\n" not in text else f"{one_line(text)}. {HELP}"


def _joined(keys: Sequence[str]) -> str:
    """Return nested keys as one: each report within a report names its own part."""
    whole = ""
    for key in keys:
        whole = key if not whole or key.startswith(whole) else f"{whole}.{key}"
    return whole


def _missing(key: str, text: str) -> str | None:
    """An argument that has no default."""
    found = re.search(r"arguments are required: ([\w, ]+)", text)
    fix = f"set {key}.init_args.{found[1].split(',')[0].strip()}" if found else ""
    return message(f"{key} must have {found[1]}", received="none", fix=fix) if found else None


def _beside_init_args(key: str, text: str) -> str | None:
    """A class with its arguments beside it."""
    given = re.search(r"Given value: (\{.*\})", text)
    if "Option 'class_path' is not accepted" not in text or given is None:
        return None
    try:
        value = ast.literal_eval(given[1])
    except (ValueError, SyntaxError):
        return None
    beside = [str(name) for name in value if name not in ("class_path", "init_args")]
    if not beside:
        return None
    return message(
        f"arguments of a class must go below init_args, in {key}, too",
        received=f"{', '.join(beside)} beside class_path: {value.get('class_path')}",
        fix=f"write {{class_path: {value.get('class_path')}, init_args: {{{beside[0]}: ...}}}}",
    )


def _several_of(key: str, text: str) -> str | None:
    """A list, or a single one, where the other is wanted."""
    found = re.search(r"Not a valid subclass of (\w+)\. Got value: (.*)", text)
    if found is None:
        return None
    return message(f"{key} must be one {found[1]}, by the name of its class", received=found[2], fix="write one name")


def _wrong_kind(key: str, text: str) -> str | None:
    """A value of another type."""
    kinds = re.findall(r"Expected a <class '([\w.]+)'>", text)
    choices = [
        part.strip(" '\"") for own in re.findall(r"typing\.Literal\[([^\]]*)\]", text) for part in own.split(",")
    ]
    value = re.search(r"(?:Got value|Given value): (.*)", text)
    if value is None or ("Expected a dot import path string" in text and not {"float", "int"} & {*kinds}):
        return None
    allowed = [KINDS[kind] for kind in dict.fromkeys(kinds) if kind in KINDS]
    allowed += [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    allowed += ["null"] if "NoneType" in kinds else []
    if key == "seed_everything":  # of Lightning's own, which draws one where it is true
        allowed = ["a whole number"]
    known = all(kind in KINDS or kind == "NoneType" for kind in kinds)
    if not {*allowed} - {"null"} or not known or "is not accepted" in text:
        return None
    received = value[1].split(" See --help")[0].rstrip(". >")
    return message(f"{key} must be {' or '.join(allowed)}", received=received, fix="write such a value")


def _twin(path: str) -> str:
    """Return what to do about a class of the other package of Lightning; nothing of all others."""
    home, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    bases = [base.__module__.split(".")[0] for base in getattr(found, "__mro__", ())]
    return "take LightningModule from lightning, not from pytorch_lightning" if "pytorch_lightning" in bases else ""


def _no_class(key: str, text: str) -> str | None:
    """A name that is no class, or one of another kind."""
    missing = re.search(r"Expected a dot import path string: (\S+)", text)
    other = re.search(r"Import path(?: (\S+))? does not correspond to a subclass of (\w+)", text)
    nowhere = re.search(r"Problem with given class_path '([^']+)':\s*(.*)", text)
    if other is not None:
        given = re.search(r"Given value: ([\w.]+)", text)
        path = other[1] or (given[1].rstrip(".") if given else "something else")
        return message(f"{key} must be a {other[2]}", received=f"{path}, which is none", fix=_twin(path) or _where(key))
    if nowhere is not None and "Parser key" not in nowhere[2]:
        return message(
            f"{key} must be a class that can be imported", received=f"{nowhere[1]} ({nowhere[2]})", fix=_where(key)
        )
    if missing is None:
        return None
    name, names = missing[1].rstrip(".;"), _short_names()
    words = [*dict.fromkeys(re.findall(r"typing\.Literal\['(\w+)'\]", text))]
    if name in names:
        kind = names[name].__mro__[1].__name__ if inspect.isclass(names[name]) else "function"
        return message(f"{key} must be a class of another kind", received=f"{name}, which is a {kind}", fix=_where(key))
    near = difflib.get_close_matches(name.lower(), [*{own.lower() for own in (*names, *words)}], n=1, cutoff=0.7)
    found = [own for own in (*words, *names) if near and own.lower() == near[0]]
    fix = f"write {found[0]}, or see COMMAND --help for others" if found else _where(key)
    choice = f", or {', '.join(words)}" if words else ""
    return message(f"{key} must be the name of a class{choice}", received=f"{name}, which is none", fix=fix)


def _where(key: str) -> str:
    return f"COMMAND --help lists what {key} can be; your own classes are written with their module"


def _short_names() -> dict[str, Any]:
    """Return what can be written without a module path, by name."""
    found: dict[str, Any] = {}
    for item in SHORT_NAMES:
        if isinstance(item, ModuleType):
            found |= {name: own for name, own in vars(item).items() if inspect.isclass(own) and name[0] != "_"}
        elif inspect.isclass(item):
            found[item.__name__] = item
    return found
