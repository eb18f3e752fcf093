"""How good a model is: what it is asked, and how its answers are judged. What is made of that is grpo/comparison.py's.

An evaluation within a run asks the engines that it has (`accuracy`); python -m grpo.evaluate starts one a model (`ask`).
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from grpo import builtin, tasks
from grpo.comparison import Answers, Question
from grpo.config import RunConfig
from grpo.devices import engine_device
from grpo.errors import DataError, RewardError
from grpo.grading import Failed, GradingPool
from grpo.inference import Sampling, engine_spec
from grpo.models import load_tokenizer, read_config
from grpo.plan import check_positions
from grpo.rewards import Grade
from grpo.rollout import Completions
from grpo.standalone import Part, sample

if TYPE_CHECKING:
    from grpo.pools import EnginePool


def greedy(max_tokens: int) -> Part:
    """One response a prompt, with nothing drawn."""
    return Part(Sampling(num_responses=1, max_tokens=max_tokens, temperature=0.0), seed=0)


def parts(config: RunConfig, k: int) -> list[Part]:
    """What a model is asked for: greedy responses, then k samples a prompt as training draws them."""
    inference = config.inference_model
    sampling = Sampling(k, inference.max_tokens, inference.temperature, inference.top_p)
    return [greedy(inference.max_tokens), *([Part(sampling, config.seed)] if k else [])]


def accuracy(
    engines: "EnginePool",
    grading: GradingPool,
    data: tasks.EncodedProblems,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    seed: int | None = 0,
) -> dict[str, float]:
    """{"accuracy": share of right answers in [0, 1], "n": problems graded} of the weights that a run's engines have.

    Problems whose grading failed or took too long are told, and counted as "ungraded" where there are any; raises
    RewardError where there is no other. Greedy, so nothing is drawn; training reseeds the engines for every collection, so
    its stream stays as it was.
    """
    completions = engines.generate(data.prompts, greedy(max_tokens).sampling, seed)
    texts = tokenizer.batch_decode(completions.responses(), skip_special_tokens=True)
    grades = grading.grade(data.problems, [data.thought + text for text in texts])
    right = [grade.correct for grade in grades if grade.is_verdict]
    found = {"ungraded": len(grades) - len(right)} if len(right) < len(grades) else {}
    if found:
        note, _ = Counter(grade.note for grade in grades if not grade.is_verdict).most_common(1)[0]
        lost = f"{found['ungraded']} of {len(grades)} greedy responses could not be graded: {note}"
        if not right:
            raise RewardError(f"{lost}; there is no accuracy without a verdict")
        print(f"Warning: {lost}; the accuracy is that of the other {len(right)}", flush=True)
    return {"accuracy": sum(right) / len(right), "n": len(right)} | found


def ask(
    config: RunConfig, models: dict[str, str], questions: list[Question], task: tasks.Task, pool: GradingPool, k: int
) -> tuple[list[Question], dict[str, Answers]]:
    """The questions that are not longer than env.max_prompt_length for any model, and each model's answers to them."""
    device, limit = engine_device(config), config.env.max_prompt_length
    encoded = {}
    for name, model in models.items():
        path = builtin.resolve(model, config.model.cache_dir)
        check_positions(config, read_config(path))
        tokenizer = load_tokenizer(path)
        encoded[name] = path, tokenizer, [tasks.encode(question.problem, task, tokenizer) for question in questions]
    kept = [i for i in range(len(questions)) if all(len(prompts[i]) <= limit for _, _, prompts in encoded.values())]
    if not kept:
        raise DataError(f"all {len(questions)} prompts are longer than env.max_prompt_length ({limit}): raise it")
    questions, answers = [questions[i] for i in kept], {}
    for name, (path, tokenizer, prompts) in encoded.items():
        print(f"Asking {models[name]}", flush=True)
        spec = engine_spec(config, path, device)
        completions = sample(
            spec, [prompts[i] for i in kept], parts(config, k), config.ray.start_timeout_s, config.ray.timeout_s
        )
        texts = [tokenizer.batch_decode(its.responses(), skip_special_tokens=True) for its in completions]
        thought = tasks.opened_thought(prompts[kept[0]], tokenizer)
        answers[name] = judge(questions, completions[0], *texts, pool=pool, thought=thought)
    return questions, answers


def judge(
    questions: list[Question],
    completions: Completions,
    texts: list[str],
    sampled: list[str] = (),
    *,
    pool: GradingPool,
    thought: str = "",
) -> Answers:
    """The verdicts on the greedy `texts` of `completions`, and on the texts `sampled`, k a question.

    A user's function gives the rewards of the greedy ones. Of the samples nothing but the outcomes is told.
    thought: what the prompts have opened, see `tasks.opened_thought`.
    """
    mine = [i for i, question in enumerate(questions) if question.graded]
    problems = [questions[i].problem for i in mine]
    grades: list[Grade | None] = [None] * len(questions)
    samples: list[list[Grade]] = [[] for _ in questions]
    for i, grade in zip(mine, graded(pool, problems, [texts[i] for i in mine], thought), strict=True):
        grades[i] = grade
    k = len(sampled) // len(questions)
    asked = [(problem, thought + sampled[i * k + j]) for i, problem in zip(mine, problems, strict=True) for j in range(k)]
    verdicts = pool.grade([problem for problem, _ in asked], [text for _, text in asked])
    for n, i in enumerate(mine):
        samples[i] = verdicts[n * k : (n + 1) * k]
    return Answers(texts, completions.length.tolist(), completions.stopped.tolist(), grades, samples)


def graded(pool: GradingPool, problems: list[tasks.Problem], responses: list[str], thought: str) -> list[Grade]:
    """The verdict on each problem's response; with a user's function its reward, a call a problem.

    Where that fails, the verdict stays, the reward is 0, and it is told: what it is called with is one response, where a run
    has a group.
    """
    grades = pool.grade(problems, [thought + text for text in responses])
    if pool.reward_function is None:
        return grades
    pairs = zip(problems, responses, strict=True)
    found = pool.reward([([problem.question], [text], [problem.answer]) for problem, text in pairs])
    failed = [its for its in found if isinstance(its, Failed)]
    if failed:
        print(f"Warning: {len(failed)} of {len(found)} calls failed, and their rewards are 0: {failed[0].note}", flush=True)
    return [_rewarded(grade, its) for grade, its in zip(grades, found, strict=True)]


def _rewarded(grade: Grade, rewards: list[float] | Failed) -> Grade:
    if isinstance(rewards, Failed):
        return replace(grade, terms={"reward_fn": 0.0}, note=grade.note or rewards.note)
    return replace(grade, terms={"reward_fn": rewards[0]})
