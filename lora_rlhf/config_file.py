"""Reading a `RunConfig` from YAML and from the command line, with errors that name file, field and fix."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import reprlib
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lora_rlhf.config import EMBEDDED, MAY_CHANGE, SECTIONS, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.plain_yaml import BadYaml, plain_yaml


def config_from_mapping(values: dict[str, Any], where: str) -> RunConfig:
    """Return the config that a nested mapping describes; `where` names its origin in errors.

    Raises:
        UserError: an unknown field (the nearest known one is suggested), a value of the wrong type or out of range.
    """
    config = _checked(_build(RunConfig, values, where, ""), where)
    return dataclasses.replace(config, output_dir=os.path.expanduser(config.output_dir))  # as libraries would below us


def config_from_file(path: str | Path) -> RunConfig:
    """Return the config in a YAML file. Raises `UserError` where it is missing, malformed or has bad fields."""
    return config_from_mapping(_read_yaml(Path(path)), _one_line(str(path)))


def config_from_command_line(
    description: str | None, arguments: Sequence[str] | None = None, default: Path | None = None
) -> RunConfig:
    """Return the config of `--config FILE` with every other option laid over it; `--help` lists all fields.

    Args:
        description: what `--help` says first.
        arguments: the words of the command line; none: this process's.
        default: file that is read where neither --config nor a model is named.
    """
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the fields below (nested: `ppo: {kl_coef: 0.1}`)."
    )
    groups: dict[str, Any] = {}
    for dotted, spec, annotation, preset in _leaves(RunConfig, ""):
        section = dotted.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        shown = "" if preset in (None, [], {}) else f" [{_shown(preset)}]"
        groups[section].add_argument(
            f"--{dotted}",
            dest=dotted,
            default=None,
            nargs="*" if _list_item(annotation) else ("?" if annotation is bool else None),
            const="true" if annotation is bool else None,
            metavar=dotted.rpartition(".")[2].upper(),
            help=(spec.metadata["help"] + shown).replace("%", "%%"),
        )
    known, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        if word.startswith("--"):
            names = [dotted for dotted, *_ in _leaves(RunConfig, "")]
            raise UserError(
                f"unknown option {_named(word.split('=')[0])}{_suggestion(word.split('=')[0][2:], names)}; see --help"
            )
    if unknown:
        raise UserError(f"unexpected word on the command line: {unknown[0]!r}; options are written --field value")

    given = vars(known)
    if not given["config"] and default and given["model_name_or_path"] in (None, EMBEDDED):
        given["config"] = str(default)
    values = _read_yaml(Path(given["config"])) if given["config"] else {}
    for dotted, _, annotation, _ in _leaves(RunConfig, ""):
        if given[dotted] is not None:
            _put(values, dotted, _coerced(_parsed(given[dotted], annotation, dotted), annotation, f"--{dotted}"))
    return config_from_mapping(values, _one_line(given["config"] or "command line"))


def config_to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return the fully resolved config as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def lasting_fields(values: dict[str, Any], stages: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a config, as a mapping, that what these stages left depends on."""
    left_out = {*MAY_CHANGE, *(section for stage, section in SECTIONS.items() if stage not in stages)}
    lasting = {name: value for name, value in values.items() if name not in left_out}
    for name, value in lasting.items():
        if isinstance(value, dict):
            lasting[name] = {field: own for field, own in value.items() if field not in MAY_CHANGE}
    return lasting


def check_checkpoint_config(held: dict[str, Any], config: RunConfig, stage: str, folder: Path) -> None:
    """Raise `UserError` where the checkpoint in `folder` is of a run of the stage with another config."""
    wanted = lasting_fields(config_to_mapping(config), [stage])
    held = with_defaults(held, config_to_mapping(RunConfig()))
    if fields := differing_fields(lasting_fields(held, [stage]), wanted):
        raise UserError(
            f"{folder} is of a run with another config: {', '.join(fields[:5])} differ. Delete {folder.parent} to "
            "begin the stage anew, or go on with the config it was made with"
        )


