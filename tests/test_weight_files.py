"""Files of weights in every format people have them in, what stands in their place, and nanochat's folders around them."""
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from vintage_oracle import checkpoint, logits

from nanochat import checkpoint_manager as ckpt
from nanochat.weight_files import INDEX, clean_name, load_torch, open_weights

pytestmark = pytest.mark.usefixtures("same_start")


def write(state, folder, form, name="model_000005"):
    """One state dict as a file of a form; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "shards":
        names, owner = list(state), {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            save_file({n: state[n] for n in part}, folder / f"{name}-0000{i}-of-00002.safetensors")
            owner |= dict.fromkeys(part, f"{name}-0000{i}-of-00002.safetensors")
        path = folder / f"{name}{INDEX}"
        path.write_text(json.dumps({"weight_map": owner}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


FORMS = ("zip", "legacy", "safetensors", "shards")


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_tensors(tmp_path, form):
    state = {k: v.bfloat16() if "wte" in k else v for k, v in checkpoint("G")[0].items()}
    weights = open_weights(write(state, tmp_path, form))
    assert weights.specs.keys() == state.keys()
    for name, t in state.items():
        spec, got = weights.specs[name], weights.read(name)
        assert (spec.shape, spec.dtype) == (t.shape, t.dtype) and got.dtype == t.dtype and torch.equal(got, t)


def test_views_are_read_as_what_they_show(tmp_path):
    whole = torch.arange(40.0).view(5, 8)
    state = {"a": whole.T, "b": whole[1:3], "c": whole[:, 2:5], "d": whole}
    torch.save(state, tmp_path / "m.pt")
    weights = open_weights(tmp_path / "m.pt")
    assert all(torch.equal(weights.read(k), v) for k, v in state.items())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_any_format_loads_with_any_prefix(tmp_path, form):
    state, fields = checkpoint("D", layers=2)
    wrapped = {(f"module._orig_mod.{k}" if i % 2 else k.replace("transformer.h.0.", "transformer.h.0._orig_mod.")): v
               for i, (k, v) in enumerate(state.items())}
    write(wrapped, tmp_path, form)
    ckpt.save_json({"model_config": fields}, tmp_path / "meta_000005.json")
    (tmp_path / "config.json").write_text('{"model_type": "nanochat"}')  # Hugging Face's, as hub repositories have it
    model, meta = ckpt.load_step(tmp_path, 5)
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(1))
    assert meta["vintage"] == "D"
    assert (model(ids[None])[0] - logits(state, fields, "D", ids)).abs().max() <= 5e-5
    assert ckpt.find(tmp_path).file == ckpt.weights_file(tmp_path, 5)


@pytest.mark.parametrize("name, want", [
    ("module.a.b", "a.b"), ("_orig_mod.module.a", "a"), ("a._orig_mod.b", "a.b"), ("a.module.module.b.weight", "a.b.weight"),
    ("submodule.a", "submodule.a"), ("a.my_orig_mod.b", "a.my_orig_mod.b")])
def test_wrappers_prefixes_are_taken_off_wherever_they_stand(name, want):
    assert clean_name(name) == want


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html><html>Sign in", "web page.*hf download"), (b"\n <HTML>", "web page"),
    (b"", "truncated or no checkpoint|refused"), (b"PK\x03\x04", "truncated or no checkpoint"),
    (pickle.dumps([1, 2]), "truncated or no checkpoint|refused|no state dict")])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_what_stands_in_place_of_weights_is_named(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    if name.endswith("safetensors") and content.lstrip()[:1] not in (b"v", b"<"):
        words = "truncated or no safetensors|truncated or no checkpoint"
    with pytest.raises(ValueError, match=words):
        open_weights(tmp_path / name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_8_bit_weights_are_named(tmp_path, form, dtype):
    if form == "legacy" and dtype.is_floating_point:
        pytest.skip("torch itself cannot read such a file")
    path = write({"a.weight": torch.ones(4, 4).to(dtype), "b.weight": torch.ones(4)}, tmp_path, form)
    with pytest.raises(ValueError, match=r"8-bit weights \(a.weight is .*bf16 or fp32"):
        open_weights(path)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files_are_one_clear_error(tmp_path, form):
    """Cut anywhere: refused when opened, or, where only data is gone, when it is read."""
    path = write({f"w{i}": torch.randn(30, 30) for i in range(3)}, tmp_path, form)
    target = next(tmp_path.glob("*.safetensors")) if form == "shards" else path
    data = target.read_bytes()
    for keep in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        target.write_bytes(data[:keep])
        with pytest.raises(ValueError, match=r"truncated|no checkpoint|refused"):
            weights = open_weights(path)
            for name in weights.specs:
                weights.read(name)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_in_a_file_is_run(tmp_path, form):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"a": Evil()}, tmp_path / "m.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="refused"):
        open_weights(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="refused"):
        load_torch(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("index, words", [
    ({"weight_map": {"a": "../m.safetensors"}}, "no index"), ({"weight_map": ["a"]}, "no index"), ([], "no index"),
    ({}, "no index"),
    ({"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}, "names b, which its file does not hold"),
    ({"weight_map": {"a": "n.safetensors"}}, "no checkpoint file .*n.safetensors")])
def test_a_wrong_index_is_named(tmp_path, index, words):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / f"m{INDEX}").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_weights(tmp_path / f"m{INDEX}")


def test_one_weight_under_two_names_is_named(tmp_path):
    torch.save({"a": torch.ones(2), "_orig_mod.a": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds a twice"):
        open_weights(tmp_path / "m.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Folders

def nanochats(folder, step, vintage="A", **sizes):
    state, fields = checkpoint(vintage, layers=2, **sizes)
    write(state, folder, "zip", f"model_{step:06d}")
    ckpt.save_json({"model_config": fields}, folder / f"meta_{step:06d}.json")
    return state, fields


def test_two_models_in_one_folder_are_named(tmp_path):
    nanochats(tmp_path, 5)
    nanochats(tmp_path, 9)
    assert ckpt.find(tmp_path).file.name == "model_000009.pt"
    nanochats(tmp_path, 12, heads=4)
    with pytest.raises(ValueError, match=r"holds two models .steps 9 and 12 differ.*--step"):
        ckpt.find(tmp_path)
    assert ckpt.find(tmp_path, 9).config.n_head == 2 and ckpt.find(tmp_path, 12).config.n_head == 4
    assert ckpt.find(tmp_path / "model_000005.pt").config.n_head == 2


def test_an_export_and_a_step_in_one_folder_are_two_models(tmp_path):
    nanochats(tmp_path, 5)
    model, _ = ckpt.load_step(tmp_path, 5)
    ckpt.save_torch(model.state_dict(), tmp_path / "model.pt")
    ckpt.save_json({"kind": "gpt", "config": ckpt.asdict(model.config)}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"holds two models, model.pt and model_000005.pt: name the file"):
        ckpt.find(tmp_path)
    assert ckpt.find(tmp_path / "model.pt").file.name == "model.pt"


@pytest.mark.parametrize("change, words", [
    ({"n_layer": 3}, "n_layer 2, but the meta file says 3"),
    ({"vocab_size": 1000}, "vocab_size .*, but the meta file says 1000"),
    ({"n_embd": 128}, "n_embd 64"), ({"n_kv_head": 1}, "n_kv_head 2"), ({"n_head": "2"}, "n_head '2'"),
    ({"n_head": 3}, "no multiple of the 3 heads"), ({"rope_theta": 5}, "does not know: rope_theta")])
def test_a_meta_file_that_contradicts_the_weights_is_named(tmp_path, change, words):
    _, fields = nanochats(tmp_path, 5)
    ckpt.save_json({"model_config": fields | change}, tmp_path / "meta_000005.json")
    with pytest.raises(ValueError, match=words):
        ckpt.find(tmp_path)
