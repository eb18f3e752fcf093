"""The driver's side of the actors: spreads work over the actors of a role and puts their answers together.

Each pool answers the same whatever the number of its actors: batches are split so that sums over the parts equal the sum
over the whole, and answers come back in the order of the questions.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock

import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from tensordict import TensorDict

from grpo.errors import ActorError
from grpo.inference import Request, Sampling
from grpo.micro_batches import split_rows
from grpo.remote import Again, ask, get_all, get_done, wait_until_back
from grpo.rollout import Completions
from grpo.shared_prompts import runs

# Starts the engine of that name again after the error, and has it take part in pushes, with the last one's weights or not.
Revive = Callable[[str, ActorHandle, ActorError, bool], None]


def named(role: str, values: list) -> dict[str, object]:
    """Values under the names that errors use: `the inference actor`, or `inference actor 1` where there are several."""
    return {f"the {role} actor" if len(values) == 1 else f"{role} actor {i}": value for i, value in enumerate(values)}


class EnginePool:
    """The inference actors.

    With `revive` one that has died is started again where it is, has the weights that it had, and is asked once more; where
    that is no longer possible the others go on without it, if `lose` says that they may.
    """

    def __init__(
        self,
        by_name: dict[str, ActorHandle],
        timeout_s: float,
        revive: Revive | None = None,
        lose: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.by_name, self.timeout_s, self.revive, self.lose = by_name, timeout_s, revive, lose
        self.submitting: list[dict[str, ObjectRef]] = []
        self.running: dict[int, str] = {}  # which engine responds to a prompt that was submitted, by its id

    @property
    def actors(self) -> list[ActorHandle]:
        return list(self.by_name.values())

    def again(self, method: str, *arguments, load: bool = True) -> Again | None:
        """For `get_all`: an engine that has died is brought back (with `load` to the last push), and called once more."""
        if self.revive is None:
            return None

        def once_more(name: str, error: ActorError) -> ObjectRef | None:
            if name not in self.by_name:  # a training rank, which is waited for beside the engines
                raise error
            if not self.bring_back(name, error, load):
                return None
            return getattr(self.by_name[name], method).remote(*arguments)

        return once_more

    def bring_back(self, name: str, error: ActorError, load: bool = True) -> bool:
        """Whether the engine is there again; if not, the others go on without it."""
        try:
            self.revive(name, self.by_name[name], error, load)
        except ActorError as gone:
            if gone.actor != name or not self.lose(name):
                raise
            del self.by_name[name]
            print(f"Warning: {gone}; the run goes on with the others (ray.min_engines)", file=sys.stderr)
            return False
        return True

    def ask(self, method: str, doing: str, can_be_left: bool = False, load: bool = True) -> list:
        """What every engine answers; one that has died is brought back (see `again`) and asked again, or left out."""
        again = self.again(method, load=load)
        return get_all(self._all(method), self.timeout_s, doing, can_be_left=can_be_left, again=again)

    def submit(self, ids: list[int], prompts: list[list[int]], sampling: Sampling, seed: int) -> None:
        """Have the engines respond to `prompts`, each at the engine that has least to do; collectors take the responses.

        Nobody waits for an engine in the midst of a long step: an error of its is raised at a later call. A death is not:
        whoever watches the engine hears of it.
        """
        load = Counter(self.running.values())
        shares: dict[str, list[Request]] = {}
        for i, prompt in zip(ids, prompts, strict=True):
            engine = min(self.by_name, key=load.__getitem__)
            load[engine] += 1
            self.running[i] = engine
            shares.setdefault(engine, []).append(Request(i, prompt, sampling))
        seeds = {name: seed + i for i, name in enumerate(self.by_name)}
        calls = {name: self.by_name[name].submit.remote(its, seeds[name]) for name, its in shares.items()}
        again = None if self.revive is None else lambda name, error: None
        self.submitting = [*filter(None, (get_done(earlier, "taking prompts", again) for earlier in self.submitting)), calls]

    def sampled(self, ids: Iterable[int]) -> None:
        """The engines are done with these prompts."""
        for i in ids:
            self.running.pop(i, None)  # one that was sampled again comes twice

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int | None) -> Completions:
        """Responses to `prompts`, in their order, K together; the same seed and weights give the same responses.

        Without a seed the engines need not be idle.
        """
        requests = [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)]
        return Completions.concatenate(self._generate(requests, seed)).in_request_order()

    def _generate(self, requests: list[Request], seed: int | None) -> list[Completions]:
        shares = {
            name: (requests[i :: len(self.by_name)], None if seed is None else seed + i)
            for i, name in enumerate(self.by_name)
            if i < len(requests)
        }

        def once_more(name: str, error: ActorError) -> ObjectRef | None:
            return self.by_name[name].generate.remote(*shares[name]) if self.bring_back(name, error) else None

        calls = {name: self.by_name[name].generate.remote(*share) for name, share in shares.items()}
        doing = f"sampling responses to {len(requests)} prompts"
        again = None if self.revive is None else once_more
        answers = get_all(calls, self.timeout_s, doing, can_be_left=True, again=again)
        left = [request for name, (share, _) in shares.items() if name not in calls for request in share]
        return answers + (self._generate(left, seed) if left else [])

    def update_weights(self, version: int) -> dict[str, ObjectRef]:
        """Have every engine receive push `version`: its receipts to come, by the engines' names."""
        return self._all("update_weights", version)

    def busy(self) -> dict[str, ObjectRef]:
        """Seconds that each engine has spent in steps since its process began, to come, by the engines' names."""
        return self._all("busy")

    def log_probs(self, tokens: list[int]) -> dict[str, ObjectRef]:
        """Log-probs of `tokens` under each engine's weights, to come, by the engines' names."""
        return self._all("log_probs", tokens)

    def _all(self, method: str, *arguments) -> dict[str, ObjectRef]:
        return {name: getattr(actor, method).remote(*arguments) for name, actor in self.by_name.items()}


