"""Part 5: whether the card computes what it should: layers, 4-bit products, a step, its checkpoint, scarce memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from card_parts.bench import NO_CARD, Bench, Figures
from card_parts.decode import Missing, fused_kernel, most_fused_rows
from card_parts.models import mistral_config, quantized_linear, random_causal_lm, shared_base, step_config, step_trainer
from card_parts.ppo import AGREEMENT, MAIN, PhaseMeter
from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.role_layers import dequantized_weight
from lora_rlhf.base.shared import POLICY
from lora_rlhf.config import RunConfig
from lora_rlhf.memory import GIB
from lora_rlhf.memory_peak import return_freed_memory
from lora_rlhf.ppo.checkpoint import read_state, restore_trainer, write_trainer
from lora_rlhf.ppo.trainer import PpoTrainer

ROWS = (1, 8, 64, 4096)
"""Rows of the 4-bit products that are compared."""
STEP = {
    "batch_size": 16, "num_mini_batches": 2, "micro_batch_size": 4, "scoring_batch_size": 8, "response_length": 64,
    "rollout_batch_size": None,
}  # fmt: skip
"""The small step that is taken again and again."""
RANK = 32
"""Of its adapters: bitsandbytes pages the moments of no factor below 100,000 numbers, and 32 · 3584 is above."""
PAGED_NUMBERS = 100_000


def correctness(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield relative errors, and whether steps, checkpoints and the second try after running out are right."""
    yield "lean layers and stock PEFT, to float32", bench.attempt(partial(lean_and_stock, bench))
    for rows in ROWS:
        yield f"4-bit product, {rows} rows, to float64", bench.attempt(partial(product_errors, bench, rows))
    for copied in (False, True):
        sampled_from = "a folded 16-bit copy" if copied else "4 bits"
        yield f"second step, sampled from {sampled_from}", bench.attempt(partial(agreement, bench, copied))
    for optim in ("adam", "paged_adam_8bit"):
        yield f"checkpoint with {optim}", bench.attempt(partial(checkpoint, bench, optim))
    yield "running out of memory", bench.attempt(partial(scarce_memory, bench))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# -- layers ---------------------------------------------------------------------------------------------------------


def lean_and_stock(bench: Bench) -> Figures:
    """Return the errors of our layers and of PEFT's, both in bfloat16, to the same in float32.

    The same 4-bit weights and adapter; the states after the final norm, and the gradients of the adapter.
    """
    from peft import get_peft_model

    config = step_config(bench, MAIN, None)
    ids = torch.randint(5, bench.size.vocabulary, (4, 48), device=bench.device)
    direction = torch.randn((4, 48, bench.size.check[0]), device=bench.device) / ids.numel()
    base = shared_base(config, checked_model(bench))
    base.set_trainable(POLICY, True)
    with torch.no_grad():
        for parameter in base.parameters(POLICY):
            parameter.normal_(std=0.02)
    values = {name.replace(f".{POLICY}.", "."): p for name, p in base.model.named_parameters() if "lora_" in name}
    with base.training():
        states = base.hidden(POLICY, ids, torch.ones_like(ids, dtype=torch.bool))
        (states.float() * direction).sum().backward()
    found = {"ours": (states, gradients(base.model))}
    for name, model in (("stock", checked_model(bench)), ("float32", in_float32(checked_model(bench)))):
        model.requires_grad_(False)
        peft = get_peft_model(model, lora_config(config.lora))
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(values[parameter_name.replace(".default.", ".")])
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=name == "stock"):
            states = model.model(input_ids=ids).last_hidden_state
        (states.float() * direction).sum().backward()
        found[name] = (states, gradients(peft))
    states32, gradients32 = found.pop("float32")
    errors = {name: relative_error(states, states32) for name, (states, _) in found.items()}
    slopes = {name: relative_error(gradient, gradients32) for name, (_, gradient) in found.items()}
    right = errors["ours"] <= 1.5 * errors["stock"] and slopes["ours"] <= 1.5 * slopes["stock"]
    return {"states": errors, "gradients": slopes, "right": right}


def checked_model(bench: Bench) -> Any:
    """Return the smaller random model, the same each time."""
    return random_causal_lm(bench, mistral_config(bench, *bench.size.check), seed=1)


