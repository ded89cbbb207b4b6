"""Publishing an exported repository with the real client, to a hub on this machine, and loading it from there."""
import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import randomize
from hub_server import Hub
from huggingface_hub import constants

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig
from nanochat.huggingface.publish import check_names
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tokenizer import Tokenizer
from scripts import export as script

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which the client takes for the real one."""
    hub = Hub()
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    tokenizer = Tokenizer.train_from_iterator(["some words and some more words, said some of them again and again"] * 3 + [
        "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))], 300)
    config = HybridConfig.from_base(GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=4, n_kv_head=4, n_embd=64))
    model = randomize(build_model(config))
    ckpt.save_export(folder / "ours", model, tokenizer, {"tag": "small"})
    return model, folder / "ours"


def export(made, dst, *args):
    script.main(["--checkpoint", str(made[1]), "--dst", str(dst), *args])


LOAD = textwrap.dedent("""\
    import json, sys, torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("someone/small", subfolder=sys.argv[1], trust_remote_code=True)
    with torch.no_grad():
        print(json.dumps(model(torch.arange(40)[None]).logits[0, -1].tolist()))
    """)


def test_two_variants_are_published_privately_and_load_from_the_hub(hub, made, tmp_path, capsys):
    export(made, tmp_path / "whole", "--push", "someone/small", "--variant", "stage1")
    assert f"published privately: {hub.url}/someone/small/tree/main/stage1" in capsys.readouterr().out
    repo = hub.repos["someone/small"]
    assert repo["private"]
    export(made, tmp_path / "normal", "--mode", "normal", "--push", "someone/small", "--variant", "normal_mode")
    for variant, folder in (("stage1", "whole"), ("normal_mode", "normal")):
        for path in (tmp_path / folder).iterdir():
            assert repo["files"][f"{variant}/{path.name}"] == path.read_bytes()
    assert set(repo["files"]) >= {"README.md", "modeling_adamba.py", "configuration_adamba.py"}
    card = repo["files"]["README.md"].decode()
    assert re.findall(r"^\| \[`(\w+)`\]", card, re.M) == ["normal_mode", "stage1"]
    assert str(tmp_path) not in card
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
           "OMP_NUM_THREADS": "1"}
    loaded = subprocess.run([sys.executable, "-I", "-c", LOAD, "normal_mode"], env=env, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    with torch.no_grad():
        want = made[0](torch.arange(40)[None], widths="normal")[0, -1]
    assert (torch.tensor(json.loads(loaded.stdout.splitlines()[-1])) - want).abs().max() < 5e-6


def test_an_interrupted_upload_goes_on(hub, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanochat.huggingface.export.SHARD_BYTES", 400_000)
    hub.fail_after = 1
    with pytest.raises(SystemExit) as stop:
        export(made, tmp_path / "out", "--push", "someone/small")
    assert stop.value.code == 2 and re.search(r"error: the upload to someone/small failed .*run the same command again",
                                              capsys.readouterr().err)
    assert len(hub.uploads) == 1 and not hub.repos["someone/small"]["files"]
    hub.fail_after = None
    export(made, tmp_path / "out", "--push", "someone/small")
    assert "holds this export already" in capsys.readouterr().out
    assert len(hub.uploads) == len(set(hub.uploads)) > 1  # nothing was sent twice
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(hub.repos["someone/small"]["files"])


def test_nothing_becomes_public_by_accident(hub, made, tmp_path, capsys, monkeypatch):
    hub.repos["someone/small"] = {"private": False, "files": {"old.txt": b"x", "model-00001-of-00002.safetensors": b"y"},
                                  "commits": 0}
    with pytest.raises(SystemExit) as stop:
        export(made, tmp_path / "out", "--push", "someone/small")
    assert stop.value.code == 2 and "already and public: add --public" in capsys.readouterr().err and not hub.uploads
    export(made, tmp_path / "out", "--push", "someone/small", "--public")
    assert "published publicly" in capsys.readouterr().out
    files = hub.repos["someone/small"]["files"]
    assert files["old.txt"] == b"x" and "model-00001-of-00002.safetensors" not in files  # an earlier export's shard
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit) as stop:
        export(made, tmp_path / "out", "--push", "someone/other")
    assert stop.value.code == 2 and "run `hf auth login`" in capsys.readouterr().err and "someone/other" not in hub.repos


def test_names():
    for repo, variant in (("nobody", None), ("a/b/c", None), ("a/b--c", None), ("a/b.", None), ("a/b", "x/y"),
                          ("a/b", "..")):
        with pytest.raises(ValueError, match=r"--push|--variant"):
            check_names(repo, variant)
    check_names("a-b/c.d_e", "stage1_6b")
