"""Load a target: weights, processor and optional adapter, from a folder or a hub id.

Safetensors only and no remote code unless asked. A hub id is first brought to a local folder, so
that both ways share every later step, the hashes included.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from lightleak.errors import UserError
from lightleak.targets.dual_encoder import DualEncoderTarget
from lightleak.targets.generative import GenerativeTarget
from lightleak.targets.open_clip import CONFIG as OPEN_CLIP
from lightleak.targets.open_clip import load_open_clip
from lightleak.targets.target import Target

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEVICES = "Give auto, cpu, cuda, cuda:1 or mps; lightleak doctor says what is here."
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Target:
    """Load a vision-language model or a dual encoder with its processor.

    Args:
        target: a local folder or a hub id of an image-text-to-text model or a dual encoder; or
            the folder of a PEFT adapter, whose base is then `base` or the one its own
            configuration names.
        adapter: a PEFT adapter to put on the target.
        base: the model that an adapter given as `target` sits on.
        dtype: "auto" keeps what the checkpoint was saved in on an accelerator and uses float32
            on a CPU (float64 stays); or float32, float64, bfloat16, float16.
        device: "auto" takes CUDA, then MPS, then the CPU; or any torch device name.
        trust_remote_code: run Python code that the checkpoint carries.
        allow_pickle: accept weights that are not safetensors; loading a pickle can run code.

    Raises:
        UserError: nothing there, no safetensors, an unknown architecture, a missing processor,
            an adapter that does not fit.
    """
    folder = _resolve(target)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and (folder / "config.json").is_file():
        raise UserError(
            "it holds both a model and an adapter",
            str(target),
            "Put the adapter in a folder of its own and give it with --adapter.",
        )
    if is_adapter:
        if adapter is not None:
            raise UserError(
                "the target is an adapter already", str(target), "Give one adapter, not two."
            )
        adapter, folder = folder, _resolve(base or _named_base(folder))
    adapter_folder = None if adapter is None else _resolve(adapter)
    _refuse_pickle(folder, "*.safetensors", allow_pickle)
    if adapter_folder is not None:
        # By its name: peft takes a pickle beside any other safetensors file.
        _refuse_pickle(adapter_folder, "adapter_model.safetensors", allow_pickle)
    where = torch.device(_choose_device(device))
    _check_dtype(dtype)
    if (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file():
        with quiet():
            dressed, processor = load_open_clip(folder)
        model = dressed.to(where, DTYPES.get(dtype, torch.float32))
    else:
        model = _load_model(folder, dtype, where, trust_remote_code, allow_pickle)
        processor = _load_processor(folder, trust_remote_code)
    if adapter_folder is not None:
        model = _put_adapter(model, adapter_folder, where)
    model.eval().requires_grad_(False)
    of_kind = DualEncoderTarget if _is_dual(model.config) else GenerativeTarget
    return of_kind(
        model=model,
        processor=processor,
        device=where,
        hashes=_hashes(folder, adapter_folder),
        name=str(target),
    )


def find(name: str | Path) -> Path:
    """The local folder of a model, resolved; a hub id is brought here first.

    Raises:
        UserError: there is none.
    """
    return _resolve(name).resolve()


def base_of(
    target: str | Path, adapter: str | Path | None = None, base: str | Path | None = None
) -> str | None:
    """The model that a target was fine-tuned from, as given or as an adapter names it.

    Raises:
        UserError: it is not there, or an adapter names none.
    """
    if adapter is not None:
        return str(target)
    if base is None:
        folder = _resolve(target)
        return _named_base(folder) if (folder / "adapter_config.json").is_file() else None
    _resolve(base)
    return str(base)


def without_adapter(target: Target, name: str) -> Target | None:
    """The base of an adapted target, made by taking the adapter off; the target is used up.

    None, with the target as it was, where the adapter holds more than low-rank matrices (trained
    biases, whole modules) or was begun from the base's own weights: then only loading the base
    anew is sure to give it.
    """
    from peft import get_peft_model_state_dict

    apart = all("lora_" in key for key in get_peft_model_state_dict(target.model))
    begun = {str(getattr(c, "init_lora_weights", None)) for c in target.model.peft_config.values()}
    if not apart or not begun <= {"True", "False", "gaussian"}:
        return None
    model = target.model.unload()
    model.eval().requires_grad_(False)
    hashes = {key: value for key, value in target.hashes.items() if key != "adapter"}
    return replace(target, model=model, name=name, hashes=hashes)


def untrained(target: Target, seed: int) -> Target:
    """The same architecture with weights drawn at random: what is read without any training."""
    plain = target.plain
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = type(plain)(plain.config).to(target.device, target.dtype)
    model.eval().requires_grad_(False)
    return replace(target, model=model, name=f"{target.name} with random weights")


def _resolve(name: str | Path) -> Path:
    """The local folder of a folder or a hub id; the only place that may use the network."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError("this is a file, not a model folder", str(name), "Give its folder.")
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        raise UserError("no such folder", str(name), "Give a model folder or a hub id owner/name.")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "*.py"]))
    except Exception as error:
        raise UserError(
            f"no such folder here, and the hub did not give it ({_first_line(error)})",
            str(name),
            "Check the name and the network, or download the model and give its folder.",
        ) from error


