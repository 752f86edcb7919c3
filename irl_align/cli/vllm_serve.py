"""The command vllm-serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from irl_align.cli.terminal import Debug, set_up
from irl_align.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="vllm-serve",
        epilog="Example: VLLM_API_KEY=... irl-align vllm-serve /shared/runs/e2e-spin-seed1 "
        "--host 0.0.0.0 --port 8000 tensor_parallel_size=2",
    )(vllm_serve)


def vllm_serve(
    model: Annotated[
        Path, typer.Argument(help="Folder of a model, or of a run, whose policy is served.")
    ],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of vLLM, as name=value.")
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    context_length: Annotated[
        int, typer.Option(min=2, help="Most tokens of prompt and completion together.")
    ] = 1024,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Size of the key-value cache in tokens, over all sequences.")
    ] = 65536,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Largest rank of the policies' LoRA adapters; 0 for none.")
    ] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="The recipe's model.dtype.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Serve a model for recipes with generation.backend vllm-server, which load their policies.

    Recipes on other machines must find the policies under the same paths. The server and the
    recipes read the API key from VLLM_API_KEY.
    """
    set_up(debug)
    from irl_align.models.generation.vllm_common import EngineSettings
    from irl_align.models.generation.vllm_process import serve
    from irl_align.models.loading import pick_device
    from irl_align.training.run_folder import artefact_folder

    settings = EngineSettings(
        device=pick_device(device).type,
        dtype=dtype,
        context_length=context_length,
        cache_tokens=cache_tokens,
        lora_rank=lora_rank,
        args=_values(options or []),
    )
    serve(artefact_folder(model, "policy"), settings, host, port)


def _values(options: list[str]) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"vllm-serve: found {option!r}, expected NAME=VALUE")
        values[name.strip()] = yaml.safe_load(value)
    return values
