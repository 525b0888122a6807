"""The LM head: what a model makes of a state to get a logit for every token, in float32 from weights in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

MULTIPLIED = {
    "cohere": "logit_scale", "cohere2": "logit_scale", "cohere2_moe": "logit_scale",
    "cohere_compass_text": "logit_scale", "falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling",
}  # fmt: skip
"""Kinds of models that multiply the product of state and LM head by a number, and its name in their config."""
DIVIDED = {
    "granite": "logits_scaling", "granite_swa": "logits_scaling", "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling", "granitemoehybrid": "logits_scaling", "granitemoeshared": "logits_scaling",
    "inkling_text": "logits_mup_width_multiplier", "minicpm3": "logits_scaling",
}  # fmt: skip
"""Kinds of models that divide it by a number: before the product or behind it, which is the same."""
CAPPED = {
    "gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping",
    "gemma3n": "final_logit_softcapping", "gemma3n_text": "final_logit_softcapping",
    "gemma4": "final_logit_softcapping", "gemma4_text": "final_logit_softcapping",
    "gemma4_unified": "final_logit_softcapping", "gemma4_unified_text": "final_logit_softcapping",
    "nanochat": "final_logit_softcapping", "vaultgemma": "final_logit_softcapping",
    "recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap",
}  # fmt: skip
"""Kinds of models that bend logits smoothly to stay below a number, and its name in their config."""


class LmHead:
    """Logits of states: l = c · tanh(s · (h Wᵀ + b) / c), or s · (h Wᵀ + b) where nothing is capped.

    A product with 16-bit weights is accumulated in float32 and not rounded to 16 bits, in which a logit of 20 is off
    by up to 0.06: probabilities by 6 %.

    Args:
        weight: [vocabulary, d], frozen.
        bias: [vocabulary], or None.
        scale: s.
        cap: c, or None.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 1.0, cap: float | None = None
    ) -> None:
        self.weight, self.bias, self.scale, self.cap = weight, bias, scale, cap

    @classmethod
    def of(cls, causal_lm: Any) -> LmHead:
        """Return the head of a transformers model, with what its kind does to the logits."""
        head, config = causal_lm.get_output_embeddings(), causal_lm.config
        settings, kind = config.get_text_config(), config.model_type
        scale = float(getattr(settings, MULTIPLIED.get(kind, ""), None) or 1.0)
        scale /= float(getattr(settings, DIVIDED.get(kind, ""), None) or 1.0)
        cap = getattr(settings, CAPPED.get(kind, ""), None)
        return cls(head.weight, getattr(head, "bias", None), scale, None if cap is None else float(cap))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [..., vocabulary], of states [..., d]; no gradient flows through them."""
        with torch.no_grad():
            logits = self._product(states.reshape(-1, states.shape[-1]).to(self.weight.dtype))
            if self.bias is not None:
                logits += self.bias
            if self.scale != 1:
                logits *= self.scale
            if self.cap is not None:
                logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits.view(*states.shape[:-1], len(self.weight))

    def bend(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return how much less a capped logit changes than an uncapped one, 1 − (l / c)²; None without a cap."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the states [n, d], at least float32, given that of s · (h Wᵀ + b) [n, vocabulary]."""
        weight = self.weight
        size: float | torch.Tensor = self.scale
        if weight.dtype == torch.float16:  # knows nothing below 6e-8, which is much where a token is all but certain
            largest = torch.linalg.vector_norm(gradient, torch.inf, 1, keepdim=True).clamp_(min=1e-30)
            gradient, size = gradient / largest, size * largest
        slope = gradient.to(weight.dtype) @ weight
        return slope.to(torch.promote_types(slope.dtype, torch.float32)).mul_(size)

    def _product(self, states: torch.Tensor) -> torch.Tensor:
        """Return h Wᵀ, float32 [n, vocabulary], of states [n, d] in the dtype of the weight."""
        weight = self.weight
        if weight.dtype in (torch.float32, torch.float64):
            return (states @ weight.T).float()
        if weight.device.type != "cpu":
            return torch.mm(states, weight.T, out_dtype=torch.float32)
        # A CPU rounds the product to 16 bits. What that took away is small, so that 16 bits hold it: a second product
        # gives it, less the first. A copy of the weight in float32 would be quicker, and twice as large as the weight.
        rounded = states @ weight.T
        logits = rounded.float()
        return logits.add_(rounded.addmm_(states, weight.T, beta=-1))
