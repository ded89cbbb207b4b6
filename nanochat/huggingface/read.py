"""Reads a Hugging Face repository that holds one of our models (scripts.export writes such) as a checkpoint of ours."""
from pathlib import Path

from nanochat.huggingface.names import own_name
from nanochat.weight_files import INDEX, Weights, some

MODEL_TYPES = ("adamba", "nanochat")
WEIGHTS = ("model.safetensors", f"model{INDEX}")
# Fields of transformers' NanoChatConfig and the value that our base GPT has there.
FIXED = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False, "attention_dropout": 0.0}


def is_repository(info: dict) -> bool:
    """Whether a config.json is that of a repository with one of our models, and not of a checkpoint of ours."""
    return "kind" not in info and info.get("model_type") in MODEL_TYPES


def weights_in(folder: Path) -> Path:
    """The file of a repository's weights, or of their index. FileNotFoundError where there is none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"there is no {' or '.join(WEIGHTS)} in {folder}: copy or download the repository again")


def own_info(info: dict, fields: dict[str, list[str]], where) -> dict:
    """
    A repository's config.json as that of a checkpoint of ours: kind, config, and what else is known of the model. fields: of
    each kind, the names of its config's fields. ValueError for a NanoChat with features that nanochat never had.
    """
    known = info.get("adamba")
    known = dict(known) if isinstance(known, dict) else {}
    if info["model_type"] == "adamba":
        kind = "hybrid" if info.get("hybrid") else "gpt"
        return {**known, "kind": kind, "config": {k: info[k] for k in fields[kind] if k in info}}
    if odd := [f"{k} {info[k]!r}" for k, v in FIXED.items() if info.get(k, v) != v]:
        raise ValueError(f"config.json in {where} has {some(odd)}, which no nanochat has: use another checkpoint")
    rope = info.get("rope_parameters") or {}
    base = rope.get("rope_theta", info.get("rope_theta")) if isinstance(rope, dict) else None
    config = {"sequence_len": info.get("max_position_embeddings"), "vocab_size": info.get("vocab_size"),
              "n_layer": info.get("num_hidden_layers"), "n_head": info.get("num_attention_heads"),
              "n_kv_head": info.get("num_key_value_heads") or info.get("num_attention_heads"),
              "n_embd": info.get("hidden_size"), "rope_base": base or 10000.0,
              "softcap": info.get("final_logit_softcapping") or 15.0}
    return {**known, "kind": "gpt", "config": config, "names": "transformers"}


def own_names(weights: Weights) -> Weights:
    """The weights of a NanoChatForCausalLM under our names; a name that is not one of its own stays as it is."""
    stored = {own_name(name): name for name in weights.specs}
    return Weights({k: weights.specs[v] for k, v in stored.items()}, lambda name: weights.read(stored[name]))
