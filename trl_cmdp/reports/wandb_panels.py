"""A workspace of Weights & Biases with the panels that matter here. Needs the package `wandb-workspaces`."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

# Section: title, axis and metrics of each of its panels.
PANELS: dict[str, list[tuple[str, str, list[str]]]] = {
    "Constraint": [
        ("Task reward", "mean reward of a rollout", ["reward"]),
        ("Cost against its limit", "nats", ["constraint/cost", "constraint/limit", "constraint/scheduled_limit"]),
        ("Satisfaction", "share of rollouts within the limit", ["constraint/satisfaction_rate"]),
        ("Largest cost", "nats", ["constraint/cost_max", "constraint/limit"]),
        ("Tokens of infeasible steps", "share of tokens", ["constraint/violated_token_frac"]),
        ("Divergence from the teacher", "nats per token", ["teacher/divergence"]),
        ("Distillation loss", "loss", ["distill_loss"]),
        ("Teacher asked beside the reward", "mean weight of a token", ["constraint/unrewarded_weight"]),
        ("Multiplier", "λ", ["lagrange_multiplier"]),
    ],
    "Evaluation": [
        ("Task reward", "mean reward of a rollout", ["eval_reward"]),
        ("Cost against its limit", "nats", ["eval_constraint/cost", "eval_constraint/limit"]),
        ("Satisfaction", "share of rollouts within the limit", ["eval_constraint/satisfaction_rate"]),
    ],
    "Training": [
        ("Loss", "loss", ["loss"]),
        ("Entropy", "nats per token", ["entropy"]),
        ("Completion length", "tokens", ["completions/mean_length"]),
        ("Groups without a signal", "share of groups", ["frac_reward_zero_std"]),
    ],
}


def wandb_workspace(entity: str, project: str) -> "Workspace":
    """
    Lay the panels out for a project. `.save()` on what is returned puts it there, as a view beside those of others.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError('The panels are made by wandb-workspaces: pip install "trl-cmdp[tracking]"') from error

    sections = []
    for name, lines in PANELS.items():
        plots = [
            panels.LinePlot(
                title=title, title_y=axis, x="train/global_step", y=[_logged_as(metric) for metric in metrics]
            )
            for title, axis, metrics in lines
        ]
        if name == "Constraint":
            plots.append(panels.WeavePanelSummaryTable(table_name="completions_by_cost"))
        sections.append(workspaces.Section(name=name, panels=plots, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name="trl-cmdp", sections=sections)


def _logged_as(metric: str) -> str:
    """Name that transformers gives a metric in Weights & Biases."""
    return f"eval/{metric.removeprefix('eval_')}" if metric.startswith("eval_") else f"train/{metric}"
