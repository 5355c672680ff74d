"""The config and the head of a checkpoint, without the rest of it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..core import Head
from .models import lm_head


def load_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """Config of a checkpoint. Runs no remote code."""
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher's config cannot be read from {model!r} ({type(error).__name__}). Pass the checkpoint that the "
            "server runs as a local folder or hub id; an architecture with code of its own is not supported."
        ) from error


def load_head(model: str, config: PretrainedConfig, revision: str | None = None) -> Head:
    """
    Head of a causal language model, without the rest of it: of the checkpoint only the file is fetched that holds the
    head, and of that only the head is read. Safetensors only, and no remote code.
    """
    with torch.device("meta"):  # names and shapes, without memory
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = {id(module): name for name, module in skeleton.named_modules()}
    head = lm_head(skeleton)
    output, embeddings = names[id(skeleton.get_output_embeddings())], names[id(skeleton.get_input_embeddings())]
    files = _tensor_files(model, revision)
    # Where they are tied a copy of the head may be stale: the embeddings count, in transformers as in vLLM.
    weight = None
    if skeleton.config.get_text_config().tie_word_embeddings:
        weight = _read_tensor(model, files, f"{embeddings}.weight", revision)
    if weight is None:
        weight = _read_tensor(model, files, f"{output}.weight", revision)
    if weight is None or weight.shape != head.weight.shape or not weight.is_floating_point():
        found = "no" if weight is None else f"a {weight.dtype} of shape {tuple(weight.shape)} as"
        raise ValueError(
            f"The checkpoint {model!r} has {found} head of shape {tuple(head.weight.shape)} ({output}.weight). A "
            "quantised head is not supported: pass the checkpoint that it was made from."
        )
    bias = None
    if head.bias is not None:
        bias = _read_tensor(model, files, f"{output}.bias", revision)
        if bias is None or bias.shape != head.bias.shape:
            raise ValueError(f"The checkpoint {model!r} lacks the bias of its head ({output}.bias).")
    return replace(head, weight=weight, bias=bias)


def _tensor_files(model: str, revision: str | None) -> dict[str, str]:
    """Name of each tensor of a checkpoint -> the file that holds it."""
    index = _checkpoint_file(model, "model.safetensors.index.json", revision)
    if index is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        if outside := next((name for name in weight_map.values() if Path(name).name != name), None):
            raise ValueError(
                f"The index of the checkpoint {model!r} names {outside!r}, which is no file of its folder."
            )
        return weight_map
    single = _checkpoint_file(model, "model.safetensors", revision)
    if single is None:
        raise ValueError(
            f"The checkpoint {model!r} has no safetensors, the only format that the teacher's head is read from. "
            "Save it again with `save_pretrained`."
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def _read_tensor(model: str, files: dict[str, str], name: str, revision: str | None) -> torch.Tensor | None:
    """Tensor of that name, or of the one that differs only in what stands before (a wrapper's prefix, or none)."""
    # Checkpoints lack or add outer prefixes: GPT-2's embeddings are `wte.weight`, those of a wrapped text model
    # `language_model.model.embed_tokens.weight`.
    candidates = [name] if name in files else []
    if not candidates:
        last = ".".join(name.split(".")[-2:])
        candidates = [key for key in files if key == last or key.endswith(f".{last}")]
    if len(candidates) != 1:
        return None
    path = _checkpoint_file(model, files[candidates[0]], revision)
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(candidates[0])


def _checkpoint_file(model: str, name: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except EntryNotFoundError:
        return None
