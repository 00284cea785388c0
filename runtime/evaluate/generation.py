"""Tasks that generate: first every answer, then every verdict, each kept as soon as it is there.

Grading waits until the model is done, so that a program never misses its time limit because the model needs the cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from flabc.console import progress
from flabc.runtime.sampling import SamplingParams

from .problem import Problem, Program, chat_code
from .record import RECORDS, Completion, Journal, Record
from .sandbox import SandboxLimits, Verdict, run_all
from .subject import Prompt, Subject
from .task import EvalOptions

COMPLETIONS = "completions.jsonl"


def run(
    problems: Sequence[Problem], subject: Subject, options: EvalOptions, folder: Path, label: str
) -> tuple[list[Record], int]:
    """Answer and grade every problem, going on from what a run before has left in ``folder``.

    Args:
        problems: what is asked.
        subject: who answers.
        options: how.
        folder: where both journals are kept.
        label: what the person knows the subject as.

    Returns:
        the records in the order of the problems, and the tokens produced.
    """
    answers = _complete(problems, subject, options, Journal(folder / COMPLETIONS, Completion), label)
    records = _grade(problems, answers, options, Journal(folder / RECORDS, Record), label)
    return records, sum(answer.tokens or 0 for answer in answers)


def prompt_of(problem: Problem, options: EvalOptions) -> Prompt:
    """What the model is given."""
    return [{"role": "user", "content": problem.instruction}] if options.chat else problem.prompt


def params_of(problem: Problem, sample: int, options: EvalOptions) -> SamplingParams:
    """How one answer is drawn; its seed depends on nothing but the problem, the sample and the run's seed."""
    digest = hashlib.sha256(f"{options.seed}\n{problem.task_id}\n{sample}".encode()).digest()
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=() if options.chat else problem.stop,
        seed=int.from_bytes(digest[:4], "big") >> 1,  # servers take a signed 32-bit integer
    )


def _complete(
    problems: Sequence[Problem], subject: Subject, options: EvalOptions, journal: Journal[Completion], label: str
) -> list[Completion]:
    known = {(row.task_id, row.sample) for row in journal.rows}
    jobs = [(problem, sample) for problem in problems for sample in range(options.samples)]
    missing = [(problem, sample) for problem, sample in jobs if (problem.task_id, sample) not in known]
    with progress(f"{label}: answering", len(jobs)) as advance:
        advance(len(jobs) - len(missing))
        prompts = [prompt_of(problem, options) for problem, _ in missing]
        params = [params_of(problem, sample, options) for problem, sample in missing]
        for index, said in subject.answers(prompts, params):
            problem, sample = missing[index]
            journal.append(Completion(task_id=problem.task_id, sample=sample, **vars(said)))
            advance(1)
    order = {(problem.task_id, sample): place for place, (problem, sample) in enumerate(jobs)}
    return sorted(journal.rows, key=lambda row: order[row.task_id, row.sample])


def _grade(
    problems: Sequence[Problem],
    answers: Iterable[Completion],
    options: EvalOptions,
    journal: Journal[Record],
    label: str,
) -> list[Record]:
    by_id = {problem.task_id: problem for problem in problems}
    known = {(row.task_id, row.sample) for row in journal.rows}
    jobs = [(by_id[answer.task_id], answer) for answer in answers if (answer.task_id, answer.sample) not in known]
    running = [job for job in jobs if isinstance(job[0].grading, Program)]
    for problem, answer in jobs:
        if not isinstance(problem.grading, Program):
            right = problem.grading.matches(chat_code(answer.text) if options.chat else answer.text)
            detail = "" if right else f"expected {problem.grading.expected}"
            journal.append(_record(problem, answer, right, detail))
    if running:
        limits = SandboxLimits(timeout_s=options.timeout_s)
        programs = [_program(problem, answer, options) for problem, answer in running]
        with progress(f"{label}: running the answers", len(running)) as advance:
            for index, verdict in run_all(programs, limits):
                problem, answer = running[index]
                journal.append(_record(problem, answer, verdict.passed, _why(answer, verdict)))
                advance(1)
    place = {problem.task_id: number for number, problem in enumerate(problems)}
    return sorted(journal.rows, key=lambda row: (place[row.task_id], row.sample))


def _program(problem: Problem, answer: Completion, options: EvalOptions) -> str:
    assert isinstance(problem.grading, Program)
    if options.chat:
        return problem.grading.answered(chat_code(answer.text))
    return problem.grading.continued(answer.text)


def _why(answer: Completion, verdict: Verdict) -> str:
    if verdict.passed:
        return ""
    if answer.finish_reason == "refused":
        return "the prompt leaves no room for an answer"
    return verdict.detail if verdict.outcome == "failed" else f"{verdict.outcome}: {verdict.detail}".rstrip(": ")


def _record(problem: Problem, answer: Completion, right: bool, detail: str) -> Record:
    return Record(
        task_id=problem.task_id,
        unit=problem.unit,
        kind=problem.kind,
        sample=answer.sample,
        score=float(right),
        prompt=problem.prompt,
        completion=answer.text,
        detail=detail,
    )
