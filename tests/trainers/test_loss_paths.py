"""The paths through scoring and loss: forwards and memory they take, and every setting of TRL's that they meet."""

import math

import pytest
import torch
from helpers import (
    EOS,
    capture_rollouts,
    dense_costs,
    history,
    loss_and_gradients,
    make_model,
    make_rows,
    make_teacher,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    run,
    scripted,
    weights,
)
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trl_cmdp.core._fused


LIMIT = 2.4  # about half of the scripted rollouts violate it
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def build(tmp_path, completions=None, *, teacher=None, model=None, env_mask=None, trainer_kwargs=None, **kwargs):
    return make_trainer(
        tmp_path,
        model=make_model(spread=0.4) if model is None else model,
        trainer_kwargs={
            "teacher_model": make_teacher() if teacher is None else teacher,
            "rollout_func": scripted(random_completions(8) if completions is None else completions, env_mask),
            **(trainer_kwargs or {}),
        },
        **{"cost_limit": LIMIT, "gradient_accumulation_steps": 2, **kwargs},
    )


def base_student(trainer):
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


class Forwards:
    """Counts the forward passes of a model's backbone."""

    def __init__(self, model):
        self.count = 0
        model.base_model.register_forward_hook(self._seen)

    def _seen(self, *_):
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


class TestTeacherStates:
    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_reused_or_recomputed(self, tmp_path, credit_assignment):
        """Kept (also in host memory) while they fit the bound, recomputed otherwise: the same loss and gradients."""
        results = []
        for memory_mb, offload in ((256, False), (256, True), (1e-6, False)):
            trainer = build(
                tmp_path,
                teacher_hidden_memory_mb=memory_mb,
                teacher_hidden_offload=offload,
                credit_assignment=credit_assignment,
            )
            batches = micro_batches(trainer, make_rows(8))
            assert all(("teacher_hidden" in batch) == (memory_mb == 256) for batch in batches)
            results.append(loss_and_gradients(trainer, batches))
        for loss, gradients in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-6)
            assert relative_error(gradients, results[0][1]) < 1e-6

    def test_kept_in_the_teachers_dtype(self, tmp_path):
        trainer = build(tmp_path, teacher=make_teacher(dtype=torch.bfloat16), cost_limit=1e-9)
        for batch in micro_batches(trainer, make_rows(8)):
            assert {hidden.dtype for hidden in batch["teacher_hidden"]} == {torch.bfloat16}

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize(("memory_mb", "teacher_forwards"), [(256, 0), (1e-6, 1)])
    def test_number_of_forwards(self, tmp_path, memory_mb, teacher_forwards, lora):
        """Per micro-step: one student forward, and at most one teacher forward; scoring is one of each per batch."""
        teacher = make_teacher()
        trainer_kwargs = {"peft_config": LoraConfig(**LORA)} if lora else {}
        trainer = build(tmp_path, teacher=teacher, teacher_hidden_memory_mb=memory_mb, trainer_kwargs=trainer_kwargs)
        student_calls, teacher_calls = Forwards(base_student(trainer)), Forwards(teacher)
        batches = micro_batches(trainer, make_rows(8))
        assert (student_calls.since(), teacher_calls.since()) == (2, 2)  # rollouts are scripted: this is scoring alone
        for batch in batches:
            assert "divergence_weights" in batch
            trainer.compute_loss(trainer.model, batch).backward()
            assert (student_calls.since(), teacher_calls.since()) == (1, teacher_forwards)

    def test_no_divergence_pass_without_violation(self, tmp_path):
        """A batch whose rollouts all keep the limit costs what GRPO costs."""
        teacher = make_teacher()
        trainer = build(tmp_path, teacher=teacher, cost_limit=1e3, teacher_hidden_memory_mb=1e-6)
        batches = micro_batches(trainer, make_rows(8))
        teacher_calls = Forwards(teacher)
        loss_and_gradients(trainer, batches)
        assert teacher_calls.since() == 0

    def test_teacher_is_frozen_and_in_eval_mode(self, tmp_path):
        teacher = make_teacher().train()
        before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
        trainer = run(tmp_path, trainer_kwargs={"teacher_model": teacher}, cost_limit=0.01)
        assert not trainer.teacher_model.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


