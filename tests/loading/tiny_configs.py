"""Models of every type that `AutoModelForCausalLM` knows, made small by the names of their config's keys."""

import re
from typing import Any

#: Value by name of the key; the first expression that matches the whole name counts.
_SMALL: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), value)
    for pattern, value in (
        (r"(pad|bos|eos|sep|cls|mask|unk|decoder_start)_token_id", 0),
        (r".*_token_id|.*_token_index|.*_token_ids?", 1),
        (r"vocab_size.*|.*_vocab_size|n_vocab|num_tokens", 128),
        (r"num_(key_value|kv)_heads|.*num_key_value_heads|n_kv_heads|num_attention_groups|multi_query_group_num", 2),
        (r".*(num|n)_(.*_)?heads|n_head|.*attention_heads|num_heads", 4),
        (r"num_experts_per_tok|.*top_?k(_experts)?|moe_topk|moe_k|n_activated_experts", 2),
        (r"n_group|topk_group|.*n_shared_experts|num_shared_experts", 1),
        (r"num_experts|.*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|.*num_experts", 4),
        (r"num_kv_shared_layers", 0),
        (r"num_(.*_)?layers|n_layers?|.*_layers|depth|.*_depth|num_blocks", 2),
        (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_.*_positions|max_sequence_length", 64),
        (r".*head_dim|d_kv|d_head|attention_head_size|v_head_size|.*_dim_head|kv_channels", 8),
        (r".*lora_rank|.*_rank", 8),
        (r".*(intermediate|ffn|ffw|mlp)_(size|dim).*|.*_intermediate_size|d_ff|n_inner|ffn_hidden_size|d_inner", 48),
        (r"hidden_size.*|d_model|n_embd|dim|embed_dim|word_embed_proj_dim|.*hidden_(size|dim)|embedding_size", 32),
        (r"(.*_)?image_size", 32),
        (r"(.*_)?patch_size", 8),
    )
)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8}

#: What some types need besides, by type or by the type of a part; None takes a key away.
_BESIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 1, "<image>": 2}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
}

#: Types of transformers 5.23 that plain transformers makes no small model of either, and why.
NOT_TINY = {
    "cohere_compass_text": "its rotary parameters are not made from its own defaults",
    "dbrx": "its attention config has no rope_theta of its own",
    "dots3_note": "its adapter's size is another part's",
    "dots3_note_text": "its low ranks are not in its config's sizes: 38 million weights at least",
    "gemma3n": "needs timm",
    "gemma4_assistant": "must share the layers of a model that is not in its config",
    "gemma4_unified_assistant": "must share the layers of a model that is not in its config",
    "musicgen": "its class takes the config of a part that its own config has not by default",
    "musicgen_melody": "its class takes the config of a part that its own config has not by default",
    "zamba": "its ties hold for its published number of layers alone",
}


def shrink(content: dict[str, Any], model_type: str = "") -> dict[str, Any]:
    """Return a config's content with every size made small; what has no small value stays as it is."""
    layers = next((content[key] for key in _LAYERS if isinstance(content.get(key), int)), None)
    small = {key: _shrunk(key, value, layers) for key, value in content.items()}
    small.pop("per_layer_config", None)
    return small | _BESIDES.get(content.get("model_type") or model_type, {})


def _shrunk(key: str, value: Any, layers: int | None) -> Any:
    if isinstance(value, dict):
        return shrink(value)
    if isinstance(value, list) and layers is not None and len(value) == layers > 2:
        kinds = list(dict.fromkeys(map(str, value)))  # a layer of each of the first two kinds, in their order
        first = [next(one for one in value if str(one) == kind) for kind in kinds[:2]]
        return first if len(first) == 2 else first * 2
    if isinstance(value, bool) or not isinstance(value, (int, list)):
        return value
    found = next((small for pattern, small in _SMALL if pattern.fullmatch(key)), None)
    if found is None or (isinstance(value, list) and key.endswith("token_id")):
        return value
    if isinstance(value, list):
        return [found] * 2 if value and all(isinstance(one, int) for one in value) else value
    return found


def tiny_model(model_type: str) -> Any:
    """Return a model of `model_type` with random weights; where its causal class is a part, the whole it is part of."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    config = config_class.from_dict(shrink(config_class().to_dict(), model_type))
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if config_class.sub_configs.get("text_config") is own_class.config_class:
        own_class = _whole_class(config)
    torch.manual_seed(0)
    model = own_class(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # no two alike, so that none can stand for another
            parameter.normal_()
    return model


def _whole_class(config: Any) -> Any:
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise LookupError(type(config).__name__)
