"""Runs and models that answer: in conversation, beside their base, for a file, and in a terminal."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.checkpoint.source import find_newest_source
from sft_dist.cli import main
from sft_dist.config.schema import Config
from sft_dist.data.messages import Message
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.evaluation.prompt import prompter_of, trained_on
from sft_dist.export.checkpoint_artefact import artefact_of_checkpoint
from sft_dist.generate.batch import answer_file
from sft_dist.generate.chat import Chat
from sft_dist.generate.conversation import Command
from sft_dist.generate.engine import Sampling, Voice
from sft_dist.generate.load import Loaded, load
from tests.helpers.taught import PAIRS, conversation, teach, write_rows
from tests.helpers.terminal import Terminal
from tests.helpers.tiny_model import build_base
from tests.helpers.trained_run import train_run

ASKED, ANSWERED = PAIRS[0]
GREEDY = Sampling(max_new_tokens=40)


@pytest.fixture(scope="module")
def taught(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that knows ``PAIRS``."""
    return teach(tiny_base, tmp_path_factory.mktemp("models") / "taught", lora=True)


@pytest.fixture(scope="module")
def loaded(taught: Path) -> Loaded:
    return load(find_newest_source(str(taught)), device="cpu", dtype="fp32", with_base=True)


def question(loaded: Loaded, text: str = ASKED) -> list[int]:
    return loaded.prompter.chat([Message("user", text)])


# what a run made


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("lora", {"method": {"type": "lora", "r": 16, "alpha": 32}, "steps": 30}),
        pytest.param("full", {"method": {"type": "full", "freeze": ["embed_tokens"]}, "steps": 2}, marks=pytest.mark.ci),
        pytest.param("prefix", {"method": {"type": "prefix"}, "steps": 2}, marks=pytest.mark.ci),
        pytest.param("qlora", {"method": {"type": "qlora", "quantization": {"skip": ["layers.0"]}}, "steps": 2}, marks=pytest.mark.ci),
        pytest.param("int8", {"method": {"type": "qlora", "quantization": {"type": "int8"}}, "steps": 2}, marks=pytest.mark.ci),
        pytest.param("prompt", {"method": {"type": "prompt"}, "steps": 2}, marks=pytest.mark.ci),
        pytest.param("pissa", {"method": {"type": "lora", "init": "pissa"}, "steps": 2}, marks=pytest.mark.ci),
    ],
)  # fmt: skip
def test_a_run_and_its_checkpoint_answer_as_trained(
    tiny_base: Path, tmp_path: Path, name: str, sections: dict[str, Any]
) -> None:
    run = train_run(tiny_base, tmp_path / name, **sections)
    source = find_newest_source(str(run))
    loaded = load(source, device="cpu", dtype="auto", with_base=True)
    answer = loaded.engine.answer(loaded.tuned, question(loaded), GREEDY)
    if name == "lora":
        assert answer.text == ANSWERED
    assert_without_cache(loaded, loaded.tuned, answer.text, answer.num_tokens)
    # The last checkpoint holds what became final/.
    artefact = artefact_of_checkpoint(find_newest_source(str(run), checkpoint="latest"), tmp_path / "artefact")
    for file in sorted((run / "final").glob("*.safetensors")):
        theirs, ours = load_file(file), load_file(artefact / file.name)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert {path.name for path in artefact.iterdir()} == {path.name for path in (run / "final").iterdir()}
    from_checkpoint = load(find_newest_source(str(run), checkpoint="latest"), device="cpu", dtype="auto")
    again = from_checkpoint.engine.answer(from_checkpoint.tuned, question(from_checkpoint), GREEDY)
    assert again.text == answer.text
    # Before training it was the base, or that quantised.
    assert loaded.base is not None
    before = loaded.engine.answer(loaded.base, question(loaded), GREEDY)
    assert before.text != answer.text
    if name not in ("qlora", "int8"):
        plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
        base = load(find_newest_source(str(tiny_base)), device="cpu", dtype="fp32")
        assert before.text == base.engine.answer(base.tuned, question(base), GREEDY).text
        assert_without_cache(loaded, Voice(plain, nullcontext, ()), before.text, before.num_tokens)


