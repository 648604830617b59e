"""The engine as a model of lm-evaluation-harness: its generation tasks, read by any strategy.

    python -m apb.evaluation.harness run --model apb --model_args pretrained=PATH,strategy=apb,blocks=8 --tasks NAME

is ``lm_eval`` with the model ``apb`` registered, and takes the same arguments: version 0.4 cannot find models of other
packages by itself. In Python, importing this module is enough for ``lm_eval.simple_evaluate``.

The harness passes one text. Its last paragraph (after the last blank line), else its last line, else its last 32 tokens
are taken as the question; the rest is the document. The model reads the same text either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine import Engine
from ..errors import InputError
from ..hf.loading import shipped_model
from ..hf.texts import Piece, encode
from ..prompt import Prompt

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise InputError("This needs lm-evaluation-harness, which is not installed; install apb[lm-eval].") from error

# Tokens of the question in a text without a line break.
_QUESTION = 32


@register_model("apb")
class EngineLM(LM):
    """A model for generation tasks; tasks that need likelihoods are refused.

    Args:
        pretrained: checkpoint folder or hub id; the shipped model if left out.
        batch_size: must be 1 (or "auto"): prompts are read one at a time.
        max_gen_toks: maximum length of an answer, for tasks that set none.
        device, dtype, strategy, blocks, compressor, ...: as in :meth:`apb.Engine.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto", "None"):
            raise InputError(f"Prompts are read one at a time: leave the batch size at 1, not {batch_size}.")
        self.engine = Engine.from_pretrained(pretrained or shipped_model(), **options)
        self.max_gen_toks = max_gen_toks
        self._rank = self.engine.group.rank

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which the harness caches requests."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    @property
    def _tokenizer(self) -> Any:
        assert self.engine.tokenizer is not None, "from_pretrained loads one"
        return self.engine.tokenizer

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for the harness to note."""
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns rendered by the tokenizer's chat template."""
        return str(
            self._tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request's (text, options), up to the first of its stop strings."""
        from tqdm import tqdm

        answers = []
        for request in tqdm(requests, desc="apb", disable=disable_tqdm or self._rank != 0):
            text, options = request.args
            answers.append(self._generate(text, dict(options)))
            self.cache_hook.add_partial("generate_until", (text, options), answers[-1])
        return answers

    def _generate(self, text: str, options: dict[str, Any]) -> str:
        stops = options.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else stops
        sampling: dict[str, Any] = {"max_new_tokens": int(options.get("max_gen_toks") or self.max_gen_toks)}
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample", temperature > 0):
            sampling["temperature"] = temperature or 1.0
            sampling |= {name: options[name] for name in ("top_k", "top_p") if options.get(name) is not None}
        answer = ""
        for piece in self.engine.stream(split(text, self._tokenizer), **sampling):
            answer += piece
            found = [place for place in map(answer.find, stops) if place >= 0]
            if found:
                return answer[: min(found)]
        return answer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: likelihoods are not supported."""
        raise InputError("The model apb answers generation tasks; this task asks for likelihoods: choose another one.")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Refused, as :meth:`loglikelihood`."""
        return self.loglikelihood(requests)  # type: ignore[return-value]


def split(text: str, tokenizer: Any) -> Prompt:
    """Split a text into a prompt's document and question; the tokens are those of the whole text.

    The harness has already rendered chat templates, so names of control tokens in the text are control tokens. A text
    that begins with BOS gets no second one.
    """
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    for mark in ("\n\n", "\n"):
        cut = text.rfind(mark, 0, len(text.rstrip()))
        if cut > 0 and text[:cut].strip():
            return Prompt(*encode(tokenizer, [Piece(text[:cut]), Piece(text[cut:])], special=not begun).around(0))
    prefix, document, query = encode(tokenizer, [Piece(text)], special=not begun).around(0)
    ids = document + query
    count = min(_QUESTION, max(1, len(ids) // 2))
    return Prompt(prefix, ids[:-count], ids[-count:])


if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
