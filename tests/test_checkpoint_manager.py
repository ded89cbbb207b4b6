"""Checkpoints: whole or not at all, named faults, hostile files, and a full disk."""
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as ckpt
from nanochat import step_checkpoint
from nanochat.checkpoint_manager import build_model
from nanochat.common import atomic_write
from nanochat.optim import setup_optimizers
from nanochat.tokenizer import Tokenizer


def test_step_roundtrip_with_nanochats_names(base, tokens, tmp_path):
    opts = setup_optimizers(base)
    loss, _ = base(tokens, tokens)
    loss.backward()
    for o in opts:
        o.step()
    ckpt.save_step(tmp_path, 650, base, opts, {"val_bpb": 1.5})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta_000650.json", "model_000650.pt", "optim_000650.pt"]
    model, meta = ckpt.load_step(tmp_path, ckpt.last_step(tmp_path))
    assert meta["val_bpb"] == 1.5 and model.config == base.config
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.named_parameters())
    fresh = setup_optimizers(model)
    ckpt.carry_optimizers(tmp_path / "optim_000650.pt", fresh)
    for a, b in zip(opts, fresh):
        sa, sb = a.state_dict()["state"], b.state_dict()["state"]
        assert sa.keys() == sb.keys() and all(torch.equal(sa[i][k], sb[i][k]) for i in sa for k in sa[i])


def test_optimizer_state_lands_on_the_parameters_device(base, tokens, tmp_path, monkeypatch):
    """
    Moments and counts of steps, carried and resumed: torch's fused AdamW moves neither. The meta device stands in for a GPU.
    """
    opts = setup_optimizers(base)
    base(tokens, tokens)[0].backward()
    for o in opts:
        o.step()
    ckpt.save_optimizers(tmp_path / "optim.pt", opts)
    saver = step_checkpoint.Saver(tmp_path, keep=1)
    saver.save(1, base, opts, {}, {})
    saver.wait()
    own = sorted((n, k) for o in opts for g in o.param_groups for n, p in zip(g["param_names"], g["params"])
                 for k in o.state[p])
    assert {k for _, k in own} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    monkeypatch.setattr(step_checkpoint.dcp, "load", lambda *a, **k: None)  # there is nowhere to read to
    for load in (lambda model, fresh: ckpt.carry_optimizers(tmp_path / "optim.pt", fresh),
                 lambda model, fresh: step_checkpoint.load(tmp_path / "step_000001", model, fresh)):
        model = build_model(base.config, "meta")
        fresh = setup_optimizers(model)
        load(model, fresh)
        state = {(n, k): v for o in fresh for g in o.param_groups for n, p in zip(g["param_names"], g["params"])
                 for k, v in o.state[p].items()}
        assert sorted(state) == own and {v.device.type for v in state.values()} == {"meta"}


def test_a_nanochat_file_loads(base, tmp_path):
    """nanochat's own: a compile prefix, a bf16 embedding, and a meta file without our 'kind'."""
    state = {"_orig_mod." + k: v for k, v in base.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    torch.save(state, tmp_path / "model_000001.pt")
    fields = {k: v for k, v in asdict(base.config).items() if k not in ckpt.LATER_FIELDS}
    ckpt.save_json({"model_config": fields, "step": 1}, tmp_path / "meta_000001.json")
    model, _ = ckpt.load_step(tmp_path, 1)
    assert model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_half_a_checkpoint_is_none(base, tmp_path):
    for step in (2, 3):
        ckpt.save_step(tmp_path, step, base, [], {})
    assert ckpt.list_steps(tmp_path) == [2, 3]
    (tmp_path / "meta_000003.json").unlink()  # as if killed before the last file was written
    assert ckpt.last_step(tmp_path) == 2
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*train one first"):
        ckpt.last_step(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["some words and some more words, said some of them again and again"] * 3 + [
        "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))], 300)


def test_export_roundtrip(hybrid, tokens, tokenizer, tmp_path):
    assert tokenizer.get_vocab_size() == hybrid.config.vocab_size
    ckpt.save_export(tmp_path / "out", hybrid, tokenizer, {"tag": "t"})
    for path in (tmp_path / "out", tmp_path / "out" / "model.pt"):
        model, its, info, file = ckpt.load(path)
        assert info["tag"] == "t" and torch.equal(model(tokens), hybrid(tokens))
        assert its.encode("said some") == tokenizer.encode("said some") and file == tmp_path / "out" / "model.pt"
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True, mmap=True)
    assert state.keys() == hybrid.state_dict().keys()


def test_an_exports_config_takes_its_place_last(hybrid, tokenizer, tmp_path, monkeypatch):
    """A run that was killed between the two is known by it: its config is not yet that of the new weights."""
    placed, replace_file = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(b.name), replace_file(a, b)))
    ckpt.save_export(tmp_path, hybrid, tokenizer, {})
    assert placed[-2:] == ["model.pt", "config.json"]