class LargestVocabularyTensor(TorchDispatchMode):
    """Largest number of rows of any tensor with a dimension as long as the vocabulary."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self.vocab_size in tensor.shape:
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return output


class TestMemory:
    VOCAB = 4096

    def test_no_tensor_of_batch_times_vocabulary(self, tmp_path):
        """In scoring, loss and backward no tensor holds the logits of all tokens: tiles of the stated bound."""
        completions = random_completions(8, longest=32)
        tokens = sum(len(ids) for ids in completions)
        trainer = build(
            tmp_path,
            completions,
            model=make_model(vocab_size=self.VOCAB, hidden_size=4),
            teacher=make_teacher(vocab_size=self.VOCAB, hidden_size=4),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_completion_length=32,
            divergence_memory_mb=0.25,
            cost_limit=1e-9,
        )
        bound = int(0.25 * 2**20 // (2 * self.VOCAB * 4))  # rows of a tile: both models' in float32 share the memory
        assert tokens > 10 * bound
        rows = make_rows(8)
        with LargestVocabularyTensor(self.VOCAB) as largest:
            (batch,) = micro_batches(trainer, rows)
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
        assert "divergence_weights" in batch
        # The heads themselves, (V, hidden) with hidden 4 here, are below the tile.
        assert 0 < largest.rows <= bound

    def test_the_probe_sees_logits(self):
        """The measurement above finds what it looks for."""
        model = make_model(vocab_size=self.VOCAB)
        with LargestVocabularyTensor(self.VOCAB) as largest:
            model(input_ids=torch.full((2, 9), 3))
        assert largest.rows == 18


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]


class TestOneProjection:
    """TRL's log-probabilities and entropy from the divergence's own projection of the student."""

    @pytest.mark.parametrize(
        "settings",
        [
            *({"loss_type": loss_type} for loss_type in LOSS_TYPES),
            {"credit_assignment": "token", "temperature": 0.7},
            {"entropy_coef": 0.1, "teacher_beta": 0.5},
            {"top_entropy_quantile": 0.5, "teacher_beta": 0.0},
            {"importance_sampling_level": "sequence", "violation_distill_loss": "teacher_nll"},
            {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_same_loss_and_gradients_as_apart(self, tmp_path, settings, lora):
        """As with TRL's head and the divergence beside it, with an expectation of the policy gradient or without."""
        results = []
        for fused, expecting in ((False, False), (True, True), (True, False)):
            trainer_kwargs = {"peft_config": LoraConfig(**LORA)} if lora else {}
            trainer = build(tmp_path, trainer_kwargs=trainer_kwargs, **{"beta": 0.1 if lora else 0.0, **settings})
            trainer._student_forward._fused = fused
            batches = micro_batches(trainer, make_rows(8))
            if not expecting:
                trainer._expected_log_prob_grad = lambda inputs, mask, token_weight: None
            results.append(loss_and_gradients(trainer, batches))
        for loss, gradients in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
            assert relative_error(gradients, results[0][1]) < 2e-5

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_the_policy_gradient_is_foreseen_on_policy(self, tmp_path, monkeypatch, loss_type, credit_assignment):
        """No position is projected a second time, whatever the loss; with an entropy bonus, which adds to it, they are."""
        corrected = []
        correct = trl_cmdp.core._fused._policy_gradient

        def count(head, workspace, hidden, *args):
            corrected.append(len(hidden))
            return correct(head, workspace, hidden, *args)

        monkeypatch.setattr(trl_cmdp.core._fused, "_policy_gradient", count)
        for entropy_coef, expected in ((0.0, False), (0.1, True)):
            trainer = build(
                tmp_path, loss_type=loss_type, credit_assignment=credit_assignment, entropy_coef=entropy_coef
            )
            batches = micro_batches(trainer, make_rows(8))
            assert all(batch["divergence_weights"].any() for batch in batches)
            loss_and_gradients(trainer, batches)
            assert bool(corrected) == expected


