"""Every causal language model of transformers, as small as its config lets it be."""

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


VOCAB = 40
SIZE = {
    **dict.fromkeys(("vocab_size",), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "n_embed", "d_model", "embed_dim", "dim", "embedding_size", "lru_width"), 32
    ),
    **dict.fromkeys(("word_embed_proj_dim", "ffn_hidden_size", "inner_dim", "dff", "d_ff", "d_inner", "n_inner"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_layers",), 2),
    **dict.fromkeys(
        (
            "encoder_attention_heads",
            "num_key_value_heads",
            "rotary_dim",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "index_topk"), 64),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("num_experts_per_tok", "mamba_expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "first_k_dense_replace"), 1),
    "mamba_d_ssm": 64,
    "attention_hidden_size": 32,
    "is_decoder": True,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a config leaves open, to be set or to follow from other sizes. Other sizes that are open are features left out.
FROM_OTHERS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "attention_hidden_size",
    "num_key_value_heads",
)
# Whose default config cannot be made small, or takes a library that is not installed.
NOT_SMALL = {
    "BltForCausalLM",
    "CohereCompassForCausalLM",
    "DbrxForCausalLM",
    "DeepseekV2ForCausalLM",
    "Dots1ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma4AssistantForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedAssistantForCausalLM",
    "Lfm2MoeForCausalLM",
    "Mamba2ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
    "Phi4MultimodalForCausalLM",
    "Qwen4ExpForCausalLM",
    "ReformerModelWithLMHead",
    "RoCBertForCausalLM",
    "XmodForCausalLM",
    "Zamba2ForCausalLM",
    "ZambaForCausalLM",
    "xLSTMForCausalLM",
}
# That take several seconds to build at any size.
SLOW = {
    "AXK1ForCausalLM",
    "AXK2ForCausalLM",
    "BailingHybridForCausalLM",
    "HrmTextForCausalLM",
    "KimiLinearForCausalLM",
}
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "block_types")


def model_classes() -> dict[str, type[PreTrainedModel]]:
    """Model classes by name."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.values()
    classes = [several[0] if isinstance(several, list | tuple) else several for several in found]
    return {model_class.__name__: model_class for model_class in classes}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The config with each size that it has made small, and those of the configs inside."""
    known = config.to_dict()
    for name, value in SIZE.items():
        renamed = name in config.attribute_map and getattr(config, name) is not None
        if renamed or (name in known and (known[name] is not None or name in FROM_OTHERS)):
            setattr(config, name, value)
    for name in LAYER_LISTS:
        kinds = known.get(name)
        if isinstance(kinds, list) and len(kinds) > 2:
            setattr(config, name, (list(dict.fromkeys(kinds)) * 2)[:2])  # two layers, of different kinds if there are
    for inner in vars(config).values():
        if isinstance(inner, PretrainedConfig):
            shrink(inner)
    return config


@torch.no_grad()
def small_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A small model with distributions far from uniform. Raises what its config or its forward raises."""
    model_class = model_classes()[name]
    config = shrink(model_class.config_class())
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > 3e6:
        raise ValueError(f"{name} stays at {size} parameters.")
    torch.manual_seed(seed)
    model = model_class._from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.05:
            parameter.mul_(4)
    tokens = torch.full((1, 3), 4)
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return model
