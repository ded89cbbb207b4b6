"""tok_eval and the report card: their numbers are those of what they collect; what is missing, stale or damaged is said."""
import json
import os

import pytest
from conftest import randomize

from nanochat.checkpoint_manager import build_model, save_export, save_json
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig
from nanochat.tokenizer import Tokenizer
from scripts import report, tok_eval


@pytest.fixture(scope="module")
def tokenizer():
    text = "the ferry had been late for a week, and nobody on the island seemed to mind "
    return Tokenizer.train_from_iterator([text * 9], 300)


@pytest.fixture
def home(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = randomize(build_model(HybridConfig.from_base(GPTConfig(64, tokenizer.get_vocab_size(), 2, 4, 4, 32))))
    save_export(tmp_path / "fractal_checkpoints/d2_32", model, tokenizer, {
        "tag": "d2", "provenance": {"trained": "stage 1", "steps": 9, "from": {"surgery": "insert", "from": None}},
        "figures": {"first_bpb": 3.5, "bpb": 1.25}})
    return tmp_path


def test_bytes_per_token(home, tokenizer, capsys):
    tokenizer.save(home / "tokenizer")
    docs = home / "docs.txt"
    docs.write_text("the ferry had been late for a week. " * 9000)
    result = tok_eval.main(["--data", str(docs)])
    for name, text in tok_eval.TEXTS.items():
        assert result["rows"][name]["this one"] == pytest.approx(len(text.encode()) / len(tokenizer.encode(text)))
    assert result["rows"]["English"]["this one"] > 1.5 > result["rows"]["Chinese"]["this one"] >= 1
    assert "docs.txt (validation)" in capsys.readouterr().out
    assert json.loads((home / f"tok_eval/{tokenizer.fingerprint}.json").read_text())["rows"] == result["rows"]


def test_the_card_collects_what_there_is_and_names_what_is_not(home, tokenizer):
    card = report.main(["-g", "d2"]).read_text()
    assert "| parameters, total |" in card and "| made by | trained stage 1, steps 9 |" in card and "| bpb | 1.25 |" in card
    for script in ("base_eval", "chat_eval", "tok_eval"):
        assert f"Not run yet: `python -m scripts.{script}`" in card
    save_json({"flops_share": {"ghost": 0.25, "think": 1.0}, "bpb": {"ghost": 1.5, "think": 1.25}, "samples": {}, "core": {
        m: {"accuracy": {"a|b": 0.5}, "centred": {"a|b": c}, "CORE": c} for m, c in (("ghost", 0.125), ("think", 0.375))}},
        home / "base_eval/d2_32/base_eval.json")
    save_json({"rows": [{"compute": "think", "scores": {"GSM8K": 0.5}, "ChatCORE": None, "flops": 0.75, "tok_per_s": 12.5}],
               "embedded": ["GSM8K"], "comparison": ["think against the reference: -1.0 points"]},
              home / "chat_eval/d2_32/chat_eval.json")
    save_json({"rows": {"English": {"this one": 3.25, "GPT-2": 4.5}}}, home / f"tok_eval/{tokenizer.fingerprint}.json")
    card = report.main(["-g", "d2", "--out", str(home / "card.md")]).read_text()
    for line in ("| share of full FLOPs | 25.0% | 100.0% |", "| bits per byte | 1.5000 | 1.2500 |",
                 "| **CORE** | 0.1250 | 0.3750 |", "| a\\|b | 0.1250 | 0.3750 |", "| think | 50.0% |  | 75% | 12.5 |",
                 "think against the reference: -1.0 points", "whose scores say nothing: GSM8K.",
                 "| English | 3.250 | 4.500 |"):
        assert line in card, line
    assert "Not run yet" not in card and "was written after this" not in card
    os.utime(home / "base_eval/d2_32/base_eval.json", (1, 1))
    assert report.main(["-g", "d2"]).read_text().count("The model was written after this") == 1


def test_a_result_of_another_form_is_named(home, capsys):
    save_json({"rows": 3}, home / "chat_eval/d2_32/chat_eval.json")
    with pytest.raises(SystemExit):
        report.main(["-g", "d2"])
    assert "is not what scripts.chat_eval writes" in capsys.readouterr().err
