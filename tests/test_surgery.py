"""Surgery: growth and ordering keep the function and leave nothing dead, files are written whole or not at all."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import language_parameters, randomize

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model
from nanochat.confidence_probe import choose, level_shares
from nanochat.gpt import GPTConfig
from nanochat.growing import INITS, Init, grow, grow_optimizers, grow_state, grown_config, place, segments
from nanochat.hybrid_gpt import HybridConfig
from nanochat.optim import setup_optimizers
from nanochat.ordering import order_by_data, order_by_weights, order_state
from nanochat.streaming import Leaf, State, leaves, open_state, save_lazy, shapes_of, streamed
from nanochat.surgery import compare, insert, insert_state, prove, unchanged
from nanochat.tokenizer import Tokenizer
from scripts import fractal_train, surgery


@pytest.fixture
def config(base_config):
    """A hybrid that can grow in steps of one head: 16 residual dims, 48 Mamba channels a group."""
    return replace(HybridConfig.from_base(base_config), mamba_headdim=16, mamba_group_width=48, mamba_d_state=8)


@pytest.fixture
def model(config):
    return double(randomize(build_model(config)))


def double(model):
    """All in fp64 but the controls, which compute in fp32."""
    model.double().compute_dtype = torch.float64
    for name in ("gate", "predictor"):
        getattr(model, name, torch.nn.Identity()).float()
    return model


def delta(a, b):
    return float((a - b).abs().max())


def is_new(name, config, new):
    """A bool tensor of the grown shape: which entries growth appended."""
    was, now = shapes_of(config)[name], shapes_of(new)[name]
    spans = segments(name, was, config), segments(name, now, new)
    return place(torch.zeros(was, dtype=torch.bool), torch.ones(now, dtype=torch.bool), *spans)


# ---------------------------------------------------------------------------------------------------------------------
# Growth keeps the function

@torch.no_grad()
@pytest.mark.parametrize("width", [80, 96, 128])
@pytest.mark.parametrize("kind", INITS)
def test_growth_is_exact_at_every_width(model, tokens, kind, width):
    grown = grow(model, width, Init(kind, rank=8))
    assert grown.config.n_embd == width and grown.transformer.h[1].mamba.ngroups == width // 16
    assert delta(grown(tokens), model(tokens)) <= 1e-9
    for level in model.config.levels:
        assert delta(grown(tokens, widths=level), model(tokens, widths=level)) <= 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_growth_is_exact_with_shared_kv_heads_and_without_value_embeddings(config, tokens, kv_heads):
    model = double(randomize(build_model(replace(config, n_kv_head=kv_heads))))
    for table in model.value_embeds.values():
        table.weight.zero_()
    grown = grow(model, 96)
    assert grown.config.n_kv_head == 6 * kv_heads // 4 and delta(grown(tokens), model(tokens)) <= 1e-9
    assert all(not t.weight[:, :16 * kv_heads].any() and t.weight[:, 16 * kv_heads:].any()
               for t in grown.value_embeds.values())


@torch.no_grad()
def test_a_chain_of_growths_is_exact(model, tokens):
    grown = grow(grow(model, 80, Init(seed=1)), 128, Init(seed=2))
    assert delta(grown(tokens), model(tokens)) <= 1e-9 and set(grown.config.levels) == {16, 32, 64, 128}
    lazily = State.of(model)
    c = model.config
    for width, seed in ((80, 1), (128, 2)):
        c, lazily = grow_state(c, lazily, width, Init(seed=seed))
    assert all(delta(lazily.get(k, torch.float64), v) <= 1e-6 for k, v in grown.state_dict().items())


@torch.no_grad()
def test_growth_in_fp32_passes_its_own_proof(model, tokens):
    before = model.float()
    before.compute_dtype = torch.float32
    after = grow(before, 96)
    proof = prove(before, after)
    assert unchanged(proof) and proof["max_delta_logit"] < 2e-5 and proof["top1_agreement"] == 1
    assert proof["level"] == {"width": 64, "max_delta_logit": pytest.approx(0, abs=2e-5), "top1_agreement": 1}
    after.lm_head.weight[0] += 0.01
    assert not unchanged(prove(before, after))
    after.lm_head.weight[0] = float("nan")
    assert not unchanged(prove(before, after))


@torch.no_grad()
def test_old_entries_are_where_they_were(model, config):
    """Heads are not scrambled, the SSM's parameters keep what they learned, and all rows of the vocabulary survive."""
    grown = grow(model, 80)
    a, b = model.transformer.h[1].mamba, grown.transformer.h[1].mamba
    inner, groups, heads = a.d_inner, a.ngroups * a.d_state, a.nheads
    starts = [0, b.d_inner, 2 * b.d_inner, 2 * b.d_inner + b.ngroups * b.d_state, 2 * b.d_inner + 2 * b.ngroups * b.d_state]
    old = a.in_proj.weight.split([inner, inner, groups, groups, heads])
    for start, rows in zip(starts, old):
        assert torch.equal(b.in_proj.weight[start:start + len(rows), :64], rows)
    for name in ("dt_bias", "A_log", "D", "norm.weight"):
        assert torch.equal(b.get_parameter(name)[:len(a.get_parameter(name))], a.get_parameter(name))
    dt = torch.nn.functional.softplus(b.dt_bias[heads:])
    assert (dt >= 9e-4).all() and (dt <= 0.11).all()  # new heads: mamba-ssm's initialisation
    A = b.A_log[heads:].exp()
    assert (A >= 1).all() and (A <= 16).all() and len(A.unique()) == len(A) and (b.D[heads:] == 1).all()
    assert torch.equal(grown.lm_head.weight[:, :64], model.lm_head.weight)
    assert torch.equal(grown.transformer.wte.weight[:, :64], model.transformer.wte.weight)
    assert not grown.transformer.wte.weight[:, 64:].any()
    for name, p in model.named_parameters():
        assert torch.equal(grown.get_parameter(name)[~is_new(name, config, grown.config)], p.flatten()), name


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is dead, nothing old is disturbed

