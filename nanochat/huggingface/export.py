"""
Writes a checkpoint as a Hugging Face repository, shard by shard, so that a model larger than memory can be exported.

A hybrid, and a base GPT of one of nanochat's later vintages, becomes an AdambaForCausalLM, whose code lies beside the
weights; a base GPT like nanochat-d32 becomes transformers' own NanoChatForCausalLM.
"""
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from nanochat.chat import stop_tokens
from nanochat.checkpoint_manager import save_json
from nanochat.gpt import GPTConfig
from nanochat.huggingface.names import nanochat_name
from nanochat.hybrid_gpt import HybridConfig
from nanochat.streaming import State, shapes_of

SHARD_BYTES = 4_000_000_000  # of one file, which is in memory while it is written
CODE = ("configuration_adamba.py", "modeling_adamba.py")
CODE_FOLDER = Path(__file__).parent
KEPT = ("tag", "proof", "calibration", "val_bpb")  # of what a checkpoint says of itself
PRIVATE = {"source", "command"}  # in its provenance: folders and file names of the machine that made it
# What our config and AdambaConfig have alike, or what only our package reads.
OWN_FIELDS = ("exit_threshold", "expand_threshold", "exit_tau")


class Exported(NamedTuple):
    """A model as it is written: the config.json's content, its weights under their names there, and whether it is Adamba."""
    config: dict
    state: State
    remote_code: bool


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def adamba_config(config: GPTConfig) -> dict:
    """The fields of AdambaConfig (its own defaults included) that describe a model of ours."""
    fields = asdict(config)
    hybrid = isinstance(config, HybridConfig)
    own = {name: fields.pop(name) for name in OWN_FIELDS if name in fields}
    fields |= {"hybrid": hybrid, "d_ref": config.d_ref, "top_width": config.top_width, "modes": config.modes,
               "norm_eps": config.norm_eps, "rope_base": config.rope_base, "softcap": config.softcap}
    return {"model_type": "adamba", "architectures": ["AdambaForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_adamba.AdambaConfig",
                         "AutoModelForCausalLM": "modeling_adamba.AdambaForCausalLM"}, **fields, **own}


def nanochat_config(config: GPTConfig) -> dict:
    """The fields of transformers' NanoChatConfig that describe a base GPT like nanochat-d32."""
    return {"model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd, "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "hidden_act": "relu2",
            "max_position_embeddings": config.sequence_len, "rms_norm_eps": config.norm_eps, "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "final_logit_softcapping": config.softcap, "tie_word_embeddings": False}


def is_plain(config: GPTConfig) -> bool:
    """Whether a config is of a base GPT that computes what nanochat-d32 does, which transformers knows."""
    return type(config) is GPTConfig and asdict(config) == asdict(GPTConfig(
        config.sequence_len, config.vocab_size, config.n_layer, config.n_head, config.n_kv_head, config.n_embd))


def as_exported(config: GPTConfig, state: State, info: dict, fingerprint: str) -> Exported:
    """A checkpoint's model as it is written. info: its config.json or meta; fingerprint: of its tokenizer."""
    known = {k: info[k] for k in KEPT if info.get(k) is not None} | {"tokenizer_fingerprint": fingerprint}
    if (info.get("figures") or {}).get("bpb") is not None:
        known["val_bpb"] = info["figures"]["bpb"]
    if info.get("provenance"):
        known["provenance"] = public(info["provenance"])
    if is_plain(config):
        names = {nanochat_name(name): name for name in state.shapes}
        renamed = State({new: state.shapes[old] for new, old in names.items()},
                        lambda name, dtype: state.get(names[name], dtype), state.dtype)
        return Exported({**nanochat_config(config), "adamba": known}, renamed, False)
    return Exported({**adamba_config(config), "adamba": known}, state, True)


def public(provenance):
    """A provenance without the names of folders and files on the machine that made it."""
    if not isinstance(provenance, dict):
        return provenance
    return {k: public(v) for k, v in provenance.items() if k not in PRIVATE}


def sub_model(config: HybridConfig, state: State, width: int) -> tuple[HybridConfig, State]:
    """The model of one level as `surgery.extract` makes it, its weights cut when they are asked for."""
    small = replace(config, top_width=width)
    shapes = shapes_of(small)

    def make(name, dtype):
        return state.get(name, dtype)[tuple(slice(n) for n in shapes[name])].contiguous()
    return small, State(shapes, make, state.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_repository(folder: Path, model: Exported, dtype: torch.dtype, tokenizer, card: str,
                     report: Callable[[int], None] = lambda n: None) -> None:
    """Writes all files of a repository into an empty folder; report(n): n bytes more of weights were written."""
    write_weights(folder, model.state, dtype, report)
    tokenizer.save(folder)
    (folder / "token_bytes.pt").unlink()  # told from tokenizer.json, and torch files are frowned on there
    end = tokenizer.encode_special("<|assistant_end|>")
    ids = {"bos_token_id": tokenizer.get_bos_token_id(), "eos_token_id": end, "pad_token_id": end}
    save_json({**ids, "eos_token_id": sorted(stop_tokens(tokenizer)), "do_sample": True, "temperature": 0.8, "top_k": 50},
              folder / "generation_config.json")
    if model.remote_code:
        for name in CODE:
            shutil.copyfile(CODE_FOLDER / name, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    save_json({**model.config, **ids, "dtype": str(dtype).removeprefix("torch.")}, folder / "config.json")


def write_weights(folder: Path, state: State, dtype: torch.dtype, report: Callable[[int], None],
                  shard_bytes: int | None = None) -> None:
    """model.safetensors, or shards of at most shard_bytes (None: SHARD_BYTES) or one tensor each, and their index."""
    shards = plan_shards(state, dtype, shard_bytes or SHARD_BYTES)
    index = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        report(write_shard(folder / file, state, names, dtype))
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        save_json({"metadata": {"total_size": state.nbytes(dtype)}, "weight_map": index},
                  folder / "model.safetensors.index.json")


def write_shard(path: Path, state: State, names: list[str], dtype: torch.dtype) -> int:
    """Writes one file of weights; returns their bytes. Its tensors are in memory only while it runs."""
    tensors = {name: state.get(name, state.stored(name, dtype)).contiguous() for name in names}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes files that nobody else may read
    return sum(t.nbytes for t in tensors.values())


def plan_shards(state: State, dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """The weights' names, in their order, in groups of at most shard_bytes, or of one weight."""
    shards, size = [[]], 0
    for name, shape in state.shapes.items():
        own = shape.numel() * state.stored(name, dtype).itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards

