"""A PPO step on shapes: its products by hand, its memory, and what other settings and cards change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lora_rlhf.base.known_shapes import MISTRAL_7B, SHIPPED
from lora_rlhf.config import LoraSettings, PpoSettings, RunConfig
from lora_rlhf.memory_plan import Planner
from lora_rlhf.model_shape import model_shape
from lora_rlhf.roofline.cards import CARDS, card_named
from lora_rlhf.roofline.phases import Phase, ppo_phases, supervised_phases

CARD = CARDS["h100"]
"""Never takes bitsandbytes' fused product for these shapes at the batch sizes below."""


@dataclass(frozen=True)
class Sizes:
    """Those of the tiny Mistral: two layers, four query heads on two key heads."""

    hidden: int = 64
    inner: int = 128
    key_width: int = 32
    layers: int = 2
    vocabulary: int = 512
    rank: int = 4

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of the whole model."""
        h, k, i = self.hidden, self.key_width, self.inner
        return [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)] * self.layers


SIZES = Sizes()


@pytest.fixture
def config(tiny_folder: Any) -> RunConfig:
    return RunConfig(
        model_name_or_path=str(tiny_folder), max_prompt_length=100, max_length=160, lora=LoraSettings(r=4),
        ppo=PpoSettings(
            batch_size=40, micro_batch_size=20, scoring_batch_size=20, response_length=60, num_ppo_epochs=3,
            gradient_checkpointing=False, expand_weights=False,
        ),
    )  # fmt: skip


def with_ppo(config: RunConfig, **changed: Any) -> RunConfig:
    return replace(config, ppo=replace(config.ppo, **changed))


def one(phases: list[Phase], name: str) -> Phase:
    return next(phase for phase in phases if name in phase.name)


def products(phase: Phase) -> tuple[float, float]:
    """Return FLOPs and bytes of the matrix products of a phase."""
    own = [op for op in phase.operations if op.kind == "matrix products"]
    return sum(op.flops for op in own), sum(op.bytes for op in own)


def body(tokens: int, dtype_bytes: int = 2) -> tuple[float, float]:
    """By hand: x Wᵀ of every linear layer for `tokens` tokens."""
    flops = sum(2 * tokens * a * b for a, b in SIZES.linears)
    return flops, dtype_bytes * sum(tokens * a + a * b + tokens * b for a, b in SIZES.linears)


def adapters(tokens: int) -> tuple[float, float]:
    """By hand: x Aᵀ, and its product with Bᵀ added to what is there, of every linear layer."""
    r = SIZES.rank
    flops = sum(2 * tokens * r * (a + b) for a, b in SIZES.linears)
    down = sum(tokens * a + a * r + tokens * r for a, _ in SIZES.linears)
    up = sum(tokens * r + r * b + 2 * tokens * b for _, b in SIZES.linears)
    return flops, 2 * (down + up)


def test_the_products_of_scoring_by_hand(config: RunConfig) -> None:
    phase = one(ppo_phases(config, CARD), "policy, reference, reward and value")
    tokens, answers = 20 * 160, 20 * 60
    read = 20 * 161  # by the reward role: EOS after every answer
    flops, moved = (3 * own + of_text for own, of_text in zip(body(tokens), body(read), strict=True))
    for own in (adapters(tokens), adapters(tokens), adapters(read)):  # the reference has no adapter
        flops, moved = flops + own[0], moved + own[1]
    head = SIZES.hidden * SIZES.vocabulary
    flops += 2 * 2 * answers * head  # log-probs of policy and reference
    moved += 2 * (2 * (answers * SIZES.hidden + head) + 4 * answers * SIZES.vocabulary)  # logits are float32
    heads = 2 * SIZES.hidden * (20 * 61 + 20)  # of value and reward, in float32, for states that were read
    moved_by_heads = 4 * (20 * 61 * (SIZES.hidden + 1) + 20 * (SIZES.hidden + 1) + 2 * SIZES.hidden)
    widths = (160, 160, 160, 161)
    angles = sum(2 * width * 8 for width in widths)  # positions times the 8 rotary frequencies
    moved_by_angles = sum(4 * (width + 8 + width * 8) for width in widths)
    assert products(phase) == (flops + heads + angles, moved + moved_by_heads + moved_by_angles)
    assert phase.times == 2


def test_the_products_of_a_decoded_token_by_hand(config: RunConfig) -> None:
    phase = one(ppo_phases(config, CARD), "first token")
    flops, moved = (a + b for a, b in zip(body(40), adapters(40), strict=True))
    head = SIZES.hidden * SIZES.vocabulary
    flops, moved = flops + 2 * 40 * head, moved + 2 * (40 * SIZES.hidden + head) + 4 * 40 * SIZES.vocabulary
    counted = products(phase)
    attention = sum(op.flops for op in phase.operations if op.name == "bmm")
    assert counted[0] - attention == flops
    assert counted[1] - sum(op.bytes for op in phase.operations if op.name == "bmm") == moved


def gradient_of_the_embeddings(tokens: int) -> float:
    """By hand: back through the first layer's queries, keys and values and their adapters, to what entered them."""
    widths = SIZES.hidden + 2 * SIZES.key_width
    return 2 * tokens * SIZES.hidden * widths + 3 * 2 * tokens * SIZES.rank * SIZES.hidden


