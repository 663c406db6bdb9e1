"""Prompts from a file, in every form in which lists of captions are published."""

import json
import pickle

import pytest

from base.errors import UserError
from images.prompts import read_prompts

PROMPTS = ["a cat", "naïve café, 猫", "", "x" * 5000, "é" * 5000]


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_every_form_gives_the_same_prompts(tmp_path):
    keys = ["caption", "prompt", "text", "caption", "prompt"]
    objects = [{key: prompt, "id": 7} for key, prompt in zip(keys, PROMPTS)]
    nothing = [prompt or None for prompt in PROMPTS]
    forms = {"a.json": json.dumps(PROMPTS), "b.json": json.dumps(nothing),
             "c.json": json.dumps(objects, ensure_ascii=False),
             "a.jsonl": "\n".join(map(json.dumps, nothing)),
             "b.jsonl": "\n".join(map(json.dumps, objects)) + "\n\n"}
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for protocol in range(2, 6):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(nothing, protocol))
    assert all(read_prompts(path) == PROMPTS for path in tmp_path.iterdir())


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff a cat \r\n\r\ntwo\u2028dogs\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "two\u2028dogs"]


def test_half_a_character_is_replaced_which_no_tokenizer_takes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"caption": "a fox \\ud83e"}\n"\\ud83e\\udd8a"')
    assert read_prompts(tmp_path / "a.jsonl") == ["a fox ?", "\U0001f98a"]


def test_a_list_as_long_as_no_network_is_read(tmp_path):
    prompts = [f"caption {i} of an ordinary length, one of many" for i in range(300_000)]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(prompts))
    assert read_prompts(tmp_path / "a.pkl") == prompts


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "no prompts in it"), ("a.txt", b" \n\n", "no prompts in it"),
    ("a.json", b"[]", "no prompts in it"), ("a.json", b'{"a": 1}', "no prompts in it"),
    ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"), ("a.json", b"[1", "is no json"),
    ("a.jsonl", b'"a"\n{', "is no jsonl"), ("a.json", b'["a", 7]', "prompt 2 is '7'; allowed"),
    ("a.jsonl", b'{"caption": 1}', "prompt 1 is '1'; allowed: a text"),
    ("a.json", b"[" * 100_000, "is no json"),
    ("a.pkl", pickle.dumps([Hostile()]), "asks for"), ("a.pkl", b"\x80\x04", "not a whole pickle"),
    ("a.pkl", pickle.dumps({"a": 1}), "no prompts in it")])
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value) and not capsys.readouterr().out


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the prompts .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")