def assert_without_cache(loaded: Loaded, voice: Voice, text: str, num_tokens: int) -> None:
    """``text`` is what the model finds most probable, token by token, each in a forward pass of its own."""
    ids = question(loaded)
    for _ in range(min(num_tokens, 12)):
        with torch.no_grad():
            logits = voice.model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    found = loaded.engine._decode(ids[len(question(loaded)) :]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert text.startswith(found)


@pytest.mark.ci
def test_new_tokens_begin_as_in_training(tiny_base: Path, tmp_path: Path) -> None:
    """The base of a grown vocabulary has the mean of its rows for them, not what transformers draws."""
    base = {"path": str(tiny_base), "add_tokens": ["<tool>", "<|call|>"]}
    run = train_run(tiny_base, tmp_path, steps=2, model=base, method={"type": "lora"})
    loaded = load(find_newest_source(str(run)), device="cpu", dtype="auto", with_base=True)
    assert loaded.base is not None
    with loaded.base.active(), torch.no_grad():
        logits = loaded.base.model(input_ids=torch.tensor([question(loaded)])).logits[0]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([question(loaded)])).logits[0]
    torch.testing.assert_close(logits[:, :259], expected)
    # The mean of the rows of an output layer has the mean of their logits.
    torch.testing.assert_close(logits[:, 259:], expected.mean(dim=1, keepdim=True).expand(-1, 2), atol=1e-5, rtol=0)


def test_a_damaged_checkpoint_does_not_answer(tiny_base: Path, tmp_path: Path) -> None:
    run = train_run(tiny_base, tmp_path, steps=1, method={"type": "lora"})
    source = find_newest_source(str(run), checkpoint="1")
    file = max(source.folder.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: "):
        artefact_of_checkpoint(source, tmp_path / "artefact")


def test_an_adapter_without_its_base(taught: Path, tmp_path: Path) -> None:
    settings = json.loads((taught / "adapter_config.json").read_text())
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in taught.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "models/lost"}))
    with pytest.raises(CheckpointError, match="the base model of the adapter, models/lost, is not on this machine"):
        load(find_newest_source(str(copied)), device="cpu", dtype="auto")
    (copied / "adapter_model.safetensors").unlink()
    (copied / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not load: "):
        load(find_newest_source(str(copied)), device="cpu", dtype="auto")


# how it is prompted


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "conversations"),
        ({"instruction": "a", "output": "b"}, "conversations"),
        ({"prompt": "a", "completion": "b"}, "conversations"),
        ({"text": "a"}, "documents"),
        ({"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}]}, "literal"),
        ({"input_ids": [1, 2]}, "literal"),
    ],
)
def test_what_a_run_was_trained_on_is_read_from_its_rows(tmp_path: Path, rows: dict[str, Any], kind: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [rows])
    settings: dict[str, Any] = {
        "model": {"path": "m"},
        "train": {"global_batch_size": 1, "max_steps": 1},
        "output_dir": "x",
    }
    config = Config.model_validate(settings | {"data": {"train": [{"path": str(file)}]}})
    assert trained_on(config) == kind
    file.unlink()
    assert trained_on(config) is None