def loss_of(model, tokens, levels=None):
    """The language loss, and one that trains the controls on what they see; levels: that many of the predictor's."""
    loss, h = model(tokens[:, :-1], tokens[:, 1:])
    e = torch.nn.functional.embedding(tokens, model.transformer.wte.weight).detach()
    plan = model.predictor(e, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([0.5, 0.9]))
    gate = sum(model.gate(h, i) for i in range(len(model.config.exit_points)))
    return loss + gate.square().mean() + plan[..., :levels].log_softmax(-1)[:, :, 0].mean()


@pytest.mark.parametrize("kind", ["lora", "copy", "svd"])
def test_every_new_entry_learns_and_old_gradients_are_as_before(model, tokens, kind):
    grown = grow(model, 96, Init(kind, rank=8))
    for m in (model, grown):
        loss_of(m, tokens, len(model.config.levels)).backward()
    fresh = {n: is_new(n, model.config, grown.config) for n, _ in grown.named_parameters()}
    for n, p in model.named_parameters():
        # the controls compute in fp32
        atol = {"predictor": 1e-4, "gate": 1e-6}.get(n.split(".")[0], 1e-9)
        torch.testing.assert_close(grown.get_parameter(n).grad[~fresh[n]], p.grad.flatten(), atol=atol, rtol=1e-6)
    grown.predictor.admit_new_levels()  # as training does first
    grown.gate.admit_new_units()
    opt, seen = torch.optim.SGD(grown.parameters(), lr=0.5), {}
    for _ in range(3):
        for n, p in grown.named_parameters():
            seen[n] = seen.get(n, 0) + p.grad.abs()
        opt.step()
        opt.zero_grad()
        loss_of(grown, tokens).backward()
    rows = torch.zeros(grown.config.vocab_size, dtype=torch.bool)
    rows[tokens[:, :-1].unique()] = True
    for n, new in fresh.items():
        touched = new & rows[:, None] if n.startswith(("value_embeds.", "transformer.wte")) else new
        # the gate and the predictor see tiny models here: a relu^2 unit may be off for every token
        share = 0.9 if n.startswith(("gate.", "predictor.")) else 1
        assert (seen[n][touched] > 0).sum() >= share * touched.sum(), n


