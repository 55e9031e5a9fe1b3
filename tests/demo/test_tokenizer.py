"""The tokenizer's promises: ids of specials, single digits, round trips, a clean cut between prompt and answer."""

import itertools

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from twotower.demo.tasks import training_tasks
from twotower.demo.tokenizer import main, train_tokenizer


@pytest.fixture(scope="module")
def problems():
    return list(itertools.islice(training_tasks(0), 1000))


@pytest.fixture(scope="module")
def tokenizer(problems):
    return train_tokenizer(problems)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_vocabulary_and_special_ids(tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<mask>"]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 2048


def test_training_is_deterministic(problems, tokenizer):
    again = train_tokenizer(iter(problems))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_vocab_size(problems):
    assert len(train_tokenizer(problems[:50], vocab_size=300)) == 300
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(problems[:50], vocab_size=259)


def test_encoding_adds_bos_and_no_eos(tokenizer):
    ids = tokenizer("Tom has 3 eggs.").input_ids
    assert ids == [1, *encode(tokenizer, "Tom has 3 eggs.")]
    assert ids.count(1) == 1 and 2 not in ids


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["Tom", "Tom has 3 eggs."], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    padding = len(encode(tokenizer, "Tom has 3 eggs.")) - len(encode(tokenizer, "Tom"))
    assert padding > 0
    assert batch["input_ids"][0][: padding + 1] == [0] * padding + [1]
    assert batch["attention_mask"][0][: padding + 1] == [0] * padding + [1]


@pytest.mark.parametrize("text", ["124", " 124", "x124y", "= 124 + 5.", "\n124", "(124)", "  124"])
def test_digits_are_tokens_of_their_own(tokenizer, text):
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, text))
    assert [token for token in tokens if any(map(str.isdigit, token))] == [c for c in text if c.isdigit()]


def test_the_space_before_a_digit_is_a_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "has 124 + 57 = 181. #### 181"))
    for i, token in enumerate(tokens):
        if token.isdigit() and not tokens[i - 1].isdigit():
            assert tokens[i - 1] == "Ġ"


def test_words_of_the_problems_are_tokens_with_their_space(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "Answer: After 1 + 2 = 3. #### 3"))
    assert tokens == ["Answer", ":", "ĠAfter", "Ġ", "1", "Ġ+", "Ġ", "2", "Ġ=", "Ġ", "3", ".", "Ġ####", "Ġ", "3"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a  b\t\n\r\n c ",
        "Grüße, 你好 🙂 e\u0301",
        "٣ ½ ² 12",
        "x , y .",
        "\x00\x7f",
        "<s>a</s> <mask>",
        " Don 't",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_prompt_and_answer_meet_at_a_token_boundary(problems, tokenizer):
    for problem in problems:
        prompt = tokenizer(problem.prompt).input_ids
        assert prompt + encode(tokenizer, f" {problem.answer}") == tokenizer(problem.text).input_ids
        assert tokenizer.decode(prompt, skip_special_tokens=True) == problem.prompt


def turns(problem):
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}]


def test_chat_template_renders_the_prompt_and_the_training_sequence(problems, tokenizer):
    for problem in problems[:20]:
        prompt = tokenizer.apply_chat_template(turns(problem)[:1], add_generation_prompt=True)["input_ids"]
        assert prompt == tokenizer(problem.prompt).input_ids
        sequence = tokenizer.apply_chat_template(turns(problem))["input_ids"]
        assert sequence == [*tokenizer(problem.text).input_ids, tokenizer.eos_token_id]


def test_chat_template_over_further_turns(problems, tokenizer):
    first, second = problems[:2]
    messages = turns(first) + turns(second)[:1]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"<s>{first.text}</s>\n{second.prompt}"


def test_chat_template_rejects_other_roles(tokenizer):
    with pytest.raises(TemplateError, match="system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)


def test_saved_and_loaded_tokenizer_is_the_same(problems, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for problem in problems[:20]:
        assert loaded(problem.text).input_ids == tokenizer(problem.text).input_ids
    assert loaded.padding_side == "left"
    assert loaded.model_max_length == 2048
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_ids == tokenizer.all_special_ids


def test_its_command_asks_for_a_folder(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tokenizer"])
    with pytest.raises(SystemExit):
        main()
    assert "the following arguments are required: folder" in capsys.readouterr().err
