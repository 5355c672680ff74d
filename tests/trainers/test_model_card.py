"""The model card: what it says of the run, metadata that the Hub's client reads back, and no secrets."""

import pytest
import torch
import yaml
from helpers import (
    history,
    make_dataset,
    make_model,
    make_rollout,
    make_settings,
    make_teacher,
    make_trainer,
    run,
    save_model,
)
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from trl_cmdp import GKDDistillTrainer, LagrangianDistillTrainer
from trl_cmdp._messages import hide_secrets, shell_command
from trl_cmdp.core import clustered_rate_interval
from trl_cmdp.evaluation import summarize
from trl_cmdp.trainers.telemetry.hub import describe_error
from trl_cmdp.trainers.telemetry.satisfaction import LOGGED_STEPS, SatisfactionCounts


def card_of(trainer, **kwargs) -> ModelCard:
    trainer.create_model_card("student", **kwargs)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_it_names_method_teacher_limit_and_measured_satisfaction(tmp_path):
    trainer = run(tmp_path, cost_limit=1.75, max_steps=3, teacher_model=make_teacher())
    card = card_of(trainer)
    for text in (
        "Constrained Distillation",
        "a llama model given as an object",
        "1.75 nats per token",
        "reverse KL",
        "of the last 3 logged steps (to step 3)",
        "2509.22921",
        "- trl-cmdp: ",
        "- torch: ",
    ):
        assert text in card.text
    name, (result,) = model_index_to_eval_results(yaml.safe_load(card.data.to_yaml())["model-index"])
    assert (name, result.metric_type) == ("student", "constraint_satisfaction")
    rate, (low, high) = result.metric_value, result.metric_args["interval"]
    assert rate == pytest.approx(sum(history(trainer, "constraint/satisfaction_rate")) / 3, abs=1e-4)
    assert 0 < low < rate < high < 1
    assert f"{100 * rate:.1f}% [{100 * low:.1f}, {100 * high:.1f}] of 12 rollouts" in card.text


def test_it_says_that_nothing_was_measured(tmp_path):
    trainer = make_trainer(tmp_path, teacher_model=make_teacher())
    card = card_of(trainer)
    assert "It has not been measured yet." in card.text
    assert card.data.eval_results is None


def test_the_last_evaluation_comes_first(tmp_path):
    trainer = run(
        tmp_path,
        teacher_model=make_teacher(),
        eval_dataset=make_dataset(1),
        per_device_eval_batch_size=4,
        cost_limit=1.75,
    )
    metrics = trainer.evaluate()
    first, second = card_of(trainer).data.eval_results
    assert first.metric_name == "Satisfaction, evaluation at step 2"
    assert first.metric_value == pytest.approx(metrics["eval_constraint/satisfaction_rate"], abs=1e-4)
    assert first.metric_args["rollouts"] == 16
    assert second.dataset_split == "train"


@pytest.mark.parametrize(
    ("trainer_class", "title"), [(GKDDistillTrainer, "On-Policy Distillation"), (LagrangianDistillTrainer, "PID Lag")]
)
def test_a_sibling_cites_its_own_paper_too(tmp_path, trainer_class, title):
    trainer = make_trainer(tmp_path, trainer_class, teacher_model=make_teacher())
    text = card_of(trainer).text
    assert trainer._paper["citation"] in text
    assert title in text
    assert "arXiv:2509.22921" in text


def test_the_licence_is_that_of_the_students_base_or_the_one_given(tmp_path):
    """And none where neither is known: the placeholder of TRL's card is none."""
    student = save_model(tmp_path / "student", make_model())
    data = card_of(make_trainer(tmp_path / "unknown", model=student)).data.to_dict()
    assert not {"license", "licence"} & set(data)
    (tmp_path / "licensed").mkdir()
    for file in (tmp_path / "student").iterdir():
        (tmp_path / "licensed" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "licensed" / "README.md").write_text("---\nlicense: other\nlicense_name: its-own\n---\n# A student\n")
    data = card_of(make_trainer(tmp_path / "base", model=str(tmp_path / "licensed"))).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "its-own")
    data = card_of(make_trainer(tmp_path / "given", model=student, hub_license="mit")).data.to_dict()
    assert data["license"] == "mit"


def test_without_a_teacher_it_is_grpo(tmp_path):
    text = card_of(make_trainer(tmp_path)).text
    assert "plain GRPO" in text
    assert "Satisfaction" not in text


