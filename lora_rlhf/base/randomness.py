"""What makes a model random in train mode, and turning it off: dropout in all its forms, noise in routers."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

RATES = re.compile(r"drop|^(input_)?jitter")
"""In the names of attributes and config fields that hold the rate of something random."""
SAMPLING_ROUTER = "router_jitter_noise"
"""Attribute of PhiMoE's router, which in train mode samples among experts that are this near; in eval mode it uses the
number otherwise, so that it has to stay."""


def turn_off_randomness(model: Any) -> None:
    """Let `model` compute in train mode what it computes in eval mode.

    Modules hold their rates as `nn.Dropout`, as plain numbers that `functional.dropout` is given, or read them from the
    config at every pass. The model's own config, which is saved with it, keeps its rates: the modules get a copy.
    """
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(vars(module)):
            setattr(module, name, 0.0)
        if SAMPLING_ROUTER in vars(module):
            _keep_in_eval_mode(module)
        config = vars(module).get("config")
        if module is not model and config is not None and _has_rates(config):
            if id(config) not in quiet:
                quiet[id(config)] = _without_rates(config)
            module.config = quiet[id(config)]


def _keep_in_eval_mode(module: nn.Module) -> None:
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def _rates(values: dict[str, Any]) -> list[str]:
    """Return the names of the values that are rates above 0."""
    return [name for name, value in values.items() if RATES.search(name) and type(value) is float and value > 0]


def _has_rates(config: Any) -> bool:
    return hasattr(config, "to_dict") and bool(_rates(vars(config)))


def _without_rates(config: Any) -> Any:
    """Return a copy of a config whose rates are 0."""
    quiet = copy.deepcopy(config)
    for name in _rates(vars(config)):
        setattr(quiet, name, 0.0)
    return quiet
