"""Float16 learns as float32 does: a loss scale keeps gradients from vanishing, and overflows cost no minibatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer, same, text_length, watch, weights

from lora_rlhf.base.shared import POLICY, VALUE
from lora_rlhf.config import RunConfig
from lora_rlhf.ppo.checkpoint import read_state, restore_trainer, scales_of, write_trainer
from lora_rlhf.ppo.optimization import FINITE_BEFORE_GROWTH, FIRST_SCALE, LossScale, clipped_gradients
from lora_rlhf.ppo.trainer import PpoTrainer

INFINITY = float("inf")


@pytest.fixture
def make_in(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PpoTrainer]:
    """A trainer whose base computes in a dtype."""

    def make(dtype: str, *args: Any, **options: Any) -> PpoTrainer:
        plain = RunConfig.__init__
        with monkeypatch.context() as patch:
            patch.setattr(RunConfig, "__init__", lambda self, **fields: plain(self, **(fields | {"dtype": dtype})))
            return make_trainer(*args, **options)

    return make


@pytest.fixture
def make_float16(make_in: Callable[..., PpoTrainer]) -> MakeTrainer:
    return partial(make_in, "float16")


# The scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_none(dtype: torch.dtype) -> None:
    scale = LossScale.of(dtype)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1e-30, INFINITY])
    scale.unscale([parameter])
    for _ in range(2 * FINITE_BEFORE_GROWTH):
        scale.note_finite()
    assert parameter.grad.tolist() == [pytest.approx(1e-30), INFINITY]
    assert scale.scale == 1 and not scale.shrink()


def test_it_is_halved_after_an_overflow_and_doubled_after_many_gradients_without() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.scale == FIRST_SCALE == 65536
    assert scale.shrink() and scale.scale == 32768
    for _ in range(FINITE_BEFORE_GROWTH - 1):
        scale.note_finite()
    assert scale.scale == 32768
    scale.note_finite()
    assert scale.scale == 65536 and scale.finite == 0
    for _ in range(20 * FINITE_BEFORE_GROWTH):
        scale.note_finite()
    assert scale.scale == 2.0**24
    assert [scale.shrink() for _ in range(25)] == [True] * 24 + [False] and scale.scale == 1


@pytest.mark.parametrize(
    ("overflows_above", "numbers", "tried", "left"),
    [
        (INFINITY, {"loss": 1.0}, [65536], 65536),
        (10_000, {"loss": 1.0}, [65536, 32768, 16384, 8192], 8192),
        (0, {"loss": 1.0}, [2.0**n for n in range(16, -1, -1)], 65536),  # no fault of the scale
        (0, {"loss": float("nan")}, [65536], 65536),  # nor this: the forward pass
    ],
    ids=["fits", "overflows", "never finite", "not finite before"],
)
def test_a_minibatch_is_tried_again_until_it_fits(
    overflows_above: float, numbers: dict[str, float], tried: list[float], left: float
) -> None:
    scale, parameter, seen = LossScale.of(torch.float16), torch.nn.Parameter(torch.zeros(1)), []

    def minibatch() -> dict[str, float]:
        seen.append(scale.scale)
        parameter.grad = torch.tensor([3 * scale.scale if scale.scale <= overflows_above else INFINITY])
        return numbers

    found, norms = clipped_gradients(minibatch, {POLICY: [parameter]}, 1.5, scale)
    assert found is numbers and seen == tried and scale.scale == left
    if tried[-1] <= overflows_above:
        assert norms[POLICY] == 3 and parameter.grad == pytest.approx(1.5, rel=1e-5)
    else:
        assert not torch.isfinite(norms[POLICY])


@pytest.mark.parametrize("overflows", [POLICY, VALUE])
def test_an_overflow_of_one_role_tries_the_minibatch_of_both_again(overflows: str) -> None:
    scale, parameters = LossScale.of(torch.float16), {r: torch.nn.Parameter(torch.zeros(1)) for r in (POLICY, VALUE)}

    def minibatch() -> dict[str, float]:
        for role, parameter in parameters.items():
            fits = role != overflows or scale.scale <= 20_000
            parameter.grad = torch.tensor([4 * scale.scale if fits else INFINITY])
        return {"loss": 1.0}

    _, norms = clipped_gradients(minibatch, {role: [p] for role, p in parameters.items()}, 2.0, scale)
    assert norms == {POLICY: 4, VALUE: 4} and scale.scale == 16384
    assert [p.grad.item() for p in parameters.values() if p.grad is not None] == pytest.approx([2, 2], rel=1e-5)


# The trainer


def test_a_scale_that_is_too_large_costs_no_step_and_changes_no_gradient(
    make_float16: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving changes exponents alone, as long as nothing vanishes."""
    found = []
    for first in (2.0**13, 2.0**40):
        trainer = make_float16(text_length)
        trainer.loss_scale.scale = first
        parameters = [p for own in trainer.parameters.values() for p in own]
        taken: list[torch.Tensor] = []
        watch(
            monkeypatch, trainer.optimizer, "step",
            lambda taken=taken, own=parameters: taken.append(torch.cat([p.grad.flatten() for p in own])),
        )  # fmt: skip
        assert "skipped" not in trainer.step() and trainer.loss_scale.scale < 2.0**30
        assert len(taken) == 1
        found.append(taken[0])
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=1e-4)


