"""The options of every command whose work can be shared among processes."""

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
