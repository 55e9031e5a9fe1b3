"""What the tests of grammar tools share."""

from twotower.demo.tasks import held_out_tasks

PROMPTS = [problem.prompt for problem in held_out_tasks("words", 3, seed=0)]
REGEX = r"[0-9]{2,3} [+*-] [0-9]{1,2} = [0-9]{2,4}\."


def texts_of(model, tokenizer, inputs, **flags):
    """The new text of each row."""
    output = model.generate(**inputs, **{"max_new_tokens": 40, **flags})
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