def test_a_named_file_is_the_one_that_loads(base, tokenizer, tmp_path):
    for step in (1, 2):
        with torch.no_grad():
            base.lm_head.weight.fill_(step)
        ckpt.save_step(tmp_path, step, base, [], {})
    tokenizer.save(tmp_path / "tokenizer")
    assert ckpt.load(tmp_path).model.lm_head.weight[0, 0] == 2
    assert ckpt.load(tmp_path / "model_000001.pt").model.lm_head.weight[0, 0] == 1
    for name in ("model_000003.pt", "typo.pt", "model.pt"):
        with pytest.raises(FileNotFoundError, match=name):
            ckpt.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no model in .*scripts.surgery"):
        ckpt.load(tmp_path / "none")


def test_a_tokenizer_of_another_size_is_refused(base_config, tokenizer, tmp_path):
    model = build_model(replace(base_config, vocab_size=301))
    ckpt.save_export(tmp_path, model, tokenizer, {})
    with pytest.raises(ValueError, match="has 300 ids, the model 301"):
        ckpt.load(tmp_path)


def test_leftovers_of_a_killed_run_are_removed(base, tmp_path):
    ckpt.save_step(tmp_path, 1, base, [], {})
    for name in ("model_000002.pt", "optim_000002.pt", ".model_000003.pt.abc.tmp", ".curves.png.abc.tmp", "notes_2024.md",
                 "model.pt"):
        (tmp_path / name).write_text("x")
    ckpt.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["meta_000001.json", "model.pt", "model_000001.pt", "notes_2024.md",
                                            "optim_000001.pt"]
    ckpt.remove_leftovers(tmp_path, everything=True)
    assert os.listdir(tmp_path) == ["notes_2024.md"]


# --- what a run resumes from

def test_the_saver_leaves_the_gpus_alone(base, tmp_path, monkeypatch):
    """On a GPU node a stream, opened in the saver's thread, would open a context on GPU 0 for every rank."""
    def opened(*_, **__):
        raise AssertionError("the saver's thread uses CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_stream", "Stream", "stream", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, opened)
    saver = step_checkpoint.Saver(tmp_path, keep=1)
    saver.save(1, base, [], {}, {})
    saver.wait()
    assert step_checkpoint.steps(tmp_path) == [1]


@pytest.fixture
def saved(base, tmp_path):
    """Checkpoints of steps 1 and 2."""
    saver = step_checkpoint.Saver(tmp_path, keep=2)
    for step in (1, 2):
        saver.save(step, base, [], {}, {"loader": step})
    saver.wait()
    assert step_checkpoint.find_whole(tmp_path)[0] == 2
    return tmp_path


def forge(path, change):
    """Changes a meta.json as an attacker would, so that its sum is right."""
    meta = ckpt.load_json(path / "meta.json")
    del meta["crc32"]
    change(meta)
    ckpt.save_json({**meta, "crc32": step_checkpoint._crc(meta)}, path / "meta.json")


def test_damage_everywhere_stops_and_touches_nothing(saved):
    """Nobody starts over without having said so, however often the same command is given."""
    (saved / "step_000001" / "rank_0.json").write_text("[]")
    assert step_checkpoint.find_whole(saved)[0] == 2
    (saved / "step_000002" / "meta.json").write_text("{}")
    for lost in (False, True, True):
        step_checkpoint.remove_leftovers(saved)
        with pytest.raises(ValueError, match=r"step_000002 is damaged .*step_000001 is damaged \(rank_0.json has another "
                                             r"size.*start over with --fresh"):
            step_checkpoint.find_whole(saved)
        assert sorted(os.listdir(saved)) == ["step_000001", "step_000002"]
        if not lost:
            (saved / "step_000002" / "__0_0.distcp").unlink()
    (saved / "step_000001" / "meta.json").unlink()
    (saved / "step_000002" / "meta.json").unlink()
    step_checkpoint.remove_leftovers(saved)
    with pytest.raises(ValueError, match=r"no meta\.json.*start over with --fresh"):
        step_checkpoint.find_whole(saved)
    step_checkpoint.remove_leftovers(saved, everything=True)
    assert os.listdir(saved) == [] and step_checkpoint.find_whole(saved) is None


