"""What is saved is a plain checkpoint."""

import subprocess
import sys

import torch
from helpers import make_lora, make_model, make_teacher, make_tokenizer, run, save_model
from safetensors.torch import load_file


LOAD = """
import sys

sys.modules["trl_cmdp"] = None  # importing it fails
sys.modules["trl"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

logits = []
for path in sys.argv[2:]:
    AutoTokenizer.from_pretrained(path)
    logits.append(AutoModelForCausalLM.from_pretrained(path)(input_ids=torch.tensor([[2, 3, 4, 5]])).logits)
torch.save(logits, sys.argv[1])
"""


def test_saved_student_loads_with_transformers_alone(tmp_path):
    """In a process that can import neither trl_cmdp nor trl, the student has the logits it was trained to; no teacher's."""
    student = save_model(tmp_path / "student", make_model(), make_tokenizer())
    input_ids = torch.tensor([[2, 3, 4, 5]])
    paths, expected = [], []
    for name in ("full", "lora"):
        trainer = run(
            tmp_path / name,
            model=student,
            teacher_model=make_teacher(),
            peft_config=make_lora() if name == "lora" else None,
            cost_limit=0.01,
            learning_rate=0.05,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.save_model(tmp_path / name / "saved")
        trainer.model.eval()
        logits = trainer.model(input_ids=input_ids).logits.detach()
        assert not torch.allclose(logits, make_model()(input_ids=input_ids).logits, atol=1e-3)  # it has learnt
        paths += [tmp_path / name / "saved", tmp_path / name / "checkpoint-2"]
        expected += [logits, logits]

    whole = tmp_path / "full" / "checkpoint-2"
    assert "trl_cmdp" not in (whole / "config.json").read_text()
    assert load_file(whole / "model.safetensors").keys() == make_model().state_dict().keys()
    command = [sys.executable, "-c", LOAD, str(tmp_path / "logits.pt"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for loaded, logits in zip(torch.load(tmp_path / "logits.pt"), expected, strict=True):
        torch.testing.assert_close(loaded, logits, rtol=1e-6, atol=1e-6)
