"""lm-eval with our models, on a small task shipped here: equal to scores made one text at a time, in every mode."""
import json

import pytest
import torch
from conftest import randomize

from nanochat import checkpoint_manager as ckpt
from nanochat.checkpoint_manager import build_model
from nanochat.confidence_probe import Controls
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tokenizer import Tokenizer

pytest.importorskip("lm_eval")

DOCS = [{"question": q, "choices": ["some words", "more", "said them again", "xyz"], "answer": i % 4}
        for i, q in enumerate(["what did they say", "words and", "again and again and again they said", "a", "some of them",
                               "ab bh co dv"])]
CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ANSWERS = """
task: small_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}:"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: [" s"], max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: small_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, tokenizer, its folder, the tasks' folder): a hybrid whose controls decide this and that."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = Tokenizer.train_from_iterator(["some words and some more words, said some of them again and again"] * 3 + [
        "".join(chr(97 + i % 26) + chr(97 + i * 7 % 26) + " " for i in range(400))], 300)
    config = GPTConfig(sequence_len=96, vocab_size=300, n_layer=4, n_head=4, n_kv_head=4, n_embd=64)
    model = randomize(build_model(HybridConfig.from_base(config)))
    with torch.no_grad():
        model.gate.c_proj.bias.fill_(0.0)
        model.gate.c_proj.weight.normal_(std=0.7, generator=torch.Generator().manual_seed(3))
    ckpt.save_export(folder / "model", model, tokenizer, {"calibration": {"budget": 0.8, "prices": [[0.8, 0.01]]}})
    (folder / "tasks").mkdir()
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in (("choice", CHOICE), ("answers", ANSWERS), ("rolling", ROLLING)):
        (folder / f"tasks/{name}.yaml").write_text(text.format(data=data))
    return model, tokenizer, folder / "model", folder / "tasks"


@pytest.fixture
def lm(made, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    from nanochat.huggingface.lm_eval_model import AdambaLM

    def make(**options):
        return AdambaLM(str(made[2]), device="cpu", **options)
    return make


def pairs(tokenizer):
    out = []
    for doc in DOCS:
        for choice in doc["choices"]:
            context = f"{doc['question']}:"
            whole = tokenizer.encode(f"{context} {choice}", prepend="<|bos|>")
            n = len(tokenizer.encode(context, prepend="<|bos|>"))
            out.append((f"{context}", f" {choice}", whole[:n], whole[n:]))
    return out


def instances(lm_args):
    from lm_eval.api.instance import Instance
    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(lm_args)]


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "ghost", 32])
@pytest.mark.parametrize("depth", [None, 3])
def test_log_likelihoods_equal_those_of_one_text_at_a_time(made, lm, mode, depth):
    model, tokenizer, *_ = made
    texts = pairs(tokenizer)
    got = lm(mode=mode, depth=depth, batch_size=5).loglikelihood(instances([t[:2] for t in texts]), disable_tqdm=True)
    for (_, _, context, continuation), (score, is_greedy) in zip(texts, got):
        logits = model(torch.tensor([context + continuation[:-1]]), widths=mode, exits=depth)[0, len(context) - 1:]
        want = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert abs(score - float(want)) < 1e-4
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)


@torch.no_grad()
def test_auto_scores_what_decoding_would(made, lm):
    """The log-likelihood of the engine's own greedy answer, from the depths and widths at which it was decoded."""
    model, tokenizer, folder, _ = made
    info = ckpt.find(folder).info
    ours, depths = lm(mode="auto", budget=0.8, batch_size=3), set()
    engine = Engine(model, tokenizer, info["calibration"])
    prompts = [tokenizer.encode(doc["question"], prepend="<|bos|>") for doc in DOCS]
    answers = [list(engine.tokens(p, 12, temperature=0, mode="auto", budget=0.8)) for p in prompts]
    kept = [(p, a) for p, a in zip(prompts, answers) if a]
    got = ours._loglikelihood_tokens([(None, p, a) for p, a in kept], disable_tqdm=True)
    for (p, a), (score, is_greedy) in zip(kept, got):
        list(engine.tokens(p, 12, temperature=0, mode="auto", budget=0.8))
        trace, n = engine.traces[0], len(p) - 1
        depths |= {d for d, _ in trace.steps}
        exits = torch.tensor([[model.config.n_block] * n + [d for d, _ in trace.steps]])[:, :n + len(a)]
        widths = torch.tensor([[trace.widths] * n + [w for _, w in trace.steps]])[:, :n + len(a)]
        logits = model(torch.tensor([p + a[:-1]]), widths=widths, exits=exits)[0, n:]
        assert is_greedy and abs(score - float(logits.log_softmax(-1)[range(len(a)), a].sum())) < 1e-4
    assert len(depths) > 1
    assert Controls(model, 0.8, calibration=info["calibration"]).price == 0.01