def test_a_hostile_meta_names_no_file_outside_and_no_device(saved, monkeypatch, capsys):
    newest, secret = saved / "step_000002", saved / "secret.json"
    secret.write_text("{}")
    os.mkfifo(newest / "__0_9.distcp")  # whoever reads it waits for ever
    read, check, meta = [], step_checkpoint._sum, (newest / "meta.json").read_bytes()
    monkeypatch.setattr(step_checkpoint, "_sum", lambda path: (read.append(path), check(path))[1])
    for name, words in (("../secret.json", "lists other files"), (str(secret), "lists other files"),
                        ("rank_1.json", "lists other files"), ("__0_9.distcp", "__0_9.distcp is no file"),
                        ("__0_8.distcp", "__0_8.distcp is no file, or not there")):
        forge(newest, lambda m, name=name: m["files"].update({name: list(check(secret))}))
        assert step_checkpoint.find_whole(saved)[0] == 1
        assert words in capsys.readouterr().out
        (saved / "damaged_000002").rename(newest)
        (newest / "meta.json").write_bytes(meta)
    forge(newest, lambda m: m.update(world=2))
    assert step_checkpoint.find_whole(saved)[0] == 1
    assert {path.name for path in read} == {"rank_0.json", ".metadata", "__0_0.distcp"}


def test_the_reader_needs_no_asserts(saved):
    """`python -O` removes them: what guards against hostile files must stay."""
    source = Path(step_checkpoint.__file__)
    module = types.ModuleType("optimized")
    exec(compile(source.read_text(), source, "exec", optimize=1), module.__dict__)
    path = saved / "step_000002"
    genuine = (path / ".metadata").read_bytes()
    outside, more = pickle.loads(genuine), pickle.loads(genuine)
    next(iter(outside.storage_data.values())).relative_path = "../secret"
    more.state_dict_metadata["model.x"] = torch.Size([1])
    for made, words in ((outside, "names files outside"), (more, "more than tensors")):
        (path / ".metadata").write_bytes(pickle.dumps(made))
        with pytest.raises(ValueError, match=words):
            module.Reader(path).read_metadata()
    (path / ".metadata").write_bytes(genuine)
    assert module.Reader(path).read_metadata().state_dict_metadata.keys() == outside.state_dict_metadata.keys()


@pytest.mark.parametrize("sees", [[True, True, True], [True, True, False]])
def test_all_machines_must_share_the_runs_folder(tmp_path, monkeypatch, sees):
    """Rank 0's part; what the others answer is made up."""
    told = []

    def everyone(value):
        told.append(value)
        return [value] * 3 if len(told) == 1 else [value, *((seen, f"node{r}") for r, seen in enumerate(sees) if r)]
    monkeypatch.setattr(step_checkpoint, "everyone", everyone)
    monkeypatch.setattr(step_checkpoint, "get_rank", lambda: (0, 3))
    if all(sees):
        step_checkpoint.check_shared(tmp_path / "run")
    else:
        with pytest.raises(ValueError, match=r"^node2 did not see in .*run what .*NANOCHAT_BASE_DIR to one that all"):
            step_checkpoint.check_shared(tmp_path / "run")
    assert told[1][0] and os.listdir(tmp_path / "run") == []
    # another rank's part: it waits for a file that does not come
    monkeypatch.setattr(step_checkpoint, "get_rank", lambda: (2, 3))
    monkeypatch.setattr(step_checkpoint, "everyone", lambda value: ["x.tmp"] * 3 if value is None else [
        (True, "node0"), (True, "node1"), value])
    with pytest.raises(ValueError, match="did not see"):
        step_checkpoint.check_shared(tmp_path / "run", seconds=0.1)
    (tmp_path / "run" / "x.tmp").touch()
    step_checkpoint.check_shared(tmp_path / "run")
    step_checkpoint.remove_leftovers(tmp_path / "run")


