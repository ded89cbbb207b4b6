"""One model of a repository on the hub, fetched by huggingface_hub itself from a local server, and nothing overwritten."""
import http.server
import threading

import huggingface_hub.constants
import pytest
import torch
from test_hub import HubHandler
from test_surgery import fails, listing
from vintage_oracle import checkpoint, logits

from nanochat import checkpoint_manager as ckpt
from nanochat.hub_models import is_repo, model_files
from nanochat.tokenizer import Tokenizer
from scripts import surgery

pytestmark = pytest.mark.usefixtures("same_start")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A local hub, whose every repository holds two steps of one small nanochat of vintage G, its tokenizer, and more."""
    root = tmp_path / "remote"
    for step in (7, 650):
        state, fields = checkpoint("G", layers=2, seed=step)
        ckpt.save_torch(state, root / f"model_{step:06d}.pt")
        ckpt.save_json({"model_config": fields, "step": step}, root / f"meta_{step:06d}.json")
        (root / f"optim_{step:06d}_rank0.pt").write_bytes(b"large")
    Tokenizer.train_from_iterator(["".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))] * 3,
                                  300).save(root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.root, server.broken, server.ranges = root, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield server
    server.shutdown()
    server.server_close()


@torch.no_grad()
def test_surgery_fetches_one_model_of_a_repository(remote, tmp_path, capsys, monkeypatch):
    """Of the step asked for; a second run fetches nothing; without the hub what is there serves."""
    surgery.main(["--src", "some/nanochat-d2", "--step", "7", "--order=none"])
    out, home = capsys.readouterr().out, tmp_path / "home"
    assert "some/nanochat-d2 at revision " + "c" * 40 in out and "vintage G" in out and "smear" in out
    names = [p for p in listing(home / "hub_checkpoints/some--nanochat-d2") if not p.startswith(".cache")]
    assert {"model_000007.pt", "meta_000007.json"} < set(names) and not any("650" in n or "optim" in n for n in names)
    made = ckpt.load(home / "hybrid_checkpoints/d2_64")
    state, fields = checkpoint("G", layers=2, seed=7)
    ids = torch.randint(300, (200,), generator=torch.Generator().manual_seed(1))
    assert (made.model(ids[None])[0] - logits(state, fields, "G", ids)).abs().max() <= 5e-5
    assert made.info["provenance"]["vintage"] == "G"
    surgery.main(["--src", "some/nanochat-d2", "--step", "7", "--order=none"])
    assert "of which 0.00 GB are to be fetched" in capsys.readouterr().out
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    surgery.main(["--src", "some/nanochat-d2", "--step", "7", "--order=none"])
    assert "the hub does not answer" in capsys.readouterr().out
    fails(capsys, ["--src", "some/other"], "some/other could not be fetched", "check the network")


def test_what_is_there_is_not_overwritten(remote, tmp_path, capsys):
    d32 = tmp_path / "home/chatsft_checkpoints/d32"
    d32.mkdir(parents=True)
    (d32 / "model_000650.pt").write_bytes(b"a model of the user's own")
    fails(capsys, ["--download"], "model_000650.pt is another file", "is not overwritten", "--src")
    assert listing(d32) == ["model_000650.pt"] and (d32 / "model_000650.pt").read_bytes() == b"a model of the user's own"
    fails(capsys, ["--src", "some/nanochat", "--step=8"], "no step 8", "it has 7, 650")
    for path in remote.root.glob("meta_*"):
        path.unlink()
    fails(capsys, ["--src", "some/nanochat"], "has no nanochat checkpoint")


def test_the_files_of_one_model_are_chosen():
    flat = ["README.md", "model_000005.pt", "meta_000005.json", "optim_000005.pt", "tokenizer.pkl", "token_bytes.pt",
            "model_000009.pt"]  # a step without its meta is none
    assert model_files(flat, None, "", "a/b") == (".", ["model_000005.pt", "meta_000005.json", "tokenizer.pkl",
                                                        "token_bytes.pt"])
    nested = [f"{d}/{n}" for d in ("base/d20", "sft/d20") for n in (*flat[:5], "tokenizer/tokenizer.json")]
    assert model_files(nested, 5, "sft/d20", "a/b")[1] == ["sft/d20/model_000005.pt", "sft/d20/meta_000005.json",
                                                           "sft/d20/tokenizer.pkl", "sft/d20/tokenizer/tokenizer.json"]
    with pytest.raises(ValueError, match="holds 2 models, in base/d20, sft/d20: name one, such as a/b/base/d20"):
        model_files(nested, None, "", "a/b")
    shards = ["model_000005.safetensors.index.json", "model_000005-00001-of-00002.safetensors", "meta_000005.json",
              "model_000005-00002-of-00002.safetensors", "model.safetensors"]
    assert sorted(model_files(shards, None, "", "a/b")[1]) == sorted(shards[:4])


@pytest.mark.parametrize("name, yes", [("karpathy/nanochat-d34", True), ("a/b/c/d", True), ("~/x", False), ("/a/b", False),
                                       ("./a", False), ("d32", False), ("../a/b", False), ("a/../b", False)])
def test_repositories_are_told_from_folders(name, yes):
    assert is_repo(name) is yes


def test_a_folder_is_never_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "karpathy/nanochat-d34").mkdir(parents=True)
    assert not is_repo("karpathy/nanochat-d34")