def test_zero_init_is_dead_where_it_says_so(model, tokens):
    grown = grow(model, 96, Init("zero"))
    loss, _ = grown(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert not grown.transformer.h[0].mlp.c_fc.weight.grad[4 * 64:].any()


@torch.no_grad()
@pytest.mark.parametrize("width", [80, 128])
def test_the_gate_keeps_its_answers_and_the_predictor_its_choices(model, tokens, width):
    grown = grow(model, width)
    c, new = model.config, grown.config
    h = model.hidden(tokens)
    g = grown.hidden(tokens)
    assert delta(g[..., :64], h) <= 1e-9 and not g[..., 64:].any()
    noise = torch.randn(*g.shape[:-1], width - 64)
    for i in range(len(c.exit_points)):
        assert delta(grown.gate(g, i), model.gate(h, i)) <= 1e-6
        assert delta(grown.gate(torch.cat((g[..., :64], noise), -1), i), model.gate(h, i)) <= 1e-6  # whatever is new
    e, valid = torch.randn(5, 9, 64), torch.ones(5, 9, dtype=torch.bool)
    model.predictor.out_weight.normal_(std=3)
    grown = grow(model, width)
    budget = torch.rand(5)
    a = model.predictor(e, valid, budget)
    b = grown.predictor(torch.cat((e, torch.zeros(5, 9, width - 64)), -1), valid, budget)
    assert delta(b[..., :len(c.levels)], a) <= 1e-5
    grown.predictor.admit_new_levels()
    d = grown.predictor(torch.cat((e, torch.zeros(5, 9, width - 64)), -1), valid, budget)
    assert delta(d[..., :len(c.levels)], a) <= 1e-5 and bool((d > b)[..., len(c.levels):].all())
    shares = level_shares(grown)[0]
    for price in (0.0, 3.0):
        old = choose(a, torch.tensor(c.levels), shares[:, :len(c.levels)], price)
        for values in (b, d):
            assert torch.equal(choose(values, torch.tensor(new.levels), shares, price), old) or (values is d and price == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

def test_weights_depend_on_the_seed_and_the_name_alone(model):
    def make(names, seed=0):
        _, state = grow_state(model.config, State.of(model), 96, Init(seed=seed))
        return {n: state.get(n, torch.float32) for n in names}
    names = list(shapes_of(model.config))
    a, b, other = make(names), make(names[::-1]), make(names, seed=1)
    assert all(torch.equal(a[n], b[n]) for n in names)
    assert not torch.equal(a["lm_head.weight"], other["lm_head.weight"])
    half = len(names) // 2
    _, hybrid = insert_state(GPTConfig(64, 300, 3, 4, 4, 64), State.of(build_model(GPTConfig(64, 300, 3, 4, 4, 64))), 0)
    new = [n for n in hybrid.shapes if ".mamba." in n]
    first = {n: hybrid.get(n, torch.float32) for n in new}
    assert half and all(torch.equal(first[n], hybrid.get(n, torch.float32)) for n in new[::-1])


@pytest.mark.parametrize("kind", ["lora", "svd", "copy"])
def test_new_entries_have_the_scale_of_the_old(config, kind):
    model = randomize(build_model(config))
    for init, ratio in ((Init(kind, rank=16), 1), (Init(kind, rank=16, scale=0.5), 0.5)):
        grown = grow(model, 128, init)
        for name in ("transformer.h.0.attn.c_q.weight", "transformer.h.1.mamba.in_proj.weight", "lm_head.weight",
                     "transformer.h.2.mlp.c_fc.weight"):
            new = is_new(name, config, grown.config)
            w = grown.get_parameter(name)
            assert w[new].detach().std() / w[~new].detach().std() == pytest.approx(ratio, rel=0.25), name
    if kind != "copy":
        grown = grow(model, 128, Init(kind, std=0.3))
        assert grown.lm_head.weight[:, 64:].detach().std() == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize("fields, words", [
    ({"kind": "random"}, "--init random is not known: choose one of lora, copy, svd, zero"), ({"rank": 0}, "--rank is 0"),
    ({"std": -1.0}, "--std is -1.0"), ({"scale": float("nan")}, "--scale is nan")])
def test_bad_inits_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Init(**fields)


@pytest.mark.parametrize("width, words", [(64, "not above the present width 64"), (32, "scripts.extract"),
                                          (90, "multiple of 16, such as 80, 96"), (65, "such as 80")])
def test_widths_that_cannot_be_are_refused(config, width, words):
    with pytest.raises(ValueError, match=words):
        grown_config(config, width)


def test_a_submodel_does_not_grow(config):
    with pytest.raises(ValueError, match="extracted sub-model"):
        grown_config(replace(config, top_width=32), 80)


# ---------------------------------------------------------------------------------------------------------------------
# Order

@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "data"])
def test_order_is_exact_and_puts_the_heavy_first(base, tokens, how):
    base = double(base)
    state = State.of(base)
    order = order_by_weights(base.config, state) if how == "weights" else order_by_data(base.config, state, tokens)
    turned = build_model(base.config).double()
    ckpt.load_state(turned, order_state(base.config, state, order).dict(), "x")
    turned.compute_dtype = torch.float64
    assert delta(turned(tokens), base(tokens)) <= 1e-9
    Q = order.rotation
    assert delta(Q.T @ Q, torch.eye(64, dtype=torch.float64)) <= 1e-12
    power = torch.stack([turned.hidden(tokens).flatten(0, 1).square().mean(0)]).sum(0)
    assert power[:32].sum() > 1.2 * power[32:].sum()
    hybrid = double(insert(turned.float(), 0))
    assert delta(hybrid(tokens), base(tokens)) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Streaming

