"""
A small byte-level BPE tokenizer for both skills: every digit is a token, and so is the space before it.

    python -m twotower.demo.tokenizer FOLDER    writes that of the embedded checkpoint
"""

import argparse
from collections.abc import Iterable
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .tasks import Task, training_tasks

PAD, BOS, EOS, MASK = "<pad>", "<s>", "</s>", "<mask>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK)
TASKS = 20_000  # what the embedded checkpoint's was trained on, of seed 0

# One user turn with the generation prompt is `Task.prompt`; with the assistant's turn it is `Task.text` and eos.
CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- ('' if loop.first else '\n') + 'Question: ' + message['content'] + '\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'Answer: ' + message['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception('the roles are user and assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Answer:' -}}
{%- endif -%}
""".strip()


def train_tokenizer(tasks: Iterable[Task], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the texts of `tasks` (a finite iterable).

    It round-trips any UTF-8 text, puts `<s>` in front of what it encodes and leaves `</s>` to the caller.

    Args:
        tasks: what to learn merges from.
        vocab_size: the most tokens to end with, special tokens and the 256 bytes included (default 1024).

    Returns:
        the tokenizer, with `<pad>`, `<s>`, `</s>`, `<mask>` as ids 0 to 3 and a chat template.
    """
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must hold the special tokens and all bytes, {smallest}, got {vocab_size}")
    tokenizer = _untrained()
    tokenizer.train_from_iterator((task.text for task in tasks), _trainer(vocab_size))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    return _wrap(tokenizer)


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Cutting out the digits first leaves the space before a digit alone, whatever stands before it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tokenizer of the embedded checkpoint.")
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    train_tokenizer(islice(training_tasks(0), TASKS)).save_pretrained(folder)


if __name__ == "__main__":
    main()