def test_backward_takes_as_many_operations_as_forward_but_in_the_lowest_layer(config: RunConfig) -> None:
    """The base takes no gradient: backward multiplies by each weight once, where an input wants one."""
    phase = one(ppo_phases(config, CARD), "micro-batch")
    tokens, answers = 20 * 160, 20 * 60
    forward, lora = body(tokens)[0], adapters(tokens)[0]
    one_role = 2 * forward + 3 * lora - gradient_of_the_embeddings(tokens)  # adapters: values, inputs, A and B
    log_probs = 2 * 2 * answers * SIZES.hidden * SIZES.vocabulary  # logits, and what their gradient sums up
    value_head = 3 * 2 * 20 * 61 * SIZES.hidden
    assert products(phase)[0] == pytest.approx(2 * one_role + log_probs + value_head, rel=1e-3)
    assert phase.times == 3 * 2


def test_checkpointing_computes_forward_once_more_and_keeps_less(config: RunConfig) -> None:
    plain = one(ppo_phases(config, CARD), "micro-batch")
    again = one(ppo_phases(with_ppo(config, gradient_checkpointing=True), CARD), "micro-batch")
    more = products(again)[0] - products(plain)[0]
    tokens = 20 * 160
    one_role = body(tokens)[0] + adapters(tokens)[0] + gradient_of_the_embeddings(tokens)
    assert more == 2 * one_role, "checkpoints of transformers want a gradient of what enters the first layer"
    assert again.peak_bytes < plain.peak_bytes


def test_a_value_head_has_no_passes_of_its_own(config: RunConfig) -> None:
    phases = ppo_phases(with_ppo(config, value_model="head"), CARD)
    assert products(one(phases, "reward and value"))[0] < 0.8 * products(one(ppo_phases(config, CARD), "and value"))[0]
    whole = sum(p.seconds(CARD) for p in phases)
    assert whole < sum(p.seconds(CARD) for p in ppo_phases(config, CARD))


def test_a_working_copy_is_made_for_rollout_and_score_and_nothing_is_dequantised_besides(config: RunConfig) -> None:
    phases = ppo_phases(with_ppo(config, expand_weights=True), CARD)
    copies = [phase for phase in phases if phase.name in ("preparation", "working copy")]
    assert [phase.stage for phase in copies] == ["rollout", "score"]
    for phase in phases:
        assert phase not in copies or phase.operations
        if phase not in copies:
            assert not [op for op in phase.operations if op.kind == "4-bit weights"], phase.name


def test_standing_memory_is_what_the_planner_counts(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, "two layers of Mistral-7B", MISTRAL_7B | {"num_hidden_layers": 2})
    config = replace(config, model_name_or_path="two layers of Mistral-7B")
    planner = Planner(config, model_shape(config), on_cuda=True, expand=False)
    adam = one(ppo_phases(config, CARD), "Adam")
    gradients = 4 * 2 * planner.adapter_parameters()
    assert adam.peak_bytes == pytest.approx(planner.standing_bytes() + gradients, rel=0.03)


def test_stop_strings_bring_each_token_to_the_host_once_as_eos_does(config: RunConfig) -> None:
    plain = one(ppo_phases(config, CARD), "first token").syncs
    watched = one(ppo_phases(with_ppo(config, stop_strings=["\n\nHuman:"]), CARD), "first token").syncs
    assert watched == plain and watched["tolist"] == 1


def test_a_decoded_token_reads_the_cache_once_and_casts_no_adapter(config: RunConfig) -> None:
    phase = one(ppo_phases(config, CARD), "last token")
    context, rows = 100 + 60 - 1, 40
    cache = 2 * rows * context * SIZES.layers * 2 * SIZES.key_width
    scores = 2 * 2 * rows * context * SIZES.layers * 4  # of four heads, written by one product and read by the other
    read = sum(op.bytes for op in phase.operations if op.name == "bmm")
    assert cache + scores < read < 1.1 * (cache + scores)
    casts = [op for op in phase.operations if op.name == "_to_copy"]
    assert len(casts) < len(SIZES.linears)


def test_a_step_is_slower_on_a_slower_card(config: RunConfig) -> None:
    seconds = {
        name: sum(p.seconds(card) for p in ppo_phases(config, card))
        for name, card in CARDS.items()
        if name in ("l4", "rtx4090", "h100")
    }
    assert seconds["l4"] > seconds["rtx4090"] > seconds["h100"]


@pytest.mark.parametrize(("stage", "rows"), [("reward", 32), ("instruct", 16)])
def test_supervised_stages_read_one_or_two_answers_an_example(config: RunConfig, stage: str, rows: int) -> None:
    (phase,) = supervised_phases(config, CARD, stage)
    tokens = rows * 160
    forward, lora = body(tokens)[0], adapters(tokens)[0]
    one_role = 2 * forward + 3 * lora - gradient_of_the_embeddings(tokens)
    head = 3 * 2 * rows * SIZES.hidden if stage == "reward" else 2 * 2 * rows * 159 * SIZES.hidden * SIZES.vocabulary
    assert products(phase)[0] == pytest.approx(one_role + head, rel=1e-3)
    assert phase.times == 1


def test_supervised_stages_compute_from_a_working_copy_where_the_run_has_one(config: RunConfig) -> None:
    for stage in ("reward", "instruct"):
        (phase,) = supervised_phases(with_ppo(config, expand_weights=True), CARD, stage)
        assert not [op for op in phase.operations if op.kind == "4-bit weights"]


def test_an_optimizer_that_wants_a_card_is_counted_without_one(config: RunConfig) -> None:
    paged = ppo_phases(with_ppo(config, optim="paged_adam_8bit"), CARD)
    assert one(paged, "Adam").operations


def test_cards_by_name_and_a_typo(make_config: Callable[..., RunConfig]) -> None:
    assert card_named("RTX 4090") is CARDS["rtx4090"]
    with pytest.raises(Exception, match="known cards are rtx3090"):
        card_named("4090ti")
