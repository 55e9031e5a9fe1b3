"""
lm-evaluation-harness's model `twotower`: texts of every mode, by [`TwoTowerEngine`]; log-likelihoods of the context
tower, or estimates of the denoiser's.

Importing this module registers the model, so that `lm_eval.simple_evaluate("twotower", model_args)` finds it. lm-eval
has no entry points for models, so its own command does not; `python -m twotower.evaluation.harness` is that command
with this model, too:

    python -m twotower.evaluation.harness run --model twotower --tasks gsm8k_cot --batch_size 16 \
        --model_args pretrained=FOLDER,mode=self_speculative
"""

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from ..checkpoints.placement import prompts_device
from ..checkpoints.selection import WHERE
from ..compat_twotower import logger
from ..decoding.config import STRATEGY_DEFAULTS
from ..generation_twotower import TwoTowerGenerationConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .denoiser_likelihood import denoiser_log_likelihood

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('evaluation.harness needs lm-evaluation-harness; pip install "twotower[eval]"') from error

# What lm-eval's tasks call the most new tokens, the first one given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LIKELIHOODS = ("context", "denoiser")
KNOBS = (*STRATEGY_DEFAULTS, "do_sample", "temperature", "top_k", "top_p")
# Arguments of lm-eval's `hf` model that say how texts are read, rather than how a model is loaded.
READING = (
    *("truncation", "logits_cache", "max_length", "softmax_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args", "max_batch_size"),
)


class TooLong(ValueError):
    """What is asked for does not fit into the model's longest text."""


@register_model("twotower")
class TwoTowerLM(HFLM):
    """
    A TwoTower for lm-eval.

    Args:
        pretrained: folder, Hub repository or a model; default the demonstration checkpoint.
        tokenizer: folder, Hub repository or a tokenizer; default the model's own.
        batch_size: B, requests decoded at a time: rows leave and join as they end and come. Of log-likelihoods, those
            of one pass.
        device: of a model that is loaded here; default a GPU if there is one.
        dtype: likewise; default as stored.
        revision: likewise, on the Hub.
        likelihood: whose: "context" for the context tower's, exactly; "denoiser" for an estimate of a lower bound of
            the denoiser's, with its error in `likelihood_errors` ([`denoiser_log_likelihood`]).
        likelihood_samples: of an estimate, at least 2.
        options: the knobs of `generate` (`mode`, `block_size`, `confidence_threshold`, `acceptance_ratio`, `seed`,
            `do_sample`, `temperature`, ...), for all requests that do not say otherwise in their `generation_kwargs`;
            those in `READING`, as lm-eval's `hf` model takes them; any others are `from_pretrained`'s.

    Raises:
        ValueError: for a knob out of range, a batch size that is no number, an unknown `likelihood`.
    """

    def __init__(
        self,
        pretrained: str | TwoTowerForBlockDiffusion | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str = "main",
        likelihood: str = "context",
        likelihood_samples: int = 32,
        **options: Any,
    ):
        self.knobs = {name: options.pop(name) for name in KNOBS if name in options}
        known = inspect.signature(HFLM.__init__).parameters
        reading = {name: options.pop(name) for name in READING if name in options and name in known}
        TwoTowerGenerationConfig(**_with_do_sample(self.knobs)).validate()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give a whole number of at least 1")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; give one of {', '.join(LIKELIHOODS)}")
        if likelihood_samples < 2:
            raise ValueError(f"likelihood_samples is {likelihood_samples}; give at least 2, for the error")
        self.likelihood, self.likelihood_samples = likelihood, likelihood_samples
        self.likelihood_errors: list[float] = []
        # Where the tokenizer is, too; of another name, in the files of that one.
        where = {each: options[each] for each in (*WHERE, "trust_remote_code") if each in options}
        if tokenizer is not None:
            where.pop("subfolder", None)
        name, model = _loaded(pretrained, device, dtype, revision, options)
        if tokenizer is None and not name:
            raise ValueError("the model was made here, and says of no place where its tokenizer is; give tokenizer")
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or name, revision=revision, **where)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=int(batch_size), backend="causal", **reading
        )
        self._device = prompts_device(model)  # lm-eval takes the weights', the meta device if they are offloaded
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """
        The text of each request up to the first of its stop strings, all decoded by one engine.

        `generation_kwargs` may hold any plain knob of `generate` beside lm-eval's own. What is sampled depends on the
        seed, the prompt, and which repetition of the same request it is.
        """
        repetitions: Counter[str] = Counter()
        asked = [self._arguments(request.args[0], request.args[1], repetitions) for request in requests]
        # The longest first, so that what does not fit into memory fails at once, and a bar never promises too much.
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number]["input_ids"]))
        texts = [""] * len(asked)
        results = self.model.generate_many([asked[i] for i in order], self.batch_size, progress=not disable_tqdm)
        for place, sequences in results:
            number = order[place]
            context, settings = requests[number].args
            new = sequences[0, len(asked[number]["input_ids"]) :].tolist()
            texts[number] = self._before_stops(self.tok_decode(self._after_thought(new)), _until(settings))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[number])
        return texts

    def _arguments(self, context: str, settings: dict[str, Any], repetitions: Counter[str]) -> dict[str, Any]:
        """Of `generate`, for one request."""
        kept = {name: value for name, value in settings.items() if value is not None}
        own = {name: value for name, value in kept.items() if name not in ("until", *LENGTHS)}
        most = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), self.max_gen_toks)
        if most >= self.max_length:
            raise TooLong(
                f"{most} new tokens were asked of a model of {self.max_length}; give a smaller max_gen_toks, or a "
                "larger max_length"
            )
        knobs: dict[str, Any] = {"do_sample": False} | _with_do_sample(self.knobs) | _with_do_sample(own)
        if not knobs["do_sample"]:
            knobs.pop("temperature", None)
        if knobs["do_sample"] or knobs.get("unmasking_rule") == "posterior":
            knobs["seed"] = crc32(context.encode(), (int(knobs.get("seed") or 0) + repetitions[context]) % 2**32)
            repetitions[context] += 1
        else:
            knobs.pop("seed", None)
        ids = self.tok_encode(context, left_truncate_len=self.max_length - most)
        return {"input_ids": ids, "max_new_tokens": most, **knobs, **self._stopping(_until(settings))}

    def _stopping(self, until: Sequence[str]) -> dict[str, Any]:
        """One criterion serves all requests that stop alike: making it reads the whole vocabulary."""
        if not until:
            return {}
        kept = tuple(until)
        if kept not in self._stops:
            self._stops[kept] = StopStringCriteria(self.tokenizer, list(kept))
        return {"stopping_criteria": StoppingCriteriaList([self._stops[kept]])}

    def _after_thought(self, tokens: list[int]) -> list[int]:
        end = self.think_end_token
        if not isinstance(end, int) or end not in tokens:
            return tokens
        return tokens[len(tokens) - tokens[::-1].index(end) :]

    def _before_stops(self, text: str, until: Sequence[str]) -> str:
        if isinstance(self.think_end_token, str):
            text = text.split(self.think_end_token)[-1].lstrip()
        elif self.think_end_token is not None:
            text = text.lstrip()
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """Of requests (texts, context ids, continuation ids): log-likelihood, and whether it is greedy."""
        if self.likelihood == "context":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        samples, block_size = self.likelihood_samples, self.knobs.get("block_size")
        answers = []
        for texts, context, continuation in requests:
            room = self.max_length - len(continuation)
            if room < 0:
                raise TooLong(f"a continuation has {len(continuation)} tokens, the model room for {self.max_length}")
            room = max(1, room)  # of a rolling window, which is all continuation, one token comes before
            estimate = denoiser_log_likelihood(self.model, context[-room:], continuation, samples, block_size)
            self.likelihood_errors.append(estimate.stderr)
            answers.append((estimate.value, estimate.is_first_guess))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's, with the knobs and whose likelihoods these are, estimates with the mean of their errors."""
        errors = self.likelihood_errors
        estimated = {
            "likelihood_samples": self.likelihood_samples,
            "likelihood_mean_stderr": sum(errors) / len(errors) if errors else None,
        }
        own = {"knobs": self.knobs, "likelihood": self.likelihood}
        return super().get_model_info() | own | (estimated if self.likelihood == "denoiser" else {})


