"""
An export is what transformers needs and computes what our model computes: logits in every mode, padded and cached, the
decoded tokens of the golden model; its files by the libraries that own the formats; uploads to a local hub.
"""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize
from hub_server import hub_server

from nanochat import checkpoint_manager as ckpt
from nanochat import hf_export
from nanochat.hub_upload import variants_card
from nanochat.hybrid_gpt import HybridConfig
from nanochat.streaming import State, leaves
from nanochat.surgery import extract
from nanochat.tokenizer import Tokenizer
from scripts import export

pytestmark = pytest.mark.usefixtures("same_start")
GOLDEN = Path(__file__).parent / "golden"
SIZES = {"sequence_len": 64, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 64, "mamba_headdim": 16,
         "mamba_d_state": 16, "mamba_group_width": 48}
MODELS = {
    "plain": HybridConfig(**SIZES, n_kv_head=4, d_ref=64, top_width=64),
    "shared heads, grown": HybridConfig(**SIZES, n_kv_head=2, d_ref=32, top_width=64),
    "extracted": HybridConfig(**SIZES, n_kv_head=4, d_ref=64, top_width=32)}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))] * 3,
                                         300)


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    """transformers' AutoModelForCausalLM; the code that exports carry is copied into a temporary folder."""
    transformers = pytest.importorskip("transformers")
    import transformers.dynamic_module_utils as dynamic
    folder = str(tmp_path_factory.mktemp("modules"))
    before, dynamic.HF_MODULES_CACHE = dynamic.HF_MODULES_CACHE, folder
    yield transformers
    dynamic.HF_MODULES_CACHE = before


