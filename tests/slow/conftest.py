import os
import sys
from pathlib import Path

import pytest
from helpers import make_model, make_tokenizer, save_model


SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"
sys.path.append(str(SCRIPTS))  # what `demo_llm.py` imports from beside it, when it is run from here


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """Folder of SmolLM2-135M-Instruct, or the one that is named by the environment."""
    if "SMOLLM2" in os.environ:
        return Path(os.environ["SMOLLM2"])
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    from smollm2 import save_teacher

    save_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> list[str]:
    """Folders of two random Llamas, of the smallest heads that vLLM's attention for CPUs has."""
    folders = []
    for seed in range(2):
        model = make_model(
            seed,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            spread=0.2,
        )
        folders.append(save_model(tmp_path_factory.mktemp("llama"), model, make_tokenizer()))
    return folders