@pytest.mark.parametrize("state", [{1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()},
                                   {"a": torch.zeros(2, dtype=torch.complex64)}, {"a": 1.0}])
def test_states_of_other_things_are_refused(base, state):
    with pytest.raises(ValueError, match="dense tensors of real numbers"):
        ckpt.load_state(base, state, "x.pt")


def test_a_hostile_size_allocates_nothing(base, tmp_path):
    ckpt.save_step(tmp_path, 1, base, [], {})
    meta = ckpt.load_json(tmp_path / "meta_000001.json")
    meta["model_config"]["vocab_size"] = 10 ** 12
    ckpt.save_json(meta, tmp_path / "meta_000001.json")
    with pytest.raises(ValueError, match="of another shape"):
        ckpt.load_step(tmp_path, 1)


def test_faulty_keys_are_named_and_nothing_is_loaded(base):
    state = dict(base.state_dict())
    state["transformer.h.0.attn.c_q.weight"] = torch.zeros(3, 3)
    state["smear.weight"] = state.pop("lm_head.weight")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"x\.pt does not fit.*missing lm_head.weight; unexpected smear.weight; of another "
                                         r"shape transformer.h.0.attn.c_q.weight \(3, 3\) instead of \(64, 64\)"):
        ckpt.load_state(base, state, "x.pt")
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    with pytest.raises(ValueError, match="no state dict"):
        ckpt.load_state(base, [1, 2], "x.pt")


@pytest.mark.parametrize("keep", [0, 10, 5000, -100])
def test_a_truncated_file_is_one_clear_error(base, tmp_path, keep):
    ckpt.save_torch(base.state_dict(), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model.pt is (truncated or no checkpoint|refused).*"):
        ckpt.load_torch(tmp_path / "model.pt")


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"a": Evil()}, tmp_path / "model.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("model.pt", "old.pt"):
        with pytest.raises(ValueError, match=r"refused.*trust|no checkpoint"):
            ckpt.load_torch(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_bad_configs_are_named(hybrid_config):
    good = asdict(hybrid_config)
    assert ckpt.config_from_dict("hybrid", good) == hybrid_config
    for fields, words in (({**good, "window_pattern": 1}, "does not support: window_pattern"),
                          ({k: v for k, v in good.items() if k != "n_head"}, "lacks n_head"),
                          ({**good, "n_head": "4"}, "n_head in the checkpoint's config is '4'"),
                          ({**good, "n_head": 7}, "no multiple of the 7 heads")):
        with pytest.raises(ValueError, match=words):
            ckpt.config_from_dict("hybrid", fields)
    for kind in ("rnn", ["gpt"]):
        with pytest.raises(ValueError, match="unknown model kind"):
            ckpt.config_from_dict(kind, good)


def test_json_faults_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="no valid JSON"):
        ckpt.load_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        ckpt.load_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="no valid JSON"):
        ckpt.load_json(tmp_path / "config.json")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="boom"), atomic_write(path) as f:
        f.write(b"new")
        raise RuntimeError("boom")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_keeps_the_previous_checkpoint_and_export(base, tokenizer, tmp_path):
    """A limit on file size stands in for the full disk: the kernel refuses the write in the same way, with an errno."""
    ckpt.save_step(tmp_path, 1, base, [], {})
    ckpt.save_export(tmp_path / "out", base, tokenizer, {"tag": "old"})
    program = textwrap.dedent(f"""
        import resource, signal, sys
        from nanochat import checkpoint_manager as ckpt
        from nanochat.common import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model, _ = ckpt.load_step({str(tmp_path)!r}, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            ckpt.save_export({str(tmp_path / "out")!r}, model, ckpt.load_tokenizer({str(tmp_path / "out")!r}, model.config),
                             {{"tag": "new"}})
        except OSError:
            cli(lambda: ckpt.save_step({str(tmp_path)!r}, 2, model, [], {{}}))()
    """)
    size = (tmp_path / "model_000001.pt").stat().st_size
    assert size > 100_000 and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no room left to write" in done.stderr and "free some disk space" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["meta_000001.json", "model_000001.pt", "optim_000001.pt", "out"]
    ckpt.load_step(tmp_path, 1)
    assert ckpt.load(tmp_path / "out").info["tag"] == "old"
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.pt", "tokenizer"]
