"""Configuration of generalised knowledge distillation."""

from dataclasses import dataclass

from .engine.config import DistillConfig, help_from_docstring


@help_from_docstring
@dataclass(kw_only=True)
class GKDDistillConfig(DistillConfig):
    """
    Configuration of [`GKDDistillTrainer`]. Every field of [`~trl.GRPOConfig`] keeps its name, position and default; the
    fields below are keyword-only, with the names of TRL's `GKDConfig` (whose `beta` is `teacher_beta` here).

    Parameters:
        lmbda (`float`, *optional*, defaults to `1.0`):
            Probability that the rollouts of a generation batch are the student's own. The others are the dataset's
            `completion` column, or the teacher's with `seq_kd`.
        seq_kd (`bool`, *optional*, defaults to `False`):
            Whether off-policy completions are sampled from the teacher (sequence-level distillation).

    And those shared by every trainer (see [`DistillConfig`]); satisfaction is only measured against `cost_limit`. `teacher_beta` is the generalised JSD's β.
    """

    lmbda: float = 1.0
    seq_kd: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(f"`lmbda` must lie in [0, 1], got {self.lmbda}.")
        if self.lmbda < 1 and self.use_vllm and self.vllm_importance_sampling_correction:
            raise ValueError(
                "Off-policy completions (`lmbda` below 1) have no sampling log-probabilities to correct by. Set "
                "`vllm_importance_sampling_correction=False`: GKD has no policy loss that it would correct."
            )
        if self.lmbda < 1 and self.seq_kd and self.use_vllm:
            raise ValueError(
                "The teacher writes its completions (`seq_kd=True`) with transformers, which TRL does not set up beside "
                "vLLM. Set `use_vllm=False`, or have them written beforehand, as the dataset's column `completion`."
            )
