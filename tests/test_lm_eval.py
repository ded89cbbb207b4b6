"""
The evaluation harness through our adapter: its own command and evaluator, on a small task that lies here; the same numbers
as one plain forward pass per question, and as our engine's decoding.
"""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as ckpt
from nanochat.confidence_probe import Controls
from nanochat.engine import Engine, prepare_inference
from scripts import lm_eval

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_start")]
GOLDEN = Path(__file__).parent / "golden/model"
QUESTIONS = [{"query": "def read(self, ", "choices": ["size=-1):", "))))", "import"], "gold": 0},
             {"query": "import os\nclass ", "choices": ["the", "A(object):", "A:"], "gold": 2},
             {"query": "for i in range(", "choices": [" ", "n):", "10):\n        x = i"], "gold": 1},
             {"query": "", "choices": ["    return self", "zqzq zq", "def"], "gold": 0},
             {"query": "return " * 30, "choices": ["None", "self._x", "0"], "gold": 1}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = TASK + """
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATE = TASK + """
output_type: generate_until
doc_to_text: query
doc_to_target: "{{{{choices[gold]}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(name=f"adamba_{name}", file=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """simple_evaluate of the harness; its data sets' cache lies in a temporary folder."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    import datasets
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    return evaluator.simple_evaluate


@pytest.fixture(scope="module")
def golden():
    model, tokenizer, info, _ = ckpt.load(GOLDEN)
    prepare_inference(model, "cpu", torch.float32)
    return model, tokenizer, info["calibration"]


MODES = [{}, {"mode": "ghost"}, {"mode": 16}, {"depth": 4}, {"lossless": True}, {"mode": "auto", "budget": 0.7}]


def plain_scores(golden, mode=None, depth=None, lossless=False, budget=None):
    """Question -> the choices' log-likelihoods, each from a forward pass of its own."""
    model, tokenizer, calibration = golden
    out, limit = [], model.config.sequence_len
    for q in QUESTIONS:
        scores = []
        for choice in q["choices"]:
            # spaces at the context's end belong to the continuation, whose first token they are part of
            context = tokenizer.encode(q["query"].rstrip(), prepend="<|bos|>")
            whole = tokenizer.encode(q["query"] + choice, prepend="<|bos|>")
            new = len(whole) - len(context)
            ids = torch.tensor([whole[-limit - 1:]])
            x, targets = ids[:, :-1], ids[0, -new:]
            if mode == "auto":
                acts = torch.arange(x.size(1))[None] >= x.size(1) - new
                control = Controls(model, budget, calibration=calibration)
                h = control.parallel(x, [x[0, :x.size(1) - new + 1].tolist()], acts)[0]
            else:
                h = model.hidden(x, mode, depth)
            scores.append(float(model.logits(h[0, -new:]).log_softmax(-1).gather(1, targets[:, None]).sum()))
        out.append(scores)
    return out


@torch.inference_mode()
def test_log_likelihoods_are_those_of_plain_passes(harness, golden, tasks):
    """In all modes, batched; and so the accuracy."""
    from lm_eval.tasks import TaskManager

    from nanochat.lm_eval_model import AdambaLM
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    seen = set()
    for options in MODES:
        lm = AdambaLM(str(GOLDEN), batch_size=4, dtype="float32", **options)
        result = harness(lm, tasks=["adamba_choice"], task_manager=manager, bootstrap_iters=0)
        want = plain_scores(golden, **options)
        samples = sorted(result["samples"]["adamba_choice"], key=lambda s: s["doc_id"])
        for sample, scores in zip(samples, want, strict=True):
            got = [r[0][0] if isinstance(r[0], (list, tuple)) else r[0] for r in sample["resps"]]
            assert got == pytest.approx(scores, abs=2e-4), options
        right = [max(range(3), key=s.__getitem__) == q["gold"] for s, q in zip(want, QUESTIONS)]
        assert result["results"]["adamba_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
        seen.add(tuple(round(s, 3) for scores in want for s in scores))
    assert len(seen) == len(MODES) - 1  # lossless scores as full compute; every other mode otherwise


@torch.inference_mode()
def test_generation_is_the_engines(golden):
    from lm_eval.api.instance import Instance

    from nanochat.lm_eval_model import AdambaLM
    model, tokenizer, calibration = golden
    prompts = ["def read(self, ", "import os\nclass ", "for i in range("]
    for options in MODES:
        lm = AdambaLM(str(GOLDEN), batch_size=2, dtype="float32", **options)
        asked = [Instance("generate_until", {}, (p, {"until": ["\n", "  "], "max_gen_toks": 12}), i)
                 for i, p in enumerate(prompts)]
        got = lm.generate_until(asked, disable_tqdm=True)
        for prompt, text in zip(prompts, got, strict=True):
            ids = tokenizer.encode(prompt, prepend="<|bos|>")
            answer = Engine(model, tokenizer, calibration).answers([ids], 12, temperature=0, stop={ids[0]}, **options)[0]
            want = tokenizer.decode([i for i in answer if i < 311])
            assert text == want[:min((want.find(u) for u in ("\n", "  ") if u in want), default=len(want))], options
    assert any(got)


@torch.inference_mode()
def test_whole_texts_conversations_and_bad_input(golden):
    from lm_eval.api.instance import Instance

    from nanochat.lm_eval_model import AdambaLM
    model, tokenizer, _ = golden
    lm = AdambaLM(str(GOLDEN), batch_size=2, dtype="float32")
    text = Path(os.__file__).read_text()[:600]
    ids = tokenizer.encode(text, prepend="<|bos|>")
    want, T = 0.0, model.config.sequence_len
    for at in range(0, len(ids) - 1, T):
        n = min(T, len(ids) - 1 - at)
        first = max(0, at + n - T) if at else 0
        logp = model(torch.tensor([ids[first:at + n]])).log_softmax(-1)[0, -n:]
        want += float(logp.gather(1, torch.tensor(ids[at + 1:at + n + 1])[:, None]).sum())
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])[0] == pytest.approx(want, abs=1e-3)
    chat = [{"role": "user", "content": "hi <|bos|"}, {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "x"}]
    rendered = lm.tok_encode(lm.apply_chat_template(chat))
    assert rendered == tokenizer.render_for_completion({"messages": [*chat, {"role": "assistant", "content": ""}]})
    rendered = lm.tok_encode(lm.apply_chat_template(chat[:2], add_generation_prompt=False))
    assert rendered == tokenizer.render_conversation({"messages": chat[:2]})[0][:-1]
    for options, words in (({"mode": "wide"}, "unknown mode 'wide'"), ({"dtype": "int8"}, "choose float32"),
                           ({"budget": 0.5}, "mode auto only"), ({"batch_size": "auto"}, "a number of rows")):
        with pytest.raises(ValueError, match=words):
            AdambaLM(str(GOLDEN), **options)


def test_the_harness_own_command(harness, tasks, tmp_path, monkeypatch, capsys):
    """The flags as in the documentation, a task that generates, and its file of results."""
    arguments = ["--model", "adamba", "--model_args", f"pretrained={GOLDEN},mode=auto",
                 "--tasks", "adamba_choice,adamba_generate",
                 "--batch_size", "8", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    lm_eval.main()
    out = capsys.readouterr().out
    assert "adamba_choice" in out and "exact_match" in out
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert results.keys() == {"adamba_choice", "adamba_generate"}
