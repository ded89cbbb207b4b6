"""
The project's first four commands, as a user types them, on a model with nanochat-d32's files, names and
width.
"""
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import randomize
from test_hub import HubHandler

from nanochat import checkpoint_manager as ckpt
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
DOWNLOAD = ("huggingface-cli download karpathy/nanochat-d32 "
            "--local-dir ~/.cache/nanochat/chatsft_checkpoints/d32")
INSERT = "python -m scripts.surgery --new-dim=2048"
FLAGS = ("-m scripts.fractal_train --checkpoint ~/.cache/nanochat/hybrid_checkpoints/d32_2048/model.pt "
         "--expanded-dim=2048 --matryoshka --sample-dim")
TRAIN = f"torchrun --nproc_per_node=8 {FLAGS}"
GROW = "python -m scripts.surgery --expand-from=2048 --new-dim=2560"


@pytest.fixture
def shell(tmp_path):
    """
    Starts a command line in a shell, with a HOME of its own, the installed entry points and a local hub.
    """
    (tmp_path / "remote").mkdir()
    (tmp_path / "bin").mkdir()
    scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2].partition("\n[")[0]
    for name, module, function in re.findall(r'^([\w-]+) = "([\w.]+):(\w+)"', scripts, re.M):
        script = tmp_path / "bin" / name  # what pip writes for an entry point
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        script.chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.root, server.broken, server.ranges = tmp_path / "remote", None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "HF_", "PYTEST_"))}
    env |= {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

    def start(line):
        return subprocess.Popen(line, shell=True, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)
    yield start
    server.shutdown()
    server.server_close()


def succeeds(process) -> str:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return out


def workers(process) -> list[int]:
    """The ids of the training processes below a shell's torchrun, which gives each a session of its own."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    below = {process.pid}
    while more := {int(pid) for pid, parent, _ in rows if int(parent) in below} - below:
        below |= more
    return [int(pid) for pid, _, args in rows if int(pid) in below and "-m scripts." in args
            and "torchrun" not in args]


def publish(remote: Path) -> None:
    """A repository with the files of nanochat-d32, whose model has d32's width and a single layer."""
    tokenizer = Tokenizer.train_from_iterator(["some text to learn words from " * 50], 300)
    config = GPTConfig(sequence_len=8, vocab_size=tokenizer.get_vocab_size(), n_layer=1)
    base = randomize(ckpt.build_model(config)).to(torch.bfloat16)
    ckpt.save_step(remote, 650, base, [], {})
    (remote / "optim_000650.pt").unlink()
    tokenizer.save(remote)


@pytest.mark.slow
def test_the_four_commands_as_written(tmp_path, shell):
    """
    The training line derives a run of some millions of steps, so the test ends it as a scheduler would, by
    SIGTERM, when it shows its first step, and exports what was saved, as the refusal of the growth says. The
    last command then grows that export.
    """
    publish(tmp_path / "remote")
    succeeds(shell(DOWNLOAD))
    home = tmp_path / ".cache/nanochat"
    assert (home / "chatsft_checkpoints/d32/model_000650.pt").is_file()
    assert "wrote" in succeeds(shell(INSERT))

    training = shell(TRAIN)
    try:
        lines = []
        for line in training.stdout:
            lines.append(line)
            if re.match(r"step +0/\d+ \| loss|step +0/\d+ \|.* tok/s", line):
                os.kill(workers(training)[0], signal.SIGTERM)
        training.wait(300)
    finally:
        if training.poll() is None:
            for pid in [*workers(training), training.pid]:
                os.kill(pid, signal.SIGKILL)
    out = "".join(lines)
    assert re.search(r"stopped by SIGTERM: step \d+ is saved", out), out
    assert re.search(r"steps [\d,]+ \(20 tokens per trained parameter\)", out), out
    assert list((home / "fractal_checkpoints/d32_2048").glob("step_*/meta.json"))

    refused = shell(GROW)
    out, _ = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "--export" in out, out
    succeeds(shell(f"python {FLAGS} --export"))
    out = succeeds(shell(GROW))
    assert "the trained export" in out and "max |delta logit|" in out
    config, info, _ = ckpt.find(home / "hybrid_checkpoints/d32_2560")
    assert config.n_embd == 2560 and info["provenance"]["from"]["trained"] == "stage 1"


def test_the_download_command_is_an_entry_point_for_the_librarys_own(tmp_path, shell):
    (tmp_path / "remote/meta_000650.json").write_text("{}")
    succeeds(shell(DOWNLOAD))
    assert (tmp_path / ".cache/nanochat/chatsft_checkpoints/d32/meta_000650.json").read_text() == "{}"
    assert shutil.which("huggingface-cli", path=str(tmp_path / "bin"))
