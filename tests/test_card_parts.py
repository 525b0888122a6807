"""What the benchmark for cards is made of: random models, floors, profiles, checks, peers, and its memory cap."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import card_parts.decode as decode_part
import card_parts.ppo as ppo_part
import torch
from card_parts.bench import SIZES, Bench
from card_parts.correctness import PAGED_NUMBERS, RANK, paged_moments, small_trainer
from card_parts.decode import SETTINGS
from card_parts.embedded_run import embedded_model
from card_parts.models import (
    config_of_size,
    mixed_prompts,
    random_causal_lm,
    shared_base,
    step_config,
    step_trainer,
    whole_vocabulary_tokenizer,
    write_model,
)
from card_parts.peers import agreement_of, numbers_of, printed_by, random_model, second_step_of, written_model
from card_parts.ppo import MAIN, decoding_floor, planned_shape
from card_parts.profiled import Profile, device_figures
from safetensors.torch import load_file
from shapes import Rates, update_flops

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.decoding import stop_position


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(SIZES["tiny"], torch.device("cpu"), 24.0, time.monotonic() + 600, tmp_path)


def test_every_id_of_the_vocabulary_decodes_and_stop_strings_are_found() -> None:
    tokenizer = whole_vocabulary_tokenizer(2000)
    assert len(tokenizer) == 2000
    assert all(tokenizer.decode([i]) for i in range(5, 2000))
    text = [1999, *tokenizer("\n\nHuman:", add_special_tokens=False)["input_ids"], 1998]
    assert stop_position(tokenizer, text, ("\n\nHuman:",)) == (len(text) - 1, tokenizer.decode([1999]))
    assert tokenizer("as it is")["input_ids"] == whole_vocabulary_tokenizer(600)("as it is")["input_ids"]


def test_prompts_differ_in_length_and_reach_the_longest(bench: Bench) -> None:
    lengths = {len(prompt) for prompt in mixed_prompts(bench, 24)}
    assert lengths == set(range(3, 25))


def test_a_written_model_is_the_one_in_memory(bench: Bench) -> None:
    model = random_causal_lm(bench, config_of_size(bench))
    write_model(model, bench.tokenizer, bench.folder / "model")
    config = step_config(bench, MAIN, None)
    config.model_name_or_path = str(bench.folder / "model")
    ids = torch.arange(5, 40)[None]
    assert torch.equal(load_causal_lm(config)(ids).logits, model(ids).logits)


def test_the_checked_step_has_moments_large_enough_to_be_paged() -> None:
    _, _, inner, _ = SIZES["mistral"].check
    assert RANK * inner >= PAGED_NUMBERS


def test_paged_moments_are_counted(bench: Bench) -> None:
    trainer, _ = small_trainer(bench)
    assert {len(p) for n, p in trainer.base.model.named_parameters() if "lora_A" in n} == {RANK}
    trainer.step()
    assert paged_moments(trainer.optimizer) == 0  # torch's own Adam
    for number, state in enumerate(trainer.optimizer.state.values()):
        state["state1"] = torch.zeros(1)
        state["state1"].is_paged = number < 2
    assert paged_moments(trainer.optimizer) == 2


def test_the_cap_leaves_room_for_cudas_own_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to 24 GiB on a card of 80: torch may take 24 less the context, 0.586 GiB, and all of it afterwards."""
    fractions = [1.0]
    card_of_80 = argparse.Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card_of_80)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fractions[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    bench.device = torch.device("cuda")
    with bench.held_to(24.0):
        assert fractions[-1] * 80 == pytest.approx(24 - 600 / 1024)
        with bench.allocator_held_to(10.0):
            assert fractions[-1] * 80 == pytest.approx(10)
    assert fractions[-1] == 1.0


def test_numbers_of_two_bases_agree_where_they_are_the_same_and_not_else(bench: Bench) -> None:
    config = step_config(bench, MAIN, None)
    first, second, other = (
        shared_base(config, random_causal_lm(bench, config_of_size(bench), seed)) for seed in (0, 0, 1)
    )
    before = [p.clone() for p in first.parameters(POLICY)]
    ours = numbers_of(bench, first)
    assert all(torch.equal(p, b) for p, b in zip(first.parameters(POLICY), before, strict=True))
    assert set(agreement_of(numbers_of(bench, second), ours).values()) == {0.0}
    assert agreement_of(numbers_of(bench, other), ours)["gradient_error"] > 0.5


@pytest.mark.slow
def test_a_backend_in_a_process_of_its_own_agrees_with_ours(bench: Bench) -> None:
    folder, file = written_model(bench), bench.folder / "numbers.safetensors"
    words = ["--backend", "transformers", "--model", str(folder), "--size", "tiny", "--numbers", str(file)]
    script = ROOT / "benchmarks" / "peers" / "backend_step.py"
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=environment() | {"PYTHONPATH": path},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["seconds"]["step"] > 0
    ours = numbers_of(bench, shared_base(step_config(bench, MAIN, None), random_model(bench)))
    assert set(agreement_of(load_file(file), ours).values()) == {0.0}


def script(tmp_path: Path, *lines: str) -> list[str]:
    """Return the command that runs a script of these lines."""
    file = tmp_path / "script.py"
    file.write_text("\n".join(["import sys, time", *lines]))
    return [sys.executable, str(file)]


def test_a_peer_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="slow was ended after"):
        second_step_of("slow", script(tmp_path, "time.sleep(60)"), seconds=0.5)
    assert time.monotonic() - started < 20


