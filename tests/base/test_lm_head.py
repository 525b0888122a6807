"""Logits of every kind of LM head are those of transformers, and in 16 bits they are not rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_rlhf.base.lm_head import CAPPED, DIVIDED, MULTIPLIED, LmHead
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.chat.mixed_decoding import ChatSampling, MixedDecoding
from lora_rlhf.ppo.decoding import Sampling, chosen_tokens, decoder_of
from lora_rlhf.roofline.operations import OperationCounter

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 4,
}  # fmt: skip
OLD_SIZES: dict[str, Any] = {
    "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "gptj": lambda: transformers.GPTJConfig(**OLD_SIZES),
    "falcon_h1": lambda: transformers.FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.3),
}
MORE_MODELS: dict[str, Callable[[], Any]] = {
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, logit_scale=0.25),
    "minicpm3": lambda: transformers.AutoConfig.for_model("minicpm3", **SIZES, **LATENT, dim_model_base=8),
    "hyperclovax": lambda: transformers.AutoConfig.for_model("hyperclovax", **SIZES, logits_scaling=0.3),
    "nanochat": lambda: transformers.AutoConfig.for_model("nanochat", **SIZES, final_logit_softcapping=2.0),
    "codegen": lambda: transformers.CodeGenConfig(**OLD_SIZES),
}
IDS = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(3))
TEMPERATURE = 0.7


def random_model(name: str) -> Any:
    """A small random model of a kind, with a bias in its LM head where it has one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config((MODELS | MORE_MODELS)[name]()).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("name", MODELS | MORE_MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = random_model(name)
    with torch.no_grad():
        states = getattr(model, model.base_model_prefix)(IDS).last_hidden_state
        expected = model(IDS).logits
        found = LmHead.of(model)(states)
        plain = states @ model.get_output_embeddings().weight.T
    assert (plain - expected).abs().max() > 0.1, "nothing but the product: the test says nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "field"), [*MULTIPLIED.items(), *DIVIDED.items(), *CAPPED.items()])
def test_a_kind_of_model_has_the_field_that_is_read(kind: str, field: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    assert hasattr(config.get_text_config(), field)
    assert kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_a_field_of_another_kind_of_model_changes_nothing() -> None:
    config = transformers.MistralConfig(**SIZES, logits_scaling=3.0, logit_scale=0.1, final_logit_softcapping=2.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        found, expected = LmHead.of(model)(model.model(IDS).last_hidden_state), model(IDS).logits
    torch.testing.assert_close(found, expected)


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest) -> tuple[SharedBase, Any]:
    """A model of each kind as a shared base with a random policy, and the same in stock PEFT."""
    model = random_model(request.param)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    stock = get_peft_model(copy.deepcopy(model), config, adapter_name=POLICY)
    base = SharedBase(model, config, torch.float32)
    base.set_trainable(POLICY, True)
    theirs = [p for n, p in stock.named_parameters() if "lora_" in n]
    with torch.no_grad():
        for ours, other in zip(base.parameters(POLICY), theirs, strict=True):
            other.copy_(ours.normal_(0, 0.3))
    return base, stock


def test_log_probs_entropies_and_gradients_of_the_adapter_are_those_of_transformers(both: tuple[Any, Any]) -> None:
    base, stock = both
    mask, answer = torch.ones_like(IDS, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    logprobs, entropy = base.response_logprobs(base.hidden(POLICY, IDS, mask), IDS, answer, TEMPERATURE, chunk=5)
    logprobs.sum().backward()

    log_all = torch.log_softmax(stock(IDS).logits[:, -8:-1] / TEMPERATURE, -1)
    expected = log_all.gather(2, IDS[:, -7:, None])[..., 0]
    expected.sum().backward()

    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy, -(log_all.exp() * log_all).sum(-1), atol=1e-4, rtol=1e-5)
    theirs = [p.grad for n, p in stock.named_parameters() if "lora_" in n]
    for ours, other in zip(base.parameters(POLICY), theirs, strict=True):
        assert ours.grad is not None and other.abs().max() > 0.01
        torch.testing.assert_close(ours.grad, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=1e-4)


def test_what_is_sampled_has_the_log_probs_of_transformers(both: tuple[Any, Any], tokenizer: Any) -> None:
    base, stock = both
    uniform = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), base.role(POLICY):
        decode = decoder_of(base.causal_lm)
        tokens, logprobs = decode(IDS, torch.ones_like(IDS) > 0, uniform, Sampling(4, TEMPERATURE), tokenizer)
        log_all = torch.log_softmax(stock(torch.cat([IDS, tokens], 1)).logits[:, -5:-1] / TEMPERATURE, -1)
    assert not (tokens == tokenizer.eos_token_id).any()
    torch.testing.assert_close(logprobs, log_all.gather(2, tokens[..., None])[..., 0], atol=1e-4, rtol=1e-5)


def test_a_chat_answers_with_the_likeliest_tokens_of_transformers(both: tuple[Any, Any], tokenizer: Any) -> None:
    base, stock = both
    decoding = MixedDecoding(base, [POLICY], [IDS[0].tolist()], tokenizer, ChatSampling(temperature=0, max_tokens=3))
    while decoding.live:
        decoding.step()
    with torch.no_grad():
        logits = stock(torch.cat([IDS[0], torch.tensor(decoding.tokens[0])])[None]).logits[0]
    assert decoding.tokens[0] == logits.argmax(-1)[len(IDS[0]) - 1 : -1].tolist()


# In 16 bits


def confident(dtype: torch.dtype) -> tuple[torch.Tensor, LmHead, torch.Tensor]:
    """States whose likeliest token, with a logit near 20, has a probability of 0.9998 or more; and that token.

    The rows of the weight have much in common, as those of language models have.
    """
    torch.manual_seed(0)
    weight = 0.3 * torch.randn(400, 64) + 0.3 * torch.randn(64)
    tokens = torch.arange(0, 400, 4)
    rows = weight[tokens] - weight.mean(0)
    states = 20 * rows / rows.square().sum(1, keepdim=True) + 0.05 * torch.randn(len(tokens), 64)
    return states.to(dtype), LmHead(weight.to(dtype)), tokens


def undecided(dtype: torch.dtype) -> tuple[torch.Tensor, LmHead, torch.Tensor]:
    """States with several likely tokens, the likeliest with a logit near 20; and any tokens."""
    torch.manual_seed(0)
    weight, states = 0.3 * torch.randn(400, 64), 3 * torch.randn(100, 64)
    return states.to(dtype), LmHead(weight.to(dtype)), torch.randint(400, (100,))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
def test_gradients_of_confident_tokens_are_not_rounding(dtype: torch.dtype, most: float) -> None:
    states, head, tokens = confident(dtype)
    exact_states = states.double().requires_grad_()
    log_all = torch.log_softmax(exact_states @ head.weight.double().T, -1)
    (exact,) = torch.autograd.grad(log_all.gather(1, tokens[:, None]).sum(), exact_states)
    found, _ = token_logprobs(states.requires_grad_(), head, tokens, 1.0, chunk=30)
    (slope,) = torch.autograd.grad(found.sum(), states)
    error = (slope.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert found.exp().median() > 0.999 and error.max() < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_and_entropies_of_logits_near_20_are_exact(dtype: torch.dtype) -> None:
    states, head, tokens = undecided(dtype)
    logits = states.double() @ head.weight.double().T
    log_all = torch.log_softmax(logits, -1)
    found, entropy = token_logprobs(states, head, tokens, 1.0, chunk=30)
    assert 15 < logits.amax(1).median() < 25
    torch.testing.assert_close(found.double(), log_all.gather(1, tokens[:, None])[:, 0], atol=2e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), -(log_all.exp() * log_all).sum(1), atol=2e-4, rtol=0)


def test_logits_in_16_bits_are_the_products_of_float64_with_bias_scale_and_cap() -> None:
    states, head, _ = undecided(torch.bfloat16)
    bias = torch.randn(400).bfloat16()
    exact = 2.0 * (states.double() @ head.weight.double().T + bias.double())
    logits, capped = LmHead(head.weight, bias, 2.0)(states), LmHead(head.weight, bias, 2.0, cap=30.0)(states)
    assert logits.dtype == capped.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(capped.double(), 30 * torch.tanh(exact / 30), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sampler_and_the_trainer_agree_in_16_bits(dtype: torch.dtype) -> None:
    states, head, _ = undecided(dtype)
    tokens, sampled = chosen_tokens(head(states), torch.rand(len(states)), 1.0)
    trained, _ = token_logprobs(states, head, tokens, 1.0, chunk=7)
    torch.testing.assert_close(sampled, trained, atol=1e-4, rtol=0)


class Products(TorchFunctionMode):
    """Notes the keywords of every `torch.mm` inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.mm:
            self.keywords.append(kwargs)
        return func(*args, **(kwargs or {}))


def test_a_card_takes_one_product_whose_result_is_float32() -> None:
    weight, states = (torch.empty(n, 4, device="meta", dtype=torch.bfloat16) for n in (9, 3))
    with Products() as seen:
        logits = LmHead(weight)(states)
    assert (logits.dtype, logits.shape) == (torch.float32, (3, 9))
    assert seen.keywords == [{"out_dtype": torch.float32}]


@pytest.mark.parametrize(("cap", "numbers"), [(None, 2), (30.0, 3)])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_chunk_takes_no_more_than_the_memory_plan_says(cap: float | None, numbers: int, gradient: bool) -> None:
    rows, vocabulary, width = 64, 4096, 8
    counter = OperationCounter()
    with counter:
        weight = torch.empty(vocabulary, width, device="meta", dtype=torch.bfloat16)
        states = torch.empty(3 * rows, width, device="meta", dtype=torch.bfloat16, requires_grad=gradient)
        tokens = torch.zeros(3 * rows, dtype=torch.int64)
        counter.clear()
        token_logprobs(states, LmHead(weight, cap=cap), tokens, TEMPERATURE, chunk=rows)
    chunk = 4 * rows * vocabulary
    expected = numbers if gradient else 2
    assert expected * chunk <= counter.peak < 1.05 * expected * chunk + weight.nbytes


def test_sampling_a_token_takes_what_the_memory_plan_says() -> None:
    rows, vocabulary = 64, 4096
    counter = OperationCounter()
    with counter:
        head = LmHead(torch.empty(vocabulary, 8, device="meta", dtype=torch.bfloat16))
        states, uniform = (torch.empty(shape, device="meta") for shape in ((rows, 8), (rows,)))
        counter.clear()
        chosen_tokens(head(states), uniform, TEMPERATURE)
    assert 12 * rows * vocabulary <= counter.peak < 1.05 * 12 * rows * vocabulary + head.weight.nbytes