class ReferencePool:
    """The reference actors, or the training ranks in their place; each scores a part of the batch."""

    method = "score"  # of the actors, for log-probs

    def __init__(self, actors: list[ActorHandle], timeout_s: float, role: str, order: Lock) -> None:
        self.actors, self.timeout_s, self.role, self.order = actors, timeout_s, role, order

    def score(self, rollouts: TensorDict) -> torch.Tensor:
        """reference_log_probs, float32 [B, T], of rollouts [B]."""
        return torch.cat(self._ask(self.method, rollouts))[: len(rollouts)]

    def score_with_states(self, rollouts: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """The same and anchor_states, float16 [B, T, D]."""
        return self._both(self._ask("score_with_states", rollouts), len(rollouts))

    def own_states(self, rollouts: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and anchor_states under the policy as it is, of training ranks alone.

        It is a part of training: the collection is taken already, and would be lost to a run that ended here.
        """
        return self._both(self._ask("own_states", rollouts, can_be_left=False), len(rollouts))

    def _both(self, answers: list, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, states = (torch.cat(column)[:length] for column in zip(*answers, strict=True))
        return log_probs, states

    def _ask(self, method: str, rollouts: TensorDict, can_be_left: bool = True) -> list:
        rollouts = rollouts.select("tokens", "prompt_length", "response_mask")
        # Equal shares, the last row again where there are too few: training ranks must all run the same passes.
        share = -(-len(rollouts) // len(self.actors))
        rows = torch.arange(share * len(self.actors)).clamp(max=len(rollouts) - 1)
        shares = [(rollouts[mine],) for mine in rows.split(share)]
        calls = named(self.role, submit(self.actors, method, shares, self.order))
        by_name = dict(zip(calls, zip(self.actors, shares, strict=True), strict=True))

        def once_more(name: str, error: ActorError) -> ObjectRef:
            actor, its = by_name[name]
            wait_until_back(actor, name, self.timeout_s)
            return getattr(actor, method).remote(*its)

        doing, again = f"scoring {len(rollouts)} rollouts", once_more if self.role == "reference" else None
        return get_all(calls, self.timeout_s, doing, can_be_left=can_be_left, again=again)


def submit(actors: list[ActorHandle], method: str, arguments: list[tuple], order: Lock) -> list[ObjectRef]:
    """Call `method` of each actor with its arguments.

    Training ranks wait for each other in collectives, and with train.sync_iter=false two threads call them. The lock they
    share makes the order of the calls the same on every rank; in another order the ranks would wait for each other for ever.
    """
    with order:
        return [getattr(actor, method).remote(*its) for actor, its in zip(actors, arguments, strict=True)]


class TrainerPool:
    """The training ranks: every call goes to all of them, since they meet in collectives."""

    def __init__(
        self,
        actors: list[ActorHandle],
        num_micro_batches: int,
        max_tokens: int | None,
        timeout_s: float,
        penalised: bool = True,
        divisor: Callable[[torch.Tensor], int] = len,
        shares_prompts: bool = False,
    ) -> None:
        """With `penalised` every rollout carries gradient, else those alone whose advantage is not 0.

        With `shares_prompts` the rollouts of a group stay together.

        `divisor` says what a batch's loss is divided by, from its response lengths: the number of responses by default.
        """
        self.divisor = divisor
        self.actors, self.timeout_s = actors, timeout_s
        self.penalised, self.shares_prompts = penalised, shares_prompts
        self.num_micro_batches, self.max_tokens = num_micro_batches, max_tokens  # a micro-batch's most tokens
        self.order = Lock()  # of calls; shared with whoever else calls the ranks

    def step(self, batch: TensorDict, number: int, with_log_probs: bool) -> tuple[dict[str, float], torch.Tensor | None]:
        """Optimiser step `number` on rollouts [B]: its metrics and, if asked for, log_probs [B, T] before the step.

        Where every advantage is 0 the weights stay: only the penalties would move them, and the optimiser would scale
        that noise up to a full step.
        """
        lengths = batch["prompt_length"] + batch["response_length"]
        training = batch["advantage"] != 0
        if self.penalised:
            training = training.any().expand(len(batch))
        groups = runs(batch["tokens"], batch["prompt_length"]) if self.shares_prompts else None
        shares = split_rows(lengths, len(self.actors), self.num_micro_batches, self.max_tokens, training, groups)
        count = self.divisor(batch["response_length"])
        arguments = [(batch[share.rows], share.sizes, share.num_training, count, with_log_probs) for share in shares]
        answers = self._call("step", arguments, f"taking optimiser step {number}")
        if not with_log_probs:
            return answers[0][0], None
        log_probs = torch.zeros(batch["tokens"].shape)
        for share, (_, part) in zip(shares, answers, strict=True):
            log_probs[share.rows] = part
        return answers[0][0], log_probs

    def push(self, version: int) -> dict[str, ObjectRef]:
        """Send the current weights as push `version`: what was sent, to come; the first rank's says it."""
        return named("training", submit(self.actors, "push", [(version,)] * len(self.actors), self.order))

    def probe(self, tokens: list[int]) -> dict[str, ObjectRef]:
        """Log-probs of `tokens` under the current weights, to come, by the ranks' names."""
        return named("training", submit(self.actors, "probe", [(tokens,)] * len(self.actors), self.order))

    def check_alive(self) -> None:
        """Raise ActorError where a rank has died."""
        calls = named("training", [ask(actor) for actor in self.actors])
        get_all(calls, self.timeout_s, "sharing its weights")

    def save(self, path: Path) -> dict:
        """Copy the ranks' state and have it written to the directory `path` beside training; returns its numbers."""
        return self._all("save", (path,), "copying its state")[0]

    def saved(self, wait: bool) -> bool:
        """Whether every rank has written what `save` began."""
        return all(self._all("saved", (wait,), "writing a checkpoint"))

    def load(self, path: Path, numbers: dict) -> None:
        """Restore the state that `save` wrote to `path`, with the numbers that it returned."""
        self._all("load", (path, numbers), "loading a checkpoint")

    def export(self, path: Path) -> None:
        """Write the model and its tokenizer in transformers format."""
        self._all("export", (path,), "exporting the model")

    def _all(self, method: str, arguments: tuple, doing: str) -> list:
        return self._call(method, [arguments] * len(self.actors), doing)

    def _call(self, method: str, arguments: list[tuple], doing: str) -> list:
        calls = submit(self.actors, method, arguments, self.order)
        return get_all(named("training", calls), self.timeout_s, doing)