def test_a_peer_that_breaks_says_why_and_one_that_works_takes_two_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="broken ended: no such kernel"):
        second_step_of("broken", script(tmp_path, "sys.exit('no such kernel')"), seconds=30)
    works = script(tmp_path, """print('{"ready": true}', flush=True)""", "for number, _ in enumerate(sys.stdin):",
                   """    print('{"number": %d}' % number, flush=True)""")  # fmt: skip
    assert second_step_of("works", works, seconds=30) == {"number": 1}


def test_what_a_process_printed_before_it_was_ended_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Though a child of it holds its output open."""
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = script(tmp_path, child, "print('first', flush=True)", "time.sleep(60)")
    started = time.monotonic()
    status, printed = printed_by(command, dict(os.environ), seconds=2)
    assert (status, printed, capfd.readouterr().out) == ("was ended after 2 s", "first\n", "first\n")
    assert time.monotonic() - started < 20
    assert printed_by(script(tmp_path, "sys.exit(3)"), dict(os.environ), 30) == ("ended with status 3", "")
    assert printed_by(script(tmp_path, "print('all')"), dict(os.environ), 30) == ("", "all\n")


def test_a_step_that_fails_takes_no_other_config_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def trainer(*given: Any) -> Any:
        made.append(given)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_trainer(*given)

    monkeypatch.setattr(ppo_part, "step_trainer", trainer)
    figures = dict(ppo_part.ppo(bench))
    assert figures.pop(MAIN) == {"error": "OutOfMemoryError: CUDA out of memory"}
    assert len(figures) == 2 and all(f["seconds"]["step"] > 0 for f in figures.values())


def test_a_second_step_that_fails_leaves_the_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = ppo_part.PhaseMeter.step, list[object]()

    def second_fails(meter: ppo_part.PhaseMeter) -> float:
        taken.append(meter)
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(meter)

    monkeypatch.setattr(ppo_part.PhaseMeter, "step", second_fails)
    figures = dict(ppo_part.ppo(bench))
    assert figures[MAIN]["step"] == 1 and figures[MAIN]["seconds"]["step"] > 0
    assert "error" in figures[f"{MAIN}, second step"] and len(figures) == 4


def test_decoding_yields_what_it_has_after_each_round(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain.from_iterable([[9.0] * len(SETTINGS), [7.0] * len(SETTINGS)])
    monkeypatch.setattr(decode_part, "milliseconds", lambda *_: {"ms": next(times)})
    found = list(decode_part.decode(bench))[1:]
    first, second = found[: len(SETTINGS)], found[len(SETTINGS) :]
    assert [name for name, _ in first] == [name for name, _ in second] == list(SETTINGS)
    assert {f["ms_per_token"] for _, f in first} == {9.0}
    assert all(f["ms_per_token"] == 7.0 and f["all_ms"] == [9.0, 7.0] for _, f in second)


def test_pieces_that_are_not_the_embedded_model_are_refused(bench: Bench) -> None:
    for name in ("a", "b"):
        (bench.folder / name).write_bytes(b"GGUF")
        bench.gguf_parts.append(bench.folder / name)
    with pytest.raises(UserError, match="gguf_parts"):
        embedded_model(bench)


def test_the_floor_and_the_flops_by_hand(bench: Bench) -> None:
    """Two layers of 2 · 64² + 2 · 64 · 32 + 3 · 64 · 128 weights, a head of 600 · 64, keys and values of width 32."""
    shape = planned_shape(bench)
    body, head = 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128), 600 * 64
    read = body * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * head + 3 * 10 * 2 * 2 * 32 * 2
    assert decoding_floor(shape, Rates(1e9, 1e15), 3, 10) == pytest.approx(read / 1e9)
    assert decoding_floor(shape, Rates(1e15, 1e9), 3, 10) == pytest.approx(2 * (body + head) * 3 / 1e9)
    config = step_config(bench, MAIN, None)
    epochs, batch = config.ppo.num_ppo_epochs, config.ppo.batch_size
    expected = epochs * batch * (2 * 4 * body * (7 + 5) + 4 * head * 5)
    assert update_flops(config.ppo, shape.body, head, 7, 5) == expected


def test_a_profile_tells_kernels_from_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch and one wait on the host, one kernel of 30 µs on the device, and a mark that is no kernel."""
    kinds = {"CPU": torch.autograd.DeviceType.CPU, "CUDA": torch.autograd.DeviceType.CUDA}
    seen = [("cudaLaunchKernel", "CPU", 0, 5), ("cudaStreamSynchronize", "CPU", 5, 40), ("aten::mm", "CPU", 0, 6),
            ("gemm", "CUDA", 10, 40), ("mark", "CUDA", 0, 50)]  # fmt: skip
    events = [
        argparse.Namespace(name=name, device_type=kinds[kind], is_user_annotation=name == "mark",
                           time_range=argparse.Namespace(start=start, end=end))
        for name, kind, start, end in seen
    ]  # fmt: skip
    profile = Profile(bench)
    profile.wall, profile.plain_wall = 80e-6, 40e-6
    monkeypatch.setattr(profile, "profiler", argparse.Namespace(events=lambda: events))
    figures = profile.figures()
    assert figures["cuda_calls"] == {"cudaLaunchKernel": 1, "cudaStreamSynchronize": 1}
    assert (figures["kernels"], figures["device_busy_ms"]) == (1, 0.03)
    assert figures["device_idle_share"] == pytest.approx(0.25)
    assert (figures["wall_ms"], figures["wall_ms_under_profiler"]) == pytest.approx((0.04, 0.08))


def test_idle_time_is_what_no_kernel_fills_without_the_profiler() -> None:
    """Kernels at 0-10, 5-12 (beside it) and 20-30 µs: busy 22 of 30; the same work takes 24 µs without the profiler."""
    figures = device_figures([("a", 20, 30), ("b", 5, 12), ("a", 0, 10)], 24e-6)
    assert (figures["kernels"], figures["device_busy_ms"]) == (3, 0.022)
    assert figures["device_idle_share"] == pytest.approx(2 / 24)
    assert figures["device_idle_share_under_profiler"] == pytest.approx(8 / 30)
    assert figures["longest_kernels"][0] == {"name": "a", "count": 2, "ms": 0.02}
