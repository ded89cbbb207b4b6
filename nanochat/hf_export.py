"""
A model as a repository for Hugging Face's hub: sharded safetensors, configuration, tokenizer, and the files with which
transformers loads it (remote_code/). A base GPT needs none of these: it becomes transformers' own NanoChatForCausalLM.
"""
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat.checkpoint_manager import build_model, load_json, model_kind, save_json
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.streaming import Leaf, write_tensor

SHARD_BYTES = 5_000_000_000
REMOTE_CODE = Path(__file__).parent / "remote_code"
CODE_FILES = ("configuration_adamba.py", "modeling_adamba.py")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
# What modeling_adamba.py computes, by the names of the config's fields: a model that has more is refused.
KNOWN_FIELDS = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "d_ref", "top_width",
                "mamba_expand", "mamba_headdim", "mamba_d_state", "mamba_d_conv", "mamba_group_width", "rope_base",
                "softcap"}
CONTROL_FIELDS = {"exit_threshold", "expand_threshold", "exit_tau"}  # of mode auto, which the file does not run


def check_exportable(config: GPTConfig) -> None:
    """ValueError for a model with features that the exported code does not compute."""
    defaults = {k: field.default for k, field in type(config).__dataclass_fields__.items()}
    odd = [k for k, v in asdict(config).items() if k not in KNOWN_FIELDS | CONTROL_FIELDS and v != defaults[k]]
    if odd:
        raise ValueError(f"this model has {', '.join(odd)}, which the exported code does not compute: only models of "
                         "nanochat-d32's vintage can be exported")


# ---------------------------------------------------------------------------------------------------------------------
# Weights

def nanochat_name(name: str) -> str:
    """The name in transformers' NanoChatForCausalLM of a base GPT's weight."""
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    parts = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
             "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    if block := re.fullmatch(r"transformer\.h\.(\d+)\.(.*)\.weight", name):
        return f"model.layers.{block[1]}.{parts[block[2]]}.weight"
    return name