def write(folder, model, tokenizer, dtype=torch.float32, info=(), **shards):
    """An export as scripts.export writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_export.save_safetensors(leaves(State.of(model), dtype), folder, **shards)
    hf_export.write_files(folder, hf_export.hub_config(model.config, tokenizer, dtype, dict(info)), tokenizer)
    return folder


def load(auto, folder, **options):
    return auto.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_ours_in_every_mode_and_depth(auto, tokenizer, tmp_path, name):
    model = randomize(ckpt.build_model(MODELS[name]))
    theirs = load(auto, write(tmp_path / "m", model, tokenizer))
    ids = torch.randint(300, (2, 64))
    choices = [(mode, None) for mode in [*model.config.modes, str(model.config.levels[0])]] + [("god", 2), ("ghost", 3)]
    for mode, depth in choices:
        theirs.config.mode, theirs.config.exit_depth = mode, depth
        torch.testing.assert_close(theirs(ids).logits, model(ids, widths=mode, exits=depth), atol=1e-5, rtol=0)
    labels = ids.masked_fill(torch.rand(2, 64) < 0.3, -100)
    theirs.config.mode, theirs.config.exit_depth = "god", None
    want = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert theirs(ids, labels=labels).loss == pytest.approx(float(want), abs=1e-5)
    for field, value, words in (("mode", "wide", "unknown mode 'wide': choose one of ghost"),
                                ("exit_depth", 7, "from 1 to 6"), ("mode", "33", "unknown mode '33'")):
        setattr(theirs.config, field, value)
        with pytest.raises(ValueError, match=words):
            theirs(ids)
        theirs.config.mode, theirs.config.exit_depth = "god", None


@torch.no_grad()
def test_padded_and_cached_rows_equal_each_row_alone(auto, tokenizer, tmp_path):
    """Padding on the left, on the right and between, in one pass and in chunks of any cut."""
    model = randomize(ckpt.build_model(MODELS["shared heads, grown"]))
    theirs = load(auto, write(tmp_path / "m", model, tokenizer))
    lengths, T = [3, 20, 9, 1], 20
    rows = [torch.randint(291, (n,)) for n in lengths]
    at = [torch.arange(T - 3, T), torch.arange(T), torch.randperm(T)[:9].sort().values, torch.tensor([0])]
    ids, mask = torch.full((4, T), 299), torch.zeros(4, T, dtype=torch.long)
    for r in range(4):
        ids[r, at[r]], mask[r, at[r]] = rows[r], 1
    alone = [model(row[None])[0] for row in rows]
    for cuts in ([T], [1, T], [7, 8, T], list(range(1, T + 1))):
        logits, cache, first = [], None, 0
        for last in cuts:
            out = theirs(ids[:, first:last], mask[:, :last], cache=cache, use_cache=True)
            logits, cache, first = [*logits, out.logits], out.cache, last
        logits = torch.cat(logits, 1)
        for r in range(4):
            torch.testing.assert_close(logits[r, at[r]], alone[r], atol=1e-5, rtol=0)
    # behind padding on the right a position shows the last token's logits, in the pass that has seen it
    torch.testing.assert_close(theirs(ids, mask).logits[3, 1:], alone[3].expand(T - 1, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_generation_decodes_the_golden_tokens(auto, tmp_path):
    """In one batch, padded on either side, cached and not: what our engine decodes of a trained model."""
    export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "m")])
    from golden import make
    expected = json.loads((GOLDEN / "expected.json").read_text())["decoded"]
    tokenizer = auto.AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)
    model = load(auto, tmp_path / "m")
    for name, options in (("full", {}), ("ghost", {"mode": "ghost"}), ("a width", {"mode": 16}),
                          ("depth 4", {"exit_depth": 4})):
        for side in ("left", "right") if name == "full" else ("left",):
            tokenizer.padding_side = side
            inputs = tokenizer(make.PROMPTS, return_tensors="pt", padding=True)
            model.config.mode, model.config.exit_depth = options.get("mode", "god"), options.get("exit_depth")
            for use_cache in (True, False) if side == "left" and name == "full" else (True,):
                out = model.generate(**inputs, max_new_tokens=make.NEW_TOKENS, do_sample=False, use_cache=use_cache)
                for row, want in zip(out[:, inputs.input_ids.size(1):].tolist(), expected[name]["tokens"], strict=True):
                    assert row[:len(want)] == want, (name, side, use_cache)


@torch.no_grad()
def test_beams_and_samples_reorder_the_cache(auto, tokenizer, tmp_path):
    model = load(auto, write(tmp_path / "m", randomize(ckpt.build_model(MODELS["plain"])), tokenizer))
    ids = torch.randint(291, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_shards_are_read_by_the_formats_own_library(tokenizer, tmp_path):
    from safetensors import safe_open
    model = randomize(ckpt.build_model(MODELS["plain"]))
    write(tmp_path, model, tokenizer, torch.bfloat16, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert all(f"-of-{len(files):05d}" in name for name in files)
    seen, total = {}, 0
    for name in files:
        with safe_open(tmp_path / name, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            seen |= {key: f.get_tensor(key) for key in f.keys() if index["weight_map"][key] == name}
        largest = max(t.nbytes for t in seen.values())
        assert (tmp_path / name).stat().st_size < max(100_000, largest) + 20_000
    own = model.state_dict()
    assert seen.keys() == own.keys()
    for name, t in seen.items():
        kept = any(part in name for part in ("A_log", "dt_bias", ".D", "conv1d", "mamba.norm", "gate.", "predictor.")) \
            and "ve_gate" not in name
        assert t.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(t, own[name].to(t.dtype))
        total += t.nbytes
    assert total == index["metadata"]["total_size"]


@torch.no_grad()
def test_bf16_shards_load_with_a_mode_of_ones_own(auto, tokenizer, tmp_path):
    model = randomize(ckpt.build_model(MODELS["plain"]))
    write(tmp_path, model, tokenizer, torch.bfloat16, shard_bytes=100_000)
    theirs = load(auto, tmp_path, dtype="auto", mode="ghost", exit_depth=4, device_map="cpu")
    assert theirs.config.width == 16 and theirs.config.depth == 4
    dtypes = {n: p.dtype for n, p in theirs.named_parameters()}
    assert {d for n, d in dtypes.items() if "mamba" in n and "proj" not in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "mamba" not in n or "proj" in n} == {torch.bfloat16}
    ids = torch.randint(300, (2, 64))
    got, want = theirs(ids).logits, model(ids, widths="ghost", exits=4)
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


@torch.no_grad()
def test_a_base_gpt_is_transformers_own_nanochat(auto, base, tokenizer, tmp_path, tokens):
    folder = tmp_path / "base_checkpoints/d3"
    ckpt.save_step(folder, 7, base, [], {})
    tokenizer.save(folder / "tokenizer")
    export.main(["--checkpoint", str(folder), "--dst", str(tmp_path / "hub")])
    assert not list((tmp_path / "hub").glob("*.py"))
    theirs = auto.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert type(theirs) is auto.NanoChatForCausalLM
    torch.testing.assert_close(theirs(tokens).logits, base(tokens), atol=1e-5, rtol=0)
    assert (theirs.config.bos_token_id, theirs.generation_config.eos_token_id) == (291, [295, 291])


# --- the command

def test_the_card_says_where_it_comes_from_and_nothing_else(tmp_path, capsys):
    measured = {mode: {"bpb": 2.0 + i / 10} for i, mode in enumerate(("ghost", "normal", "think"))}
    config, info, _ = ckpt.find(GOLDEN / "model")
    measured |= {mode: {"bpb": 3.0} for mode in config.distinct_modes if mode not in measured}
    (tmp_path / "eval.json").write_text(json.dumps({"modes": measured}))
    export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "hub"), "--mode", "normal", "--eval",
                 str(tmp_path / "eval.json")])
    card = (tmp_path / "hub/README.md").read_text()
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and "mode" not in line]
    assert [(r[0], r[1], r[4]) for r in rows] == [("| ghost, whisper", "8", "2.0000 |"), ("| normal", "16", "2.1000 |"),
                                                  ("| think, god", "32", "2.2000 |")]
    assert str(tmp_path) not in card and "from_pretrained(name, trust_remote_code=True)" in card and "FOLDER" in card
    assert "Trained: unfrozen, 400 steps" in card and "2.5198 bits per byte" in card and "license: mit" in card
    written = json.loads((tmp_path / "hub/config.json").read_text())
    assert written["mode"] == "normal" and written["adamba"]["calibration"] == info["calibration"]
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in (tmp_path / "hub").iterdir()}
    export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "hub"), "--mode", "normal", "--eval",
                 str(tmp_path / "eval.json")])  # an earlier export is replaced
    assert {p.name: p.read_bytes() for p in (tmp_path / "hub").iterdir()} == before


def test_nothing_published_names_a_folder_of_this_machine(hybrid, tokenizer):
    info = {"provenance": {"surgery": "insert", "source": "/home/me/x", "command": "python /home/me",
                           "source_sha256": "a" * 64, "from": {"trained": "stage 1", "source": "/home/me/y"}}}
    config = hf_export.hub_config(hybrid.config, tokenizer, torch.float32, info)
    assert config["adamba"]["provenance"] == {"surgery": "insert", "source_sha256": "a" * 64, "from": {"trained": "stage 1"}}
    assert "/home/me" not in json.dumps(config) + hf_export.card(hybrid.config, info, torch.float32, None, None)


@pytest.mark.parametrize("arguments, words", [
    (["--mode", "wide"], "unknown mode 'wide': choose one of ghost"), (["--mode", "9"], "width 9 is not a level"),
    (["--exit-depth", "9"], "it must be from 1 to 8"), (["--variant", "a"], "--variant has no effect without --push"),
    (["--public"], "--public has no effect"), (["--push", "name"], "write it as USER/NAME"),
    (["--push", "a/b", "--variant", "../x"], "no name of a folder"), (["--eval", str(GOLDEN / "expected.json")], "no table"),
])
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "hub"), *arguments])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "hub").exists()


def test_a_folder_of_others_and_a_full_disk_are_left_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text("{}")
    arguments = ["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "hub")]
    with pytest.raises(SystemExit):
        export.main(arguments)
    assert "no export" in capsys.readouterr().err and (tmp_path / "hub/config.json").read_text() == "{}"
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(SystemExit):
        export.main([*arguments[:-1], str(tmp_path / "a/b/hub")])
    err = capsys.readouterr().err
    assert "0.0 GB of disk are free: free some" in err and err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_features_that_the_code_lacks_are_refused(base_config):
    later = dataclasses.make_dataclass("Later", [("smear_lambda", float, 0.0)], bases=(type(base_config),), frozen=True)
    hf_export.check_exportable(later())
    with pytest.raises(ValueError, match="this model has smear_lambda, which the exported code does not compute"):
        hf_export.check_exportable(dataclasses.replace(later(), smear_lambda=0.5))


def test_an_extracted_model_exports(hybrid, tokenizer, tmp_path):
    ckpt.save_export(tmp_path / "small", extract(hybrid, "normal"), tokenizer, {})
    export.main(["--checkpoint", str(tmp_path / "small"), "--dst", str(tmp_path / "hub")])
    assert json.loads((tmp_path / "hub/config.json").read_text())["top_width"] == 32


# --- outside of this repository, and on the hub

OUTSIDE = """
import sys
sys.modules["nanochat"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, options = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **options)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
inputs = tokenizer("def read(self, ", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs.input_ids.size(1):].tolist())
"""


def outside(folder, *arguments, **env):
    """What a program prints that stands elsewhere and has torch and transformers alone."""
    done = subprocess.run([sys.executable, "-I", "-c", OUTSIDE, *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "HF_HOME": str(folder / "hf"), **env}, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_loads_where_our_package_is_not(tmp_path):
    pytest.importorskip("transformers")
    export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "hub")])
    (tmp_path / "elsewhere").mkdir()
    want = json.loads((GOLDEN / "expected.json").read_text())["decoded"]["full"]["tokens"][0]
    assert outside(tmp_path / "elsewhere", str(tmp_path / "hub"), HF_HUB_OFFLINE="1") == want


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local server, to which the hub's own client in this process turns; and how to export to it."""
    import huggingface_hub.constants as constants
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False), (
                "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        server.push = lambda *arguments: export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "out"),
                                                      *arguments])
        yield server