def test_a_model_without_turns_goes_on_from_text(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    settings: dict[str, Any] = {
        "model": {"path": "m"},
        "train": {"global_batch_size": 1, "max_steps": 1},
        "output_dir": "x",
    }
    after_text = prompter_of(tokenizer, Config.model_validate(settings | {"data": {"train": [{"path": str(rows)}]}}))
    assert (
        after_text.notice
        == "the run was trained without a chat template: the model goes on from your text, and knows no turns"
    )
    tokenizer.chat_template = None
    base = prompter_of(tokenizer, None)
    assert base.notice == "the tokenizer has no chat template: the model goes on from your text, and knows no turns"
    assert base.complete("日") == tokenizer("日")["input_ids"]
    with pytest.raises(ConfigError, match="no chat template"):
        base.chat([Message("user", "a")])


def test_a_system_message_that_the_template_would_leave_out_is_refused(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    prompter = prompter_of(tokenizer, None)
    with pytest.raises(ConfigError, match="it has no place for a system message"):
        prompter.chat([Message("system", "a"), Message("user", "b")])


# a conversation


@pytest.fixture
def talk(loaded: Loaded) -> tuple[Chat, Callable[[], str]]:
    """A conversation, and what it has shown since it was last asked for."""
    file = io.StringIO()
    chat = Chat(loaded, GREEDY, Console(file=file, width=200, highlight=False))

    def shown() -> str:
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text

    return chat, shown


Talk = tuple[Chat, Callable[[], str]]


def test_turns_are_kept_taken_back_and_forgotten(talk: Talk, tmp_path: Path) -> None:
    chat, shown = talk
    chat.ask(ASKED)
    first = shown()
    assert first.splitlines()[0] == ANSWERED
    assert first.splitlines()[1].startswith("25 tokens, ")
    chat.ask(ASKED)
    assert [m.role for m in chat.conversation.messages()][:2] == ["user", "assistant"]
    assert chat._prompt("x") != chat.loaded.prompter.chat([Message("user", "x")]), (
        "what was said before is in the prompt"
    )
    chat.obey(Command("undo", ""))
    assert chat.conversation.turns == [(ASKED, ANSWERED)]
    file = tmp_path / "saved.jsonl"
    for _ in range(2):
        chat.obey(Command("save", str(file)))
    assert [json.loads(line) for line in file.read_text().splitlines()] == [conversation(ASKED, ANSWERED)] * 2
    chat.obey(Command("reset", ""))
    shown()
    chat.ask(ASKED)
    assert shown().splitlines()[0] == ANSWERED
    with pytest.raises(ConfigError, match="no file is named"):
        chat.obey(Command("save", ""))
    assert chat.obey(Command("help", ""))
    assert "/system [TEXT]" in shown()
    assert not chat.obey(Command("exit", ""))


def test_a_system_message_stands_first(talk: Talk) -> None:
    chat, _ = talk
    chat.obey(Command("system", "短く。"))
    assert chat._prompt("x") == chat.loaded.prompter.chat([Message("system", "短く。"), Message("user", "x")])
    chat.obey(Command("reset", ""))
    assert chat.conversation.system == "短く。"
    chat.obey(Command("system", ""))
    assert chat._prompt("x") == chat.loaded.prompter.chat([Message("user", "x")])


@pytest.mark.parametrize(("width", "is_wide"), [(100, True), (60, False)])
def test_base_and_tuned_model_beside_or_below_each_other(loaded: Loaded, width: int, is_wide: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False)
    Chat(loaded, replace(GREEDY, max_new_tokens=25), console, compares=True).ask(ASKED)
    lines = file.getvalue().splitlines()
    both = [line for line in lines if "before training" in line and "after training" in line]
    assert bool(both) == is_wide
    assert any(ANSWERED in line for line in lines)
    assert max(line.count("tokens/s") for line in lines) == (2 if is_wide else 1)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["chat", *arguments])
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_one_prompt_prints_the_answer_alone(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(capsys, str(taught), "--prompt", ASKED, "--temperature", "0")
    assert (code, out) == (0, ANSWERED + "\n")
    assert err.splitlines()[0].startswith("taught: LoRA adapter on ")
    assert "tokens/s" in err


def test_questions_through_a_pipe(
    taught: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'{ASKED}\n/reset\n"""\n{PAIRS[1][0]}\n"""\n/nonsense\n/exit\n{ASKED}\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code, out, _ = run_command(capsys, str(taught), "--temperature", "0")
    lines = out.splitlines()
    assert code == 0
    assert [line for line in lines if line in dict(PAIRS).values()] == [ANSWERED, PAIRS[1][1]]
    assert "error: /nonsense is no command" in lines


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--file", "x"), "--file without --out"),
        (("--out", "x"), "--out without --file"),
        (("--file", "x", "--out", "y", "--prompt", "z"), "--prompt is one question and --file has many"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU here"),
    ],
)
def test_options_that_do_not_go_together(
    taught: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], what: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = run_command(capsys, str(taught), *arguments)
    assert code == 2
    assert f"error: {what}" in err


def test_a_file_that_is_not_there(taught: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    code, _, err = run_command(capsys, str(taught), "--file", str(tmp_path / "none.jsonl"), "--out", str(out))
    assert (code, out.exists()) == (4, False)
    assert f"error: --file: {tmp_path}/none.jsonl does not exist" in err


# a file


ROWS: list[dict[str, Any]] = [
    conversation(*PAIRS[0]),
    {"messages": [{"role": "user", "content": PAIRS[1][0]}]},
    {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    {"instruction": PAIRS[1][0], "input": "", "output": PAIRS[1][1]},
    {"prompt": PAIRS[2][0], "completion": PAIRS[2][1]},
    {"prompt": PAIRS[2][0]},
    {"segments": [{"text": f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n", "train": False}, {"text": ANSWERED, "train": True}]},
]  # fmt: skip
EXPECTED = [PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[2], PAIRS[0]]


def answer(loaded: Loaded, source: Path, output: Path, sampling: Sampling = GREEDY, system: str | None = None) -> Any:
    quiet = Console(file=io.StringIO())
    return answer_file(loaded, sampling, str(source), output, identity="x", system=system, console=quiet)


def test_a_file_in_any_layout_is_answered(loaded: Loaded, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    done = answer(loaded, source, output)
    assert (done.num_rows, done.num_before) == (7, 0)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == [answered for _, answered in EXPECTED]
    assert [row.get("reference") for row in rows] == [
        None if number in (1, 5) else answered for number, (_, answered) in enumerate(EXPECTED)
    ]
    assert [row["messages"][-1]["content"] for row in rows[:6]] == [asked for asked, _ in EXPECTED[:6]]
    assert all(row["base_answer"] != row["answer"] and row["finish_reason"] == "stop" for row in rows)


def test_it_goes_on_where_it_was_stopped(loaded: Loaded, tmp_path: Path) -> None:
    """Also in the middle of a line, with draws that do not depend on what came before."""
    loaded = replace(loaded, base=None)
    source, output = write_rows(tmp_path / "in.jsonl", ROWS[:4]), tmp_path / "out.jsonl"
    drawn = replace(GREEDY, temperature=1.0, seed=3)
    answer(loaded, source, output, drawn)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"".join(lines[:2]) + lines[2][:20], b"", whole):
        output.write_bytes(kept)
        done = answer(loaded, source, output, drawn)
        assert output.read_bytes() == whole
        assert done.num_before == kept.count(b"\n")
    output.unlink()
    answer(loaded, source, output, replace(drawn, seed=4))
    assert output.read_bytes() != whole


def test_answers_to_something_else_are_not_mixed_in(loaded: Loaded, tmp_path: Path) -> None:
    loaded = replace(loaded, base=None)
    source, output = write_rows(tmp_path / "in.jsonl", ROWS[:2]), tmp_path / "out.jsonl"
    answer(loaded, source, output)
    before = output.read_bytes()
    others: list[tuple[Callable[[], object], str]] = [
        (lambda: answer(loaded, source, output, replace(GREEDY, max_new_tokens=9)), "row 1 was answered by another model, or with"),
        (lambda: answer(loaded, write_rows(tmp_path / "b.jsonl", ROWS[3:5]), output), "row 1 answers another question"),
        (lambda: answer(loaded, write_rows(tmp_path / "c.jsonl", ROWS[:1]), output), "row 2 is one more than the input has"),
        (lambda: answer(loaded, source, output, system="短く。"), "row 1 answers another question"),
    ]  # fmt: skip
    for again, what in others:
        with pytest.raises(ConfigError, match=what):
            again()
        assert output.read_bytes() == before
    for strange in ("a shopping list", "a shopping list\n", '{"a": 1}\n'):
        output.write_text(strange)
        with pytest.raises(ConfigError, match="exists"):
            answer(loaded, source, output)
        assert output.read_text() == strange


def test_a_row_that_is_too_long_is_named(loaded: Loaded, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [ROWS[0], {"prompt": "あ" * 200}])
    with pytest.raises(ConfigError, match=r"row 2 of .*: the prompt has 6.. tokens and the model was made for 512"):
        answer(loaded, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


# a terminal


def press_ctrl_c(terminal: Terminal) -> None:
    """As late as a person: between its prompt and its waiting, CPython's readline hears of it with the next key only."""
    time.sleep(1)
    terminal.type("\x03")


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer and not the program; twice at the prompt it leaves."""
    base = build_base(tmp_path / "slow", num_layers=24)
    saved = tmp_path / "saved.jsonl"
    command = [sys.executable, "-m", "sft_dist", "chat", str(base), "--temperature", "0", "--max-new-tokens", "450"]
    with Terminal(command, columns=60) as terminal:
        at = terminal.wait_for("you > ")
        assert "slow: model" in terminal.text
        terminal.type("東京は？\r")
        at = terminal.wait_for(r"東京は？\n.{3}", after=at)  # it has begun to speak
        terminal.type("\x03")
        at = terminal.wait_for(r"(\d+) tokens?, [\d.,]+ tokens/s, stopped\s+you > ", after=at)
        terminal.type(f"/save {saved}\r")
        at = terminal.wait_for("you > ", after=terminal.wait_for("added to ", after=at))
        terminal.type("/reset\r")
        at = terminal.wait_for(r"a new conversation\nyou > ", after=at)
        terminal.type("/undo\r")
        at = terminal.wait_for(r"error: /undo: nothing has been said yet\n  fix: .*\nyou > ", after=at)
        press_ctrl_c(terminal)
        at = terminal.wait_for(r"Ctrl-C again leaves.*\nyou > ", after=at)
        press_ctrl_c(terminal)
        assert terminal.wait_for_exit() == 0
        assert "Traceback" not in terminal.text
    asked, answered = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert asked == {"role": "user", "content": "東京は？"}
    assert 0 < len(answered["content"]) < 450