@torch.no_grad()
def test_a_streamed_model_is_the_model(hybrid, tokens):
    model = streamed(hybrid.config, State.of(hybrid))
    for widths in (None, "normal"):
        assert torch.equal(model(tokens, widths=widths), hybrid(tokens, widths=widths))
    assert all(p.is_meta for p in model.parameters())


def test_files_written_lazily_are_torch_files(hybrid, tmp_path):
    state = State.of(hybrid)
    for dtype in (torch.float32, torch.bfloat16):
        save_lazy(leaves(state, dtype), tmp_path / "model.pt")
        for mmap in (True, False):
            read = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
            assert read.keys() == state.shapes.keys()
            for k, v in read.items():
                assert torch.equal(v, state.get(k, state.stored(k, dtype))), k
                assert v.data_ptr() % 64 == 0 or not mmap
        assert read["lm_head.weight"].dtype == dtype
        assert read["transformer.h.1.mamba.A_log"].dtype == read["gate.c_fc.weight"].dtype == torch.float32
    torch.save(hybrid.state_dict(), tmp_path / "plain.pt")
    save_lazy(leaves(state, torch.float32), tmp_path / "lazy.pt")
    assert abs((tmp_path / "plain.pt").stat().st_size - (tmp_path / "lazy.pt").stat().st_size) < 5000
    again = open_state(tmp_path / "lazy.pt", hybrid.config)
    assert all(torch.equal(again.get(k, torch.float32), v) for k, v in hybrid.state_dict().items())


def test_states_that_cannot_be_read_are_named(hybrid, tmp_path):
    state = dict(hybrid.state_dict())
    torch.save(state, tmp_path / "m.pt")
    whole = open_state(tmp_path / "m.pt", hybrid.config)
    os.truncate(tmp_path / "m.pt", 300_000)  # after it was opened
    with pytest.raises(ValueError, match="truncated in"):
        whole.dict()
    with pytest.raises(ValueError, match="truncated or no checkpoint"):
        open_state(tmp_path / "m.pt", hybrid.config)