class TestPrecision:
    def test_bf16_scores_as_the_loss_does(self, tmp_path, monkeypatch):
        """Under autocast, the costs that judge a rollout equal the costs in the loss's forward, before any step."""
        trainer = build(tmp_path, bf16=True, cost_limit=1e-9, shuffle_dataset=False)
        captured = capture_rollouts(trainer, monkeypatch)
        requests = []
        forward = trainer._student_forward
        differentiate = forward._differentiate_fused
        monkeypatch.setattr(
            forward,
            "_differentiate_fused",
            lambda request, **kwargs: requests.append(request) or differentiate(request, **kwargs),
        )
        batches = micro_batches(trainer, make_rows(8))
        loss, gradients = loss_and_gradients(trainer, batches)
        assert math.isfinite(loss)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        in_loss = torch.cat([request.scores["costs"][request.weights != 0] for request in requests])
        scored = captured[0].costs[captured[0].mask]
        torch.testing.assert_close(in_loss.sort().values, scored.sort().values, rtol=1e-5, atol=1e-6)

        exact = build(tmp_path / "float32", cost_limit=1e-9)
        captured = capture_rollouts(exact, monkeypatch)
        micro_batches(exact, make_rows(8))
        reference = captured[0].costs[captured[0].mask]
        assert not torch.equal(scored, reference)  # autocast was on
        torch.testing.assert_close(scored, reference, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("bf16", [True, False])
    def test_half_precision_weights(self, tmp_path, bf16):
        """A bf16 teacher (its own dtype) with a float32 student, and a bf16 student, train with finite losses."""
        for model, teacher in (
            (make_model(), make_teacher(dtype=torch.bfloat16)),
            (make_model(dtype=torch.bfloat16), make_teacher(dtype=torch.bfloat16)),
        ):
            trainer = run(tmp_path, model=model, trainer_kwargs={"teacher_model": teacher}, bf16=bf16, cost_limit=0.01)
            assert next(teacher.parameters()).dtype == torch.bfloat16
            assert all(math.isfinite(loss) and loss != 0 for loss in history(trainer, "distill_loss"))
            assert all(math.isfinite(norm) and norm > 0 for norm in history(trainer, "grad_norm"))

    def test_gradient_checkpointing(self, tmp_path):
        """Recomputed activations give the same gradients."""
        results = []
        for checkpointing in (False, True):
            trainer = build(tmp_path, gradient_checkpointing=checkpointing)
            results.append(loss_and_gradients(trainer, micro_batches(trainer, make_rows(8)))[1])
        assert relative_error(results[1], results[0]) < 1e-5


class TestLora:
    def test_only_the_adapter_learns(self, tmp_path):
        before = dict(make_model().named_parameters())
        trainer = run(
            tmp_path,
            trainer_kwargs={"teacher_model": make_teacher(), "peft_config": LoraConfig(**LORA)},
            cost_limit=0.01,
            learning_rate=0.1,
        )
        base = base_student(trainer)
        assert all(norm > 0 for norm in history(trainer, "grad_norm"))
        assert torch.equal(base.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
        assert torch.equal(base.lm_head.weight, before["lm_head.weight"])
        adapters = {name: value for name, value in weights(trainer).items() if "lora_B" in name}
        assert adapters
        assert all(value.abs().sum() > 0 for value in adapters.values())

    def test_gradient_is_the_dense_one(self, tmp_path, monkeypatch):
        """Through the adapter, the divergence's gradient is autograd's of the dense divergence."""
        teacher = make_teacher()
        trainer = build(
            tmp_path,
            teacher=teacher,
            cost_limit=1e-9,
            trainer_kwargs={"peft_config": LoraConfig(**LORA, lora_dropout=0.0)},
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        batches = micro_batches(trainer, make_rows(8))
        for batch in batches:
            batch["advantages"] = torch.zeros_like(batch["advantages"])
        _, gradients = loss_and_gradients(trainer, batches)
        batch = trainer._generate_and_score_completions(make_rows(8))
        costs = dense_costs(trainer.model, teacher, batch) * batch["completion_mask"]
        (costs.sum() / batch["completion_mask"].sum()).backward()
        reference = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert reference.keys() == gradients.keys()
        assert relative_error(gradients, reference) < 1e-5


class TestMasks:
    COMPLETIONS = ([2, 3, 4, 5, 6, EOS], [7, 8, 9, EOS], [2, 4, EOS], [5, 5, 5, 5, 5, 5])
    ENV_MASK = ([1, 1, 0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1], [1, 0, 1, 0, 1, 0])

    @pytest.mark.parametrize("memory_mb", [256, 1e-6])
    def test_tool_mask(self, tmp_path, monkeypatch, memory_mb):
        """Tokens that a tool wrote cost nothing and are imitated by nobody."""
        teacher, model = make_teacher(), make_model(spread=0.4)
        trainer = build(
            tmp_path,
            self.COMPLETIONS,
            env_mask=self.ENV_MASK,
            teacher=teacher,
            model=model,
            cost_limit=1e-9,
            gradient_accumulation_steps=1,
            divergence_memory_mb=memory_mb,
        )
        captured = capture_rollouts(trainer, monkeypatch)
        rows = make_rows(4)
        batch = trainer._generate_and_score_completions(rows)
        mask = torch.zeros(4, 6, dtype=torch.long)
        for row, tokens in enumerate(self.ENV_MASK):
            mask[row, : len(tokens)] = torch.tensor(tokens)
        assert torch.equal(captured[0].mask.long(), mask)
        expected = dense_costs(model, teacher, batch).detach() * mask
        torch.testing.assert_close(captured[0].costs.double(), expected, rtol=1e-4, atol=1e-6)
        cost = torch.tensor(trainer._logs["extra"]["cost"], dtype=torch.float64)
        torch.testing.assert_close(cost, expected.sum(1) / mask.sum(1), rtol=1e-4, atol=1e-6)

        batches = micro_batches(trainer, rows)
        batches[0]["advantages"] = torch.zeros(4)
        _, gradients = loss_and_gradients(trainer, batches)
        ((dense_costs(model, teacher, batch) * mask).sum() / mask.sum()).backward()
        assert relative_error(gradients, {name: p.grad for name, p in model.named_parameters()}) < 1e-5

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("aggregation", ["lexicographic", "sum_then_normalize"])
    def test_truncated_completions(self, tmp_path, monkeypatch, credit_assignment, aggregation):
        """A truncated completion that TRL masks would cost 0 and look feasible: it is left out and counted."""
        trainer = build(
            tmp_path,
            self.COMPLETIONS,
            mask_truncated_completions=True,
            gradient_accumulation_steps=1,
            cost_limit=1e3,
            credit_assignment=credit_assignment,
            constraint_aggregation=aggregation,
            reward_funcs=lambda completions, **kwargs: [3.0, 1.0, 2.0, 9.0],
        )
        batch = trainer._generate_and_score_completions(make_rows(4))
        assert trainer._sums["train"]["constraint/satisfaction_rate"] == [3.0, 3.0]
        assert trainer._sums["train"]["constraint/unjudged_frac"] == [1.0, 4.0]
        advantages = batch["advantages"]
        advantages = advantages if advantages.dim() == 1 else advantages[:, 0]
        # Standardised over the three that are judged: their mean is 2 and their deviation 1. The reward 9 is not seen.
        torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, 0.0]), rtol=1e-3, atol=1e-3)


