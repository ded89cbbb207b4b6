"""The exported repository in transformers, against our own model; what its files and its card say."""
import json
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import randomize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.huggingface.card import Place, mode_rows, model_card, variants_card
from nanochat.huggingface.export import as_exported, plan_shards, write_weights
from nanochat.hybrid_gpt import HybridConfig
from nanochat.streaming import State
from nanochat.surgery import extract
from nanochat.tokenizer import Tokenizer
from scripts import export, fractal_eval

GOLDEN = Path(__file__).parent / "golden"
INFO = {"tag": "small", "figures": {"bpb": 1.25}, "loader": {"path": "/scratch/folder/data"},
        "provenance": {"surgery": "insert", "seed": 0, "source": "/scratch/folder/model.pt", "source_sha256": "ab" * 32,
                       "command": "python -m scripts.surgery --src /scratch/folder", "from": {"source": "/scratch/folder"}}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["some words and some more words, said some of them again and again"] * 3 + [
        "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))], 300)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """name -> (our model, its checkpoint's folder, the exported folder): a hybrid, one of shared kv heads, a base GPT."""
    out, Made = {}, namedtuple("Made", "model checkpoint repo")
    for name, kv in (("hybrid", 4), ("shared", 2), ("base", 4)):
        config = GPTConfig(sequence_len=160, vocab_size=300, n_layer=3, n_head=4, n_kv_head=kv, n_embd=64)
        model = randomize(build_model(config if name == "base" else HybridConfig.from_base(config)))
        folder = tmp_path_factory.mktemp(name)
        ckpt.save_export(folder / "ours", model, tokenizer, INFO)
        export.main(["--checkpoint", str(folder / "ours"), "--dst", str(folder / "repo")])
        out[name] = Made(model, folder / "ours", folder / "repo")
    return out


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def theirs(models):
    return {name: load(made.repo) for name, made in models.items()}


def random_tokens(*shape, seed=0):
    return torch.randint(290, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, n, **options):
    """What our engine makes of a prompt, whatever the tokens are."""
    tokenizer = type("NoTokens", (), {"encode_special": lambda self, name: -1, "get_special_tokens": lambda self: {}})()
    engine = Engine(model, tokenizer)
    return list(engine.tokens(prompt, n, temperature=0, **options))


# --- the same function

@torch.no_grad()
@pytest.mark.parametrize("name", ["hybrid", pytest.param("shared", marks=pytest.mark.slow)])
def test_logits_and_text_equal_ours_in_every_mode_and_depth(models, theirs, name, same_start):
    ours, model, x = models[name].model, theirs[name], random_tokens(2, 150)
    prompt = x[:1, :9]
    for mode, depth in [*((m, None) for m in ours.config.modes), (32, None), (None, 1), (None, 3), ("normal", 4)]:
        model.config.mode, model.config.exit_depth = mode, depth
        assert (model(x).logits - ours(x, widths=mode, exits=depth)).abs().max() < 5e-6
        text = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert text[0, 9:].tolist() == greedy(ours, prompt[0].tolist(), 20, mode=mode, depth=depth)
    model.config.mode = model.config.exit_depth = None


@torch.no_grad()
def test_a_base_gpt_is_transformers_own_nanochat(models, theirs, same_start):
    made, x = models["base"], random_tokens(2, 150)
    assert type(theirs["base"]).__name__ == "NanoChatForCausalLM" and not list(made.repo.glob("*.py"))
    assert (theirs["base"](x).logits - made.model(x)).abs().max() < 5e-6
    text = theirs["base"].generate(x[:1, :9], max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert text[0, 9:].tolist() == greedy(made.model, x[0, :9].tolist(), 20)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ghost", pytest.param(None, marks=pytest.mark.slow)])
def test_padding_is_seen_by_nobody_wherever_it_stands(theirs, mode, same_start):
    """Left, right and between, in one forward pass and in many: every valid token answers as if its row were alone."""
    model = theirs["shared"]
    model.config.mode = mode
    lengths, T = (100, 37, 5), 100
    for where in ("left", "right", "between"):
        rows = [random_tokens(1, n, seed=n) for n in lengths]
        mask = torch.zeros(3, T, dtype=torch.long)
        for r, n in enumerate(lengths):
            at = {"left": torch.arange(T - n, T), "right": torch.arange(n), "between": torch.randperm(T)[:n].sort().values}
            mask[r, at[where]] = 1
        ids = random_tokens(3, T, seed=9)
        for r, row in enumerate(rows):
            ids[r, mask[r].bool()] = row[0]
        alone = [model(row).logits[0] for row in rows]
        for cuts in ([T], [1] * 30 + [70], [64, 1, 35], [99, 1]):
            memory, seen, parts = None, 0, []
            for n in cuts:
                out = model(ids[:, seen:seen + n], attention_mask=mask[:, :seen + n], cache=memory, use_cache=True)
                memory, seen = out.cache, seen + n
                parts.append(out.logits)
            logits = torch.cat(parts, 1)
            for r in range(3):
                assert (logits[r, mask[r].bool()] - alone[r]).abs().max() < 5e-6, (where, cuts, r)
                if cuts == [T]:  # the last column is what generation goes on from, be it padding or not
                    assert (logits[r, -1] - alone[r][-1]).abs().max() < 5e-6, (where, r)
    model.config.mode = None


@pytest.mark.slow
@torch.no_grad()
def test_batched_generation_equals_each_row_alone(models, theirs, same_start):
    model, prompts = theirs["hybrid"], [random_tokens(n, seed=n) for n in (3, 40, 11)]
    T = max(map(len, prompts))
    ids, mask = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
    for r, p in enumerate(prompts):
        ids[r, T - len(p):], mask[r, T - len(p):] = p, 1
    options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    text = model.generate(ids, attention_mask=mask, **options)[:, T:]
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)[:, T:]
    for r, p in enumerate(prompts):
        assert text[r].tolist() == greedy(models["hybrid"].model, p.tolist(), 25)
        assert beams[r].tolist() == model.generate(p[None], num_beams=3, **options)[0, len(p):].tolist()
        no_cache = model.generate(p[None], num_beams=3, use_cache=False, **options)[0, len(p):]
        assert beams[r].tolist() == no_cache.tolist()


@torch.no_grad()
def test_a_trained_models_text_is_what_our_engine_made_of_it(tmp_path, same_start):
    """The golden model, in batches padded on either side: the tokens that are kept in tests/golden."""
    from golden import make
    export.main(["--checkpoint", str(GOLDEN / "model"), "--dst", str(tmp_path / "repo")])
    model, tokenizer = load(tmp_path / "repo"), AutoTokenizer.from_pretrained(tmp_path / "repo")
    expected = json.loads((GOLDEN / "expected.json").read_text())["decoded"]
    for name, mode, depth, side in (("full", None, None, "left"), ("full", None, None, "right"),
                                    ("ghost", "ghost", None, "right"), ("depth 4", None, 4, "left")):
        model.config.mode, model.config.exit_depth, tokenizer.padding_side = mode, depth, side
        inputs = tokenizer(make.PROMPTS, return_tensors="pt", padding=True)
        text = model.generate(**inputs, max_new_tokens=make.NEW_TOKENS, do_sample=False)[:, inputs.input_ids.size(1):]
        for row, want in zip(text.tolist(), expected[name]["tokens"], strict=True):
            assert row[:len(want)] == want, (name, side)


@torch.no_grad()
def test_bf16_keeps_the_recurrence_in_fp32(models, theirs, tmp_path, same_start):
    """Both ways to bf16: a file in bf16, and a file in fp32 that is cast when it is read."""
    export.main(["--checkpoint", str(models["hybrid"].checkpoint), "--dst", str(tmp_path / "bf16"), "--dtype", "bf16"])
    x, exact = random_tokens(2, 150), theirs["hybrid"](random_tokens(2, 150)).logits
    for model in (load(tmp_path / "bf16"), load(models["hybrid"].repo, dtype=torch.bfloat16)):
        mixer = model.transformer["h"][1].mamba
        for p in (mixer.A_log, mixer.dt_bias, mixer.D, mixer.norm.weight, mixer.conv1d.weight, mixer.conv1d.bias):
            assert p.dtype == torch.float32
        assert model.lm_head.weight.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
        assert 1e-5 < (model(x).logits - exact).abs().max() < 0.1


@torch.no_grad()
def test_an_exported_mode_is_a_smaller_model_of_the_same_answers(models, tmp_path, same_start):
    made, x = models["hybrid"], random_tokens(2, 100)
    export.main(["--checkpoint", str(made.checkpoint), "--dst", str(tmp_path / "normal"), "--mode", "normal"])
    small = load(tmp_path / "normal")
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in made.model.parameters())
    assert (small(x).logits - made.model(x, widths="normal")).abs().max() < 5e-6
    weights, ours = safe_open(tmp_path / "normal/model.safetensors", "pt"), extract(made.model, "normal").state_dict()
    assert set(weights.keys()) == set(ours) and all(torch.equal(weights.get_tensor(k), v) for k, v in ours.items())


@torch.no_grad()
def test_loss_and_kept_logits(theirs, same_start):
    model, x = theirs["hybrid"], random_tokens(2, 20)
    labels = x.masked_fill(torch.arange(20) < 7, -100)
    out = model(x, labels=labels)
    log_p = out.logits.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    assert abs(out.loss + log_p[:, 6:].mean()) < 1e-5
    assert torch.equal(model(x, logits_to_keep=3).logits, out.logits[:, -3:])


def test_wrong_modes_depths_and_caches_are_named(theirs):
    model, x = theirs["hybrid"], random_tokens(1, 5)
    for field, value, words in (("mode", "auto", "only the Adamba package does"), ("mode", "loud", "mode 'loud'.*ghost"),
                                ("exit_depth", 7, "out of range: this model has 6 blocks"), ("exit_depth", 0, "range")):
        setattr(model.config, field, value)
        with pytest.raises(ValueError, match=words):
            model(x)
        setattr(model.config, field, None)
    memory = model(x, use_cache=True).cache
    model.config.mode = "ghost"
    with pytest.raises(ValueError, match="start again without it"):
        model(x, cache=memory)
    model.config.mode = None


@pytest.mark.slow
def test_it_loads_where_our_package_is_not(models, tmp_path):
    """In another folder and an interpreter that finds neither nanochat nor mamba_ssm nor tiktoken."""
    shutil.copytree(models["hybrid"].repo, tmp_path / "copy")
    x = random_tokens(1, 60)
    script = textwrap.dedent("""\
        import sys, json
        for name in ("nanochat", "scripts", "mamba_ssm", "tiktoken", "rustbpe"):
            sys.modules[name] = None
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("copy", trust_remote_code=True, mode="normal")
        x = torch.tensor(json.loads(sys.argv[1]))
        with torch.no_grad():
            print(json.dumps(model(x).logits[0, -1].tolist()))
        """)
    run = subprocess.run([sys.executable, "-I", "-c", script, json.dumps(x.tolist())], cwd=tmp_path, capture_output=True,
                         text=True, check=True, env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    got = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    with torch.no_grad():
        assert (got - models["hybrid"].model(x, widths="normal")[0, -1]).abs().max() < 5e-6


def test_the_tokenizer_and_the_chat_template_are_ours(models, tokenizer, theirs):
    for name in ("hybrid", "base"):
        auto = AutoTokenizer.from_pretrained(models[name].repo)
        text = "some words, said 123 again\n naïve 漢字 🙂"
        assert auto(text)["input_ids"] == tokenizer.encode(text, prepend="<|bos|>")
        chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
        ids = auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == tokenizer.render_for_completion({"messages": [*chat, {"role": "assistant", "content": ""}]})
        generation, end = theirs[name].generation_config, tokenizer.encode_special("<|assistant_end|>")
        assert generation.eos_token_id == [tokenizer.get_bos_token_id(), end]
        assert generation.bos_token_id == auto.bos_token_id == tokenizer.get_bos_token_id()


# --- files

def test_shards_hold_every_weight_once(models, theirs, tmp_path):
    model = models["hybrid"].model
    exported = as_exported(model.config, State.of(model), {}, "x")
    total, limit = exported.state.nbytes(torch.float32), 200_000
    done = []
    write_weights(tmp_path, exported.state, torch.float32, done.append, shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 5
    assert sum(done) == index["metadata"]["total_size"] == total
    for names in plan_shards(exported.state, torch.float32, limit):
        size = sum(exported.state.shapes[n].numel() * 4 for n in names)
        assert size <= limit or len(names) == 1
    assert index["weight_map"].keys() == model.state_dict().keys()
    for path in models["hybrid"].repo.iterdir():
        if not path.name.startswith("model."):
            shutil.copy(path, tmp_path)
    x = random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x).logits, theirs["hybrid"](x).logits)


def test_nothing_of_the_makers_machine_is_published(models):
    for made in models.values():
        for path in made.repo.iterdir():
            assert b"/scratch" not in path.read_bytes() and str(made.checkpoint).encode() not in path.read_bytes(), path


def test_an_export_is_not_overwritten_by_another(models, tmp_path, capsys):
    args = ["--checkpoint", str(models["hybrid"].checkpoint), "--dst", str(tmp_path / "out")]
    export.main(args)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    export.main(args)
    assert "holds this export already" in capsys.readouterr().out
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert {k for k in before if before[k] != after[k]} <= {"README.md"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").write_text("mine")
    for dst, more in (("out", ["--dtype", "bf16"]), ("full", [])):
        with pytest.raises(SystemExit):
            export.main([*args[:2], "--dst", str(tmp_path / dst), *more])
        assert re.search(r"error: .*exists and is not this export: name another folder with --dst", capsys.readouterr().err)
    assert (tmp_path / "full/diary.txt").read_text() == "mine"


def test_bad_arguments_and_a_full_disk(models, tmp_path, capsys, monkeypatch):
    hybrid, base = str(models["hybrid"].checkpoint), str(models["base"].checkpoint)
    usage = namedtuple("usage", "total used free")
    cases = [([base, "--mode", "normal"], "only a hybrid has sub-models"), ([hybrid, "--mode", "loud"], "mode 'loud'"),
             ([hybrid, "--public"], "add --push USER/NAME"), ([hybrid, "--push", "nobody"], "give USER/NAME"),
             ([hybrid, "--push", "a/b", "--variant", "../x"], "no plain folder name"),
             ([hybrid, "--quality", str(models["hybrid"].checkpoint / "config.json")], "no bits per byte"),
             ([hybrid], r"needs 0\.0 GB, and 0\.0 GB of disk are free")]
    for args, words in cases:
        if args == [hybrid]:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
        with pytest.raises(SystemExit) as stop:
            export.main(["--checkpoint", args[0], "--dst", str(tmp_path / "dst"), *args[1:]])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(words, err) and err.count("\n") == 1 and not (tmp_path / "dst").exists()


# --- the card

def test_the_card_says_what_is_known_and_no_more(models, tmp_path):
    card = (models["hybrid"].repo / "README.md").read_text()
    assert "has not been measured" in card and "1.2500" in card and "abababab" in card
    names = re.findall(r'from_pretrained\("([^"]*)"', card)
    assert names == ["PATH_OR_REPOSITORY"] * 2
    config = models["hybrid"].model.config
    widths = [int(w) for w in re.findall(r"^\| \w+ \| (\d+) \|", card, re.M)]
    assert widths == sorted(set(config.levels))  # ghost and whisper are one row here
    fractal_eval.main(["--checkpoint", str(models["hybrid"].checkpoint), "--data", "embedded", "--eval-tokens", "400",
                       "--json", str(tmp_path / "q.json")])
    export.main(["--checkpoint", str(models["hybrid"].checkpoint), "--dst", str(tmp_path / "out"), "--quality",
                 str(tmp_path / "q.json")])
    measured = json.loads((tmp_path / "q.json").read_text())["modes"]
    card = (tmp_path / "out/README.md").read_text()
    for mode in config.distinct_modes:
        assert mode not in measured or f"{measured[mode]['bpb']:.4f}" in card or mode == "whisper"


def test_the_cards_flops_are_those_of_the_model(models):
    model = models["hybrid"].model
    rows = mode_rows(model.config, {})
    assert [r["share"] for r in rows] == sorted(r["share"] for r in rows) and rows[-1]["share"] == 1
    for row in rows:
        assert row["flops"] == sum(c.flops for c in model.cost(row["mode"], 80).values())


def test_the_card_of_a_repository_lists_its_variants(models):
    configs = {name: json.loads((models[name].repo / "config.json").read_text()) for name in ("hybrid", "base")}
    card = variants_card("someone/small", configs)
    for name, made in (("hybrid", models["hybrid"]), ("base", models["base"])):
        count = sum(p.numel() for p in made.model.parameters())
        assert re.search(rf"\| \[`{name}`\]\({name}\) \| {count:,} \| 64 \| {made.model.config.n_block} \|", card)
    assert 'from_pretrained("someone/small", subfolder="hybrid", trust_remote_code=True' in card
    own = model_card(models["hybrid"].model.config, configs["hybrid"]["adamba"], {}, Place("someone/small", "hybrid"), True)
    assert 'from_pretrained("someone/small", subfolder="hybrid")' in own


def test_one_shard_at_a_time_is_in_memory(tmp_path):
    """Of tensors that are made when they are asked for, those of a written shard are gone before the next is made."""
    alive = weakref.WeakSet()

    def make(name, dtype):
        held = sum(t.nbytes for t in alive)
        assert held < 4000, f"{held} bytes are still held"
        t = torch.zeros(250, dtype=dtype)
        alive.add(t)
        return t
    names = [f"w{i}" for i in range(16)]
    write_weights(tmp_path, State({n: torch.Size([250]) for n in names}, make, torch.float32), torch.float32, lambda n: None,
                  shard_bytes=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
