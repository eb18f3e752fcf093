"""A push of the trainer's weights to the engines, proven by what each of them holds and computes afterwards."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ray import ObjectRef
from ray.exceptions import RayTaskError

from grpo.errors import PushError
from grpo.pools import EnginePool, TrainerPool
from grpo.remote import get, get_all
from grpo.weight_sync import Sent, verify

# Mean absolute difference, nats a token, between the trainer's and an engine's log-probs of one text. Measured with equal
# weights: 5e-7 (0.4M parameters) and 2e-5 (0.5B) in float32, up to 0.06 in bfloat16.
PROBE_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass
class WeightPush:
    """Pushes from the training ranks to the engines, each of them proven."""

    trainer: TrainerPool
    engines: EnginePool
    aliases: dict[str, str]  # further names of tied weights, by the name that they are sent under
    dtype: str  # the coarser of the two sides'
    timeout_s: float
    join: Callable[[str], ObjectRef]  # have the engine of that name take part
    before: Sent | None = None  # the last push

    def __call__(self, version: int) -> None:
        """Give every engine the trainer's weights as `version`; PushError where one does not hold them afterwards."""
        sending, receiving = self.trainer.push(version), self.engines.update_weights(version)
        doing, again = f"pushing weights version {version}", self.engines.again("update_weights", version, load=False)
        calls = sending | receiving
        found = get_all(calls, self.timeout_s, doing, again=again)
        answers = dict(zip(calls, found, strict=True))
        sent = answers[next(iter(sending))]
        for engine in receiving:
            if engine in answers:  # the run may go on without one that died
                verify(sent, answers[engine], engine, self.aliases, self.before)
        self.before = sent

    def repeat(self, engine: str, load: bool) -> None:
        """Have an engine that was started again take part in pushes; with `load` it takes the last one again.

        In shared memory alone that is still there.
        """
        try:
            get(self.join(engine), self.timeout_s, engine, "joining pushes again")
        except RayTaskError:  # what is shared is gone with the rank that shares it
            self.trainer.check_alive()
            raise
        if load and self.before is not None:
            version = self.before.version
            call = self.engines.by_name[engine].update_weights.remote(version)
            receipt = get(call, self.timeout_s, engine, f"taking weights version {version} again")
            verify(self.before, receipt, engine, self.aliases)

    def probe(self, version: int, tokens: list[int]) -> float:
        """Compare log-probs of `tokens`: the largest over engines of the mean absolute difference, nats a token.

        Raises PushError where an engine is further from the trainer than rounding explains.
        """
        ours, theirs = self.trainer.probe(tokens), self.engines.log_probs(tokens)
        doing, again = f"probing weights version {version}", self.engines.again("log_probs", tokens)
        calls = ours | theirs
        found = get_all(calls, self.timeout_s, doing, again=again)
        answers = dict(zip(calls, found, strict=True))
        expected, largest, tolerance = answers[next(iter(ours))], 0.0, PROBE_TOLERANCE[self.dtype]
        for engine in theirs.keys() & answers.keys():
            difference = np.abs(answers[engine] - expected)
            if not difference.mean() <= tolerance:
                raise PushError(
                    f"{engine}, version {version}: its log-probs of a probe text differ from the trainer's by "
                    f"{difference.mean():.3g} nats a token (at most {tolerance:g} in {self.dtype}), most at token "
                    f"{int(difference.argmax()) + 1}; every tensor arrived and is held, so the engine "
                    "computes something else with them"
                )
            largest = max(largest, float(difference.mean()))
        return largest
