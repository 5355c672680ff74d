"""What is saved is a plain checkpoint, and training goes on from it as if it had never stopped."""

import subprocess
import sys

import pytest
import torch
from helpers import history, make_model, make_teacher, make_tokenizer, make_trainer, run, weights
from peft import LoraConfig
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
    """In a process that can import neither trl_cmdp nor trl, the student has the logits it was trained to."""
    make_model().save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    input_ids = torch.tensor([[2, 3, 4, 5]])
    paths, expected = [], []
    for name in ("full", "lora"):
        trainer_kwargs = {"teacher_model": make_teacher()}
        if name == "lora":
            trainer_kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = run(
            tmp_path / name,
            model=str(tmp_path / "student"),
            trainer_kwargs=trainer_kwargs,
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

    command = [sys.executable, "-c", LOAD, str(tmp_path / "logits.pt"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for loaded, logits in zip(torch.load(tmp_path / "logits.pt"), expected, strict=True):
        torch.testing.assert_close(loaded, logits, rtol=1e-6, atol=1e-6)


def test_nothing_of_ours_in_the_checkpoint(tmp_path):
    """Neither teacher weights nor names of this package in the model's own files."""
    run(tmp_path, trainer_kwargs={"teacher_model": make_teacher()}, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert "trl_cmdp" not in (checkpoint / "config.json").read_text()
    assert load_file(checkpoint / "model.safetensors").keys() == make_model().state_dict().keys()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2},  # step 2 of 4 ends a generation cycle
        {"steps_per_generation": 2, "credit_assignment": "token"},
        {"lora": True},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_resume(tmp_path, settings):
    """From a checkpoint at the end of a generation cycle: the uninterrupted run's weights and metrics, bit for bit."""
    settings = dict(settings)
    lora = settings.pop("lora", False)

    def build(name, max_steps):
        trainer_kwargs = {"teacher_model": make_teacher()}
        if lora:
            trainer_kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        return make_trainer(
            tmp_path / name,
            trainer_kwargs=trainer_kwargs,
            cost_limit=1.7,
            max_steps=max_steps,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
            **settings,
        )

    whole = build("whole", 4)
    whole.train()
    build("stopped", 2).train()
    resumed = build("stopped", 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(resumed).items())
    for name in ("loss", "constraint/cost", "constraint/satisfaction_rate", "distill_loss"):
        assert history(resumed, name) == history(whole, name), name
