"""chat_rl: its gradient against autograd written out, that rewards rise, and that forced tokens are not learnt."""
import argparse

import pytest
import torch
from conftest import randomize

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tokenizer import Tokenizer
from scripts import chat_rl
from scripts.chat_rl import Answers

FEW = ["--data", "examples", "--num-iterations", "8", "--examples-per-step", "4", "--num-samples", "8",
       "--max-new-tokens", "6", "--eval-every", "4", "--eval-examples", "8", "--init-lr-frac", "1", "--device-type", "cpu"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["How many apples does Ann have, if she buys three and eats one?"] * 4, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomize(build_model(HybridConfig.from_base(GPTConfig(256, tokenizer.get_vocab_size(), 2, 4, 4, 32))))


def test_the_gradient_is_that_of_advantage_weighted_likelihood(model):
    """And of the narrow pass's divergence; over passes of two rows, padded, with forced tokens in between."""
    g = torch.Generator().manual_seed(1)
    groups = []
    for lengths in ((9, 14), (11,), (7, 7)):
        ids = [torch.randint(290, (n,), generator=g).tolist() for n in lengths]
        masks = [[0, 0, 0] + [int(i % 3 > 0) for i in range(n - 3)] for n in lengths]
        groups.append(Answers(ids, masks, [0.75, -0.25][:len(ids)]))
    args = argparse.Namespace(device_batch_size=2, narrow_weight=0.3)
    model.zero_grad()
    got = chat_rl.learn(model, groups, args, 16)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, policy, narrow = sum(sum(m) for group in groups for m in group.masks), 0.0, 0.0
    for group in groups:
        for ids, mask, advantage in zip(*group):
            x = torch.tensor([ids])
            full, small = (torch.log_softmax(model(x, widths=w)[0, :-1], -1) for w in (None, 16))
            live = torch.tensor(mask[1:], dtype=torch.float32)
            policy = policy - advantage * (live * full.gather(1, x[0, 1:, None])[:, 0]).sum() / total
            narrow = narrow + (live * (full.exp() * (full - small)).detach().sum(-1)).sum() * 0
            narrow = narrow - (live * (full.detach().exp() * small).sum(-1)).sum() / total  # the rest is constant
    (policy + 0.3 * narrow).backward()
    assert got == pytest.approx(float(policy), rel=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None and float(p.grad.abs().max()) > 0:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad()


def test_advantages_are_rewards_less_their_questions_mean(model, tokenizer):
    class ByLength(GSM8K):
        def evaluate(self, conversation, answer):
            return len(answer) % 2 == 0
    task = ByLength("train", "examples")
    args = argparse.Namespace(num_samples=8, max_new_tokens=6, temperature=1.0, top_k=50)
    answers, mean = chat_rl.ask(Engine(model, tokenizer), task, 0, args, 5)
    prompt = tokenizer.render_for_completion(task[0])
    rewards = [float(len(tokenizer.decode(ids[len(prompt):])) % 2 == 0) for ids in answers.ids]
    assert answers.advantages == [r - sum(rewards) / 8 for r in rewards] and mean == sum(rewards) / 8
    assert 0 < mean < 1 and all(mask[:len(prompt)] == [0] * len(prompt) for mask in answers.masks)
    again, _ = chat_rl.ask(Engine(model, tokenizer), task, 0, args, 5)
    assert again == answers
    long = argparse.Namespace(**vars(args) | {"max_new_tokens": 9999})
    small = randomize(build_model(HybridConfig.from_base(GPTConfig(16, tokenizer.get_vocab_size(), 2, 4, 4, 32))))
    assert chat_rl.ask(Engine(small, tokenizer), task, 0, long, 5) is None


@pytest.fixture
def home(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    save_export(tmp_path / "chatsft_checkpoints/d2_32", model, tokenizer, {"tag": "d2", "provenance": {"trained": "sft"}})
    return tmp_path


@pytest.mark.slow
def test_rewards_rise_in_every_mode(home, tokenizer, monkeypatch):
    """The reward is an 'e' in the answer: what is sampled at full width rises, and the narrow widths follow it."""
    class WithE(GSM8K):
        def evaluate(self, conversation, answer):
            return "e" in answer
    monkeypatch.setattr(chat_rl, "make", lambda name, split, data, fetch: WithE(split, data, fetch))
    figures = chat_rl.main(["-i", "sft", *FEW, "--num-iterations", "12"])
    first, last = (sum(figures["rewards"][at:at + 3]) / 3 for at in (0, 9))
    assert last > first + 0.2 and len(figures["rewards"]) == 12
    folder = home / "chatrl_checkpoints/d2_32"
    assert ckpt.load_json(folder / "config.json")["provenance"]["trained"] == "rl"
    before, after = (ckpt.load(p).model for p in (home / "chatsft_checkpoints/d2_32", folder))
    task = WithE("test", "examples")
    prompts = [tokenizer.render_for_completion(c) for c in task] * 4
    share = {}
    for name, m in (("before", before), ("after", after)):
        for mode in ("ghost", "think"):
            rows = Engine(m, tokenizer).answers(prompts, 6, temperature=1.0, top_k=50, mode=mode)
            share[name, mode] = sum("e" in tokenizer.decode(row) for row in rows) / len(rows)
    assert share["after", "think"] > share["before", "think"] + 0.2
    assert share["after", "ghost"] > share["before", "ghost"]


@pytest.mark.parametrize("argv, words", [
    (["--num-samples", "1"], "at least 2"), (["--temperature", "0"], "above 0"), (["--num-iterations", "0"], "at least 1"),
    (["--init-lr-frac", "-1"], "--init-lr-frac"), (["-i", "rl"], "no model in")])
def test_bad_flags_are_named(home, capsys, argv, words):
    with pytest.raises(SystemExit):
        chat_rl.main([*([] if "-i" in argv else ["-i", "sft"]), *FEW, *argv])
    assert words in capsys.readouterr().err


def test_what_cannot_be_trained_is_named(home, model, tokenizer, monkeypatch, capsys):
    save_export(home / "base", randomize(build_model(GPTConfig(64, tokenizer.get_vocab_size(), 2, 4, 4, 32))), tokenizer, {
        "tag": "b", "provenance": {}})
    with pytest.raises(SystemExit):
        chat_rl.main(["--checkpoint", str(home / "base"), *FEW])
    assert "holds a base GPT" in capsys.readouterr().err
    save_export(home / "chatrl_checkpoints/d2_32", model, tokenizer, {"tag": "d2", "provenance": {}})
    with pytest.raises(SystemExit):
        chat_rl.main(["-i", "rl", *FEW])
    assert "is the source" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        chat_rl.main(["-i", "sft", *FEW])
    assert "without torchrun" in capsys.readouterr().err
