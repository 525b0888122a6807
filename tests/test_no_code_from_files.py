"""No file that is read runs code: no pickle under any name, no YAML tag, no template, no module beside a model.

The one thing that runs code is a reward function, which its config names on purpose.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import assert_one_line_of_error

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm, load_reward_model
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.chat.votes import kept_votes
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.config_file import config_from_command_line, config_from_file
from lora_rlhf.data.bad_rows import BadRows
from lora_rlhf.data.chat import prompt_ids, set_chat_template
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arms import bad_words
from lora_rlhf.evaluation.judge_replies import ReplyFile
from lora_rlhf.evaluation.local_tasks import local_tasks
from lora_rlhf.evaluation.mt_bench import read_questions
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.plus import load_plus
from lora_rlhf.reward.sources import score_scales, source_entries
from lora_rlhf.run import RunDirectory, run_summary


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code_has_run"


@pytest.fixture(params=["pickle", "text pickle", "torch"])
def bomb(request: pytest.FixtureRequest, marker: Path, tmp_path: Path) -> bytes:
    """The bytes of a file that makes the marker when it is unpickled."""
    if request.param == "torch":
        torch.save(Bomb(marker), tmp_path / "bomb.pt")
        return (tmp_path / "bomb.pt").read_bytes()
    return pickle.dumps(Bomb(marker), protocol=0 if request.param == "text pickle" else None)


@pytest.fixture(autouse=True)
def no_code_has_run(marker: Path) -> Iterator[None]:
    yield
    assert not marker.exists()


def test_the_bomb_goes_off_where_it_is_unpickled(bomb: bytes, marker: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bomb)
    assert not marker.exists()
    try:
        pickle.loads(bomb)
    except pickle.UnpicklingError:
        torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()
    marker.unlink()


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        read()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# -- pickles under the names of other files ---------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.json.gz", "pairs.parquet"])
def test_a_pickle_as_preference_data(tmp_path: Path, bomb: bytes, name: str, skip: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(bomb)
    for source in (tmp_path / "data" / name, tmp_path / "data"):
        assert name in refused(lambda source=source: dataset_rows(str(source), "train", BadRows(skip)))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["data.py", "data.csv", "data.pkl", "data.arrow", "dataset_infos.json.py"])
def test_a_data_folder_with_a_script_or_a_pickle_runs_nothing(
    tmp_path: Path, bomb: bytes, marker: Path, name: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "data" / name).write_bytes(bomb)
    refused(lambda: dataset_rows(str(tmp_path / "data"), "train"))
    refused(lambda: dataset_rows(str(tmp_path / "data" / name), "train"))


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": config_from_file,
    "score_scales.json": lambda file: score_scales(file.parent),
    "summary.json": lambda file: run_summary(file.parent),
    "bad_words.txt": lambda file: bad_words(str(file)),
    "questions.jsonl": read_questions,
    "task.jsonl": lambda file: local_tasks(file.parent),
    "chat_template.jinja": lambda file: set_chat_template(_Tokenizer(), str(file)),
}


class _Tokenizer:
    """Renders nothing: a file is refused before."""

    chat_template: str | None = None

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no template")


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_as_a_file_of_a_run_or_an_evaluation(tmp_path: Path, bomb: bytes, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_bytes(bomb)
    if name == "bad_words.txt" and bomb.isascii():  # any text is a list of words
        READERS[name](folder / name)
    else:
        refused(lambda: READERS[name](folder / name))


def test_a_pickle_as_the_config_of_a_run_that_goes_on(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(bomb)
    (tmp_path / "run" / "summary.json").write_bytes(b"{}")
    refused(lambda: RunDirectory(RunConfig(output_dir=str(tmp_path / "run"))))


def test_a_pickle_among_what_is_kept_is_passed_over(tmp_path: Path, bomb: bytes) -> None:
    for name in ("votes.jsonl", "replies.jsonl"):
        (tmp_path / name).write_bytes(bomb)
    assert kept_votes(tmp_path / "votes.jsonl") == []
    assert ReplyFile(tmp_path / "replies.jsonl").known == {}
    cache = ResultCache(tmp_path / "cache")
    cache.result({"n": 1}, lambda: 1)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(bomb)
    assert cache.result({"n": 1}, lambda: 2) == 2


# -- models and adapters ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedBase, Path]:
    """The tiny base, and a folder with a sound adapter for it."""
    config = RunConfig(model_name_or_path=str(tiny_folder), dtype="float32", lora=LoraSettings(r=4, lora_alpha=8))
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), torch.float32)
    folder = tmp_path_factory.mktemp("adapters") / "policy"
    base.save_adapter(POLICY, folder)
    return base, folder


@pytest.fixture
def adapter(saved: tuple[SharedBase, Path], tmp_path: Path) -> Path:
    """A copy of the adapter."""
    shutil.copytree(saved[1], tmp_path / "adapter")
    return tmp_path / "adapter"


MODEL_FILES = ["model.safetensors", "config.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def of(model: Path) -> RunConfig:
    return RunConfig(model_name_or_path=str(model), dtype="float32", load_in_4bit=False)


def loaders(model: Path) -> list[Callable[[], Any]]:
    """Everything that loads weights or the config of a model folder."""
    config = of(model)
    return [
        lambda: load_causal_lm(config),
        lambda: load_reward_model(config, pad_token_id=2),
        lambda: load_plus(model),
        lambda: load_causal_lm(replace(config, load_in_4bit=True)),
    ]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pickle_as_a_file_of_a_model(model: Path, bomb: bytes, name: str) -> None:
    (model / name).write_bytes(bomb)
    for load in loaders(model):
        assert str(model) in refused(load)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_pickle_as_a_file_of_a_tokenizer(model: Path, bomb: bytes, name: str) -> None:
    assert (model / name).is_file()
    (model / name).write_bytes(bomb)
    if name == "chat_template.jinja" and bomb.isascii():  # any text is a template
        load_tokenizer(of(model))
        return
    refused(lambda: load_tokenizer(of(model)))
    refused(lambda: load_plus(model))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "vocab.txt"])
def test_a_pickle_as_a_tokenizer_of_another_kind(model: Path, bomb: bytes, name: str) -> None:
    (model / "tokenizer.json").unlink()
    (model / name).write_bytes(bomb)
    refused(lambda: load_tokenizer(of(model)))


PICKLED = (
    "pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "model.pt", "model.pkl",
)  # fmt: skip


def test_pickles_beside_the_weights_are_not_read(
    model: Path, adapter: Path, saved: tuple[SharedBase, Path], bomb: bytes
) -> None:
    for name in (*PICKLED, "generation_config.json"):  # without the last, transformers' own defaults hold
        for folder in (model, adapter):
            (folder / name).write_bytes(bomb)
    for load in loaders(model):
        load()
    saved[0].replace_adapter(POLICY, adapter)
    load_plus(adapter)


def test_pickles_in_place_of_the_weights_are_not_read(
    model: Path, adapter: Path, saved: tuple[SharedBase, Path], bomb: bytes
) -> None:
    for folder, weights in ((model, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        (folder / weights).unlink()
        for name in PICKLED:
            (folder / name).write_bytes(bomb)
    for load in loaders(model):
        refused(load)
    assert "adapter_model.safetensors" in refused(lambda: saved[0].replace_adapter(POLICY, adapter))
    refused(lambda: load_plus(adapter))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base_model.json"])
def test_a_pickle_as_a_file_of_an_adapter(
    adapter: Path, saved: tuple[SharedBase, Path], bomb: bytes, name: str
) -> None:
    assert (adapter / name).is_file()
    (adapter / name).write_bytes(bomb)
    assert str(adapter) in refused(lambda: saved[0].replace_adapter(POLICY, adapter))
    assert str(adapter) in refused(lambda: load_plus(adapter))


def test_a_model_cannot_bring_code_of_its_own(model: Path, marker: Path) -> None:
    (model / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")
    own = {name: ["modeling_own.Own", None] if name == "AutoTokenizer" else "modeling_own.Own" for name in classes}
    for file, kind in (("config.json", "mistral"), ("config.json", "own"), ("tokenizer_config.json", None)):
        held = json.loads((model / file).read_text()) | {"auto_map": own, "trust_remote_code": True}
        (model / file).write_text(json.dumps(held | ({"model_type": kind} if kind else {"tokenizer_class": "Own"})))
        for load in (*loaders(model), lambda: load_tokenizer(of(model))):
            with contextlib.suppress(UserError):
                load()
            assert not marker.exists()
    for load in loaders(model):  # of a kind that transformers does not know
        refused(load)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_model_cannot_fetch_code_from_the_hub(model: Path, name: str) -> None:
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(held | {name: "someone/kernel"}))
    for load in loaders(model):
        assert f"{name} names code on the Hub" in refused(load)


# -- configs, templates and data that ask for code --------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [MARKER]",
        "!!python/object/apply:os.system ['touch MARKER']",
        "!!python/object/new:os.system ['touch MARKER']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!Own {a: 1}",
    ],
)
def test_a_config_cannot_make_objects(tmp_path: Path, marker: Path, tag: str) -> None:
    file = tmp_path / "run.yaml"
    value = tag.replace("MARKER", str(marker))
    file.write_text(f"seed: 1\noutput_dir: {value}\n")
    text = refused(lambda: config_from_file(file))
    assert "line 2" in text
    assert f"{tag.split()[0].replace('!!', 'tag:yaml.org,2002:')} is refused" in text
    assert "is refused" in refused(
        lambda: config_from_command_line("", ["--ppo.reward_sources", f"{{kind: {value} }}"])
    )


def test_a_config_with_a_tag_stops_a_recipe_in_one_line(recipe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: !!python/object/apply:os.system ['true']\n")
    status, printed = recipe("direct_rlhf_lora.py", "--config", str(tmp_path / "run.yaml"))
    assert_one_line_of_error(status, printed, "run.yaml", "is refused")


@pytest.mark.parametrize("where", ["trust_remote_code", "ppo.trust_remote_code", "lora.trust_remote_code"])
def test_no_config_turns_foreign_code_on(tmp_path: Path, where: str) -> None:
    section, _, name = where.rpartition(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: true}}\n" if section else f"{name}: true\n")
    assert f"unknown field {where}" in refused(lambda: config_from_file(tmp_path / "run.yaml"))
    assert f"unknown option --{where}" in refused(lambda: config_from_command_line("", [f"--{where}", "true"]))


def test_no_data_set_name_is_a_reader_that_unpickles(
    tmp_path: Path, bomb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    (tmp_path / "train.pkl").write_bytes(bomb)
    monkeypatch.chdir(tmp_path)
    for reader in {"pandas", *(module for module, _ in _EXTENSION_TO_MODULE.values())}:
        for name in (reader, f"{reader}:{tmp_path}", f"{reader}:."):
            assert "names a reader of files" in refused(lambda name=name: dataset_rows(name, "train"))  # type: ignore[misc]


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.append(1) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{% for i in range(10000000) %}x{% endfor %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(model: Path, tmp_path: Path, marker: Path, escape: str) -> None:
    file = tmp_path / "escape.jinja"
    file.write_text(escape.replace("MARKER", str(marker)))
    tokenizer = load_tokenizer(of(model))
    assert "does not render" in refused(lambda: set_chat_template(tokenizer, str(file)))
    (model / "chat_template.jinja").write_text(file.read_text())
    assert "does not render" in refused(lambda: load_tokenizer(of(model)))


def test_what_a_template_prints_of_data_is_not_a_template(model: Path, marker: Path) -> None:
    tokenizer = load_tokenizer(of(model))
    text = "{{ 7 * 6 }}{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    assert text in tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": text}]))


def test_a_reward_function_is_the_one_thing_that_is_imported_and_only_by_its_name(
    tmp_path: Path, marker: Path, bomb: bytes
) -> None:
    (tmp_path / "named.py").write_text("def reward(prompts, completions, **_):\n    return [0.0] * len(completions)\n")
    (tmp_path / "other.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "bomb.py").write_bytes(bomb)
    source: dict[str, Any] = {"kind": "function", "path": f"{tmp_path / 'named.py'}:reward"}

    def entries(**changed: Any) -> Any:
        config = RunConfig()
        config.ppo.reward_sources = [source | changed]
        return source_entries(config)

    assert [entry.name for entry in entries()] == ["named"]
    assert entries(kind="model", path=f"{tmp_path / 'other.py'}:f")[0].kind == "model"  # a folder, not imported
    refused(lambda: entries(kind="adapter", path=f"{tmp_path / 'other.py'}:f"))
    refused(lambda: entries(path=f"{tmp_path / 'bomb.py'}:reward"))
    refused(lambda: entries(kind="module", path=f"{tmp_path / 'other.py'}:f"))
