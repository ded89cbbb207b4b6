"""Chat data for training, chat_sft over a hybrid, and a teacher that stays as it is."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import randomize

from nanochat import checkpoint_manager as ckpt
from nanochat import mixture
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.engine import Compute, Engine
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.shards import iter_texts
from nanochat.tasks import TASKS, make
from nanochat.tasks.evaluate import Judge, Sampling, choose_in_passes
from nanochat.tasks.sources import prepare_tasks
from nanochat.tokenizer import Tokenizer
from scripts import chat_sft, fractal_train

FEW = ["--num-iterations", "3", "--device-batch-size", "4", "--total-batch-size", "1024", "--eval-every", "2",
       "--eval-tokens", "1024", "--chatcore-max-cat", "4", "--chatcore-max-sample", "1", "--tasks", "ARC-Easy|GSM8K",
       "--task-data", "examples", "--device-type", "cpu", "--init-lr-frac", "0.5"]


def text_of(content):
    return content if isinstance(content, str) else "".join(p["text"] for p in content)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text_of(m["content"]) for name in TASKS if name != "SpellingBee"
             for c in make(name, "test", "examples") for m in c["messages"]]
    return Tokenizer.train_from_iterator(texts, 500)


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomize(build_model(HybridConfig.from_base(GPTConfig(256, tokenizer.get_vocab_size(), 2, 4, 4, 32))))


@pytest.fixture(scope="module")
def source(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("source")
    save_export(folder / "d2_32", model, tokenizer, {"tag": "d2", "provenance": {}})
    other = Tokenizer.train_from_iterator(["the quick brown fox " * 40], 300)
    for name, length, its in (("base", 256, tokenizer), ("short", 128, tokenizer), ("foreign", 256, other)):
        config = GPTConfig(length, its.get_vocab_size(), 2, 4, 4, 48)
        save_export(folder / name, randomize(build_model(config), 3), its, {"tag": name, "provenance": {}})
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path


def test_tasks_are_a_source_of_training_data(home):
    folder = prepare_tasks("examples:GSM8K+ARC-Easy+GSM8K")
    train, val = (list(iter_texts(folder, split)) for split in ("train", "val"))
    want = [c["messages"] for name in ("GSM8K", "ARC-Easy", "GSM8K") for c in make(name, "train", "examples")]
    assert train and val and not set(train) & set(val)
    assert prepare_tasks("examples:GSM8K+ARC-Easy+GSM8K") == folder != prepare_tasks("examples:GSM8K")
    parts = mixture.prepare_mixture("0.5*examples:GSM8K,0.5*examples:MMLU")
    assert [mixture.is_chat(part) for part in parts] == [True, True]
    import pyarrow.parquet as parquet
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]
    messages = [json.loads(r["messages"]) if isinstance(r["messages"], str) else r["messages"] for r in rows]
    assert sorted(map(json.dumps, messages)) == sorted(map(json.dumps, want))
    with pytest.raises(ValueError, match="no task Trivia"):
        prepare_tasks("examples:Trivia")


def test_stages_hear_multiple_choice_and_tool_use_by_default():
    sources = dict(map(reversed, mixture.parse(mixture.DEFAULT_MIXTURE)))
    names = {name for source in sources for name in source.partition(":")[2].split("+")}
    assert {"GSM8K", "MMLU", "ARC-Easy", "ARC-Challenge"} <= names and sum(sources.values()) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["ghost", "think"])
def test_choosing_in_passes_is_what_the_judge_chooses(model, tokenizer, mode):
    task = make("ARC-Challenge", "test", "examples")
    judged = list(Judge(Engine(model, tokenizer), Compute(mode), Sampling(), 3).run(task, list(range(7))))
    assert choose_in_passes(model, tokenizer, task, 7, 3, mode) == sum(o.right for o in judged) / 7
    small = randomize(build_model(HybridConfig.from_base(GPTConfig(24, tokenizer.get_vocab_size(), 2, 4, 4, 32))))
    assert choose_in_passes(small, tokenizer, task, 7, 3) == 0  # no question fits


def test_chat_sft_trains_all_judges_and_keeps_the_best(home, source, tokenizer, capsys):
    figures = chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K+ARC-Easy"])
    assert figures["steps"] == 3 and figures["bpb"] < figures["first_bpb"]
    last, best = home / "chatsft_checkpoints/d2_32", home / "chatsft_checkpoints/d2_32_best"
    info = ckpt.load_json(last / "config.json")
    assert info["provenance"]["trained"] == "sft" and info["tag"] == "d2_sft"
    before, after = (ckpt.load(p).model.state_dict() for p in (source / "d2_32", last))
    assert all(not torch.equal(before[k], after[k]) for k in before if not k.startswith(("predictor.", "gate.")))
    evaluations = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines() if "val_bpb" in line]
    assert [e["step"] for e in evaluations] == [0, 2, 3]
    modes = list(HybridConfig.from_base(GPTConfig(256, 500, 2, 4, 4, 32)).distinct_modes)
    assert all(f"val_ChatCORE_{mode}" in e for e in evaluations for mode in modes)
    means = [sum(e[f"val_{mode}"] for mode in modes) / len(modes) for e in evaluations]
    assert ckpt.load_json(best / "config.json")["best_bpb"] == pytest.approx(min(means))
    assert ckpt.newest(home, "sft", "d2_32") == last  # and not the best one, which was written before
    assert "ChatCORE ghost" in capsys.readouterr().out
    again = chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K+ARC-Easy"])
    assert again["bpb"] == figures["bpb"]  # it is trained already


def test_rows_without_anything_to_learn_are_counted(home, source, tmp_path, capsys):
    long = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "yes"}]
    short = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello, my friend " * 3}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps([*chat[:1], {**chat[1], "content": f"{chat[1]['content']} {i}"}])
                              for i in range(30) for chat in (long, short, short, short)))
    chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--chatcore-max-cat", "0", "--chatcore-max-sample", "0",
                   "--eval-tokens", "8192", "--data", str(file)])
    out = capsys.readouterr().out
    assert "had no token to learn" in out and "ChatCORE while training: none" in out


@pytest.mark.parametrize("teacher, extra, words", [
    ("foreign", [], "another tokenizer"), ("short", [], "a context of 128"), ("nowhere", [], "no model"),
    ("base", ["--recipe", "single"], "--recipe single"), ("base", ["--teacher-weight", "0"], "a share above 0")])
def test_a_teacher_that_cannot_teach_is_named(home, source, capsys, teacher, extra, words):
    with pytest.raises(SystemExit):
        chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K", "--teacher",
                       str(source / teacher), *extra])
    assert words in capsys.readouterr().err


def test_what_the_teacher_knows_is_kept(home, source, tokenizer):
    """
    Trained on one conversation alone, a model drifts away from what it said of other text; with the teacher it stays nearer.
    The teacher here is the model itself before training, of another file; it is not changed.
    """
    data = ["--data", "examples:MMLU", "--num-iterations", "12", "--eval-every", "-1", "--tasks", ""]
    x = torch.tensor([tokenizer.encode("Once upon a time there was a little girl who had three apples. " * 4)])
    before = ckpt.load(source / "d2_32").model
    with torch.no_grad():
        said = torch.log_softmax(before(x), -1)
    drift = {}
    for tag, teacher in (("free", []), ("kept", ["--teacher", str(source / "d2_32"), "--teacher-weight", "1"])):
        few = [f for f in FEW if f not in ("--tasks", "ARC-Easy|GSM8K")]
        chat_sft.main(["--checkpoint", str(source / "d2_32"), *few, *data, "--tag", tag, *teacher])
        with torch.no_grad():
            now = torch.log_softmax(ckpt.load(home / f"chatsft_checkpoints/{tag}").model(x), -1)
        drift[tag] = float((said.exp() * (said - now)).sum(-1).mean())
    assert drift["kept"] < 0.9 * drift["free"], drift
    after = ckpt.load(source / "d2_32").model.state_dict()
    assert all(torch.equal(p, after[k]) for k, p in before.state_dict().items())


def test_flags_of_chat_sft_and_of_fractal_train(home, source, capsys):
    for argv, words in ((["--chatcore-max-cat", "-1"], "at least 0"), (["--nonsense"], "unrecognized arguments: --nonsense"),
                        (["--checkpoint", str(source / "base")], "base GPT")):
        with pytest.raises(SystemExit):
            chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K", *argv])
        assert words in capsys.readouterr().err
    theirs = home / "chatsft_checkpoints/d2_32"
    ckpt.save_step(theirs, 650, ckpt.load(source / "base").model, [], {})
    with pytest.raises(SystemExit):
        chat_sft.main(["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K"])
    assert "never overwritten" in capsys.readouterr().err and ckpt.list_steps(theirs) == [650]
    with pytest.raises(SystemExit):
        fractal_train.main(["--checkpoint", str(source / "d2_32"), "--controls", "--teacher", str(source / "base")])
    assert "--teacher teaches whole passes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_and_judge_what_one_does(home, source):
    argv = ["--checkpoint", str(source / "d2_32"), *FEW, "--data", "examples:GSM8K+ARC-Easy", "--tasks", "ARC-Easy|MMLU",
            "--teacher", str(source / "base"), "--chatcore-max-cat", "8", "--device-batch-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "scripts.chat_sft", *argv, "--tag", "two"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    chat_sft.main([*argv, "--tag", "one"])
    cores = {}
    for tag in ("one", "two"):
        lines = (home / f"chatsft_checkpoints/{tag}/metrics.jsonl").read_text().splitlines()
        first = json.loads(next(line for line in lines if "val_bpb" in line))
        cores[tag] = {k: v for k, v in first.items() if "ChatCORE" in k}
    assert cores["one"] == cores["two"] and len(cores["one"]) > 2
    assert (home / "chatsft_checkpoints/two_best/model.pt").is_file()
