"""Part 1: versions, the card, and what it does at best, so that everything after is a share of its own limit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch
from shapes import Rates

from card_parts.bench import NO_CARD, Bench, Figures
from lora_rlhf.memory import GIB
from lora_rlhf.run import package_versions


def limits(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield versions, the card, and its rates."""
    yield "versions", {"python": platform.python_version(), "cuda": torch.version.cuda} | package_versions()
    yield "card", card(bench)
    rates = bench.rates
    yield "rates", {"copy_gb_per_second": rates.bandwidth / 1e9, "bf16_tflop_per_second": rates.matmul / 1e12}


def card(bench: Bench) -> Figures:
    """Return what the card is."""
    if not bench.on_card:
        return {"not_measured": NO_CARD, "processor": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(bench.device)
    free, whole = torch.cuda.mem_get_info(bench.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / GIB,
        "taken_beside_tensors_gib": (whole - free - torch.cuda.memory_reserved(bench.device)) / GIB,
        "driver": driver_version(),
    }


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or why it is not known."""
    if shutil.which("nvidia-smi") is None:
        return "not known: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.strip().splitlines() or ["not known: nvidia-smi said nothing"])[0]


def measured_limits(bench: Bench) -> Rates:
    """Return bytes per second of a large copy (read and written), and the rate of a large bfloat16 product."""
    source = torch.randn(bench.size.copied // 2, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copying = bench.seconds_of(lambda: target.copy_(source), repeats=5)
    side = bench.size.matmul
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    multiplying = bench.seconds_of(lambda: torch.mm(left, right, out=product), repeats=5)
    return Rates(2 * source.numel() * source.itemsize / copying, 2 * side**3 / multiplying)
