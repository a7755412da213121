"""Options that several commands take alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Where(StrEnum):
    """Where the processes are."""

    LOCAL = "local"
    RAY = "ray"


Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes at once, one thread and at most one accelerator each; 0 takes one for "
        "each accelerator, or each core where there is none.",
    ),
]
Executor = Annotated[
    Where, typer.Option(help="local: processes of this machine; ray: actors of Ray Core.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join; else RAY_ADDRESS, else one is started here."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float64, bfloat16, float16.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad record or photo.")]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Follow image paths and links out of their folder.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint carries.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load weights that are not safetensors.")
]
