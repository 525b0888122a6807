"""Direct RLHF on one GPU: QLoRA PPO in which policy, reference, reward and value share one 4-bit base.

Rooms, as data flows: `config` → `data` → `base` → `reward` → `ppo` → `merge` → `evaluation`; `stages` strings them
together for the recipes.
"""

import logging
from importlib.metadata import version

from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

# bitsandbytes advises, at import, to install kernels from the Hub; no code is loaded from there.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())

__all__ = ["RunConfig", "UserError", "__version__"]
__version__ = version("lora-rlhf")
