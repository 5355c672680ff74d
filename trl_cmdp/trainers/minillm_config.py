"""Configuration of MiniLLM."""

from dataclasses import dataclass

from .engine.config import DistillConfig, help_from_docstring


@help_from_docstring
@dataclass(kw_only=True)
class MiniLLMDistillConfig(DistillConfig):
    """
    Configuration of [`MiniLLMDistillTrainer`]. Every field of [`~trl.GRPOConfig`] keeps its name, position and default;
    the fields below are keyword-only.

    Parameters:
        single_step_decomposition (`bool`, *optional*, defaults to `True`):
            Whether a token's own log-ratio is taken out of its return and its exact expectation over the vocabulary,
            the reverse KL, is differentiated instead.
        length_normalization (`bool`, *optional*, defaults to `True`):
            Whether returns-to-go are means over the tokens to come, not sums.
        teacher_mixed_alpha (`float`, *optional*, defaults to `0.2`):
            Share α of the teacher in the distribution that training rollouts are sampled from. 0 turns it off.

    And those shared by every trainer (see [`DistillConfig`]); satisfaction is only measured against `cost_limit`. `teacher_beta` must stay 1, reverse KL.
    """

    single_step_decomposition: bool = True
    length_normalization: bool = True
    teacher_mixed_alpha: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        self._check_below_one("teacher_mixed_alpha")
        if self.teacher_beta != 1:
            raise ValueError(f"MiniLLM minimises reverse KL: `teacher_beta` must be 1, got {self.teacher_beta:g}.")
        if self.teacher_mixed_alpha > 0 and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError(
                "Only transformers' `generate` can mix the teacher into every sampled token. Set "
                "`teacher_mixed_alpha=0`, or `use_vllm=False` and `use_transformers_continuous_batching=False`."
            )