def test_nested_trees_are_written(tmp_path):
    tree = [{"state": {0: {"a": Leaf(torch.Size([2, 3]), torch.float32, lambda: torch.ones(2, 3))}}, "lr": (0.1, 2)}]
    save_lazy(tree, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)[0]["state"][0]["a"], torch.ones(2, 3))
    with pytest.raises(AssertionError, match="would be left out"):
        save_lazy({"a": torch.ones(2)}, tmp_path / "x.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

def test_optimizer_state_grows_along(model, tokens, tmp_path):
    model = model.float()
    model.compute_dtype = torch.float32
    opts = setup_optimizers(model)
    for _ in range(2):
        loss_of(model, tokens).backward()
        for o in opts:
            o.step()
        model.zero_grad()
    torch.save([o.state_dict() for o in opts], tmp_path / "optim.pt")
    grown = grow(model, 96)
    save_lazy(grow_optimizers(ckpt.load_torch(tmp_path / "optim.pt"), model.config, grown.config), tmp_path / "grown.pt")
    new = setup_optimizers(grown)
    assert ckpt.carry_optimizers(tmp_path / "grown.pt", new) == len(list(grown.parameters()))
    # it is also an ordinary optimizer file
    for o, state in zip(setup_optimizers(grown), ckpt.load_torch(tmp_path / "grown.pt")):
        o.load_state_dict(state)
    mine = {n: o.state[p] for o in new for g in o.param_groups for n, p in zip(g["param_names"], g["params"])}
    for o in opts:
        for g in o.param_groups:
            for n, p in zip(g["param_names"], g["params"]):
                fresh = is_new(n, model.config, grown.config)
                for k, v in o.state[p].items():
                    w = mine[n][k]
                    assert torch.equal(w[~fresh], v.flatten()) and not w[fresh].any() if v.ndim else torch.equal(w, v)
    loss_of(grown, tokens).backward()
    for o in new:
        o.step()


def test_optimizer_states_without_names_or_of_other_models_are_refused(model, config, tmp_path):
    opts = setup_optimizers(model)
    state = [o.state_dict() for o in opts]
    for g in state[0]["param_groups"]:
        del g["param_names"]
    with pytest.raises(ValueError, match="does not name its parameters"):
        grow_optimizers(state, config, grown_config(config, 80))
    state = [o.state_dict() for o in opts]
    state[0]["param_groups"][0]["param_names"][0] = "smear.weight"
    with pytest.raises(ValueError, match=r"another model \(it has smear.weight\)"):
        grow_optimizers(state, config, grown_config(config, 80))
    for bad in ({}, [1], [{"a": 1}]):
        torch.save(bad, tmp_path / "o.pt")
        if bad:
            with pytest.raises(ValueError, match="optimizer"):
                ckpt.carry_optimizers(tmp_path / "o.pt", opts)


# ---------------------------------------------------------------------------------------------------------------------
# The command

@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))] * 3,
                                         300)