def _named_base(adapter: Path) -> str:
    """The base that an adapter's own configuration names; a folder here, never a hub id.

    Nobody gave that name, so nothing may be fetched for it.
    """
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        name = settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"its adapter_config.json cannot be read ({_first_line(error)})", str(adapter)
        ) from error
    if not name or not Path(name).is_dir():
        named = (
            f"the adapter names the base {name!r}, which is no folder here"
            if name
            else ("the adapter does not name its base")
        )
        raise UserError(named, str(adapter), "Give its base with --base.")
    return str(name)


def _refuse_pickle(folder: Path, weights: str, allowed: bool) -> None:
    if allowed or any(folder.glob(weights)):
        return
    if any(next(folder.glob(pattern), None) for pattern in _PICKLED):
        raise UserError(
            "its weights are pickled, and loading a pickle can run code",
            str(folder),
            "Convert them to safetensors, or pass --allow-pickle if you trust their source.",
        )
    raise UserError("no *.safetensors weights in it", str(folder), "Is this a model folder?")


def _choose_device(device: str) -> str:
    if device != "auto":
        if device.partition(":")[0] not in {"cpu", "cuda", "mps", "xpu", "npu", "hpu"}:
            raise UserError("no such device", f"--device {device}", _DEVICES)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"this machine cannot use it ({_first_line(error)})", f"--device {device}", _DEVICES
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype; choose auto or {', '.join(DTYPES)}", f"--dtype {dtype}")


def _load_model(
    folder: Path, dtype: str, device: torch.device, remote_code: bool, allow_pickle: bool
) -> Any:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=remote_code, local_files_only=True
            )
            auto = AutoModel if _is_dual(config) else AutoModelForImageTextToText
            model, loaded = auto.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=DTYPES.get(dtype, "auto"),
                trust_remote_code=remote_code,
                use_safetensors=None if allow_pickle else True,
                local_files_only=True,
            )
    except Exception as error:
        message = _first_line(error)
        advice = "Is it an image-text-to-text model or a dual encoder that transformers knows?"
        if "trust_remote_code" in str(error):
            advice = "Pass --trust-remote-code if you have read that code and trust it."
        raise UserError(
            f"transformers could not load it ({message})", str(folder), advice
        ) from error
    absent = sorted(loaded["missing_keys"]) + sorted(str(k) for k in loaded["mismatched_keys"])
    if absent:
        raise UserError(
            f"its weights are not complete: {len(absent)} tensor(s) are missing or misshapen, "
            f"{absent[0]} first, and would be drawn at random",
            str(folder),
            "Download it again.",
        )
    if dtype == "auto" and device.type == "cpu" and model.dtype.itemsize < 4:
        model = model.float()
    return model.to(device)


def _is_dual(config: Any) -> bool:
    """Whether a checkpoint is a dual encoder: what transformers classifies images with, untaught.

    Some configurations serve both kinds (BLIP); then the architecture that was saved decides.
    """
    dual = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if config.model_type == "open_clip":
        return True
    if config.architectures:
        return config.architectures[0] in {*dual.values(), "VisionTextDualEncoderModel"}
    generative = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return config.model_type in dual and config.model_type not in generative


def _put_adapter(model: Any, folder: Path, device: torch.device) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, folder, torch_device=str(device))
            stored = set(load_peft_weights(str(folder), device="cpu"))
            expected = set(get_peft_model_state_dict(adapted))
    except Exception as error:
        raise UserError(
            f"the adapter does not fit the model ({_first_line(error)})",
            str(folder),
            "Give the base that it was trained on.",
        ) from error
    if stored != expected:
        odd = sorted(stored ^ expected)
        raise UserError(
            f"the adapter does not fit the model: {len(odd)} tensor(s) stand in one of them only, "
            f"{odd[0]} first",
            str(folder),
            "Give the base that it was trained on, and the whole adapter.",
        )
    return adapted


def _load_processor(folder: Path, remote_code: bool) -> Any:
    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=remote_code, local_files_only=True
            )
    except ImportError as error:
        raise UserError(
            f"its processor needs a package that is missing ({_first_line(error)})",
            str(folder),
            "Install it, for most models: pip install torchvision.",
        ) from error
    except Exception as error:
        raise UserError(
            f"its processor cannot be loaded ({_first_line(error)})",
            str(folder),
            "Copy the processor and tokenizer files of the base model into the folder.",
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            "it has a tokenizer or an image processor, but no processor that joins the two",
            str(folder),
            "Copy processor_config.json and preprocessor_config.json of the base model into it.",
        )
    return processor


def _hashes(folder: Path, adapter: Path | None) -> dict[str, str]:
    """SHA-256 of what decides the evidence: weights, processor with chat template, adapter."""
    weights = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".bin", ".pt"})
    settings = sorted(
        p for p in folder.iterdir() if p.suffix in {".json", ".jinja", ".model", ".txt", ".py"}
    )
    hashes = {"weights": _digest(weights), "processor": _digest(settings)}
    if adapter is not None:
        hashes["adapter"] = _digest(
            sorted(p for p in adapter.iterdir() if p.name.startswith("adapter_"))
        )
    return hashes


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and notices of loading and saving; errors still reach the caller."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    below = logging.root.manager.disable
    log.set_verbosity_error()
    log.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(below)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