class TestRewards:
    def capture(self, tmp_path, monkeypatch, reward_funcs, **kwargs):
        trainer = build(tmp_path, reward_funcs=reward_funcs, gradient_accumulation_steps=1, cost_limit=1e3, **kwargs)
        captured = capture_rollouts(trainer, monkeypatch)
        batch = trainer._generate_and_score_completions(make_rows(4))
        return captured[0].rewards, batch["advantages"], trainer

    def test_several_weighted_functions(self, tmp_path, monkeypatch):
        """The task reward is the weighted sum; a function that returns None for a rollout adds nothing to it."""
        rewards, _, _ = self.capture(
            tmp_path,
            monkeypatch,
            [lambda **kwargs: [1.0, 2.0, 3.0, 4.0], lambda **kwargs: [1.0, None, 0.0, 1.0]],
            reward_weights=[0.5, 2.0],
        )
        assert rewards.tolist() == [2.5, 1.0, 1.5, 4.0]

    def test_none_from_every_function(self, tmp_path, monkeypatch):
        """A rollout that no function scored is unjudged: NaN, advantage 0, and no part of any mean."""
        rewards, advantages, trainer = self.capture(tmp_path, monkeypatch, lambda **kwargs: [1.0, None, 2.0, 3.0])
        assert rewards.isnan().tolist() == [False, True, False, False]
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 0.0, 1.0]), rtol=1e-3, atol=1e-3)
        assert trainer._sums["train"]["constraint/unjudged_frac"] == [1.0, 4.0]
        assert trainer._sums["train"]["constraint/satisfaction_rate"] == [3.0, 3.0]

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_none_for_every_rollout(self, tmp_path, credit_assignment):
        """No reward at all in a step is no error: nothing is learnt from it, and nothing becomes NaN."""
        trainer = run(
            tmp_path,
            reward_funcs=lambda completions, **kwargs: [None] * len(completions),
            trainer_kwargs={"teacher_model": make_teacher()},
            cost_limit=1e3,
            credit_assignment=credit_assignment,
        )
        assert history(trainer, "grad_norm") == [0.0, 0.0]
        assert history(trainer, "constraint/unjudged_frac") == [1.0, 1.0]

    def test_async_function(self, tmp_path, monkeypatch):
        async def reward(completions, **kwargs):
            return [float(index) for index in range(len(completions))]

        rewards, _, _ = self.capture(tmp_path, monkeypatch, reward)
        assert rewards.tolist() == [0.0, 1.0, 2.0, 3.0]


