"""The wheel: what it holds and what it asks for."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = shutil.ignore_patterns(".*", "runs", "tests", "build", "dist", "*.egg-info", "__pycache__", "benchmarks")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources with the tools that are installed."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=OTHER)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.parametrize(
    "name",
    [
        "lora_rlhf/py.typed",
        "lora_rlhf/data/embedded/train.jsonl",
        "lora_rlhf/data/embedded/test.jsonl",
        "lora_rlhf/evaluation/bad_words.txt",
        "demo/page.css",
        "demo/page.js",
    ],
)
def test_the_wheel_holds_the_files_that_the_package_reads(wheel: zipfile.ZipFile, name: str) -> None:
    assert wheel.read(in_wheel(name)) == (ROOT / name).read_bytes()


def in_wheel(name: str) -> str:
    """The demo is a package of its own there: `demo` alone would be anybody's."""
    return re.sub("^demo/", "lora_rlhf_demo/", name)


def test_the_wheel_holds_the_licence(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if re.fullmatch(r"lora_rlhf-.*\.dist-info/(licenses/)?LICENSE", n))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = [ROOT / "lora_rlhf", ROOT / "demo"]
    modules = {in_wheel(str(path.relative_to(ROOT))) for folder in folders for path in folder.rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules
    tops = {name.split("/")[0].partition("-")[0] for name in wheel.namelist()}
    assert tops == {"lora_rlhf", "lora_rlhf_demo"}


def test_the_demo_is_a_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "lora-rlhf-demo = lora_rlhf_demo.app:run" in wheel.read(name).decode()


@pytest.mark.parametrize(
    ("extra", "package"), [("demo", "gradio"), ("eval", "lm-eval"), ("unsloth", "unsloth"), ("test", "pytest")]
)
def test_the_extras_are_declared(metadata: Message, extra: str, package: str) -> None:
    assert extra in metadata.get_all("Provides-Extra", [])
    needed = [line for line in metadata.get_all("Requires-Dist", []) if f'extra == "{extra}"' in line]
    assert [line for line in needed if re.match(rf"{package}\b", line)]


def imported_packages() -> set[str]:
    found = set()
    for path in (ROOT / "lora_rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"lora_rlhf"}


def test_what_the_library_imports_is_required_or_an_extra(metadata: Message) -> None:
    lines = metadata.get_all("Requires-Dist", [])
    required = {re.split(r"[^\w-]", line)[0].lower() for line in lines if "extra ==" not in line}
    comes_with = {"yaml": "pyyaml", "numpy": "scipy"}
    comes_with |= dict.fromkeys(["safetensors", "tokenizers"], "transformers")
    assert {comes_with.get(name, name) for name in imported_packages()} - {"unsloth", "lm_eval"} <= required


def test_name_licence_and_python_are_stated(metadata: Message) -> None:
    assert metadata["Name"] == "lora-rlhf"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
