"""An exported repository as a checkpoint of ours, and models of later vintages in transformers."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from hub_server import Hub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.hub_models import fetch_model, model_files
from nanochat.huggingface.export import CODE, CODE_FOLDER, as_exported, write_weights
from nanochat.hybrid_gpt import HybridConfig
from nanochat.streaming import State
from nanochat.tokenizer import Tokenizer
from scripts import export, surgery

SMALL = GPTConfig(sequence_len=128, vocab_size=300, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
LATER = replace(SMALL, rope_base=100000.0, softcap=20.0, qk_scale=1.2, windows=(20, 7, 0, 0),
                x0_lambdas=(0.2, 0.0, -0.3, 0.1), smear_gate=tuple(0.3 - 0.02 * i for i in range(24)), smear_lambda=0.7,
                backout_lambda=0.4, value_embeds=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["some words and some more words, said some of them again and again"] * 3 + [
        "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))], 300)


def exported(config, tokenizer, folder, monkeypatch):
    """A random model, and the folder that it was exported to, in shards."""
    monkeypatch.setattr("nanochat.huggingface.export.SHARD_BYTES", 500_000)
    model = randomize(build_model(config))
    ckpt.save_export(folder / "ours", model, tokenizer, {
        "tag": "small", "calibration": {"budget": 0.7, "prices": [[0.7, 0.1]]}, "provenance": {"surgery": "insert"}})
    export.main(["--checkpoint", str(folder / "ours"), "--dst", str(folder / "repo")])
    return model, folder / "repo"


@pytest.mark.parametrize("config", [HybridConfig.from_base(SMALL), SMALL, HybridConfig.from_base(LATER)])
def test_a_repository_is_a_checkpoint(config, tokenizer, tmp_path, monkeypatch, tokens):
    model, repo = exported(config, tokenizer, tmp_path, monkeypatch)
    assert len(list(repo.glob("*.safetensors"))) > 1
    for path in (repo, repo / "model.safetensors.index.json"):
        again, its, info, _ = ckpt.load(path)
        assert again.config == config and its.fingerprint == tokenizer.fingerprint and info["tag"] == "small"
        assert info["calibration"] == {"budget": 0.7, "prices": [[0.7, 0.1]]}
        assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    export.main(["--checkpoint", str(repo), "--dst", str(tmp_path / "again")])
    for path in repo.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.slow
def test_surgery_starts_from_a_repository(tokenizer, tmp_path, monkeypatch, tokens):
    (tmp_path / "b").mkdir()
    base, repo = exported(SMALL, tokenizer, tmp_path / "b", monkeypatch)
    surgery.main(["--src", str(repo), "--dst", str(tmp_path / "hybrid")])
    hybrid = ckpt.load(tmp_path / "hybrid").model
    with torch.no_grad():
        assert (hybrid(tokens) - base(tokens)).abs().max() < 1e-4
    export.main(["--checkpoint", str(tmp_path / "hybrid"), "--dst", str(tmp_path / "repo")])
    surgery.main(["--expand-from", "128", "--new-dim", "256", "--src", str(tmp_path / "repo"), "--dst",
                  str(tmp_path / "grown")])
    with torch.no_grad():
        assert (ckpt.load(tmp_path / "grown").model(tokens) - base(tokens)).abs().max() < 1e-4


def test_an_exported_repository_of_the_hub_is_fetched_by_its_name(tokenizer, tmp_path, monkeypatch, capsys):
    _, repo = exported(SMALL, tokenizer, tmp_path, monkeypatch)
    hub = Hub()
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    files = {f"small/{p.name}": p.read_bytes() for p in repo.iterdir()}
    files |= {"README.md": b"", "modeling_adamba.py": b""}
    hub.repos["someone/all"] = {"private": True, "commits": 1, "files": files}
    folder = fetch_model("someone/all", tmp_path / "got")
    hub.close()
    assert folder == tmp_path / "got/small" and "revision" in capsys.readouterr().out
    assert ckpt.load(folder).model.config == SMALL
    assert not list(folder.glob("*.md")) and not list((tmp_path / "got").glob("*.py"))  # nothing but what is needed
    two = ["a/config.json", "a/model.safetensors", "b/config.json", "b/model.safetensors"]
    with pytest.raises(ValueError, match=r"holds 2 models, in a, b: name one, such as someone/all/b"):
        model_files(two, None, "", "someone/all")
    assert model_files(two, None, "a", "someone/all") == ("a", two[:2])
    with pytest.raises(ValueError, match="has no nanochat checkpoint"):
        model_files(["config.json", "pytorch_model.bin"], None, "", "someone/all")


def test_what_is_no_model_of_ours_is_named(tokenizer, tmp_path, monkeypatch):
    _, repo = exported(SMALL, tokenizer, tmp_path, monkeypatch)
    good = json.loads((repo / "config.json").read_text())
    for changes, words in (({"hidden_act": "silu"}, "hidden_act 'silu'"), ({"num_hidden_layers": 3}, "does not fit"),
                           ({"vocab_size": "many"}, "'many'"), ({"model_type": "llama"}, "has no config")):
        (repo / "config.json").write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=words):
            ckpt.load(repo)
    (repo / "config.json").write_text(json.dumps(good))
    other = Tokenizer.train_from_iterator(["other words entirely, of another text " * 9 + "".join(
        chr(97 + i * 5 % 26) + chr(97 + i * 11 % 26) + " " for i in range(400))], 300)
    other.save(repo)
    with pytest.raises(ValueError, match="is not the model's"):
        ckpt.load(repo)
    (repo / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        ckpt.load(repo)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [True, False])
def test_later_vintages_run_in_transformers(hybrid, tmp_path, same_start):
    """All that later nanochats have, at once: parallel, in pieces, padded, generated, at widths and exits."""
    config = HybridConfig.from_base(LATER) if hybrid else LATER
    model = randomize(build_model(config))
    made = as_exported(config, State.of(model), {}, "x")
    write_weights(tmp_path, made.state, torch.float32, lambda n: None)
    for name in CODE:
        shutil.copy(CODE_FOLDER / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(made.config | {"dtype": "float32"}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    x = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(1))
    tools = type("NoTokens", (), {"encode_special": lambda self, name: -1, "get_special_tokens": lambda self: {}})()
    for mode, depth in ((None, None), ("ghost", None), (None, 2), ("normal", config.n_block - 1)):
        theirs.config.mode, theirs.config.exit_depth = mode, depth
        want = model(x, widths=mode, exits=depth)
        assert (theirs(x).logits - want).abs().max() < 1e-5
        for cuts in ([1] * 9 + [91], [60, 40]):
            memory, seen = None, 0
            for n in cuts:
                out = theirs(x[:, seen:seen + n], cache=memory, use_cache=True)
                assert (out.logits - want[:, seen:seen + n]).abs().max() < 1e-5
                memory, seen = out.cache, seen + n
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[1, :37] = 0
        padded = theirs(x, attention_mask=mask).logits
        assert (padded[1, 37:] - model(x[1:, 37:], widths=mode, exits=depth)[0]).abs().max() < 1e-5
        text = theirs.generate(x[:1, :9], max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 9:]
        ours = Engine(model, tools).tokens(x[0, :9].tolist(), 20, temperature=0, mode=mode, depth=depth)
        assert text.tolist() == list(ours)
