"""Small real targets that many tests share, built once a session."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the lab keeps what it built; shared by the processes of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["LIGHTLEAK_CACHE"] = str(shared / "lab-cache")
    return shared / "lab-cache"


@pytest.fixture(scope="session")
def lab_tiny(cache, tmp_path_factory):
    """A trained tiny LLaVA with 80 members and 160 non-members."""
    from lightleak import lab

    out = tmp_path_factory.mktemp("lab") / "tiny"
    return lab.build("captions-tiny", out, members=80, nonmembers=160, epochs=12)


@pytest.fixture(scope="session")
def lab_lora(cache, tmp_path_factory):
    """A tiny LLaVA and an adapter trained on 48 members; 48 non-members."""
    from lightleak import lab

    out = tmp_path_factory.mktemp("lab") / "lora"
    return lab.build("captions-lora", out, members=48, nonmembers=48, epochs=3)


@pytest.fixture(scope="session")
def lab_pairs(cache, tmp_path_factory):
    """A small CLIP trained on 60 members; 120 non-members."""
    from lightleak import lab

    out = tmp_path_factory.mktemp("lab") / "pairs"
    return lab.build("pairs-clip", out, members=60, nonmembers=120, epochs=20)


@pytest.fixture(scope="session")
def lab_faces(cache, tmp_path_factory):
    """A tiny CLIP that was taught 8 people by name; 16 more that it never saw."""
    from lightleak import lab

    out = tmp_path_factory.mktemp("lab") / "faces"
    return lab.build("faces", out, members=8, nonmembers=16, copies=20)


@pytest.fixture
def subset(tmp_path):
    """Write some rows of a records file, with their images, to a file of their own."""

    def write(source, name, start=0, stop=None):
        rows = [json.loads(line) for line in Path(source).read_text().splitlines()][start:stop]
        for row in rows:
            image = tmp_path / "img" / Path(row["image"]).name
            image.parent.mkdir(exist_ok=True)
            if not image.exists():
                image.write_bytes((Path(source).parent / row["image"]).read_bytes())
            row["image"] = f"img/{image.name}"
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write
