"""CORE against a plain reference (an example at a time, whole logits, the prompts by a template), and hostile bundles."""
import csv
import functools
import http.server
import io
import json
import random
import threading
import zipfile

import jinja2
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import randomize

from nanochat import core_eval
from nanochat.checkpoint_manager import build_model, save_export
from nanochat.core_eval import CoreTask, open_bundle, prompts, read_bundle
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tokenizer import Tokenizer
from scripts import base_eval

WORDS = ["river", "stone", "bread", "night", "green", "seven", "house", "light", "water", "horse"]


def rows_of(kind, n, seed):
    rng = random.Random(seed)

    def text(k):
        return " ".join(rng.choices(WORDS, k=k))
    if kind == "multiple_choice":
        return [{"query": text(rng.randint(1, 6)), "choices": [text(rng.randint(1, 4)) for _ in range(rng.randint(2, 5))],
                 "gold": rng.randrange(2)} for _ in range(n)]
    if kind == "schema":
        return [{"context_options": [text(rng.randint(2, 5)) for _ in range(2)], "continuation": text(3),
                 "gold": rng.randrange(2)} for _ in range(n)]
    return [{"context": text(4) + rng.choice(["", " ", "\n"]), "continuation": text(1)} for _ in range(n)]


TASKS = [CoreTask("choice", "multiple_choice", rows_of("multiple_choice", 9, 1), 3, "\nAnswer: ", 0.25),
         CoreTask("pair", "schema", rows_of("schema", 7, 2), 0, " ", 0.5),
         CoreTask("last word", "language_modeling", rows_of("language_modeling", 8, 3), 2, " ", 0.0),
         CoreTask("more shots than rows", "multiple_choice", rows_of("multiple_choice", 3, 4), 10, " ", 0.0)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator([" ".join(WORDS)] * 4, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig(128, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    model = randomize(build_model(HybridConfig.from_base(config))).requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that greedy tokens are sometimes right
    return model


def zipped(folder, tasks=TASKS, inside="eval_bundle/", extra=()):
    """A bundle in DCLM's layout, as nanochat's is zipped."""
    file = folder / "bundle.zip"
    with zipfile.ZipFile(file, "w") as z:
        z.writestr(inside + "core.yaml", yaml.safe_dump({"icl_tasks": [
            {"label": t.label, "dataset_uri": f"world/{i}.jsonl", "num_fewshot": [t.shots], "icl_task_type": t.kind,
             **({"continuation_delimiter": t.delimiter} if t.delimiter != " " else {})} for i, t in enumerate(tasks)]}))
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerows([["Eval Task", "Task Category", "Random baseline"],
                          *([t.label, "x", 100 * t.baseline] for t in tasks)])
        z.writestr(inside + "eval_meta_data.csv", out.getvalue())
        for i, t in enumerate(tasks):
            z.writestr(f"{inside}eval_data/world/{i}.jsonl", "".join(json.dumps(r) + "\n" for r in t.rows))
        for name, data in extra:
            z.writestr(name, data)
    return file


TEMPLATES = {
    "multiple_choice": "{% for e in shots %}{{ e.query }}{{ d }}{{ e.choices[e.gold] }}\n\n{% endfor %}"
                       "{{ row.query }}{{ d }}{{ option }}",
    "schema": "{% for e in shots %}{{ e.context_options[e.gold] }}{{ d }}{{ e.continuation }}\n\n{% endfor %}"
              "{{ option }}{{ d }}{{ row.continuation }}",
    "language_modeling": "{% for e in shots %}{{ e.context | trim }}{{ d }}{{ e.continuation }}\n\n{% endfor %}"
                         "{{ row.context | trim }}{{ d }}{% if option %}{{ row.continuation }}{% endif %}"}


def reference(model, tokenizer, task, most=None, widths=None):
    """nanochat's way: one example at a time, each sequence alone, logits of all positions."""
    data, right = list(task.rows), 0
    random.Random(1337).shuffle(data)
    data = data[:most]
    for index, row in enumerate(data):
        others = [i for i in range(len(data)) if i != index]
        shots = [data[i] for i in random.Random(1234 + index).sample(others, min(task.shots, len(others)))]
        template = jinja2.Template(TEMPLATES[task.kind], keep_trailing_newline=True)
        options = row.get("choices") or row.get("context_options") or [False, True]
        texts = [template.render(shots=shots, row=row, d=task.delimiter, option=o) for o in options]
        if task.kind == "language_modeling":
            texts[0] = texts[0].strip()
        ids = [tokenizer.encode(t, prepend="<|bos|>") for t in texts]
        if task.kind == "multiple_choice":
            same = next(i for i in range(min(map(len, ids)) + 1) if i == min(map(len, ids)) or len({r[i] for r in ids}) > 1)
            spans = [(same, len(r)) for r in ids]
        elif task.kind == "schema":
            same = next(i for i in range(1, 999) if i > min(map(len, ids)) or len({r[-i] for r in ids}) > 1) - 1
            spans = [(len(r) - same, len(r)) for r in ids]
        else:
            assert ids[1][:len(ids[0])] == ids[0]
            spans, ids = [(len(ids[0]), len(ids[1]))], ids[1:]
        losses, greedy = [], []
        for r, (start, stop) in zip(ids, spans):
            logits = model(torch.tensor([r]), widths=widths)[0]
            losses.append(float(F.cross_entropy(logits[start - 1:stop - 1], torch.tensor(r[start:stop]))))
            greedy.append(logits[start - 1:stop - 1].argmax(-1).tolist() == r[start:stop])
        right += greedy[0] if task.kind == "language_modeling" else losses.index(min(losses)) == row["gold"]
    return right / len(data)


@pytest.mark.parametrize("mode", ["ghost", "think"])
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.label)
def test_scores_equal_a_plain_reference(model, tokenizer, task, mode):
    for most, batch in ((None, 4), (3, 100)):
        got = core_eval.evaluate_task(model, tokenizer, task, most, batch, mode)
        assert got == pytest.approx(reference(model, tokenizer, task, most, mode))


def test_each_sequences_loss_equals_a_plain_reference(model, tokenizer):
    """Finer than what is right: the losses themselves, in batches of sequences of different lengths."""
    found = [s for task in TASKS for i in range(3) for s in core_eval.sequences(tokenizer, task, i, 128)]
    for i, loss, greedy in core_eval.judge(model, found, 5, "ghost"):
        s = found[i]
        logits = model(torch.tensor([s.ids]), widths="ghost")[0][s.start - 1:s.stop - 1]
        assert loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor(s.ids[s.start:s.stop]))), rel=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == s.ids[s.start:s.stop])