class TestSettings:
    """Two steps of every setting: finite, the divergence takes part, and something is learnt."""

    def check(self, tmp_path, **kwargs):
        before = dict(make_model().named_parameters())
        trainer = run(tmp_path, trainer_kwargs={"teacher_model": make_teacher()}, **{"cost_limit": 1.7, **kwargs})
        assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
        assert all(math.isfinite(norm) for norm in history(trainer, "grad_norm"))
        assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
        assert all(0 < value < math.inf for value in history(trainer, "distill_loss"))
        assert len(history(trainer, "distill_loss")) > 0
        return trainer

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
    def test_loss_types(self, tmp_path, loss_type, credit_assignment):
        self.check(tmp_path, loss_type=loss_type, credit_assignment=credit_assignment)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none", True, False])
    @pytest.mark.parametrize("aggregation", ["lexicographic", "sum_then_normalize"])
    def test_scale_rewards(self, tmp_path, scale_rewards, aggregation):
        self.check(tmp_path, scale_rewards=scale_rewards, constraint_aggregation=aggregation)

    @pytest.mark.parametrize("cost_scope", ["mean", "sum", "worst_prefix"])
    def test_scopes(self, tmp_path, cost_scope):
        self.check(tmp_path, cost_scope=cost_scope)

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_iterations": 2, "gradient_accumulation_steps": 2},
            {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
            {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            {"beta": 0.1, "trainer_kwargs": {"teacher_model": make_teacher(), "peft_config": LoraConfig(**LORA)}},
            {"importance_sampling_level": "sequence"},
            {"top_entropy_quantile": 0.5},
            {"max_grad_norm": 0.0, "teacher_beta": 0.5},
        ],
        ids=lambda settings: "-".join(key for key in settings if key != "trainer_kwargs"),
    )
    def test_batching(self, tmp_path, settings):
        settings = {"trainer_kwargs": {"teacher_model": make_teacher()}, **settings}
        trainer = run(tmp_path, cost_limit=0.1, max_steps=4, **settings)
        assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
        assert all(math.isfinite(norm) for norm in history(trainer, "grad_norm"))
        assert len(history(trainer, "distill_loss")) == 4
        assert all(value > 0 for value in history(trainer, "distill_loss"))

    def test_second_iteration_uses_the_new_student(self, tmp_path):
        """On reused rollouts the divergence in the loss is the current student's, not the one that was scored."""
        trainer = run(
            tmp_path,
            reward_funcs=None,
            trainer_kwargs={"teacher_model": make_teacher()},
            cost_limit=1e-9,
            num_iterations=3,
            max_steps=3,
            learning_rate=0.02,
            loss_type="dapo",
        )
        scored, in_loss = history(trainer, "teacher/divergence"), history(trainer, "distill_loss")
        assert len(scored) == 1  # one generation, three steps
        assert in_loss[0] == pytest.approx(scored[0], rel=1e-4)
        assert in_loss[2] < in_loss[1] < in_loss[0]