@pytest.fixture
def home(base, config, tokenizer, tmp_path, monkeypatch):
    """A base dir with nanochat's layout for a tiny d32 and a hybrid of it that can grow."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    d32 = tmp_path / "chatsft_checkpoints/d32"
    ckpt.save_step(d32, 650, base, [], {})
    tokenizer.save(d32)
    ckpt.save_export(tmp_path / "hybrid_checkpoints/d32_64", randomize(build_model(config)), tokenizer,
                     {"tag": "d32", "provenance": {"surgery": "insert"}, "loader": {"batches": 3}})
    return tmp_path


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fails(capsys, args, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        surgery.main(args)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert e.value.code == 2 and len(lines) == 1, lines
    assert all(w in lines[0] for w in words), lines[0]


def test_the_seed_workflow(home, tokens, capsys):
    """Insert, then grow twice, by the documented commands, at toy size."""
    surgery.main(["--new-dim=64", "--order=none"])
    info = ckpt.load_json(home / "hybrid_checkpoints/d32_64/config.json")
    assert info["provenance"]["source_sha256"] == ckpt.sha256(home / "chatsft_checkpoints/d32/model_000650.pt")
    assert info["provenance"]["command"].endswith("--new-dim=64 --order=none") and info["proof"]["max_delta_logit"] <= 1e-4
    surgery.main(["--expand-from=64", "--new-dim=128"])
    out = capsys.readouterr().out
    assert "surgery's; there is no trained export" in out and "max |delta logit|" in out
    surgery.main(["--expand-from=128", "--new-dim=192", "--dtype=bfloat16"])
    a, b = (ckpt.load(home / f"hybrid_checkpoints/d32_{w}") for w in (64, 192))
    assert b.model.config.n_embd == 192
    assert b.info["proof"]["cast"]["max_delta_logit"] > 0 and b.info["proof"]["level"]["width"] == 64
    assert b.info["provenance"]["from"]["from"]["surgery"] == "insert"
    with torch.no_grad():
        assert compare(a.model(tokens), b.model(tokens))["max_delta_logit"] < 0.1  # the cast
    assert torch.load(home / "hybrid_checkpoints/d32_192/model.pt", weights_only=True, mmap=True)[
        "lm_head.weight"].dtype == torch.bfloat16


def test_growth_takes_the_trained_export_if_there_is_one(home, config, tokenizer, capsys):
    for end in ("", "_unfrozen"):
        ckpt.save_export(home / f"fractal_checkpoints/d32_64{end}", randomize(build_model(config)), tokenizer, {})
        surgery.main(["--expand-from=64", "--new-dim=80"])
        assert f"d32_64{end}/model.pt (the trained export)" in capsys.readouterr().out
    (home / "fractal_checkpoints/d32_64_unfrozen/model.pt").unlink()  # half an export is none
    surgery.main(["--expand-from=64", "--new-dim=80"])
    assert "d32_64/model.pt (the trained export)" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(home, capsys):
    before = listing(home)
    surgery.main(["--expand-from=64", "--new-dim=80", "--dry-run"])
    out = capsys.readouterr().out
    assert listing(home) == before
    assert all(w in out for w in ("width 64 -> 80", "mamba", "total", "GB of disk are free", "min on", "dry run"))


def test_user_errors_are_one_line_and_write_nothing(home, base, config, tokenizer, capsys, monkeypatch):
    before = listing(home)
    grown = ["--expand-from=64", "--new-dim=80"]
    fails(capsys, ["--new-dim=128"], "is not the base's width 64", "--expand-from=64 --new-dim=128")
    fails(capsys, ["--init=svd"], "--init has no effect on insertion")
    fails(capsys, ["--expand-from=32", "--new-dim=64"], "no hybrid d32_32", "--new-dim=32")
    fails(capsys, ["--expand-from=64", "--new-dim=90"], "multiple of 16")
    fails(capsys, [*grown, "--tag=d9"], "no hybrid d9_64")
    fails(capsys, [*grown, "--rank=0"], "--rank is 0")
    fails(capsys, [*grown, "--step=3"], "no effect with --expand-from")
    fails(capsys, [*grown, "--with-optimizer"], "no optimizer's state", "--with-optimizer")
    fails(capsys, [*grown, "--src", str(home / "chatsft_checkpoints/d32")], "holds a base GPT")
    fails(capsys, ["--expand-from=80", "--new-dim=96", "--src", str(home / "hybrid_checkpoints/d32_64")], "has width 64")
    fails(capsys, [*grown, "--dst", str(home)], "is no export", "--dst")
    fails(capsys, [*grown, "--dst", str(home / "hybrid_checkpoints/d32_64")], "both the source and the destination")
    fails(capsys, ["--src", str(home / "nowhere")], "no folder", "--download")
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
        fails(capsys, grown, "of disk are free", "--dst", "--dtype bfloat16")
    if not torch.cuda.is_available():
        fails(capsys, [*grown, "--device-type=cuda"], "sees no CUDA device")
    assert listing(home) == before
    file = home / "chatsft_checkpoints/d32/model_000650.pt"
    state = dict(torch.load(file, weights_only=True))
    torch.save({**state, "smear_gate.weight": torch.zeros(1, 24)}, file)
    fails(capsys, [], "unexpected smear_gate.weight")
    meta = ckpt.load_json(file.with_name("meta_000650.json"))
    meta = {"model_config": {k: v for k, v in meta["model_config"].items() if k not in ckpt.LATER_FIELDS}}
    ckpt.save_json(meta, file.with_name("meta_000650.json"))  # as nanochat itself writes it
    fails(capsys, [], "vintage G", "missing", "resid_lambdas")
    torch.save({k: v for k, v in state.items() if k != "lm_head.weight"}, file)
    fails(capsys, [], "missing lm_head.weight")
    torch.save(state, file)
    ckpt.save_json({**meta, "model_config": {**meta["model_config"], "n_layer": 2}}, file.with_name("meta_000650.json"))
    fails(capsys, [], "n_layer 3, but the meta file says 2")
    ckpt.save_json({**meta, "model_config": {**meta["model_config"], "window_pattern": "SSSL"}},
                   file.with_name("meta_000650.json"))
    fails(capsys, [], "vintage C", "missing resid_lambdas")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_what_was_there(home, config, capsys, monkeypatch, stop):
    surgery.main(["--expand-from=64", "--new-dim=80"])
    out = home / "hybrid_checkpoints/d32_80"
    before, digest = listing(home), ckpt.sha256(out / "model.pt")
    real, calls = os.pwrite, []

    def pwrite(*a):
        calls.append(a)
        if len(calls) > 20:
            raise stop
        return real(*a)
    monkeypatch.setattr("os.pwrite", pwrite)
    with pytest.raises(SystemExit) as e:
        surgery.main(["--expand-from=64", "--new-dim=80", "--seed=5"])
    assert e.value.code == (130 if stop is KeyboardInterrupt else 2)
    assert stop is KeyboardInterrupt or "no room left" in capsys.readouterr().err
    assert listing(home) == before and ckpt.sha256(out / "model.pt") == digest


def test_a_killed_run_leaves_nothing_that_looks_whole(home, capsys):
    """SIGKILL in the middle of writing: no folder of the result's name; the next run cleans up and succeeds."""
    program = ("import os, signal, sys\nfrom scripts import surgery\nreal, n = os.pwrite, [0]\n"
               "def pwrite(*a):\n    n[0] += 1\n    n[0] > 20 and os.kill(os.getpid(), signal.SIGKILL)\n"
               "    return real(*a)\n"
               "os.pwrite = pwrite\nsurgery.main(['--expand-from=64', '--new-dim=80'])\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == -9, done.stderr
    folder = home / "hybrid_checkpoints"
    assert not (folder / "d32_80").exists() and list(folder.glob(".d32_80.*.new"))
    fails(capsys, ["--expand-from=80", "--new-dim=96"], "no hybrid d32_80")
    surgery.main(["--expand-from=64", "--new-dim=80"])
    assert sorted(p.name for p in folder.iterdir()) == ["d32_64", "d32_80"]


def test_config_holds_everything(home, config):
    surgery.main(["--expand-from=64", "--new-dim=80", "--init=svd", "--rank=4", "--seed=9"])
    info = json.loads((home / "hybrid_checkpoints/d32_80/config.json").read_text())
    assert ckpt.config_from_dict("hybrid", info["config"]) == grown_config(config, 80) and info["loader"] == {"batches": 3}
    assert info["config"].keys() == asdict(grown_config(config, 80)).keys()
    assert info["provenance"]["init"] == {"kind": "svd", "rank": 4, "std": None, "scale": 1.0, "seed": 9}
    assert {"torch", "python", "nanochat"} <= info["provenance"]["versions"].keys()
    assert info["written"]["peak_rss_mb"] > 0 and info["proof"]["level"]["width"] == 64
    assert language_parameters(ckpt.load(home / "hybrid_checkpoints/d32_80").model)


def test_training_goes_on_across_a_growth_step(home, tokenizer, base, capsys, monkeypatch):
    """Base with its optimizer -> hybrid -> some training -> growth with the optimizer -> training takes its state over."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    (home / "docs").mkdir()
    for i in range(8):
        (home / "docs" / f"{i}.txt").write_text("".join(chr(97 + j * (i + 3) % 26) + " ab cd"[j % 6] for j in range(3000)))
    opts = setup_optimizers(base)
    base(torch.arange(40)[None], torch.arange(40)[None])[0].backward()
    for o in opts:
        o.step()
    ckpt.save_step(home / "chatsft_checkpoints/d32", 651, base, opts, {})
    train = ["--data", str(home / "docs"), "--unfreeze", "--num-iterations", "2", "--device-batch-size", "2",
             "--eval-tokens", "128", "--eval-every", "-1"]
    surgery.main(["--with-optimizer", "--order=none"])
    fractal_train.main(["--checkpoint", str(home / "hybrid_checkpoints/d32_64"), *train])
    assert "parameters go on with the optimizer's state" in capsys.readouterr().out
    surgery.main(["--expand-from=64", "--new-dim=128", "--with-optimizer"])
    fractal_train.main(["--checkpoint", str(home / "hybrid_checkpoints/d32_128"), *train])
    out = capsys.readouterr().out
    assert "d32_64_unfrozen/model.pt (the trained export)" in out and "parameters go on with the optimizer's state" in out
    fails(capsys, ["--with-optimizer", "--order=weights"], "do not survive --order weights")
