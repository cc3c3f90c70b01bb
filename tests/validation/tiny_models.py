"""Models small enough to be made in every test, of real architectures."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

LAYERS = 12


def tiny_qwen2(tie: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.float16)
