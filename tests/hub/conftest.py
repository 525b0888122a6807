"""Fixtures: a stand-in Hub that the real client talks to, and finished tiny runs to push."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from hub_server import HubServer
from hub_state import READER, TOKEN
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http as client

import lora_rlhf.hub.push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The stand-in Hub; the token in the environment may write to `you/…`."""
    with HubServer({TOKEN: ("you", True), READER: ("guest", False)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # of the functions that need no client
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # there is no xet storage here
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        client.close_session()
        yield server
        client.close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a push waited between its attempts; nothing waits in truth, the client's own retries neither."""
    waited: list[float] = []
    monkeypatch.setattr(lora_rlhf.hub.push, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda seconds: None))
    return waited


@pytest.fixture
def validation(hub: HubServer) -> Iterator[None]:
    """Let `ModelCard.validate`, which knows one address only, reach the stand-in."""

    class ToStandIn(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.host == "huggingface.co":
                request.url = httpx.URL(hub.endpoint).copy_with(path=request.url.path)
            return super().handle_request(request)

    client.set_client_factory(lambda: httpx.Client(transport=ToStandIn(), follow_redirects=True))
    yield
    client.set_client_factory(client.default_client_factory)


@pytest.fixture
def finished_run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished tiny run."""
    return Path(shutil.copytree(run_folder, tmp_path / "finished"))


@pytest.fixture
def loud_run(finished_run: Path) -> Path:
    """The run with an adapter that changes much, as three steps of training do not."""
    from safetensors.torch import load_file, save_file

    for name in ("policy_adapter", "reward_adapter"):
        file = finished_run / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(0)
        weights = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return finished_run


@pytest.fixture
def other_run(finished_run: Path, tmp_path: Path) -> Path:
    """A run like `finished_run` with other weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(finished_run, tmp_path / "other"))
    file = folder / "policy_adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def pushed(hub: HubServer, recipe: Callable[..., tuple[int, str]]) -> Callable[..., str]:
    """Run the recipe to its good end; return what it printed."""

    def push(run: Path, *options: str, repo_id: str = "you/plus") -> str:
        status, printed = recipe("push_to_hub.py", "--output_dir", str(run), "--repo_id", repo_id, *options)
        assert status == 0, printed
        return printed

    return push