def test_long_prompts_are_cropped_on_the_left(tokenizer):
    whole, cut = (core_eval.sequences(tokenizer, TASKS[0], 0, limit) for limit in (1000, 12))
    for a, b in zip(whole, cut):
        assert len(b.ids) == min(12, len(a.ids)) and a.ids[a.start:a.stop] == b.ids[b.start:b.stop] == b.ids[b.start:]


def test_language_is_judged_by_what_follows_the_context():
    assert prompts(CoreTask("x", "language_modeling", [{"context": "a b ", "continuation": "c"}], 0, " ", 0.0), 0) == [
        "a b", "a b c"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    return tmp_path


def test_a_bundle_is_read_from_a_zip_a_folder_and_a_url(home):
    file = zipped(home)
    by_file = open_bundle(str(file))
    assert read_bundle(by_file) == TASKS == read_bundle(open_bundle(str(by_file))) and open_bundle(str(file)) == by_file
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(home))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/bundle.zip"
    try:
        fetched = open_bundle(url)
    finally:
        server.shutdown()
        server.server_close()
    assert read_bundle(fetched) == TASKS
    assert open_bundle(url) == fetched  # nobody serves any more
    assert sorted(p.name for p in (home / "home/eval_bundle").iterdir()) == ["eval_bundle"]


