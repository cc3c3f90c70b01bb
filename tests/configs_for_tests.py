"""Configs as tests need them: one model's, and a whole run's of model=tiny."""

from pathlib import Path
from typing import Any

from ladezeit.config import (
    CacheConfig,
    CacheState,
    InferenceConfig,
    ProcessConfig,
    ProcessKind,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
    TrackingKind,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
)

HERE = Path(__file__).parent

#: The architecture of a mixture of experts of some kilobytes, for `SyntheticModel`.
TINY_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 127,
}


def model_config(name: str) -> Any:
    """Return the model config that an option file composes to."""
    from omegaconf import OmegaConf

    from ladezeit.config import FolderModel, HubModel, PackagedModel, SyntheticModel

    plain = OmegaConf.load(HERE.parent / "conf" / "model" / f"{name}.yaml")
    kind = str(plain.pop("defaults")[0]).rpartition("/")[2].partition("@")[0]
    schema = {"hub": HubModel, "folder": FolderModel, "packaged": PackagedModel, "synthetic": SyntheticModel}[kind]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def make_run_config(outputs: Path, **changes: Any) -> RunConfig:
    """Return a run config of model=tiny on the CPU; `changes` replace whole groups or keys."""
    fields: dict[str, Any] = {
        "model": model_config("tiny"),
        "loading": TransformersLoading(name="transformers", device_map="device"),
        "validation": ValidationConfig(ValidationLevel.placement),
        "cache": CacheConfig(CacheState.as_is),
        "inference": InferenceConfig(new_tokens=3, token_ids=[1, 2, 3]),
        "runtime": RuntimeConfig(),
        "process": ProcessConfig(ProcessKind.prewarmed, time_limit_s=120),
        "tracking": TrackingConfig(TrackingKind.none),
        "device": "cpu",
        "sample": 0,
        "phases": True,
        "order_seed": 0,
        "discard_first": False,
        "outputs": str(outputs),
    }
    return RunConfig(**(fields | changes))
