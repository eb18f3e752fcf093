"""The synchronous collector: TorchRL's LLMCollector around grpo/collect.py.

Apart from it, since importing TorchRL's collectors imports vLLM, which the actors of async mode do without.
"""

import warnings
from collections.abc import Callable

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors.llm import LLMCollector

from grpo.collect import graded_turn, sampling_seed
from grpo.inference import Sampling
from grpo.metrics import Clock
from grpo.pools import EnginePool
from grpo.rollout import pack
from grpo.tasks import EncodedProblems


class InferencePolicy(TensorDictModuleBase):
    """The policy as TorchRL sees it: prompts in, rollouts out, sampled by the engines."""

    in_keys = ["problem"]
    out_keys = ["tokens", "prompt_length", "response_length", "response_mask", "inference_log_probs"]

    def __init__(self, engines: EnginePool, data: EncodedProblems, sampling: Sampling, seed: int, clock: Clock) -> None:
        super().__init__()
        self.engines, self.data, self.sampling, self.seed, self.clock = engines, data, sampling, seed, clock

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        prompts = [self.data.prompts[i] for i in tensordict["problem"][:, 0].tolist()]
        collection_seed = sampling_seed(self.seed, int(tensordict["group_id"][0, 0]))
        with self.clock.phase("generate"):
            completions = self.engines.generate(prompts, self.sampling, collection_seed)
        rows = [prompt for prompt in prompts for _ in range(self.sampling.num_responses)]
        return tensordict.update(pack(rows, completions).view(tensordict.batch_size))


class GroupCollector(LLMCollector):
    """TorchRL's collector with a turn that keeps tensors dense: [G, K], nothing stacked lazily, no prompt drawn twice."""

    def __init__(self, *args, **kwargs) -> None:
        with warnings.catch_warnings():  # an offer of transforms that a one-turn environment has no use for
            warnings.filterwarnings("ignore", message="The env passed to", category=FutureWarning)
            super().__init__(*args, **kwargs)

    @property
    def rollout(self) -> Callable[[], TensorDict]:
        return self._collect

    def _collect(self) -> TensorDict:
        return graded_turn(self.env, self.policy(self.env.reset()))