def test_small_gradients_are_nearer_to_float32_than_those_of_bfloat16_and_gone_without_a_scale(
    make_in: Callable[..., PpoTrainer],
) -> None:
    """Of a loss that is a millionth of the usual one: as gradients are in the lower layers of a deep model."""
    exact, coarse, fine = (make_in(dtype, vf_coef=1e-7) for dtype in ("float32", "bfloat16", "float16"))
    rollout = exact._rollout(POLICY, [0, 1, 2, 3])
    scored = exact._scored(rollout, [0, 1, 2, 3])
    advantages, returns = exact.targets(rollout, scored, scored.logprobs - scored.reference)

    def value_gradient(trainer: PpoTrainer) -> torch.Tensor:
        with trainer.base.training():
            trainer._accumulate(rollout, scored, advantages, returns, torch.arange(4), False, 4)
        own = trainer.parameters[VALUE][:-1]  # the head is in float32
        trainer.loss_scale.unscale(own)
        return torch.cat([p.grad.flatten() for p in own if p.grad is not None])

    expected = value_gradient(exact)
    errors = [float((value_gradient(t) - expected).norm() / expected.norm()) for t in (coarse, fine)]
    assert errors[1] < 0.6 * errors[0]
    fine.loss_scale.scale = 1.0
    assert (expected != 0).any() and (value_gradient(fine) == 0).all()


def test_what_is_not_finite_at_any_scale_is_a_skipped_step(make_float16: MakeTrainer) -> None:
    trainer = make_float16(text_length)
    trainer.step()
    before, kept, plain = weights(trainer), trainer.loss_scale.scale, trainer.targets

    def broken(*args: Any) -> Any:
        advantages, returns = plain(*args)
        return advantages * float("nan"), returns

    trainer.targets = broken  # type: ignore[method-assign]
    assert "skipped" in trainer.step() and trainer.guards.skipped == 1
    assert trainer.loss_scale.scale == kept and same(before, weights(trainer))


def test_metrics_name_the_scale_and_a_checkpoint_keeps_it(
    make_float16: MakeTrainer, make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Any
) -> None:
    trainer, config = make_float16(text_length), make_config()
    trainer.loss_scale.scale = 2.0**9
    assert trainer.step()["loss_scale"] == 512 and trainer.loss_scale.finite == 1
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "step").mkdir()
    write_trainer(trainer, config, tmp_path / "metrics.jsonl", tmp_path / "step")
    state = read_state(tmp_path / "step", config)
    resumed = make_float16(text_length, scales=scales_of(state))
    restore_trainer(resumed, state, tmp_path / "step")
    assert resumed.loss_scale == trainer.loss_scale and resumed.loss_scale is not trainer.loss_scale
    assert "loss_scale" not in make_trainer(text_length).step()
    del state["loss_scale"]  # of an earlier version
    restore_trainer(make_trainer(text_length, scales=scales_of(state)), state, tmp_path / "step")
