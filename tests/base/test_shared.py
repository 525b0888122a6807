"""Four roles on one base equal four separate copies, and switching roles leaves nothing behind."""

from __future__ import annotations

import copy
import json

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase, last_real
from lora_rlhf.errors import UserError

ROLES = (POLICY, REFERENCE, REWARD, VALUE)


def batch(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of token ids; padded ones on both sides, by different amounts."""
    ids = torch.randint(5, 500, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.bool)
    if padded:
        mask[0, :3] = mask[0, 10:] = mask[1, :5] = False
        ids[~mask] = 2
    return ids, mask


def nf4(folder: str, kind: type = AutoModelForCausalLM, **extra: object) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    model = kind.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32, **extra)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture
def separate(make_base, make_config, tmp_path):
    """The same four roles as four separately loaded stock models: role -> (trunk, adapter parameters by name)."""
    shared = make_base()
    models = {}
    for role in ROLES:
        model = nf4(make_config().model_name_or_path)
        if role != REFERENCE:
            shared.save_adapter(role, tmp_path / role)
            file = tmp_path / role / "adapter_config.json"
            causal = json.loads(file.read_text()) | {"task_type": "CAUSAL_LM", "modules_to_save": None}
            file.write_text(json.dumps(causal))
            model = PeftModel.from_pretrained(model, str(tmp_path / role), is_trainable=True).get_base_model()
        models[role] = model.model
    return shared, models


def loss_of(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states.square().mean(-1) * mask).sum()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_roles_equal_four_separate_copies_in_losses_and_gradients(separate, padded, checkpointing):
    shared, models = separate
    ids, mask = batch(padded)
    for role in ROLES[:1] + ROLES[2:]:
        shared.set_trainable(role, True)
    if checkpointing:
        shared.enable_gradient_checkpointing()
    losses = {}
    with shared.training():  # all forwards before all backwards: the order that plain checkpointing gets wrong
        for role in ROLES:
            losses[role] = loss_of(shared.hidden(role, ids, mask), mask)
        for role in ROLES[::-1]:
            if role != REFERENCE:
                losses[role].backward()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    for role, trunk in models.items():
        states = trunk(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        expected = loss_of(states, mask)
        torch.testing.assert_close(losses[role], expected, rtol=1e-5, atol=1e-5)
        if role == REFERENCE:
            continue
        expected.backward()
        theirs = {n.replace(".default", ""): p.grad for n, p in trunk.named_parameters() if "lora_" in n}
        ours = {
            n.replace(f".{role}", "").removeprefix("base_model.model.model."): p.grad
            for n, p in shared.model.named_parameters()
            if f".{role}." in n and "lora_" in n
        }
        assert ours.keys() == theirs.keys() and len(ours) == 28
        for name, grad in ours.items():
            torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-4)


def test_padding_changes_no_state(make_base):
    base = make_base()
    ids, mask = batch(padded=True)
    with torch.no_grad():
        for role in ROLES:
            states = base.hidden(role, ids, mask)
            for i in range(3):
                alone = base.hidden(
                    role, ids[i : i + 1][:, mask[i]], torch.ones(1, int(mask[i].sum()), dtype=torch.bool)
                )
                torch.testing.assert_close(states[i][mask[i]], alone[0], rtol=1e-4, atol=1e-5)


def test_columns_of_padding_are_left_out_and_put_back(make_base):
    base = make_base()
    ids, mask = batch(padded=False)
    wide_ids, wide_mask = torch.nn.functional.pad(ids, (4, 3), value=2), torch.nn.functional.pad(mask, (4, 3))
    with torch.no_grad():
        wide = base.hidden(POLICY, wide_ids, wide_mask)
        assert wide.shape[1] == 19 and not wide[:, :4].any() and not wide[:, -3:].any()
        torch.testing.assert_close(wide[:, 4:-3], base.hidden(POLICY, ids, mask))


def test_one_mixed_pass_equals_one_pass_per_role(make_base):
    base = make_base()
    ids, mask = batch(padded=True)
    with torch.no_grad():
        mixed = base.hidden_mixed([role for role in ROLES for _ in ids], ids.repeat(4, 1), mask.repeat(4, 1))
        for role, states in zip(ROLES, mixed.chunk(4), strict=True):
            torch.testing.assert_close(states[mask], base.hidden(role, ids, mask)[mask], rtol=1e-5, atol=1e-5)


def test_switching_roles_leaves_trainability_and_active_role_as_they_were(make_base):
    base = make_base()
    before = {n: p.requires_grad for n, p in base.model.named_parameters()}
    assert any(before.values()) and not all(v for n, v in before.items() if "lora_" in n)
    for role in ROLES:
        with base.role(role), base.role(REFERENCE), base.role(VALUE):
            assert {n: p.requires_grad for n, p in base.model.named_parameters()} == before
    assert {n: p.requires_grad for n, p in base.model.named_parameters()} == before
    assert base.model.active_adapter == POLICY
    with pytest.raises(ZeroDivisionError), base.role(REFERENCE):
        raise ZeroDivisionError
    assert base.model.active_adapter == POLICY


def test_gradients_are_the_same_before_and_after_a_pass_without_gradient(make_base):
    """bitsandbytes repacks 4-bit weights on the CPU in such a pass, for a kernel that has no backward."""
    base = make_base()
    ids, mask = batch(padded=False)

    def gradients() -> list[torch.Tensor]:
        for parameter in base.parameters(POLICY):
            parameter.grad = None
        loss_of(base.hidden(POLICY, ids, mask), mask).backward()
        return [p.grad.clone() for p in base.parameters(POLICY)]

    before = gradients()
    with torch.no_grad():
        base.hidden(POLICY, ids, mask)
    for first, second in zip(before, gradients(), strict=True):
        assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("role", [POLICY, REFERENCE])
def test_expanded_weights_give_the_same_states_and_leave_no_trace(make_base, role):
    base = make_base()
    ids, mask = batch(padded=True)
    with torch.no_grad():
        plain = base.hidden(role, ids, mask)
        with base.expanded(role):
            torch.testing.assert_close(base.hidden(role, ids, mask), plain, rtol=1e-4, atol=1e-5)
            with pytest.raises(RuntimeError, match="expanded"):
                base.hidden(VALUE, ids, mask)
        assert torch.equal(base.hidden(role, ids, mask), plain)


@pytest.mark.parametrize("role", [POLICY, REWARD, VALUE])
def test_an_adapter_is_saved_alone_and_loads_back_bit_for_bit(make_base, tmp_path, role):
    base, other = make_base(seed=1), make_base(seed=2)
    base.save_adapter(role, tmp_path / role)
    assert {p.name for p in (tmp_path / role).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not [p for p in (tmp_path / role).iterdir() if p.is_dir()]
    other.load_adapter("again", tmp_path / role)
    for saved, loaded in zip(base.parameters(role), other.parameters("again"), strict=True):
        assert torch.equal(saved, loaded)
    assert ("again" in other.heads) == (role != POLICY)


def test_stock_transformers_and_peft_score_like_the_reward_role(make_base, make_config, tokenizer, tmp_path):
    base = make_base()
    base.save_adapter(REWARD, tmp_path / "reward")
    stock = nf4(make_config().model_name_or_path, AutoModelForSequenceClassification, num_labels=1)
    stock.config.pad_token_id = tokenizer.pad_token_id
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "reward")).eval()
    ids = torch.randint(5, 500, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 9:] = False
    ids[~mask] = tokenizer.pad_token_id
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(base.scores(REWARD, ids, mask, batch=2), expected, rtol=1e-4, atol=1e-5)


def test_the_value_role_starts_as_a_copy_of_the_reward_role(make_base):
    base = make_base()
    base.copy_adapter(REWARD, "copy", trainable=True)
    for first, second in zip(base.parameters(REWARD), base.parameters("copy"), strict=True):
        assert torch.equal(first, second) and first is not second and second.requires_grad


def test_an_adapter_of_another_base_is_refused(make_base, make_config, tmp_path):
    from lora_rlhf.base.embedded import build_tiny_model

    make_base().save_adapter(REWARD, tmp_path / "reward")
    (tmp_path / "wide").mkdir()
    build_tiny_model(tmp_path / "wide", hidden_size=32)
    other = make_base(make_config(model_name_or_path=str(tmp_path / "wide")))
    with pytest.raises(UserError, match="trained on another base"):
        other.load_adapter("theirs", tmp_path / "reward")


def test_an_adapter_with_other_target_modules_is_refused_where_it_must_fit(make_base, make_config, tmp_path):
    config = make_config()
    narrow = copy.deepcopy(config)
    narrow.lora.target_modules = ["q_proj"]
    make_base(narrow).save_adapter(POLICY, tmp_path / "policy")
    with pytest.raises(UserError, match="does not fit"):
        make_base(config).replace_adapter(POLICY, tmp_path / "policy")


def test_a_reward_adapter_without_its_head_is_refused(make_base, tmp_path):
    from safetensors.torch import load_file, save_file

    base = make_base()
    base.save_adapter(REWARD, tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(UserError, match="head is lost"):
        base.load_adapter("headless", tmp_path / "reward")


def test_unknown_target_modules_are_named(make_config):
    from lora_rlhf.config import LoraSettings

    config = make_config(lora=LoraSettings(target_modules=["nothing_proj"]))
    with pytest.raises(UserError, match="nothing_proj"):
        SharedBase(load_causal_lm(config), lora_config(config.lora), torch.float32)


def test_the_last_real_state_is_found_with_padding_on_either_side():
    states = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert last_real(states, mask)[:, 0].tolist() == [1.0, 7.0]


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_an_adapter_that_is_more_than_lora_is_refused(make_base, tmp_path, field):
    base = make_base()
    base.save_adapter("reward", tmp_path / "reward")
    file = tmp_path / "reward" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: True}))
    with pytest.raises(UserError, match=f"only plain LoRA can share the base; this adapter has {field}"):
        make_base().load_adapter("other", tmp_path / "reward")
