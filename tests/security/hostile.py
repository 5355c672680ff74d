"""Model folders that try to run code when they are loaded."""

import json
import pathlib
from pathlib import Path

import torch
from helpers import make_model, make_tokenizer, save_model
from transformers import PreTrainedModel


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def with_remote_code(folder: Path, trace: Path, model: PreTrainedModel, model_type: str = "own") -> str:
    """
    Saves a model and its tokenizer whose classes are the folder's own code, which makes the file `trace` when imported.
    With the `model_type` "llama" the code of the model is not needed, and that of the tokenizer is.
    """
    save_model(folder, model, make_tokenizer())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {
        "config.json": {"model_type": model_type, "architectures": ["OwnModel"], "auto_map": classes},
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        },
    }
    if model_type == "llama":
        changes["config.json"]["architectures"] = ["LlamaForCausalLM"]
    for name, values in changes.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"class OwnConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    return str(folder)


def with_pickled_weights(folder: Path, trace: Path | None = None) -> str:
    """Saves a model whose only weights are a pickle, one that makes the file `trace` if there is one."""
    model = make_model()
    save_model(folder, model, make_tokenizer())
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict() if trace is None else {"lm_head.weight": Bomb(trace)}, folder / "pytorch_model.bin")
    return str(folder)