def test_a_teacher_s_folder_and_the_dataset_s_path_stay_private(tmp_path):
    teacher = save_model(tmp_path / "private" / "my-teacher", make_teacher())
    (tmp_path / "private" / "data.jsonl").write_text("{}")
    trainer = make_trainer(tmp_path / "out", teacher_model=teacher)
    trainer.command = []
    card = card_of(trainer, dataset_name=str(tmp_path / "private" / "data.jsonl"))
    assert "`my-teacher` (a local folder)" in card.text
    assert "private" not in card.content
    assert "command" not in card.text


def test_an_evaluation_fills_a_table_and_the_metadata(tmp_path):
    trainer = make_trainer(tmp_path, teacher_model=make_teacher())
    rollouts = [make_rollout(index // 2, index % 2, [0.1 * index], right=index < 3) for index in range(4)]
    evaluation = summarize(make_settings(), [*rollouts, make_rollout(0, 0, [0.0], greedy=True)])
    card = card_of(trainer, evaluation=evaluation)
    values = {}
    for decoding, measured in (("sampled", evaluation.sampled), ("greedy", evaluation.greedy)):
        figures = {"final_answer_accuracy": measured.right, "constraint_satisfaction": measured.costs.satisfaction}
        shown = [f"{100 * of.value:.1f}% [{100 * of.low:.1f}, {100 * of.high:.1f}]" for of in figures.values()]
        counts = f"{measured.right.num_rollouts} | {measured.right.num_problems}"
        assert f"| {decoding} | {counts} | {' | '.join(shown)} | {measured.costs.mean.value:.3f}" in card.text
        values |= {(name, decoding): pytest.approx(of.value, abs=1e-4) for name, of in figures.items()}
    assert f"{100 * evaluation.sampled.costs.violation_bound:.1f}%" in card.text
    results = card.data.eval_results
    assert {(result.metric_type, result.metric_args["decoding"]): result.metric_value for result in results} == values
    assert {result.dataset_type for result in results} == {"arithmetic"}
    without_costs = summarize(make_settings(teacher=None), [make_rollout()])
    assert "| – |" in card_of(trainer, evaluation=without_costs).text


def test_counts_are_of_the_last_logged_steps_and_by_prompt():
    counts = SatisfactionCounts()
    feasible, judged = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])
    for step in range(1, LOGGED_STEPS + 3):
        counts.add("train", feasible if step > 2 else torch.zeros(4, dtype=torch.bool), judged, 2)
        counts.close("train", step)
    counts.close("train", 99)  # a log without rollouts
    measured = counts.measured("train")
    assert (measured.rollouts, measured.groups) == (3 * LOGGED_STEPS, 2 * LOGGED_STEPS)
    assert (measured.first_step, measured.last_step, measured.logged_steps) == (3, LOGGED_STEPS + 2, LOGGED_STEPS)
    assert measured.rate == pytest.approx(2 / 3)
    expected = clustered_rate_interval(torch.tensor([1, 1] * LOGGED_STEPS), torch.tensor([2, 1] * LOGGED_STEPS))
    assert (measured.low, measured.high) == pytest.approx(expected)
    assert counts.measured("eval") is None


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--name", "b c"], "--name 'b c'"),
        (["--hub_token", "abc"], "--hub_token ***"),
        (["--hub-token=abc"], "--hub-token=***"),
        (["--teacher_model_server_api_key", "abc"], "--teacher_model_server_api_key ***"),
        (["--run_name", "x-hf_0123456789abc"], "--run_name x-***"),
        (["--url", "http://me:abc@host:8000/v1"], "--url http://***@host:8000/v1"),
        (["--url", "https://host/x?sig=abc&y=1"], "--url https://host/x?***"),
        (["--model_init_kwargs", '{"token": "abc"}'], '--model_init_kwargs \'{"token": "***"}\''),
        (["--note", "my own-secret!"], "--note 'my ***'"),
        (["--eos_token", "<|im_end|>", "--max_tokens", "3"], "--eos_token '<|im_end|>' --max_tokens 3"),
        (["--revision", "a" * 40], f"--revision {'a' * 40}"),
    ],
)
def test_secrets_are_hidden_in_the_command(arguments, shown):
    assert shell_command(["/usr/bin/trl-cmdp", *arguments], ["own-secret!", None]) == f"trl-cmdp {shown}"
    assert shell_command(["/home/me/train.py", *arguments], ["own-secret!"]) == f"python train.py {shown}"


def test_an_error_is_described_with_its_causes_and_without_signatures():
    try:
        try:
            raise OSError("500 Server Error for url https://host/x?X-Amz-Signature=abc")
        except OSError as error:
            raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
    except RuntimeError as error:
        text = describe_error(error)
    assert "model.safetensors" in text
    assert "500 Server Error" in text
    assert "abc" not in text
    assert hide_secrets("nothing to hide") == "nothing to hide"