def with_defaults(held: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a config as it was written, with the defaults of fields that came later."""
    return {
        k: with_defaults(v, defaults[k]) if isinstance(v, dict) and isinstance(defaults.get(k), dict) else v
        for k, v in (defaults | held).items()
    }


def differing_fields(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Return dotted names of the fields in which two nested mappings differ."""
    names = []
    for key in sorted(first.keys() | second.keys()):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += differing_fields(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(f"{prefix}{key}")
    return names


def _leaves(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any, Any]]:
    """Yield (dotted name, field, annotation, default) of every leaf; plain fields before nested sections."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    for spec in sorted(fields, key=lambda f: dataclasses.is_dataclass(hints[f.name])):
        annotation = hints[spec.name]
        if dataclasses.is_dataclass(annotation):
            yield from _leaves(annotation, f"{prefix}{spec.name}.")  # type: ignore[arg-type]
        else:
            default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
            yield f"{prefix}{spec.name}", spec, annotation, default


def _build(kind: type, values: dict[str, Any], where: str, prefix: str) -> Any:
    hints = get_type_hints(kind)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown field {prefix}{_named(key)}{_suggestion(str(key), list(hints))}")
        annotation = hints[key]
        if dataclasses.is_dataclass(annotation):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix}{key} is a section of fields, not {_brief(value)}")
            built[key] = _build(annotation, value, where, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            built[key] = _coerced(value, annotation, f"{where}: {prefix}{key}")
    return kind(**built)


def _coerced(value: Any, annotation: Any, where: str) -> Any:
    """Return `value` as the annotated type; raise `UserError` where it is not one (a bool is no number)."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerced(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        if value in options:
            return value
        raise UserError(
            f"{where} is one of {', '.join(map(str, options))}, not {_brief(value)}{_suggestion(str(value), options)}"
        )
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_coerced(item, options[0], f"{where}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        if isinstance(value, dict):
            return value
        raise UserError(f"{where} is a mapping such as {{kind: adapter, path: FOLDER}}, not {_brief(value)}")
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-4 as a string
            if annotation is float:
                return float(value)
            if isinstance(value, int) or not isinstance(value, str):
                if value == int(value):
                    return int(value)
            elif value.lstrip("+-").isdigit():
                return int(value)
            elif float(value).is_integer():
                return int(float(value))
    if annotation is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    article = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    raise UserError(f"{where} is {article.get(annotation.__name__, annotation.__name__)}, not {_brief(value)}")


_AT_LEAST_ONE = (
    "lora.r", "ppo.total_steps", "ppo.batch_size", "ppo.num_ppo_epochs", "ppo.num_mini_batches", "ppo.micro_batch_size",
    "ppo.scoring_batch_size", "ppo.response_length", "max_prompt_length", "max_length",
    "reward.per_device_train_batch_size", "sft.per_device_train_batch_size", "reward.gradient_accumulation_steps",
    "sft.gradient_accumulation_steps", "compare.num_prompts", "compare.num_safety_prompts", "merge.drift_prompts",
    "ppo.kl_horizon", "ppo.prefix_tokens",
)  # fmt: skip
_ABOVE_ZERO = ("reward.learning_rate", "sft.learning_rate", "ppo.learning_rate", "ppo.temperature", "ppo.max_grad_norm",
               "ppo.cliprange", "ppo.cliprange_value", "ppo.kl_target")  # fmt: skip


def _checked(config: RunConfig, where: str) -> RunConfig:
    """Return `config` after checks of ranges that hold whatever the run is."""
    flat = {dotted: _get(config, dotted) for dotted, *_ in _leaves(RunConfig, "")}
    for name, value in flat.items():
        if isinstance(value, float) and value != value:
            raise UserError(f"{where}: {name} is not a number (nan)")
    for name in _AT_LEAST_ONE:
        if flat[name] < 1:
            raise UserError(f"{where}: {name} is at least 1, not {flat[name]}")
    for name in _ABOVE_ZERO:
        if not 0 < flat[name] < float("inf"):
            raise UserError(f"{where}: {name} is above 0, not {flat[name]}")
    for name in (
        "ppo.value_learning_rate",
        "ppo.sampler_correction",
        "ppo.score_clip",
        "ppo.rollout_batch_size",
        "ppo.logits_chunk_size",
        "ppo.max_stopped_updates",
        "max_train_pairs",
        "max_eval_pairs",
    ):
        if flat[name] is not None and not 0 < flat[name] < float("inf"):
            raise UserError(f"{where}: {name} is above 0, or none; not {flat[name]}")
    for stage in ("reward", "sft", "ppo"):
        if (most := flat[f"{stage}.max_skipped_steps"]) is not None and most < 0:
            raise UserError(f"{where}: {stage}.max_skipped_steps is 0 or more, or none; not {most}")
        if flat.get(f"{stage}.weight_decay", 0) < 0:
            raise UserError(f"{where}: {stage}.weight_decay is not below 0; not {flat[f'{stage}.weight_decay']}")
        if not 0 <= flat[f"{stage}.warmup_ratio"] < 1:
            raise UserError(
                f"{where}: {stage}.warmup_ratio is a share, from 0 to below 1; not {flat[f'{stage}.warmup_ratio']}"
            )
    for name in ("ppo.gamma", "ppo.lam", "ppo.stop_string_penalty", "ppo.prefix_share"):
        if not 0 <= flat[name] <= 1:
            raise UserError(f"{where}: {name} is from 0 to 1, not {flat[name]}")
    for name in (
        "ppo.kl_coef", "ppo.vf_coef", "ppo.missing_eos_penalty", "ppo.value_warmup_steps", "ppo.snapshots"
    ):  # fmt: skip
        if not 0 <= flat[name] < float("inf"):
            raise UserError(f"{where}: {name} is 0 or more, and finite, not {flat[name]}")
    if config.ppo.value_warmup_steps >= config.ppo.total_steps:
        raise UserError(f"{where}: ppo.value_warmup_steps is below ppo.total_steps: the policy would never learn")
    if "" in config.ppo.stop_strings:
        raise UserError(f"{where}: ppo.stop_strings holds an empty text, which would end every answer at once")
    if not 0 <= config.reward.contrast_share < float("inf"):
        raise UserError(f"{where}: reward.contrast_share is not below 0; not {config.reward.contrast_share}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"{where}: seed is from 0 to 2^32 - 1, not {config.seed}")
    if config.ppo.normalization_samples < 2:
        raise UserError(f"{where}: ppo.normalization_samples is at least 2: a deviation needs two answers")
    if not config.output_dir.strip():
        raise UserError(f"{where}: output_dir is empty; name a folder")
    if not config.dataset_name:
        raise UserError(f"{where}: dataset_name is empty; name at least one data set")
    if config.dataset_weights and len(config.dataset_weights) != len(config.dataset_name):
        raise UserError(
            f"{where}: dataset_weights has {len(config.dataset_weights)} numbers for {len(config.dataset_name)} "
            "data sets in dataset_name; give one each"
        )
    if any(not 0 < w < float("inf") for w in config.dataset_weights):
        raise UserError(f"{where}: dataset_weights are above 0, not {config.dataset_weights}")
    if config.ppo.adaptive_kl and config.ppo.kl_horizon < config.ppo.batch_size:
        raise UserError(
            f"{where}: ppo.kl_horizon ({config.ppo.kl_horizon}) is below ppo.batch_size ({config.ppo.batch_size}): "
            "one step could turn the KL coefficient around"
        )
    if config.ppo.batch_size % config.ppo.num_mini_batches:
        raise UserError(
            f"{where}: ppo.batch_size ({config.ppo.batch_size}) is not a multiple of ppo.num_mini_batches "
            f"({config.ppo.num_mini_batches})"
        )
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _read_yaml(path: Path) -> dict[str, Any]:
    shown = _one_line(str(path))
    try:
        values = plain_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"--config: no file {shown}{_suggestion(str(path), siblings)}") from None
    except OSError as error:
        raise UserError(f"--config: {shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config: {shown} is not UTF-8 text") from None
    except ValueError as error:  # a name with a zero byte
        raise UserError(f"--config: {shown} cannot be read: {error}") from None
    except BadYaml as error:
        raise UserError(f"--config: {shown} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config: {shown} holds {type(values).__name__}, not fields such as `seed: 1`")
    return values


def _parsed(words: Any, annotation: Any, dotted: str) -> Any:
    """Return what a command-line word means; numbers, booleans and mappings are written as in YAML."""
    if isinstance(words, list):
        if [word.lower() for word in words] in (["none"], ["null"]):
            return None
        return [word if _list_item(annotation) is str else _parsed(word, Any, dotted) for word in words]
    options = get_args(annotation) or (annotation,)
    if str in options or get_origin(annotation) is Literal:
        return None if words.lower() in ("none", "null") else words
    try:
        value = plain_yaml(words)
    except BadYaml as error:
        raise UserError(f"--{dotted}: {_brief(words)} cannot be read: {error}") from None
    return None if isinstance(value, str) and value.lower() == "none" else value


def _list_item(annotation: Any) -> Any:
    """Return what a list (or list or none) holds; none where the annotation is no list."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is list:
            return get_args(kind)[0]
    return None


def _get(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{section} is a section of fields, not {_brief(inner)}")
        values = inner
    values[name] = value


def _shown(default: Any) -> str:
    return (
        " ".join(map(str, default))
        if isinstance(default, list)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )


def _brief(value: Any) -> str:
    """Return a value as it is written in Python, cut where it is long or deep."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 3, 80, 80
    return brief.repr(value)


def _named(key: Any) -> str:
    """Return the name of a field as it stands, or quoted and cut where it would not print as a short word."""
    return str(key) if str(key).isprintable() and len(str(key)) <= 80 else _brief(key)


def _one_line(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _suggestion(name: str, known: Sequence[Any]) -> str:
    if len(name) > 300:  # of a path, at most; comparing takes time
        return ""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    if not close:  # the right field without its section
        close = [str(k) for k in known if str(k).rpartition(".")[2] == name][:1]
    return f"; did you mean {close[0]}?" if close else ""
