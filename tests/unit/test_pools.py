"""The driver's side of the actors."""

import sys
import time
from threading import Lock, Thread
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayTaskError
from tensordict import TensorDict

from grpo import pools
from grpo.errors import ActorError
from grpo.inference import Sampling
from grpo.pools import EnginePool, ReferencePool, TrainerPool, named, submit
from grpo.push import WeightPush


class Recorder:
    """In the place of an actor's handle: notes the order in which it is called."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, method):
        def remote(*arguments):
            self.calls.append((method, *arguments))
            time.sleep(0)  # let the other thread in

        return SimpleNamespace(remote=remote)


def test_prompts_go_to_the_engine_that_has_least_to_sample(monkeypatch):
    monkeypatch.setattr(pools, "get_done", lambda calls, doing, again: {})
    engines = [Recorder(), Recorder()]
    pool = EnginePool(named("inference", engines), 1.0)

    def feed(*ids: int) -> list[list[int]]:
        """Which of them each engine was given."""
        for engine in engines:
            engine.calls.clear()
        pool.submit(list(ids), [[i] for i in ids], Sampling(2, 4, 1.0), seed=7)
        assert all(call[2] == 7 + i for i, engine in enumerate(engines) for call in engine.calls)
        return [[request.request_id for call in engine.calls for request in call[1]] for engine in engines]

    assert feed(0, 1, 2, 3) == [[0, 2], [1, 3]]
    pool.sampled([0, 2])  # and neither graded nor trained on
    assert feed(4, 5, 6, 7) == [[4, 5, 6], [7]]
    pool.sampled([1, 3, 7])
    assert feed(8, 9) == [[], [8, 9]]


def test_threads_that_share_an_order_call_every_rank_in_the_same_one():
    ranks, order = [Recorder() for _ in range(3)], Lock()

    def call(method: str) -> None:
        for number in range(300):
            submit(ranks, method, [(number,)] * 3, order)

    threads = [Thread(target=call, args=(method,)) for method in ("step", "score")]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(ranks[0].calls) == 600
    assert ranks[0].calls == ranks[1].calls == ranks[2].calls
    assert ranks[0].calls != sorted(ranks[0].calls)  # the threads did take turns


@pytest.mark.parametrize(("rows", "actors"), [(8, 2), (7, 2), (5, 4), (3, 4), (2, 4), (1, 3)])
def test_every_rank_scores_as_many_rows_and_each_answer_comes_back_once(rows, actors, monkeypatch):
    shares = []

    def score(batch: TensorDict) -> torch.Tensor:
        shares.append(len(batch))
        return 2.0 * batch["tokens"]

    monkeypatch.setattr("grpo.pools.get_all", lambda calls, timeout_s, doing, **options: list(calls.values()))
    tokens = torch.arange(rows * 3).view(rows, 3)
    batch = TensorDict({k: tokens for k in ("tokens", "prompt_length", "response_mask")}, batch_size=[rows])
    actor = SimpleNamespace(score=SimpleNamespace(remote=score))
    assert torch.equal(ReferencePool([actor] * actors, 1.0, "training", Lock()).score(batch), 2.0 * tokens)
    assert shares == [-(-rows // actors)] * actors


def test_several_actors_are_told_apart_by_number():
    assert list(named("inference", ["x"])) == ["the inference actor"]
    assert named("training", ["x", "y"]) == {"training actor 0": "x", "training actor 1": "y"}


class Engine(Recorder):
    """Answers at once: what it was asked, or that it has died where `deaths` are left."""

    def __init__(self, deaths: int = 0) -> None:
        super().__init__()
        self.deaths = deaths

    def __getattr__(self, method):
        def remote(*arguments):
            self.calls.append((method, *arguments))
            if self.deaths:
                self.deaths -= 1
                return ActorError("it died", died=True)
            return arguments

        return SimpleNamespace(remote=remote)


def answered(calls: dict, timeout_s: float, doing: str, again=None, **options) -> list:
    """`get_all` for calls that are their answers."""
    for name, answer in list(calls.items()):
        while isinstance(answer, ActorError):
            answer = calls[name] = again(name, answer)
        if answer is None:
            del calls[name]
    return list(calls.values())


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(pools, "get_all", answered)
    monkeypatch.setattr(pools.Completions, "concatenate", lambda parts: SimpleNamespace(in_request_order=lambda: parts))


def of(share) -> list[int]:
    return [request.request_id for request in share[0]]


def test_an_engine_that_died_is_brought_back_and_asked_for_the_same_with_the_same_seed(asked):
    engines, revived = [Engine(), Engine(deaths=2)], []
    pool = EnginePool(named("inference", engines), 1.0, lambda name, actor, error, load: revived.append((name, load)))
    first, second = pool.generate([[1], [2], [3]], Sampling(2, 4, 1.0), seed=5)
    assert (of(first), first[1], of(second), second[1]) == ([0, 2], 5, [1], 6)
    assert engines[1].calls == [engines[1].calls[0]] * 3
    assert revived == [("inference actor 1", True)] * 2


def gone(name, actor, error, load):
    raise ActorError(f"{name} died once too often", name)


def test_without_an_engine_that_is_gone_its_prompts_go_to_the_others(asked, capsys):
    engines = [Engine(), Engine(deaths=1), Engine()]
    pool = EnginePool(named("inference", engines), 1.0, gone, lose=lambda name: name == "inference actor 1")
    answers = pool.generate([[i] for i in range(6)], Sampling(2, 4, 1.0), seed=5)
    assert [of(share) for share in answers] == [[0, 3], [2, 5], [1], [4]]
    assert "inference actor 1 died once too often; the run goes on with the others" in capsys.readouterr().err
    assert list(pool.by_name) == ["inference actor 0", "inference actor 2"]  # by the names that they had
    engines[0].deaths = 1
    with pytest.raises(ActorError, match=r"^inference actor 0 died once too often$"):
        pool.generate([[0]], Sampling(2, 4, 1.0), seed=5)


def test_by_default_the_run_goes_on_with_all_engines_or_not_at_all(asked):
    with pytest.raises(ActorError, match=r"^inference actor 1 died once too often$"):
        pool = EnginePool(named("inference", [Engine(), Engine(deaths=1)]), 1.0, gone)
        pool.generate([[0], [1]], Sampling(2, 4, 1.0), seed=5)


def test_the_death_of_another_actor_is_not_the_engines(asked):
    def without_trainer(name, actor, error, load):
        raise ActorError("the training actor died", "the training actor", died=True)

    pool = EnginePool(named("inference", [Engine(), Engine(deaths=1)]), 1.0, without_trainer, lose=lambda name: True)
    with pytest.raises(ActorError, match=r"^the training actor died$"):
        pool.generate([[0], [1]], Sampling(2, 4, 1.0), seed=5)


def test_a_training_rank_that_dies_in_a_push_is_not_taken_for_an_engine(asked):
    pool = EnginePool(named("inference", [Engine()]), 1.0, lambda *arguments: None)
    death = ActorError("the training actor died while pushing weights version 6", "the training actor", died=True)
    with pytest.raises(ActorError, match="the training actor died") as raised:
        pool.again("update_weights", 6, load=False)("the training actor", death)
    assert raised.value is death


def test_an_engine_that_finds_no_weights_since_the_rank_that_shared_them_is_dead_says_so(monkeypatch):
    """The engine's own words, `unable to open file`, would end the run; a rank's death does not."""
    alive, asked = [True], []

    def get(call, *arguments):
        raise RayTaskError("connect", "unable to open file", RuntimeError())

    def get_all(calls, timeout_s, doing):
        asked.extend(calls)
        if not alive[0]:
            raise ActorError(f"the training actor died while {doing}", "the training actor", died=True)

    monkeypatch.setattr("grpo.push.get", get)
    monkeypatch.setattr(pools, "get_all", get_all)
    monkeypatch.setattr(pools, "ask", lambda actor: actor)
    trainer = TrainerPool(["rank"], 1, None, 1.0)
    push = WeightPush(
        trainer, EnginePool({"the inference actor": None}, 1.0), {}, "float32", 1.0, join=lambda engine: engine
    )
    with pytest.raises(RayTaskError):
        push.repeat("the inference actor", load=False)
    alive[0] = False
    with pytest.raises(ActorError, match=r"^the training actor died while sharing its weights$"):
        push.repeat("the inference actor", load=False)
    assert asked == ["the training actor"] * 2