def _loaded(
    pretrained: str | TwoTowerForBlockDiffusion | None,
    device: str | None,
    dtype: str | torch.dtype,
    revision: str,
    options: dict[str, Any],
) -> tuple[str, TwoTowerForBlockDiffusion]:
    """The model, and where its tokenizer is."""
    from .. import demo_checkpoint

    if pretrained is not None and not isinstance(pretrained, str):
        if options:
            raise ValueError(f"{next(iter(options))} was given with a model that is loaded already; leave it out")
        return pretrained.config._name_or_path, pretrained
    name = pretrained or str(demo_checkpoint())
    has_gpu = torch.cuda.is_available()
    # lm-eval's command names a GPU where none was asked for, and its `hf` model then takes what there is.
    if device is not None and device.startswith("cuda") and not has_gpu:
        logger.warning("%s was asked for and is not there; the model is on the CPU", device)
        device = None
    options.setdefault("device_map", device or ("auto" if has_gpu else None))
    model = TwoTowerForBlockDiffusion.from_pretrained(name, dtype=dtype, revision=revision, **options)
    return name, model.eval()


def _with_do_sample(knobs: dict[str, Any]) -> dict[str, Any]:
    """As in lm-eval, a temperature alone asks to sample, and 0 not to."""
    if knobs.get("temperature") is None:
        return knobs
    temperature = float(knobs["temperature"])
    return {"do_sample": temperature > 0, **knobs, "temperature": temperature}


def _until(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def main() -> None:
    """lm-eval's command, which finds the model `twotower`, too."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
