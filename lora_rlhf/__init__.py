"""Direct RLHF on one GPU: QLoRA PPO in which policy, reference, reward and value share one 4-bit base.

Rooms, as data flows: `config` → `data` → `base` → `reward` → `ppo` → `merge` → `evaluation` → `hub`; `stages` strings
them together for the recipes. `load_plus` loads what a run made.
"""

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

if TYPE_CHECKING:
    from lora_rlhf.plus import load_plus

# bitsandbytes advises, at import, to install kernels from the Hub; no code is loaded from there.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())

__all__ = ["RunConfig", "UserError", "__version__", "load_plus"]
__version__ = version("lora-rlhf")


def __getattr__(name: str) -> Any:
    if name == "load_plus":  # imports torch, which most of the package's commands can do without
        from lora_rlhf.plus import load_plus

        return load_plus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
