"""The engine as a model of lm-evaluation-harness, its prompts read by any strategy.

    python -m apb.evaluation.harness run --model apb --model_args pretrained=PATH,strategy=apb,blocks=8 --tasks NAME

is ``lm_eval`` with the model ``apb`` registered, and takes the same arguments: version 0.4 cannot find models of other
packages by itself. In Python, importing this module is enough for ``lm_eval.simple_evaluate``.

The harness passes one text; :mod:`apb.evaluation.questions` tells where the question begins in it. The tokens that the
model reads are those of the harness's own ``hf``, and so are stops and likelihoods.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

from jinja2 import TemplateError

from ..engine import Engine
from ..errors import InputError
from ..hf.loading import position_limit, shipped_model
from ..planning.methods import Full
from ..prompt import Prompt
from ..session import token_scores
from .questions import Span, around, last_user_turn, of_tokens, split

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    # lm_eval.models registers the harness's own models, which the harness itself does only while there are no others.
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as error:
    raise InputError(
        "This needs lm-evaluation-harness, 0.4.10 or later, which is not installed; install apb-llm[lm-eval]."
    ) from error

# What the harness's command line passes where no --device is given; on several ranks it would be one GPU for all.
_NO_DEVICE = "cuda:0"
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
# A context and a continuation as texts (None: there are none), and their tokens.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
Score = tuple[float, bool]

log = logging.getLogger(__name__)


@register_model("apb")
class EngineLM(TemplateLM):
    """A model for all tasks of text.

    Strings among the options mean what they mean on the harness's command line: "false" is False, "8" is 8.

    Args:
        pretrained: checkpoint folder or hub id; the shipped model if left out.
        batch_size: must be 1 (or "auto"): prompts are read one at a time.
        max_gen_toks: maximum length of an answer, for tasks that set none.
        device: "cpu" or "cuda"; the harness's "cuda:0" is taken as its default: a GPU if there is one.
        add_bos_token: begin every text with BOS, or none; by default the tokenizer's own way. A text that a chat
            template has begun with BOS gets no second one.
        dtype, strategy, blocks, compressor, ...: as in :meth:`apb.Engine.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int | str = 256,
        device: str | None = None,
        add_bos_token: bool | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if str(batch_size).partition(":")[0] not in ("1", "auto", "None"):
            raise InputError(f"Prompts are read one at a time: leave the batch size at 1, not {batch_size}.")
        usual = device == _NO_DEVICE
        self.engine = Engine.from_pretrained(
            pretrained or shipped_model(), device=None if usual else device, **_values(options)
        )
        if usual and self.engine.device.type == "cpu":
            log.warning("There is no GPU here; the model runs on the CPU.")
        self.max_gen_toks = int(max_gen_toks)
        self.tokenizer = cast(Any, self.engine.tokenizer)
        self._adds_bos: bool | None = _value(add_bos_token)
        if self._adds_bos is not None:
            self.tokenizer.add_bos_token = self._adds_bos
        self._turns: dict[str, Span | None] = {}  # where the last user turns of rendered chats are
        self._samples: dict[str, Mapping[str, Any]] = {}  # what the contexts of likelihoods were made of

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The id of the tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise InputError(
                "A text without a context follows BOS or EOS, and this tokenizer has neither; name another."
            )
        return int(eos if bos is None else bos)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns rendered by the tokenizer's chat template; without the system's if it refuses that role."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except TemplateError:
            log.warning("The chat template was refused the system's turn, which is left out.")
            return self._rendered([turn for turn in chat_history if turn["role"] != "system"], add_generation_prompt)

    def _rendered(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        text = str(render(chat))
        self._turns[text] = last_user_turn(render, chat, text)
        return text

    def _kept_turn(self, text: str) -> Span | None:
        """Where the user's text may be in a chat that was rendered before: the harness can keep requests on disk."""
        opening, closing = self._frame
        end = text.rfind(closing) if closing else -1
        return (len(opening) if text.startswith(opening) else 0, end) if end > 0 else None

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the chat template writes before a user turn, and between the last one and the answer."""
        if self.tokenizer.chat_template is None:
            return "", ""
        render = partial(self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        opening, closing = around(render, [{"role": "user", "content": ""}], 0)
        return opening, closing.rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text."""
        special = self._special(string) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])

    def _special(self, text: str) -> bool:
        """True if the tokenizer is to add its special tokens to a text."""
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        return not (first and text.startswith(first)) and self._adds_bos is not False

    def _prompt(self, text: str, sample: object, rendered: str | None = None) -> Prompt:
        """A text as a prompt; ``rendered``: the text that it is the beginning of, if a chat template has made one."""
        fields = sample if isinstance(sample, Mapping) else {}
        chat = rendered or text
        turn = self._turns[chat] if chat in self._turns else self._kept_turn(chat)
        return split(text, self.tokenizer, special=self._special(text), turn=turn, sample=fields)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request's (text, options), up to the first of its stop strings."""
        answers = []
        for request in self._told(requests, disable_tqdm):
            text, options = request.args
            answers.append(self._generate(self._prompt(text, request.doc), options))
            self.cache_hook.add_partial("generate_until", (text, options), answers[-1])
        return answers

    def _generate(self, prompt: Prompt, asked: Mapping[str, Any]) -> str:
        given = {name: value for name, value in asked.items() if value is not None}
        until = given.pop("until", ())
        until = [until] if isinstance(until, str) else until
        stops = [stop for stop in (*until, self.tokenizer.eos_token) if stop]
        options: dict[str, Any] = dict(normalize_gen_kwargs(_values(given), self.max_gen_toks))
        if unknown := sorted(set(options) - _GENERATION):
            utils.warning_once(log, f"Left out of the task's generation options: {', '.join(unknown)}.")
        if options["max_gen_toks"] == 0:
            return ""
        sampling: dict[str, Any] = {"max_new_tokens": options["max_gen_toks"]}
        if options["do_sample"]:
            sampling["temperature"] = options.get("temperature") or 1.0
            sampling |= {name: options[name] for name in ("top_k", "top_p") if name in options}
        engine = self._engine_for(prompt)
        read = len(engine.reading.arranged(prompt))  # stops are looked for after it
        criteria = stop_sequences_criteria(self.tokenizer, stops, read, 1)
        text = engine.generate(prompt, stopping_criteria=criteria, **sampling).text
        return str(postprocess_generated_text(text, stops, None))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Score]:
        """For each request's (context, continuation): its log-likelihood, and if greedy decoding would give it."""
        self._samples = {request.args[0]: request.doc for request in requests}
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text.

        There is no document in it to be read by a strategy: attention is exact.
        """
        sums = []
        for request in self._told(requests, disable_tqdm):
            (text,) = request.args
            tokens = self.tok_encode(text)
            longest = position_limit(self.engine.model.config) or len(tokens) + 1
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, longest, context_len=1)
            scored: list[Scored] = [(None, *utils.make_disjoint_window(window)) for window in windows]
            sums.append(sum(score for score, _ in self._loglikelihood_tokens(scored, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """As :meth:`loglikelihood`; a context is read once for all its continuations."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(number)
        scores: dict[int, Score] = {}
        for context, numbers in self._told(list(groups.items()), disable_tqdm):
            texts = requests[numbers[0]][0]
            found = self._after(context, texts and texts[0], [requests[number][2] for number in numbers])
            scores |= zip(numbers, found, strict=True)
            for number in numbers:
                if (pair := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, scores[number])
        return [scores[number] for number in range(len(requests))]

    def _after(self, context: Sequence[int], text: str | None, continuations: Sequence[list[int]]) -> list[Score]:
        """The scores of continuations of a context; ``text``: the context's, if it is one."""
        if len(context) == 1:
            return [self._after_one(context, continuation) for continuation in continuations]
        # White space at a context's end has gone to the continuations.
        prompt = self._prompt(text.rstrip(), self._samples.get(text), text) if text else of_tokens(context)
        assert prompt.token_ids == tuple(context), "both are the tokens of the text"
        engine = self._engine_for(prompt) if text else self._exact
        session = engine.prefill(prompt, max_new_tokens=max(0, *(len(each) - 1 for each in continuations)))
        return [_total(*session.score(each)) if each else (0.0, True) for each in continuations]

    def _after_one(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        """As :meth:`_after` a single token, which is no prompt yet: the continuation's first token makes it one."""
        if not continuation:
            return 0.0, True
        prompt = Prompt.from_tokens((), context, continuation[:1])
        _, logits = self._exact.inspect(prompt, [0], lambda strategy, layer: None)
        score, greedy = _total(*token_scores(logits, continuation[:1]))
        if len(continuation) > 1:
            session = self._exact.prefill(prompt, max_new_tokens=len(continuation) - 2)
            rest, all_greedy = _total(*session.score(continuation[1:]))
            score, greedy = score + rest, greedy and all_greedy
        return score, greedy

    def _engine_for(self, prompt: Prompt) -> Engine:
        """The engine; the exact one for a document of fewer tokens than the blocks that were asked for."""
        asked = max(method.blocks or 1 for method in self.engine.reading.methods)
        return self.engine if asked <= len(prompt.document) else self._exact

    @cached_property
    def _exact(self) -> Engine:
        """An engine on the same model, for texts without a document, which have nothing to be cut into blocks."""
        if self.engine.group.size > 1:
            raise InputError(
                f"Texts without a context are scored on one rank, and there are {self.engine.group.size}; use one."
            )
        return Engine.from_model(
            self.engine.model,
            self.tokenizer,
            strategy=Full(),
            backend=self.engine.backend,
            fused=self.engine.fused,
            mesh=self.engine.mesh,
            allow_extrapolation=self.engine.reading.allow_extrapolation,
            verify=False,
        )

    def _told(self, items: Sequence[Any], disable: bool) -> Any:
        """The items, with a bar that shows how many are done, on rank 0."""
        from tqdm import tqdm

        return tqdm(items, desc="apb", disable=disable or self.engine.mesh.everyone.rank != 0)


def _value(value: Any) -> Any:
    return utils.handle_arg_string(value) if isinstance(value, str) else value


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their strings read as the harness reads its command line."""
    return {name: _value(value) for name, value in options.items()}


def _total(log_probabilities: Any, likeliest: Any) -> Score:
    return float(log_probabilities.sum()), bool(likeliest.all())


if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
