"""The embedded models' tokenizer: nothing is lost, what must be one token is one token, both encoders agree."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slipstream import tasks
from slipstream.tasks.lexicon import FILLER, KEYS, LABELS, OPERATORS, REGISTERS
from training.tokenizer import CHAT_TEMPLATE, END_THINK, IM_END, IM_START, SPECIAL, THINK, save, vocabulary

TASK_LIKE = st.text(st.sampled_from("LAHz0189 @#:,|;>=+-*()\n.ä中"), max_size=40)
SHORT = {"program_spread": {"num_tokens": 1024}}


@given(text=st.one_of(st.text(max_size=40), TASK_LIKE))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_comes_back(tokenizer, encoder, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert encoder.text(text) == ids


@pytest.mark.parametrize(
    "text", ["naïve 中文 🙂🏽\u200d🚀", "\x00\x1c\x85\u2028\ufeff", "a\r\nb\t c  d", "<think>L012</think>"]
)
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["7", "42", "00123", "L12", "L1234", "x=98765,4.5"])
def test_digits_are_tokens(tokenizer, text):
    tokens = tokenizer.encode(text).tokens
    if text == "L1234":  # no label, and so no token that holds several digits
        assert tokens == list(text)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def one_token(tokenizer, text: str) -> bool:
    return len(tokenizer.encode(text).ids) == 1


def test_what_is_looked_up_is_one_token(tokenizer):
    assert all(one_token(tokenizer, label) for label in LABELS)
    assert all(one_token(tokenizer, register) for register in REGISTERS)
    assert all(one_token(tokenizer, key) for key in KEYS)
    assert all(one_token(tokenizer, " " + word) for word in FILLER)
    assert tokenizer.encode("L012 : add A:B,C|12;34>A=46").tokens == (
        [
            "L012",
            "Ġ:",
            "ĠaddĠ",
            "A",
            ":",
            "B",
            ",",
            "C",
            "|",
            "1",
            "2",
            ";",
            "3",
            "4",
            ">",
            "A",
            "=",
            "4",
            "6",
        ]
    )
    assert all(tokenizer.encode(f"L001 : {op} A:B,C").tokens[2] == f"Ġ{op}Ġ" for op in OPERATORS)
    assert tokenizer.encode("@apple is 12345").tokens == ["@", "apple", "ĠisĠ", *"12345"]


def test_ids_are_stable(tokenizer):
    """Special tokens, then bytes, then pieces; the embeddings were trained with these ids."""
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert len({tokenizer.token_to_id(piece) for piece in LABELS}) == len(LABELS)
    assert tokenizer.token_to_id("L000") == len(SPECIAL) + 256
    assert hashlib.sha256(json.dumps(vocabulary()).encode()).hexdigest()[:16] == "26a9b512272704f6"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_count_tokens_is_exact(tokenizer, encoder, task):
    for seed in range(8):
        problem = tasks.make(task, seed, **SHORT.get(task, {}))
        ids = tokenizer.encode(problem.prompt).ids
        assert len(ids) == tasks.count_tokens(problem.prompt)
        assert ids == encoder.text(problem.prompt)
        rendered = [THINK, *tokenizer.encode(problem.completion[len("<think>") :]).ids, IM_END]
        assert encoder.completion(problem.completion) == rendered and rendered.count(END_THINK) == 1


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_task_falls_back_to_letters(tokenizer, task):
    """All wording of the tasks is in the vocabulary: no word of a problem is spelt byte by byte."""
    problem = tasks.make(task, 1234, **SHORT.get(task, {}))
    tokens = tokenizer.encode(problem.prompt + "\n" + problem.completion).tokens
    assert not [t for t in tokens if len(t) == 1 and t.isalpha() and t not in REGISTERS and t not in "XYZĊĠ"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save(directory)
    assert json.loads((directory / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    return AutoTokenizer.from_pretrained(directory)


def test_chat_template_is_the_training_prompt(loaded, encoder):
    for task in tasks.TASKS:
        problem = tasks.make(task, 3, **SHORT.get(task, {}))
        chat = [{"role": "user", "content": problem.prompt}]
        ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == encoder.prompt(problem.prompt)
        assert ids[0] == IM_START and loaded.decode(ids[-3:]) == "<|im_start|>assistant\n"


def test_transformers_decodes_a_completion(loaded, encoder):
    problem = tasks.make("program", 0, steps=5)
    ids = encoder.completion(problem.completion)
    assert loaded.decode(ids, skip_special_tokens=True) == problem.completion, "the tags are visible text"
    assert loaded.eos_token_id == IM_END == ids[-1] and loaded.pad_token_id == 0
    assert loaded.encode(problem.prompt) == encoder.text(problem.prompt), "no token is added at the ends"


def test_a_conversation_ends_every_turn(loaded):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    text = loaded.apply_chat_template(chat, tokenize=False)
    assert (
        text == "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    )
