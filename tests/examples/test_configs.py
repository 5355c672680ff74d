"""The presets: the paper's values, no unknown key, and one step on minute stand-ins through the command line."""

import json
from pathlib import Path

import pytest
from helpers import make_model, make_teacher, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_cmdp import ConstrainedDistillConfig
from trl_cmdp.cli import main
from trl_cmdp.cli._train import TrainingParser


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
MODELS = {
    "gsm8k_qwen2.5_math": ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B-Instruct", "gsm8k"),
    "math_llama_3.2": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-11B-Vision-Instruct", "math"),
    "math_llama_3.1_8b_teacher": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B-Instruct", "math"),
}
TRAIN = {
    "gsm8k": {"question": "Tom has 2 eggs. He buys 3. How many has he?", "answer": "2+3=<<2+3=5>>5 eggs.\n#### 5"},
    "math": {
        "problem": "What is $2+3$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is $\boxed{5}$.",
    },
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}="


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """Student and teacher of one character tokenizer with a chat template, and train rows of each task."""
    characters = "".join(sorted({character for row in TRAIN.values() for text in row.values() for character in text}))
    instruction = (
        r"QuestionAnswer:ProblemSolution please reason step by step, and put your final answer within \boxed{}."
    )
    characters += "".join(sorted({*instruction, "P", "=", "\n"} - {*characters}))
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(characters)
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, make in (("student", make_model), ("teacher", make_teacher)):
        save_model(tmp_path / name, make(vocab_size=len(tokenizer)), tokenizer)
    for task, row in TRAIN.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return tmp_path


def parse(name: str):
    parser = TrainingParser("constrained", ConstrainedDistillConfig)
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", "out", "--bf16", "false"]
    *parsed, of_config, of_command_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert (of_config, of_command_line) == ([], [])  # no unknown key
    return parsed


def test_every_preset_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_values_of_the_paper(name):
    script, model, _, training = parse(name)
    assert (model.model_name_or_path, script.teacher_model, script.task) == MODELS[name]
    assert (training.cost_limit, training.violation_penalty, training.learning_rate) == (0.35, 20.0, 1e-5)
    assert training.optim == "adamw_torch"
    assert (model.dtype, training.bf16) == ("float32", False)  # `parse` takes bf16 away, which needs a GPU
    assert training.num_generations == 8
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8 * 8
    assert training.generation_batch_size == 8 * 8


@pytest.mark.parametrize("name", MODELS)
def test_no_key_twice(name):
    """YAML takes the last of several without a word."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    keys = [line.partition(":")[0] for line in lines if line and line[0] != "#"]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", MODELS)
def test_one_step_on_stand_ins(name, stand_ins, monkeypatch, capsys):
    monkeypatch.chdir(stand_ins)
    small = ["--max_steps", "1", "--max_completion_length", "4", "--bf16", "false", "--use_cpu", "true"]
    small += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--dtype", "float32"]
    models = ["--model_name_or_path", "student", "--teacher_model", "teacher", "--dataset_name", MODELS[name][2]]
    quiet = ["--report_to", "none", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    config = ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", "out"]
    assert main(["constrained", *config, *small, *models, *quiet]) == 0
    out = capsys.readouterr().out
    assert "rewards/final_answer_reward/mean" in out
    assert "'constraint/limit': '0.35'" in out
    AutoModelForCausalLM.from_pretrained(stand_ins / "out")
