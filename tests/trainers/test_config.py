"""Fields of every config: read from the command line and from YAML, and refused where a value makes no sense."""

import math
from dataclasses import fields

import pytest
from helpers import make_args
from transformers import HfArgumentParser
from trl import TrlParser

from trl_cmdp import ConstrainedDistillConfig, GKDDistillConfig, LagrangianDistillConfig, MiniLLMDistillConfig


# What a field is given as on the command line and in YAML, and what it is then.
FIELDS = [
    ("cost_limit", "0.25", "0.25", 0.25),
    ("cost_limit", "1e-2", "1e-2", 0.01),
    ("cost_limit", "auto", "auto", "auto"),
    ("cost_limit", '{"near": 0.2, "far": 1}', "{near: 0.2, far: 1}", {"near": 0.2, "far": 1.0}),
    ("cost_scope", "worst_prefix", "worst_prefix", "worst_prefix"),
    ("credit_assignment", "token", "token", "token"),
    ("teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "{dtype: bfloat16}", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("field", "on_command_line", "in_yaml", "value"), FIELDS)
def test_command_line_and_yaml(tmp_path, field, on_command_line, in_yaml, value):
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", f"--{field}", on_command_line]
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\n{field}: {in_yaml}\nuse_cpu: true\nbf16: false\n")
    parser = TrlParser(ConstrainedDistillConfig)
    for (config,) in (
        HfArgumentParser(ConstrainedDistillConfig).parse_args_into_dataclasses(arguments),
        parser.parse_args_and_config(arguments),
        parser.parse_args_and_config(["--config", str(path)]),
    ):
        assert getattr(config, field) == value
        assert type(getattr(config, field)) is type(value)


ONE_OF = "must be one of"
LIMIT_KINDS = "must be a number, 'auto', or a number for each teacher, got"
REFUSED = {
    ConstrainedDistillConfig: [
        ({"cost_limit": 0.0}, "`cost_limit` must be positive, got 0: .* use `GKDDistillTrainer`"),
        ({"cost_limit": "-1"}, "`cost_limit` must be positive"),
        ({"cost_limit": math.nan}, "`cost_limit`"),
        ({"cost_limit": "none"}, f"{LIMIT_KINDS} 'none'"),
        ({"cost_limit": None}, f"{LIMIT_KINDS} None"),
        ({"cost_limit": {"near": 1.0, "far": 0.0}}, "`cost_limit` must be"),
        ({"cost_limit": {"near": "auto", "far": 1.0}}, "`cost_limit` must be"),
        ({"cost_limit": {}}, "`cost_limit` must be"),
        ({"cost": "kl"}, f"`cost` {ONE_OF}"),
        ({"cost_scope": "median"}, f"`cost_scope` {ONE_OF}"),
        ({"credit_assignment": "rollout"}, f"`credit_assignment` {ONE_OF}"),
        ({"constraint_aggregation": "normalize_then_sum"}, f"`constraint_aggregation` {ONE_OF}"),
        ({"violation_penalty": 0.0}, "`violation_penalty`"),
        ({"violation_distill_coef": -0.5}, "`violation_distill_coef`"),
        ({"violation_distill_loss": "kl"}, f"`violation_distill_loss` {ONE_OF}"),
        ({"teacher_beta": 1.5}, "`teacher_beta`"),
        ({"teacher_prob_floor": 1.0}, "`teacher_prob_floor`"),
        ({"divergence_memory_mb": 0}, "`divergence_memory_mb`"),
        ({"auto_limit_steps": 0}, "`auto_limit_steps` must be positive"),
        ({"auto_limit_quantile": 0.0}, r"must lie in \(0, 1\]"),
        ({"cost_limit_start": 1.0}, "belongs to a schedule"),
        ({"cost_limit_schedule": "linear", "cost_limit_schedule_steps": 2.5}, "a whole number of steps, or a share"),
        ({"cost_limit_schedule": "linear", "cost_limit_schedule_steps": 0}, "`cost_limit_schedule_steps` must be"),
        ({"cost_limit_schedule": "linear", "cost_limit_start": 0.0}, "`cost_limit_start` must be positive"),
        ({"cost_limit_schedule": "step"}, f"`cost_limit_schedule` {ONE_OF}"),
    ],
    LagrangianDistillConfig: [
        ({"multiplier": "adam"}, "must be one of 'fixed', 'dual', 'pid'"),
        ({"cost_limit": 0.0}, "`cost_limit` must be positive, got 0: .* use `GKDDistillTrainer`"),
        ({"multiplier_init": -1.0}, "must not be negative"),
        ({"multiplier_init": 11.0}, "above `multiplier_max`"),
        ({"pid_cost_ema": 1.0}, r"must lie in \[0, 1\)"),
    ],
    GKDDistillConfig: [
        ({"lmbda": 1.5}, r"`lmbda` must lie in \[0, 1\]"),
        ({"cost_limit": 0.0}, "`cost_limit` must be positive"),
        ({"cost_scope": "max"}, f"`cost_scope` {ONE_OF}"),
        ({"tolerated_violation_rate": -0.1}, "tolerated_violation_rate"),
        ({"tolerated_violation_rate": 1.0}, "tolerated_violation_rate"),
        ({"tolerated_violation_rate": math.nan}, "tolerated_violation_rate"),
        ({"lmbda": 0.5, "use_vllm": True}, "vllm_importance_sampling_correction=False"),
        (
            {"lmbda": 0.5, "seq_kd": True, "use_vllm": True, "vllm_importance_sampling_correction": False},
            "`use_vllm=False`",
        ),
    ],
    MiniLLMDistillConfig: [
        ({"teacher_mixed_alpha": 1.0}, r"`teacher_mixed_alpha` must lie in \[0, 1\)"),
        ({"teacher_beta": 0.5}, "`teacher_beta` must be 1"),
        ({"use_vllm": True}, "`teacher_mixed_alpha=0`"),
    ],
}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [(config, *case) for config, cases in REFUSED.items() for case in cases],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_refused(tmp_path, config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, config, **fields)


@pytest.mark.parametrize(
    ("given", "dtype"), [({}, "float32"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16")]
)
def test_without_a_gpu_the_cpu_is_taken_and_said(tmp_path, monkeypatch, caplog, given, dtype):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    config = ConstrainedDistillConfig(str(tmp_path), **given)
    assert config.use_cpu
    assert config.bf16 == (dtype == "bfloat16")
    assert caplog.messages == [f"No GPU was found: this run uses the CPU, in {dtype}."]
    caplog.clear()
    assert ConstrainedDistillConfig(str(tmp_path), use_cpu=True).bf16  # as TRL's, and nothing is said
    assert not caplog.messages


CONFIGS = list(REFUSED)
NUMBERS = [
    (config, own.name)
    for config in CONFIGS
    for own in fields(config)
    if "float" in str(own.type) and (config is CONFIGS[0] or own.name in config.__annotations__)
]
BOUNDS = {"max_grad_norm", "delta", "epsilon_high", "off_policy_mask_threshold"}
BOUNDS |= {"vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"}  # infinity makes them none


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_no_number_is_nan_or_infinite(tmp_path, config, name):
    """Every field that holds a float, TRL's too, and those within lists and dictionaries."""
    values = [math.nan, math.inf, -math.inf]
    if name in BOUNDS:
        values = [math.nan]
    elif name == "reward_weights":
        values = [[1.0, value] for value in values]
    elif name == "cost_limit":
        values += ["nan", "inf", {"near": 1.0, "far": math.inf}][: None if config is CONFIGS[0] else 0]
    name_of_now = name.replace("sampling_cap", "sampling_clip_max")  # TRL's
    for value in values:
        with pytest.raises((ValueError, OverflowError), match=rf"{name_of_now}|cannot convert float"):
            make_args(tmp_path, config, **{name: value})


def test_a_bound_may_be_infinite(tmp_path):
    assert make_args(tmp_path, max_grad_norm=math.inf).max_grad_norm == math.inf