def test_answers_equal_the_engines_and_end_at_stop_sequences(made, lm):
    model, tokenizer, *_ = made
    engine, contexts = Engine(model, tokenizer), [f"{doc['question']}:" for doc in DOCS]
    stop = {tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")}
    special = set(tokenizer.get_special_tokens().values())
    for options, ours in (({"mode": "normal"}, {"mode": "normal"}), ({"lossless": True}, {"mode": None})):
        prompts = [tokenizer.encode(c, prepend="<|bos|>") for c in contexts]
        plain = [engine.tokens(p, 24, temperature=0, stop=stop, **ours) for p in prompts]
        whole = [tokenizer.decode(t for t in tokens if t not in special) for tokens in plain]
        until = [max(whole, key=len)[9:12], "no such text"]
        got = lm(batch_size=4, **options).generate_until(instances(
            [(c, {"until": until, "max_gen_toks": 24}) for c in contexts]), disable_tqdm=True)
        assert got == [text.split(until[0])[0] for text in whole] and got != whole


def test_conversations_are_rendered_as_in_training(made, lm):
    _, tokenizer, *_ = made
    ours = lm()
    history = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "some words"}]
    ids = tokenizer.render_for_completion({"messages": [*history, {"role": "assistant", "content": ""}]})
    assert ours.tok_encode(ours.apply_chat_template(history)) == ids
    begun = [*history, {"role": "assistant", "content": "more"}]
    assert ours.tok_encode(ours.apply_chat_template(begun, add_generation_prompt=False)) == ids + tokenizer.encode("more")


def test_long_texts_are_scored_in_windows(made, lm):
    model, tokenizer, *_ = made
    text = "some words and more " * 30
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * model.config.sequence_len
    (got,) = lm(batch_size=2).loglikelihood_rolling(instances([(text,)]), disable_tqdm=True)
    with torch.no_grad():
        want, T = 0.0, model.config.sequence_len
        for at in range(0, len(ids), T):
            end = min(at + T, len(ids))
            start = max(0, end - T)
            before = [tokenizer.get_bos_token_id()] if start == 0 else [ids[start - 1]]
            logits = model(torch.tensor([before + ids[start:end - 1]]))[0]
            want += float(logits.log_softmax(-1)[range(at - start, end - start), ids[at:end]].sum())
    assert abs(got - want) < 1e-3


def test_bad_options_are_named(lm):
    for options, words in (({"mode": "loud"}, "unknown mode 'loud'"), ({"batch_size": "auto"}, "give a number"),
                           ({"trust_remote_code": True}, "is not known"), ({"budget": 0.5}, "mode auto only")):
        with pytest.raises(ValueError, match=words):
            lm(**options)


@pytest.mark.slow
def test_an_exported_repository_scores_the_same_as_a_transformers_model(made, lm, tmp_path):
    """lm-eval's `hf` on the exported folder, in a mode, against ours on the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from scripts import export
    export.main(["--checkpoint", str(made[2]), "--dst", str(tmp_path / "repo")])
    theirs = HFLM(pretrained=str(tmp_path / "repo"), trust_remote_code=True, mode="ghost", dtype="float32", device="cpu",
                  batch_size=5)
    requests = instances([t[:2] for t in pairs(made[1])])
    ours = lm(mode="ghost", batch_size=4).loglikelihood(requests, disable_tqdm=True)
    for (a, greedy), (b, also) in zip(ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert abs(a - b) < 1e-3 and greedy == also
    asked = instances([(f"{doc['question']}:", {"until": ["zz"], "max_gen_toks": 20}) for doc in DOCS])
    assert lm(mode="ghost").generate_until(asked, True) == theirs.generate_until(asked, True)


@pytest.mark.slow
@torch.no_grad()
def test_lm_evals_own_command_gives_our_scores(made, tmp_path, monkeypatch, capsys):
    """Its command line, its task files, its tables."""
    from scripts import lm_eval as script
    model, tokenizer, folder, tasks = made
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    script.main(["--model", "adamba", "--model_args", f"pretrained={folder},mode=normal", "--include_path", str(tasks),
                 "--tasks", "small_choice,small_answers,small_rolling", "--batch_size", "4", "--device", "cpu",
                 "--output_path", str(tmp_path / "out"), "--log_samples"])
    assert "small_choice" in capsys.readouterr().out
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    texts, right = pairs(tokenizer), 0
    for d, doc in enumerate(DOCS):
        scores = []
        for _, _, context, continuation in texts[4 * d:4 * d + 4]:
            logits = model(torch.tensor([context + continuation[:-1]]), widths="normal")[0, len(context) - 1:]
            scores.append(float(logits.log_softmax(-1)[range(len(continuation)), continuation].sum()))
        right += scores.index(max(scores)) == doc["answer"]
    assert results["small_choice"]["acc,none"] == pytest.approx(right / len(DOCS))
    nats = nbytes = 0
    for doc in DOCS:
        ids = tokenizer.encode(doc["question"], prepend="<|bos|>")
        logits = model(torch.tensor([ids[:-1]]), widths="normal")[0]
        nats -= float(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
        nbytes += len(doc["question"])
    assert results["small_rolling"]["bits_per_byte,none"] == pytest.approx(nats / nbytes / 0.693147181, abs=1e-4)


def test_lm_evals_own_default_device_is_no_fault(made, monkeypatch):
    """It passes cuda where nothing is said, on a machine without a GPU, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from nanochat.huggingface.lm_eval_model import AdambaLM
    assert AdambaLM(str(made[2]), device="cuda:0").device.type == "cpu"