def save_safetensors(leaves: dict[str, Leaf], folder: Path, shard_bytes: int = SHARD_BYTES, report=lambda n: None) -> None:
    """
    Writes tensors, each made when its turn has come, as model.safetensors, or in shards of at most `shard_bytes` (a larger
    tensor has one of its own) with their index. report(n): n bytes more were written. OSError when the disk is full.
    """
    shards, sizes = [{}], [0]
    for name, leaf in leaves.items():
        size = leaf.shape.numel() * leaf.dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = leaf
        sizes[-1] += size
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, shard in zip(names, shards):
        _save_shard(shard, folder / file, report)
    if n > 1:
        save_json({"metadata": {"total_size": sum(sizes)},
                   "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}},
                  folder / "model.safetensors.index.json")


def _save_shard(leaves, path, report):
    """One file of the safetensors format: the header's length, the header in JSON, the tensors' bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, leaf in leaves.items():
        size = leaf.shape.numel() * leaf.dtype.itemsize
        header[name] = {"dtype": DTYPES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        at = 8 + len(text)
        for name, leaf in leaves.items():
            at += write_tensor(f, leaf, at, report)
            assert at == 8 + len(text) + header[name]["data_offsets"][1]
        os.fsync(f.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and code

def hub_config(config: GPTConfig, tokenizer, dtype: torch.dtype, info: dict, mode: str | int = "god",
               depth: int | None = None) -> dict:
    """
    The repository's config.json. Under 'adamba' it holds what our own export's config.json does, so that nothing is lost
    when this package reads the repository.
    """
    ids = {"bos_token_id": tokenizer.get_bos_token_id(), "eos_token_id": tokenizer.encode_special("<|assistant_end|>"),
           "pad_token_id": tokenizer.encode_special("<|assistant_end|>")}
    own = {"kind": model_kind(config), "config": asdict(config), "tokenizer_fingerprint": tokenizer.fingerprint,
           **{k: info[k] for k in ("tag", "proof", "figures", "calibration") if info.get(k) is not None},
           "provenance": _without_paths(info.get("provenance"))}
    common = {**ids, "tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch."), "adamba": own}
    if isinstance(config, HybridConfig):
        fields = {k: getattr(config, k) for k in KNOWN_FIELDS}
        return {"architectures": ["AdambaForCausalLM"], "model_type": "adamba",
                "auto_map": {"AutoConfig": "configuration_adamba.AdambaConfig",
                             "AutoModelForCausalLM": "modeling_adamba.AdambaForCausalLM"},
                **dict(sorted(fields.items())), "mode": mode, "exit_depth": depth, **common}
    return {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd, "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "hidden_act": "relu2",
            "max_position_embeddings": config.sequence_len, "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "final_logit_softcapping": config.softcap, **common}


def _without_paths(provenance):
    """A provenance, and those that it came from, without what names folders of the machine where it was made."""
    if not isinstance(provenance, dict):
        return None
    return {k: _without_paths(v) if k == "from" else v for k, v in provenance.items() if k not in ("source", "command")}


def write_files(folder: Path, config: dict, tokenizer) -> None:
    """Everything but the weights and the card: configuration, generation's, tokenizer, and the code where it is needed."""
    save_json(config, folder / "config.json")
    ids = {k: config[k] for k in ("bos_token_id", "pad_token_id")}
    save_json({**ids, "eos_token_id": [config["eos_token_id"], config["bos_token_id"]], "do_sample": False},
              folder / "generation_config.json")
    tokenizer.save(folder)
    if "auto_map" in config:
        for name in CODE_FILES:
            shutil.copyfile(REMOTE_CODE / name, folder / name)


def files_of_export(folder: Path) -> set[str]:
    """The names in a folder that an earlier export of ours wrote; empty where it is none of ours."""
    try:
        if "adamba" not in load_json(folder / "config.json"):
            return set()
    except (OSError, ValueError):
        return set()
    ours = (r"(config|generation_config|tokenizer|tokenizer_config)\.json|chat_template\.jinja|token_bytes\.pt|README\.md"
            r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(configuration|modeling)_adamba\.py")
    return {p.name for p in folder.iterdir() if re.fullmatch(ours, p.name)}


# ---------------------------------------------------------------------------------------------------------------------
# The model card

def card(config: GPTConfig, info: dict, dtype: torch.dtype, repo: str | None, variant: str | None,
         measured: dict | None = None) -> str:
    """
    README.md of the repository, or of a variant's folder in it. repo: where it will be, or None where that is not known.
    measured: mode -> bits per byte, of scripts.fractal_eval.
    """
    hybrid = isinstance(config, HybridConfig)
    total = build_model(config, "meta").num_params()["total"]
    name = "Adamba" if hybrid else "nanochat GPT"
    lines = ["---", "license: mit", "library_name: transformers", "pipeline_tag: text-generation",
             "tags: [adamba, nanochat, mamba-2, matryoshka, early-exit]" if hybrid else "tags: [nanochat]", "---",
             f"# {name}, {total / 1e9:.2f} B parameters" if total >= 1e8 else f"# {name}, {total:,} parameters", ""]
    lines += [("A nanochat GPT with a Mamba-2 block after each attention block, nested widths and early exits."
               if hybrid else "A GPT of nanochat, in transformers' own NanoChat architecture."),
              f"{config.n_block} blocks of width {config.n_embd}, a context of {config.sequence_len} tokens, a vocabulary "
              f"of {config.vocab_size:,}; weights in {str(dtype).removeprefix('torch.')}.", "",
              *_usage(hybrid, repo, variant)]
    if hybrid:
        lines += _modes(config, measured)
    lines += ["## Where it comes from", "", *_provenance(info), "", "## Licence", "",
              "MIT, as nanochat and its published weights are. The data that a model was trained on may have terms of its "
              "own.", ""]
    return "\n".join(lines)


def _usage(hybrid, repo, variant):
    where = f'"{repo}"' if repo else '"FOLDER"  # this folder, or the repository that it was uploaded to'
    extra = "".join([f', subfolder="{variant}"' * bool(variant), ", trust_remote_code=True" * hybrid])
    lines = ["## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", f"name = {where}",
             f"tokenizer = AutoTokenizer.from_pretrained(name{extra})",
             f"model = AutoModelForCausalLM.from_pretrained(name{extra})",
             'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
             'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
             "return_dict=True)",
             "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))", "```", ""]
    if hybrid:
        lines += ['`from_pretrained(..., mode="normal")` runs attention and MLP at the width of that mode (the table '
                  "below), `exit_depth=N` the first N blocks alone.", ""]
    return lines


def _modes(config, measured):
    """The table of modes; those of one width share a row."""
    model, context = build_model(config, "meta"), config.sequence_len / 2

    def flops(width):
        return sum(c.flops for c in model.cost(width, context).values())
    lines = ["## Modes", "", "FLOPs are those of one token in the whole model, head and Mamba blocks included, with half of "
             "the context before it.", "", "| mode | width | GFLOPs per token | share | bits per byte |",
             "|---|---|---|---|---|"]
    for width in config.levels:
        names = [mode for mode, d in config.modes.items() if d == width]
        quality = next((f"{measured[mode]:.4f}" for mode in names if measured and mode in measured), "not measured")
        lines.append(f"| {', '.join(names)} | {width} | {flops(width) / 1e9:.3g} | {flops(width) / flops(None):.0%} "
                     f"| {quality} |")
    return [*lines, ""]


def _provenance(info):
    lines = []
    if proof := info.get("proof"):
        lines.append(f"- Surgery kept the function: max |delta logit| {proof['max_delta_logit']:.2e} on "
                     f"{proof.get('probe_tokens', 'some')} probe tokens.")
    at = info.get("provenance")
    while isinstance(at, dict):
        for key, text in (("trained", "Trained"), ("surgery", "Surgery"), ("extracted", "Extracted at"),
                          ("fresh", "New weights")):
            if at.get(key) is not None:
                steps = f", {at['steps']} steps" if at.get("steps") is not None else ""
                digest = f", from weights of SHA-256 {at['source_sha256'][:16]}..." if at.get("source_sha256") else ""
                lines.append(f"- {text}: {at[key]}{steps}{digest}.")
        at = at.get("from")
    figures = info.get("figures") or {}
    if "bpb" in figures:
        lines.append(f"- Validation during training, at full width: {figures['bpb']:.4f} bits per byte.")
    if evidence := info.get("calibration"):
        if "delta" in evidence and "epsilon" in evidence:
            lines.append(f"- Mode auto is calibrated: P[{evidence.get('risk', 'risk')} > {evidence['delta']}] <= "
                         f"{evidence['epsilon']}. It runs in the package that trained the model, not in transformers.")
    return lines or ["- Nothing is recorded about its training."]


def variant_row(config: GPTConfig, dtype: torch.dtype, measured: dict | None) -> str:
    """The cells of a variant in the table of a repository's card, behind its name."""
    total = build_model(config, "meta").num_params()["total"]
    best = f"{list(measured.values())[-1]:.4f}" if measured else "not measured"
    return f"{total:,} | {config.n_embd} | {str(dtype).removeprefix('torch.')} | {best}"
