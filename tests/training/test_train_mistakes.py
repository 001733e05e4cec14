"""What ``revmux train`` refuses, in which words, and that a bug of ours is no such mistake."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Train, revmux, save_backbone, tiny_config, write_rows
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from word_tokenizers import word_tokenizer

from revmux_vllm import bundled, errors
from revmux_vllm.training import run
from revmux_vllm.training.options import TrainOptions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rungs mux:2,mux:5", "5 does not divide"),
        (
            "--rungs mux:two",
            "--rungs: rung 'mux:two': expected exit, mux:N, merge:N or merge:N+mux:N",
        ),
        ("--widths 2", "--rungs and --widths: give one of them"),
        ("--prefill-layers 4", "fewer than the backbone's 4 layers"),
        ("--batch-size 3", "expected at least the widest width 4"),
        ("--batch-size 500", "together at most the 144 training rows"),
        ("--backbone nowhere", "neither a folder with a config.json nor a model of the hub"),
        ("--train nowhere.tsv", "no such file"),
        ("--eval nowhere.tsv", "no such file"),
        ("--store-dtype int8", "expected auto, float32, bfloat16, float16"),
        ("--adapter-type best", "expected one of revmux, ora, vanilla"),
        ("--recipe secret", "expected default or paper"),
        ("--hold-out 1", "0 to below 1"),
        ("--rungs mux:32", "16 rows a process, fewer than the widest width 32"),
        ("--epochs 0 --gradient-accumulation 0", "--gradient-accumulation 0: expected at least 1"),
        ("--max-tokens 600", "the backbone takes 520 at most"),
        ("--text-columns a,b,c", "expected one, or two for pairs"),
        ("--text-columns a", "expected the columns a; found label, text. Name yours with --text-c"),
        ("--bundle-backbone --backbone org/name", "not a folder with model.safetensors"),
        ("--adapter-hidden-size 0", "--adapter-hidden-size 0: expected at least 1"),
        ("--label-words w3", "at least two different words"),
        ("--label-words w3,unheard", "the tokenizer does not know 'unheard'"),
        ("--backbone revmux-llama/config.json", "neither a folder with a config.json nor"),
        ("--learning-rate nan", "--learning-rate nan: expected more than 0"),
        ("--train sst2:train", "sst2:train: neither a file nor a hub data set"),
        ("--eval few.tsv", "3 rows, 64 at a time, never fill a composite of 4"),
        ("--label-words w3,w4", "not a trained LlamaForCausalLM: no weights for lm_head.weight"),
    ],
)
def test_mistakes_end_with_a_clear_error(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "few.tsv", 3, 1)
    result = train(change)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "--resume" not in result.output, "there is nothing to resume"
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_peft_is_to_be_merged_first(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    result = train(f"--backbone {folder}")
    assert result.exit_code == 2
    assert "a PEFT adapter over org/base, not a whole model; merge it: AutoPeft" in result.output


def test_a_text_that_ends_with_the_padding_is_refused(train: Train, tmp_path: Path) -> None:
    """transformers would read a decoder's answer one token before."""
    rows = write_rows(tmp_path / "train.tsv", 160, 0).read_text()
    (tmp_path / "train.tsv").write_text(rows + "1\tw5 w6 unheard\n")
    result = train("--hold-out 0")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "'w5 w6 unheard' ends with '[UNK]', which is the backbone's padding" in said
    assert "pad_token_id" in said


def test_labels_of_another_order_are_noticed(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train("--train nowhere.tsv")  # makes the backbone
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "backbone")
    texts = [f"w{i} w{i + 1} w7" for i in range(10, 74)]
    with torch.no_grad():
        answers = [model(**tokenizer(t, return_tensors="pt")).logits.argmax().item() for t in texts]
    assert 0 < sum(answers) < len(answers)
    for turned, warns in ((0, False), (1, True)):
        rows = [f"{answer ^ turned}\t{text}" for answer, text in zip(answers, texts, strict=True)]
        (tmp_path / "train.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
        caplog.clear()
        assert train("--hold-out 0").exit_code == 0
        assert ("agree on 0.0 % of 64 rows (chance 50.0 %)" in caplog.text) == warns
        assert ("100.0 %: LABEL_0 as LABEL_1, LABEL_1 as LABEL_0" in caplog.text) == warns


def test_what_is_not_installed_is_named(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    there = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: there(name) if name != "psutil" else None)
    result = train()
    assert result.exit_code == 2
    assert "psutil is not installed; in a clone" in " ".join(result.output.split())
    assert "pip install -e '.[train]'" in " ".join(result.output.split())


@pytest.mark.parametrize("bug", [ValueError("ours"), ImportError("ours"), OSError("of a library")])
def test_a_bug_keeps_its_traceback(
    bug: Exception, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: TrainOptions) -> None:
        raise bug

    monkeypatch.setattr(run, "check", broken)
    assert train().exception is bug


def test_a_backbone_that_answers_with_words_asks_for_them(train: Train, tmp_path: Path) -> None:
    result = train(family="t5")
    assert result.exit_code == 2
    message = f"--backbone {tmp_path / 'backbone'}: a T5 backbone answers with words: give "
    assert f"{message}--label-words, one word per class" in " ".join(result.output.split())


def test_a_model_that_answers_for_every_token_is_refused(train: Train, tmp_path: Path) -> None:
    """A LLaMA's has the very weights of a classifier."""
    config = tiny_config("llama", 64, 4, 2)
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "backbone")
    word_tokenizer().save_pretrained(tmp_path / "backbone")
    result = train()
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "LlamaForTokenClassification in config.json: it answers for every token; one ans" in said
    assert "cannot be told apart again; plain vLLM serves that of a BERT" in said


def test_a_backbone_without_a_head_is_to_be_fine_tuned(train: Train, tmp_path: Path) -> None:
    config = tiny_config("bert", 64, 4, 2)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "backbone")
    word_tokenizer().save_pretrained(tmp_path / "backbone")
    said = " ".join(train().output.split())
    assert "not a trained BertForSequenceClassification: no weights for bert.pooler" in said
    assert said.endswith("classifier.bias; fine-tune it first"), "it cannot answer with words"


def test_what_is_no_checkpoint_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    result = train(f"--output {tmp_path / 'mine'}")
    assert result.exit_code == 2
    assert "has other files than a checkpoint's" in " ".join(result.output.split())
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    backbone = train(f"--backbone {bundled.resolve('revmux-llama')}")
    assert "that is a RevMUX checkpoint" in " ".join(backbone.output.split())


def test_names_are_printed_as_they_are(train: Train, tmp_path: Path) -> None:
    """Rich reads [brackets] as markup and :train: as a picture."""
    save_backbone("llama", tmp_path / "backbone", num_labels=2)
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    config |= {"id2label": {"0": "[/b]", "1": ":train:"}, "label2id": {"[/b]": 0, ":train:": 1}}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config))
    dev = write_rows(tmp_path / "dev.tsv", 32, 1)
    result = train(f"--output {tmp_path / 'out[v2]'} --eval {dev}")
    assert result.exit_code == 0, result.output
    assert f"vllm serve {tmp_path / 'out[v2]'}" in result.output
    shown = revmux(f"eval {tmp_path / 'out[v2]'} --eval {dev}")
    assert "[/b]" in shown.output
    assert ":train:" in shown.output