def gradients(model: nn.Module) -> torch.Tensor:
    """Return the gradients of an adapter, one after another."""
    return torch.cat(
        [p.grad.float().flatten() for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
    )


def in_float32(model: Any) -> Any:
    """Return a 4-bit model with its weights dequantised to float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(dequantized_weight(child).float(), requires_grad=False)
                setattr(module, name, plain)
    model.is_loaded_in_4bit = model.is_quantized = False
    return model.float()


def product_errors(bench: Bench, rows: int) -> Figures:
    """Return error and milliseconds of a 4-bit product as bitsandbytes chooses it, fused, and dequantised first."""
    width, _, inner, _ = bench.size.check
    width, inner = (width, inner) if not bench.on_card else (bench.size.hidden, bench.size.inner)
    layer = quantized_linear(torch.randn((inner, width), device=bench.device, dtype=torch.bfloat16) * 0.02)
    x = torch.randn((rows, width), device=bench.device, dtype=torch.bfloat16)
    expected = x.double() @ dequantized_weight(layer).double().T
    ways = {"chosen": None, "fused": True, "dequantised": False}
    found: Figures = {"width": width, "outputs": inner}
    for name, fused in ways.items():
        try:
            found[name] = timed_product(bench, layer, x, expected, fused)
        except Missing as missing:
            found[name] = {"not_measured": str(missing)}
    return found


@torch.no_grad()
def timed_product(bench: Bench, layer: Any, x: torch.Tensor, expected: torch.Tensor, fused: bool | None) -> Figures:
    """Return error and milliseconds of one way to multiply."""
    if fused is None:
        error = relative_error(layer(x), expected)
        return {"error": error, "right": error < 0.01, "ms": 1e3 * bench.seconds_of(lambda: layer(x), repeats=5)}
    with fused_kernel(bench, fused):
        if fused and len(x) > (most := most_fused_rows()):
            raise Missing(f"bitsandbytes has a fused product for up to {most} rows")
        return timed_product(bench, layer, x, expected, None)


# -- steps ----------------------------------------------------------------------------------------------------------


def small_trainer(bench: Bench, **ppo: Any) -> tuple[PpoTrainer, RunConfig]:
    """Return a trainer of the smaller model, and its config; made twice, it does the same twice."""
    config = step_config(bench, MAIN, None, **(STEP | bench.size.step | ppo))
    config = replace(config, lora=replace(config.lora, r=RANK))
    return step_trainer(bench, config, checked_model(bench)), config


def agreement(bench: Bench, copied: bool) -> Figures:
    """Return how well sampler and trainer agree in the second step, the first one having moved the policy."""
    trainer, _ = small_trainer(bench, expand_weights=copied)
    trainer.step()
    metrics = trainer.step()
    right = metrics["first_ratio_deviation"] < 0.1 and abs(metrics["sampler_kl"]) < 0.01
    return {name: metrics[name] for name in AGREEMENT} | {"right": right}


def checkpoint(bench: Bench, optim: str) -> Figures:
    """Return how far a step after a checkpoint is from the same step of a trainer that was restored from it."""
    if optim != "adam" and not bench.on_card:
        return {"not_measured": NO_CARD}
    trainer, config = small_trainer(bench, optim=optim)
    trainer.step()
    folder = bench.folder / f"checkpoint_{optim}"
    folder.mkdir(exist_ok=True)
    (bench.folder / "metrics.jsonl").write_text("")
    write_trainer(trainer, config, Path(bench.folder / "metrics.jsonl"), folder)
    restored, _ = small_trainer(bench, optim=optim)
    restore_trainer(restored, read_state(folder, config), folder)
    same = same_state(trainer.optimizer, restored.optimizer)
    paged = [paged_moments(t.optimizer) for t in (trainer, restored)]
    large = sum(p.numel() >= PAGED_NUMBERS for own in trainer.parameters.values() for p in own)
    as_expected = paged == ([large, large] if optim == "paged_adam_8bit" else [0, 0])
    first, second = trainer.step(), restored.step()
    names = ("policy_loss", "value_loss", "score", "grad_norm", "value_grad_norm")
    differences = {name: abs(first[name] - second[name]) for name in names}
    weights = [
        torch.cat([p.detach().flatten() for own in t.parameters.values() for p in own]) for t in (trainer, restored)
    ]
    error = relative_error(weights[1], weights[0])
    return {
        "optimizer_state_same": same,
        "paged_moments": dict(zip(("trained", "restored"), paged, strict=True)),
        "differences": differences,
        "weights_error": error,
        "right": same and as_expected and error < 1e-3,
    }


def paged_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return how many parameters have a first moment that bitsandbytes pages."""
    return sum(getattr(state.get("state1"), "is_paged", False) for state in optimizer.state.values())


def same_state(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> bool:
    """Return whether two optimizers hold the same numbers."""
    held = [[o.state[p] for group in o.param_groups for p in group["params"] if p in o.state] for o in (first, second)]
    return all(
        torch.equal(value.cpu(), other[name].cpu())
        for one, other in zip(*held, strict=True)
        for name, value in one.items()
        if isinstance(value, torch.Tensor)
    )


def scarce_memory(bench: Bench) -> Figures:
    """Return what a step does where memory runs out: it goes on in smaller batches, to the same numbers."""
    whole = {"micro_batch_size": 16, "batch_size": 16, "num_mini_batches": 1, "gradient_checkpointing": False}
    whole = whole if bench.on_card else {"gradient_checkpointing": False}
    plenty, _ = small_trainer(bench, **whole)
    meter = PhaseMeter(bench, plenty)
    meter.step()
    meter.step()
    peak, expected = meter.peaks["update"]["allocated_gib"], meter.metrics
    del meter, plenty
    return_freed_memory()
    trainer, _ = small_trainer(bench, **whole)
    trainer.step()
    before = dict(trainer.batches.sizes)
    if bench.on_card:
        return_freed_memory()
        standing = torch.cuda.memory_allocated(bench.device) / GIB
        with bench.allocator_held_to(standing + 0.5 * (peak - standing)):
            found = trainer.step()
    else:
        run_out_once(trainer)
        found = trainer.step()
    names = ("policy_loss", "value_loss", "grad_norm", "value_grad_norm")
    differences = {name: abs(found[name] - expected[name]) for name in names}
    shrunk = trainer.batches.sizes != before
    close = all(math.isclose(found[name], expected[name], rel_tol=0.05) for name in names[2:])
    how = "a cap between what stands and the peak" if bench.on_card else "an error raised in the first forward pass"
    sizes = {"before": before, "after": dict(trainer.batches.sizes)}
    return {"forced_by": how, "sizes": sizes, "differences": differences, "right": shrunk and close}


def run_out_once(trainer: PpoTrainer) -> None:
    """Let the next forward pass with gradient say that memory ran out, as CUDA would."""
    plain = trainer.base.hidden

    def hidden(*given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            trainer.base.hidden = plain  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("memory ran out, for a test")
        return plain(*given)

    trainer.base.hidden = hidden  # type: ignore[method-assign, assignment]
