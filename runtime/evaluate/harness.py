"""lm-evaluation-harness over our engines: its tasks, its prompts, its metrics; only the model is ours.

A folder is run in this process. A server is asked by the harness's own client, which needs the model's tokenizer for
tasks that compare likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from flabc.console import note, progress
from flabc.errors import EngineError, UsageError, require
from flabc.runtime.batch import generate_batch
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

from .perplexity import score_text, target_nll
from .record import Record
from .subject import Local, Server
from .task import EvalOptions

#: Tokens, padding included, that are scored at once: their logits over a large vocabulary take 600 MB.
SCORED_TOKENS = 1024

#: How often a server that is busy is asked again; the harness waits longer each time.
RETRIES = 8

#: A request, the tokens of its context, and those of its continuation.
_Pair = tuple[Any, list[int], list[int]]


def run(subject: Local | Server, options: EvalOptions) -> list[Record]:
    """Run the harness's tasks named in ``options.choices``.

    ``options.data`` is a folder with further task definitions.

    Raises:
        MissingExtraError: if lm-eval is not installed.
        UsageError: if no task is named, or the harness does not know one.
    """
    if not options.choices:
        raise UsageError("No task of lm-evaluation-harness is named.", fix="Say --task lm-eval:arc_easy,boolq")
    evaluator: Any = require("lm_eval.evaluator", "harness")
    tasks: Any = require("lm_eval.tasks", "harness")
    manager = tasks.TaskManager(include_path=None if options.data is None else str(options.data.absolute()))
    unknown = [name for name in options.choices if name not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-evaluation-harness has no task {unknown[0]!r}.", fix="Give --data FOLDER for your own.")
    found = evaluator.simple_evaluate(
        **_model(subject, options),
        tasks=list(options.choices),
        limit=options.limit,
        task_manager=manager,
        apply_chat_template=options.chat,
        log_samples=True,
        bootstrap_iters=0,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        confirm_run_unsafe_code=False,
    )
    return _records(found)


def _model(subject: Local | Server, options: EvalOptions) -> dict[str, Any]:
    """How ``simple_evaluate`` is told which model to ask."""
    if isinstance(subject, Local):
        return {"model": language_model(subject.session)}
    arguments: dict[str, Any] = {"model": subject.model, "base_url": f"{subject.url}/completions"}
    # A text that is scored takes two places of our server: one to be read, one for the token that is asked for beside.
    arguments |= {"num_concurrent": max(1, options.batch // 2), "max_retries": RETRIES}
    if options.tokenizer is None:
        arguments |= {"tokenizer_backend": "None", "tokenized_requests": False}
    else:
        arguments |= {"tokenizer_backend": "huggingface", "tokenizer": str(options.tokenizer)}
    return {"model": "local-completions", "model_args": arguments}


def _records(found: dict[str, Any]) -> list[Record]:
    """One record per document and metric, of the metrics that are means over documents of which more is better.

    Others (a corpus' perplexity, BLEU, what is weighed by length) cannot be told by documents; they are named.

    Raises:
        UsageError: if no metric is left.
    """
    records, others = list[Record](), list[str]()
    for task, rows in found["samples"].items():
        scores: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            for metric in row["metrics"]:
                scores.setdefault((metric, row["filter"]), {})[str(row["doc_id"])] = row[metric]
        upwards, results = found["higher_is_better"].get(task, {}), found["results"][task]
        for (metric, chosen), by_document in scores.items():
            kind = f"{task} {metric}" + ("" if chosen == "none" else f" ({chosen})")
            if upwards.get(metric) is False or not _is_mean(by_document.values(), results.get(f"{metric},{chosen}")):
                others.append(kind)
                continue
            records += [
                Record(task_id=f"{kind}/{document}", unit=document, kind=kind, score=float(score))
                for document, score in by_document.items()
            ]
    if not records:
        raise UsageError(
            f"Nothing that these tasks measure is a mean over documents of which more is better: {', '.join(others)}.",
            fix="For perplexity, say --task perplexity --corpus FILE.",
        )
    if others:
        note(f"left out, since no mean over documents of which more is better: {', '.join(others)}")
    return records


def _is_mean(scores: Collection[Any], told: Any) -> bool:
    """Whether what the harness tells of a metric is the mean of its scores."""
    numbers = all(isinstance(score, (bool, int, float)) and math.isfinite(score) for score in scores)
    return numbers and isinstance(told, (int, float)) and math.isclose(fmean(scores), told, rel_tol=1e-6, abs_tol=1e-9)


def language_model(session: Session) -> Any:
    """A session as the harness's ``LM``.

    Raises:
        MissingExtraError: if lm-eval is not installed.
    """
    base: Any = require("lm_eval.api.model", "harness").TemplateLM

    class SessionLM(base):  # type: ignore[misc]
        """The harness's requests, answered by a session; tokens and windows are the session's own."""

        @property
        def eot_token_id(self) -> int:
            """What a text without context is conditioned on."""
            if session.codec.prefix_id is None:
                raise EngineError("The model has no end-of-sequence token, which lm-evaluation-harness needs.")
            return session.codec.prefix_id

        @property
        def prefix_token_id(self) -> int:
            """The same: beginning of sequence where there is one."""
            return self.eot_token_id

        @property
        def tokenizer_name(self) -> str:
            """Part of the key of the harness's cache."""
            return "flabc"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Token ids of a text."""
            encode = session.codec.encode_plain if add_special_tokens is False else session.codec.encode
            return encode(string)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The prompt of a conversation."""
            return session.codec.render(chat_history, add_generation_prompt=add_generation_prompt)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-likelihood of whole texts, in nats, behind the harness's own prefix."""
            before = [self.prefix_token_id]
            return [-score_text(session.backend, session.codec, request.args[0], before)[0] for request in requests]

        def _loglikelihood_tokens(self, requests: Sequence[_Pair], **_: Any) -> list[tuple[float, bool]]:
            return _likelihoods(session, requests)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Texts up to a stop text."""
            return _generate(session, requests)

    return SessionLM()


def _likelihoods(session: Session, requests: Sequence[_Pair]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of the continuation, whether it is the greedy one) of each request."""
    longest = min(session.backend.limits.max_length, session.spec.max_position_embeddings)
    # The last token is never read; what does not fit is cut off in front.
    rows = [
        ([*context, *continuation][-longest - 1 :], min(len(continuation), longest))
        for _, context, continuation in requests
    ]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    answers: dict[int, tuple[float, bool]] = {}
    with progress("lm-evaluation-harness: scoring", len(rows)) as advance:
        while order:
            taken = [order.pop()]
            width = len(rows[taken[0]][0])
            while order and width * (len(taken) + 1) <= SCORED_TOKENS:
                taken.append(order.pop())
            ids = np.zeros((len(taken), width), np.int64)  # padded behind, where a causal model does not look
            for place, index in enumerate(taken):
                ids[place, : len(rows[index][0])] = rows[index][0]
            logits = session.backend.score(ids[:, :-1])  # (B, S - 1, V)
            for place, index in enumerate(taken):
                tokens, new = rows[index]
                piece, targets = logits[place, : len(tokens) - 1][-new:], ids[place, : len(tokens)][-new:]
                greedy = bool((piece.argmax(-1) == targets).all())
                answers[index] = (-float(target_nll(piece, targets).sum()), greedy)
            advance(len(taken))
    return [answers[index] for index in range(len(rows))]


def _generate(session: Session, requests: Sequence[Any]) -> list[str]:
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    longest = session.backend.limits.max_length
    shortened = cut = 0
    for request in requests:
        context, asked = request.args
        until = asked.get("until") or []
        sampled = bool(asked.get("do_sample", False))
        wanted = int(asked.get("max_gen_toks", asked.get("max_new_tokens", 256)))
        tokens = min(wanted, longest // 2)  # a task may ask for more than the model has positions
        params.append(
            SamplingParams(
                max_tokens=tokens,
                temperature=float(asked.get("temperature") or 1.0) if sampled else 0.0,
                top_p=float(asked.get("top_p", 1.0)),
                stop=tuple([until] if isinstance(until, str) else until),
                seed=len(prompts),
            )
        )
        ids = session.encode(context)
        prompts.append(ids[-(longest - tokens) :])
        shortened += tokens < wanted
        cut += len(ids) > len(prompts[-1])
    if shortened or cut:
        note(
            f"lm-evaluation-harness: there is room for {longest} tokens, so {cut} of {len(prompts)} prompts were cut "
            f"off in front, and {shortened} answers are to end before the task would have them end"
        )
    answers = dict(generate_batch(session, prompts, params))
    return [answers[index].text for index in range(len(prompts))]