def test_variants_are_uploaded_and_listed(hub, tmp_path, capsys, monkeypatch):
    """Broken off, again, and a second variant."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    hub.fail_uploads = 1
    with pytest.raises(SystemExit):
        hub.push("--push", "me/adamba", "--variant", "stage1")
    err = capsys.readouterr().err
    assert "could not be uploaded to me/adamba" in err and "run the same command again" in err.splitlines()[-1]
    assert (tmp_path / "out/config.json").is_file()
    for variant in ("stage1", "stage0", "stage1"):
        hub.push("--push", "me/adamba", "--variant", variant)
        assert f"uploaded to {hub.url}/me/adamba, folder {variant}" in capsys.readouterr().out
    assert len([r for r in hub.requests if r[0] == "PUT"]) == 2  # one refused, one taken; then the hub had it
    repo = hub.repos["me/adamba"]
    assert repo["private"] and "stage1/model.safetensors" in repo["files"] and "modeling_adamba.py" in repo["files"]
    card = repo["files"]["README.md"].decode()
    assert [line.split("]")[0] for line in card.splitlines() if line.startswith("| [")] == ["| [stage0", "| [stage1"]
    assert 'from_pretrained("me/adamba", subfolder="stage1"' in card

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("the hub did not answer")
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", unreachable)
    with pytest.raises(SystemExit):  # a card that could not be read is not written anew
        hub.push("--push", "me/adamba", "--variant", "stage2")
    assert repo["files"]["README.md"].decode() == card


def test_a_whole_repository_is_public_if_asked_and_needs_the_right(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(SystemExit):
        hub.push("--push", "me/open", "--public")
    assert "you may not write to me/open: run `hf auth login`" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.push("--push", "me/open", "--public")
    repo = hub.repos["me/open"]
    assert not repo["private"] and "config.json" in repo["files"] and "token_bytes.pt" not in repo["files"]
    assert 'name = "me/open"' in repo["files"]["README.md"].decode()
    hub.push("--push", "me/open")
    assert "note: me/open was there before and is public" in capsys.readouterr().out


@pytest.mark.slow
def test_a_variant_loads_from_the_hub(hub, tmp_path):
    pytest.importorskip("transformers")
    hub.push("--push", "me/adamba", "--variant", "stage1")
    (tmp_path / "elsewhere").mkdir()
    want = json.loads((GOLDEN / "expected.json").read_text())["decoded"]["full"]["tokens"][0]
    assert outside(tmp_path / "elsewhere", "me/adamba", "subfolder=stage1", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1",
                   HF_HUB_OFFLINE="0") == want


def test_a_card_written_by_hand_around_the_table_stays():
    card = variants_card("", "me/x", "b", "1 | 2 | 3 | 4").replace("One folder", "My words. One folder")
    card = variants_card(card, "me/x", "a", "5 | 6 | 7 | 8")
    card = variants_card(card, "me/x", "b", "9 | 9 | 9 | 9")
    assert "My words. One folder" in card and card.count("```python") == 1
    assert [line for line in card.splitlines() if line.startswith("| [")] == [
        "| [a](./a) | 5 | 6 | 7 | 8 |", "| [b](./b) | 9 | 9 | 9 | 9 |"]
