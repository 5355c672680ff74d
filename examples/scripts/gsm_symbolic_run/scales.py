"""What a run is made of."""

from dataclasses import dataclass, replace

from trl_cmdp import (
    ConstrainedDistillConfig,
    ConstrainedDistillTrainer,
    GKDDistillConfig,
    GKDDistillTrainer,
    LagrangianDistillConfig,
    LagrangianDistillTrainer,
)


@dataclass(frozen=True)
class Scale:
    """
    What a run is made of.

    Args:
        methods (`tuple[str, ...]`):
            Methods that are compared, of `METHODS`.
        max_steps, max_number (`int`, *optional*):
            Problems of at most so many steps, and with no number above this; `None` takes all.
        random_base (`bool`):
            Start from a tiny random model with a tokenizer of its own instead of SmolLM2.
        teacher_problems (`int`):
            Worked solutions that the teacher is trained on.
        teacher_lora (`bool`):
            Train the teacher by LoRA instead of all its weights.
        teacher_learning_rate (`float`):
            Learning rate of the teacher.
        solutions_batch_size (`int`):
            Worked solutions of an optimizer step.
        student_layers (`int`):
            Layers of the student; SmolLM2 has 30.
        healing_problems (`int`):
            Worked solutions that the student is healed on before it is measured, and again until it is in range.
        tuning_problems (`int`):
            Problems that it is measured on, which nothing else is. With 0 it is healed once, and not measured.
        steps (`int`):
            Optimizer steps of each method.
        prompts_per_step (`int`):
            Prompts of each step.
        num_generations (`int`):
            Rollouts of each prompt.
        micro_batch (`int`):
            Rollouts of one forward and backward.
        max_completion_length (`int`):
            Longest completion, in tokens.
        learning_rate (`float`):
            Learning rate of each method.
        evaluation_batch_size (`int`):
            Rollouts generated at a time in the evaluation.
        validation_problems, test_problems (`int`):
            Problems of the evaluation: new ones of the train templates, and of held-out templates.
        num_samples (`int`):
            Sampled rollouts of each.
    """

    methods: tuple[str, ...]
    max_steps: int | None
    max_number: int | None
    random_base: bool
    teacher_problems: int
    teacher_lora: bool
    teacher_learning_rate: float
    solutions_batch_size: int
    student_layers: int
    healing_problems: int
    tuning_problems: int
    steps: int
    prompts_per_step: int
    num_generations: int
    micro_batch: int
    max_completion_length: int
    learning_rate: float
    evaluation_batch_size: int
    validation_problems: int
    test_problems: int
    num_samples: int


COST_LIMIT = 0.25  # nats per token
# The coefficients are those that were chosen on the embedded tasks (docs/comparison.md): nothing is tuned on this one.
METHODS = {
    "grpo": (ConstrainedDistillTrainer, ConstrainedDistillConfig, {}),  # without a teacher
    "gkd": (GKDDistillTrainer, GKDDistillConfig, {}),
    "lambda": (LagrangianDistillTrainer, LagrangianDistillConfig, {"multiplier_init": 0.1}),
    "dual": (LagrangianDistillTrainer, LagrangianDistillConfig, {"multiplier": "dual", "multiplier_lr": 0.01}),
    "pid": (
        LagrangianDistillTrainer,
        LagrangianDistillConfig,
        {"multiplier": "pid", "pid_kp": 0.5, "pid_ki": 0.1, "pid_kd": 0.1},
    ),
    "constrained": (ConstrainedDistillTrainer, ConstrainedDistillConfig, {}),
    "unrewarded-0": (ConstrainedDistillTrainer, ConstrainedDistillConfig, {"unrewarded_distill_coef": 0.0}),
}
_CPU_SMOKE = Scale(
    methods=("grpo", "gkd", "lambda", "constrained"),
    max_steps=2,
    max_number=50,
    random_base=False,
    teacher_problems=32,
    teacher_lora=True,
    teacher_learning_rate=2e-3,
    solutions_batch_size=8,
    student_layers=12,
    healing_problems=32,
    tuning_problems=0,
    steps=2,
    prompts_per_step=2,
    num_generations=4,
    micro_batch=8,
    max_completion_length=64,
    learning_rate=5e-5,
    evaluation_batch_size=16,
    validation_problems=16,
    test_problems=8,
    num_samples=1,
)
_CPU = replace(
    _CPU_SMOKE,
    teacher_problems=2400,
    student_layers=20,
    healing_problems=600,
    steps=32,
    prompts_per_step=4,
    micro_batch=16,
    max_completion_length=80,
    evaluation_batch_size=32,
    validation_problems=96,
    test_problems=48,
)
_GPU = replace(
    _CPU,
    methods=tuple(METHODS),
    teacher_problems=14_000,
    teacher_lora=False,
    teacher_learning_rate=5e-4,
    solutions_batch_size=32,
    student_layers=14,
    healing_problems=2560,
    tuning_problems=300,
    steps=40,
    prompts_per_step=32,
    num_generations=8,
    micro_batch=64,
    evaluation_batch_size=300,
    validation_problems=300,
    test_problems=150,
    num_samples=2,
)
# As `gpu`, and small enough for a test: random models that learn nothing.
_TINY = replace(
    _GPU,
    random_base=True,
    teacher_problems=16,
    solutions_batch_size=8,
    student_layers=2,
    healing_problems=8,
    tuning_problems=2,
    steps=2,
    prompts_per_step=2,
    num_generations=2,
    micro_batch=2,
    max_completion_length=6,
    evaluation_batch_size=4,
    validation_problems=2,
    test_problems=2,
)
SCALES = {"tiny": _TINY, "cpu-smoke": _CPU_SMOKE, "cpu": _CPU, "gpu": _GPU}
