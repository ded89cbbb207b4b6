"""Names of a base GPT's matrices, here and in transformers' NanoChatForCausalLM."""
import re

NANOCHAT_NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
                  "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def nanochat_name(name: str) -> str:
    """A base GPT's weight's name in NanoChatForCausalLM."""
    block = re.fullmatch(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{NANOCHAT_NAMES[block[2]]}.weight"
    return {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}[name]


def own_name(name: str) -> str:
    """A NanoChatForCausalLM's weight's name in our base GPT; what is none of its own stays as it is."""
    block = re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.\w+)\.weight", name)
    back = {theirs: ours for ours, theirs in NANOCHAT_NAMES.items()}
    if block and block[2] in back:
        return f"transformer.h.{block[1]}.{back[block[2]]}.weight"
    return "transformer.wte.weight" if name == "model.embed_tokens.weight" else name
