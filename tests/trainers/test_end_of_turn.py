"""A teacher that ends a turn with another token than the student: said before training, and made one stop action."""

import copy

import pytest
import torch
from fake_server import serving
from fake_vllm import FakeServer
from helpers import (
    CHARACTERS,
    EOS,
    VOCAB,
    history,
    make_dataset,
    make_model,
    make_settings,
    make_teacher,
    make_tokenizer,
    make_trainer,
    run,
    same_weights,
    save_model,
)
from transformers import PreTrainedModel

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.evaluation import Rollout, evaluate, score_rollouts


END = CHARACTERS[-1]  # what the teacher ends with, at the last id
ENDS = (EOS, VOCAB - 1)


def teacher_with_own_end(
    template: str | None = None, declared: int | list[int] = VOCAB - 1
) -> tuple[PreTrainedModel, object]:
    """Teacher and its tokenizer, whose EOS is the student's unless the template is all that says otherwise."""
    teacher, tokenizer = make_teacher(), make_tokenizer()
    teacher.generation_config.eos_token_id = declared
    if template is None:
        tokenizer.eos_token = END
    tokenizer.chat_template = template
    return teacher, tokenizer


@torch.no_grad()
def with_swapped_rows(teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher that gives each of the two tokens the other's probability by itself."""
    teacher = copy.deepcopy(teacher)
    weight = teacher.lm_head.weight
    weight[list(ENDS)] = weight[list(reversed(ENDS))].clone()
    return teacher


class TestWarning:
    TEMPLATE = "{% for message in messages %}{{ message['content'] }}" + END + "{% endfor %}"

    @pytest.mark.parametrize(
        "kwargs",
        [{}, {"template": TEMPLATE, "declared": [EOS, VOCAB - 1]}],
        ids=["eos", "chat-template"],
    )
    def test_another_end_is_said_with_what_to_set(self, tmp_path, caplog, kwargs):
        path = save_model(tmp_path / "teacher", *teacher_with_own_end(**kwargs))
        make_trainer(tmp_path, teacher_model=path)
        assert f"teacher_eos_token={END!r}" in caplog.text
        assert "completions/clipped_ratio" in caplog.text
        caplog.clear()
        make_trainer(tmp_path, teacher_model=path, teacher_eos_token=END)
        assert "teacher_eos_token" not in caplog.text

    def test_an_instance_says_it_by_its_generation_config(self, tmp_path, caplog):
        make_trainer(tmp_path, teacher_model=teacher_with_own_end()[0])
        assert f"teacher_eos_token={END!r}" in caplog.text

    def test_a_server_says_it_by_its_checkpoint(self, tmp_path, caplog):
        teacher, tokenizer = teacher_with_own_end()
        folder = save_model(tmp_path / "teacher", teacher, tokenizer)
        with serving(FakeServer(teacher.eval(), folder)) as server:
            make_trainer(tmp_path, teacher_model_server_url=server.url)
        assert f"teacher_eos_token={END!r}" in caplog.text

    def test_none_where_the_student_stops_there_too(self, tmp_path, caplog):
        model = make_model()
        model.generation_config.eos_token_id = list(ENDS)
        make_trainer(tmp_path, model=model, teacher_model=save_model(tmp_path / "teacher", *teacher_with_own_end()))
        make_trainer(tmp_path, teacher_model=make_teacher())
        assert "teacher_eos_token" not in caplog.text

    def test_what_is_no_token(self, tmp_path):
        with pytest.raises(ValueError, match=r"teacher_eos_token='<\|im_end\|>'` is no token"):
            make_trainer(tmp_path, teacher_model=make_teacher(), teacher_eos_token="<|im_end|>")


class TestOneStop:
    """The setting is the teacher whose rows are swapped, in every method and from every teacher."""

    @pytest.mark.parametrize(
        ("trainer_class", "settings"),
        [
            (ConstrainedDistillTrainer, {"cost_limit": 0.01}),
            (ConstrainedDistillTrainer, {"cost_limit": 0.01, "cost": "teacher_nll"}),
            (LagrangianDistillTrainer, {"multiplier_init": 0.5, "teacher_beta": 0.5}),
            (GKDDistillTrainer, {"teacher_prob_floor": 0.01}),
            (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.4}),
        ],
        ids=["constrained", "teacher_nll", "lagrangian", "gkd", "minillm"],
    )
    def test_trained(self, tmp_path, trainer_class, settings):
        teacher = make_teacher()

        def train(name, model, **kwargs):
            return run(
                tmp_path / name, trainer_class, model=make_model(spread=0.4), teacher_model=model, **settings, **kwargs
            )

        ours = train("ours", teacher, teacher_eos_token=END)
        expected = train("expected", with_swapped_rows(teacher))
        assert history(ours, "constraint/cost") == history(expected, "constraint/cost")
        assert history(ours, "loss") == history(expected, "loss")
        assert same_weights(ours, expected)
        assert history(ours, "constraint/cost") != history(train("without", teacher), "constraint/cost")

    @pytest.mark.parametrize("route", ["pooling", "v1/completions"])
    def test_from_a_server(self, tmp_path, route):
        costs = []
        settings = {"cost": "log_ratio", "violation_distill_coef": 0.0} if route == "v1/completions" else {}
        for name, teacher, token in (
            ("ours", make_teacher(), END),
            ("other", with_swapped_rows(make_teacher()), None),
        ):
            folder = save_model(tmp_path / name, teacher, make_tokenizer())
            with serving(FakeServer(teacher.eval(), folder, route)) as server:
                trainer = run(
                    tmp_path,
                    model=make_model(spread=0.4),
                    teacher_model_server_url=server.url,
                    teacher_eos_token=token,
                    teacher_model_server_top_k=3 if route == "v1/completions" else 0,
                    cost_limit=1e6,
                    **settings,
                )
            costs.append([history(trainer, "constraint/cost"), history(trainer, "teacher/divergence_lower_bound")])
        assert costs[0] == costs[1]
        assert costs[0][0]

    def test_what_the_teacher_writes_ends_as_the_student_does(self, tmp_path):
        teacher = make_teacher()
        with torch.no_grad():
            teacher.lm_head.weight[VOCAB - 1] = 3 * teacher.lm_head.weight[5:9].mean(0)
        trainer = make_trainer(
            tmp_path, GKDDistillTrainer, teacher_model=teacher, teacher_eos_token=END, lmbda=0.0, seq_kd=True
        )
        stops = trainer.eos_token_ids
        completions = trainer._teacher_completions([[5, 6, 7]] * 32)
        assert any(ids[-1] == EOS for ids in completions)
        assert not any(VOCAB - 1 in ids or EOS in ids[:-1] for ids in completions)
        assert trainer.eos_token_ids == stops

    def test_evaluated(self):
        """As it was trained: `score_rollouts` by ids, `evaluate` by the setting."""
        student, teacher = make_model(spread=0.4), make_teacher()
        rollouts = [Rollout("", "", [5, 6], [7, 8, EOS]), Rollout("", "", [5, 6, 4, 3], [VOCAB - 1, 8])]
        costs = score_rollouts(rollouts, student, teacher, ends=ENDS)
        torch.testing.assert_close(costs, score_rollouts(rollouts, student, with_swapped_rows(teacher)))
        arguments = {
            "tokenizer": make_tokenizer(),
            "problems": make_dataset(1).select(range(2)),
            "reward": lambda completions, **kwargs: [0.0] * len(completions),
        }
        ours = evaluate(student, teacher=teacher, settings=make_settings(teacher_eos_token=END), **arguments)
        expected = evaluate(student, teacher=with_swapped_rows(teacher), settings=make_settings(), **arguments)
        assert [record.costs for record in ours] == [record.costs for record in expected]
        assert [record.costs for record in ours] != [
            record.costs for record in evaluate(student, teacher=teacher, settings=make_settings(), **arguments)
        ]
