"""A model of ours as lm-eval's LM, in any layout.

Every rank runs the same evaluator on the same requests. Data-parallel ranks compute every dp_size-th request and exchange the results,
so lm-eval itself knows of one process only. Requests are cut, scored and ended as by lm-eval's own class for transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import ConfigError, DataError
from megatron_ft.evaluation.harness.requests import batches_of, padded, sampling_of
from megatron_ft.evaluation.harness.texts import Texts
from megatron_ft.evaluation.scoring import Scorer
from megatron_ft.generation.loading import ChatModel
from megatron_ft.generation.stop_strings import StopStrings
from megatron_ft.models.rope import LENGTH_METHODS, method_of
from megatron_ft.wording import counted


class RanksLM(TemplateLM):
    """max_length: tokens that the model reads at most; longer requests lose their beginning."""

    def __init__(self, chat: ChatModel, layout: Layout, texts: Texts, max_length: int, batch_size: int):
        super().__init__()
        self.chat, self.layout, self.texts = chat, layout, texts
        self.scorer = Scorer(chat.decoder.model, layout)
        self.max_length, self.batch_size = max_length, batch_size
        scaling = chat.decoder.model.rotary_pos_emb.arch.rope_scaling
        self.pads = method_of(scaling) not in LENGTH_METHODS

    @property
    def eot_token_id(self) -> int:
        return self.texts.end

    @property
    def prefix_token_id(self) -> int:
        return self.texts.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.chat.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.texts.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.texts.conversation(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.texts.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is what greedy decoding would answer."""
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"an answer of a task has {counted(len(continuation), 'token')} after {len(context)} of context; the model scores 1 to "
                    f"{self.max_length} after at least one: change the task, or --max_length"
                )
        return self._shared(requests, self._scored)

    def _scored(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with self._bar(len(rows), "scored") as bar:
            for batch in batches_of([len(row) for row in rows], self.batch_size, self.pads):
                scores = self.scorer.score(padded([rows[i] for i in batch]))
                log_probs, greedy = scores.log_probs.double().cpu(), scores.greedy.cpu()
                for n, i in enumerate(batch):
                    last = len(rows[i]) - 1
                    those = slice(last - len(requests[i][2]), last)
                    found[i] = (float(log_probs[n, those].sum()), bool(greedy[n, those].all()))
                bar.update(len(batch))
        return found

    def _bar(self, total: int, what: str) -> tqdm:
        """Return a progress bar over this replica's requests, which only the first rank shows."""
        return tqdm(total=total, desc=f"requests {what}", disable=not self.layout.is_main)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows that do not overlap."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_prob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers; requests with the same settings are answered together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            settings = copy.deepcopy(requests[numbers[0]].args[1])
            said = self._answers([requests[i].args[0] for i in numbers], settings)
            for i, answer in zip(numbers, said, strict=True):
                answers[i] = answer
        return answers

    def _answers(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        stops = handle_stop_sequences(options.pop("until", None), self.chat.tokenizer.decode([self.eot_token_id]))
        count = options.pop("max_gen_toks")
        if count >= self.max_length:
            raise ConfigError(
                f"a task asks for {count} new tokens and the model reads {self.max_length}: lower max_gen_toks in the task's "
                "generation_kwargs, or raise --max_length"
            )
        sampling = sampling_of(options)
        stop = StopStrings([one for one in stops if one], self.chat.tokenizer.decode)

        def answered(some: Sequence[str]) -> list[str]:
            ids = [np.array(self.tok_encode(text)[-(self.max_length - count) :]) for text in some]
            seed = self.layout.dp_rank
            with self._bar(len(ids), "answered") as bar:
                found = self.chat.decoder.generate(
                    ids, count, sampling, self.batch_size, seed, stop.is_over, bar.update
                )
            return [self.chat.tokenizer.decode(one, skip_special=True) for one in found]

        return [postprocess_generated_text(text, stops, None) for text in self._shared(prompts, answered)]

    def _shared(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Return work(items), of which each data-parallel rank does a share."""
        size = self.layout.dp_size
        shares: list[Any] = [None] * size
        mine = work(items[self.layout.dp_rank :: size])
        dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
        return [shares[i % size][i // size] for i in range(len(items))]