def damaged(home, what):
    task = TASKS[0]
    if what == "truncated":
        file = zipped(home)
        file.write_bytes(file.read_bytes()[:-200])
        return file
    if what == "no zip":
        (home / "bundle.zip").write_text("hello")
        return home / "bundle.zip"
    if what == "outside":
        return zipped(home, extra=[("../../evil.txt", "x")])
    if what == "no yaml":
        return zipped(home, inside="other/")
    if what == "gold":
        return zipped(home, [CoreTask("g", task.kind, [{**task.rows[0], "gold": 9}], 0, " ", 0.0)])
    if what == "columns":
        return zipped(home, [CoreTask("c", task.kind, [{"query": "x"}], 0, " ", 0.0)])
    if what == "kind":
        return zipped(home, [CoreTask("k", "essay", task.rows, 0, " ", 0.0)])
    return zipped(home, [CoreTask("../../../etc/passwd", "schema", [], 0, " ", 0.0)])


@pytest.mark.parametrize("what, words", [
    ("truncated", "truncated or no .zip"), ("no zip", "truncated or no .zip"), ("outside", "outside its folder"),
    ("no yaml", "no core.yaml"), ("gold", "lacks gold as an index"), ("columns", "lacks choices, gold"),
    ("kind", "describe no task"), ("empty", "describe no task")])
def test_a_damaged_or_hostile_bundle_is_named(home, what, words):
    file = damaged(home, what)
    with pytest.raises(ValueError, match=words):
        read_bundle(open_bundle(str(file)))
    assert not list(home.rglob("evil.txt")) and not list((home / "home").glob(".eval_bundle*tmp"))


def test_an_address_outside_the_bundle_is_refused(home):
    file = zipped(home)
    folder = open_bundle(str(file))
    listed = yaml.safe_load((folder / "core.yaml").read_text())
    listed["icl_tasks"][0]["dataset_uri"] = "../../../../secret.jsonl"
    (folder / "core.yaml").write_text(yaml.safe_dump(listed))
    (home / "secret.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="lacks the data"):
        read_bundle(folder)


def test_the_command(home, model, tokenizer, capsys):
    save_export(home / "m", model, tokenizer, {"tag": "t", "provenance": {}})
    docs = home / "docs.txt"
    docs.write_text("\n".join(" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(6000)))
    common = ["--checkpoint", str(home / "m"), "--data", str(docs), "--eval-tokens", "1024", "--device-type", "cpu"]
    result = base_eval.main([*common, "--bundle", str(zipped(home)), "--max-tokens", "4"])
    for mode, row in result["core"].items():
        want = {t.label: core_eval.evaluate_task(model, tokenizer, t, None, 8, mode) for t in TASKS}
        assert row["accuracy"] == want
        scores = [(want[t.label] - t.baseline) / (1 - t.baseline) for t in TASKS]
        assert row["CORE"] == pytest.approx(sum(scores) / len(scores))
    assert list(result["bpb"]) == list(result["core"]) == list(model.config.distinct_modes)
    assert all(0 < v < 20 for v in result["bpb"].values()) and all(len(s) == 7 for s in result["samples"].values())
    table = (home / "home/base_eval/m/base_eval.csv").read_text().splitlines()
    assert table[0] == "Mode,Task,Accuracy,Centered" and len(table) == 1 + 4 * (len(TASKS) + 1)
    out = base_eval.main([*common, "--eval", "core", "--modes", "ghost", "-x", "2"])
    assert list(out["core"]) == ["ghost"] and not out["bpb"] and "embedded tasks" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--eval", "taste"], "choose of core"), (["--modes", "loud"], "unknown mode"), (["-x", "0"], "at least 1"),
    (["--bundle", "nowhere.zip"], "no evaluation bundle"),
    (["--bundle", "http://127.0.0.1:9/x.zip"], "could not be fetched")])
def test_bad_flags_are_named(home, model, tokenizer, capsys, argv, words):
    save_export(home / "m", model, tokenizer, {"tag": "t", "provenance": {}})
    with pytest.raises(SystemExit):
        base_eval.main(["--checkpoint", str(home / "m"), "--device-type", "cpu", *argv])
    assert words in capsys.readouterr().err
