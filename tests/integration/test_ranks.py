"""Several training ranks, engines and references: the same run as with one of each, up to rounding."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

import grpo_sync
from grpo.builtin import demonstration
from grpo.config_sections import LoraConfig, ObjectiveConfig, OptimizerConfig, TrainConfig, TrainModelConfig
from grpo.launch import compose
from grpo.micro_batches import split_rows
from grpo.models import load_model, load_tokenizer
from grpo.objectives.online import divisor
from grpo.pools import ReferencePool, TrainerPool
from grpo.rollout import Completions, pack
from grpo.scoring import score, score_with_states
from grpo.tasks.arithmetic import question, split_expressions
from grpo.trainer import TrainerActor, TrainerSpec

from .conftest import Finished

CPU = torch.device("cpu")
TRANSFORMERS = "inference_model.backend=transformers"


@pytest.fixture
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def ragged_batch(model_path: str) -> TensorDict:
    """Sixteen responses of the model's kind, cut to 1 to 16 tokens, off-policy by some tenths of a nat."""
    tokenizer, model = load_tokenizer(model_path), load_model(model_path, CPU)
    expressions = split_expressions()["train"][::150][:16]
    prompts = [tokenizer(f"<|user|>{question(e)}<|end|><|assistant|>")["input_ids"] for e in expressions]
    responses = [tokenizer(demonstration(e, right=i % 2 == 0))["input_ids"][: i + 1] for i, e in enumerate(expressions)]
    flat = np.array([token for response in responses for token in response])
    length = np.array([len(response) for response in responses])
    log_probs, versions = np.zeros(len(flat), np.float32), np.zeros(len(flat), np.int32)
    completions = Completions(np.arange(16), length, length > 0, flat, log_probs, versions)
    batch = pack(prompts, completions)
    own = score(model, batch["tokens"], batch["prompt_length"], batch["response_mask"], 1.0)
    generator = torch.Generator().manual_seed(0)
    for key in ("inference_log_probs", "reference_log_probs"):
        noise = 0.3 * torch.randn(own.shape, generator=generator)
        batch[key] = torch.where(batch["response_mask"], own + noise, 0.0)
    batch["advantage"] = torch.randn(16, generator=generator)
    return batch


class Rewinding(TrainerActor):
    """Goes back to its first weights, so that one start serves many steps; and overflows on a rank when told to."""

    overflowing_rank = None

    def start(self, rank: int, *arguments) -> None:
        super().start(rank, *arguments)
        self.rank, self.first = rank, [parameter.detach().clone() for parameter in self.trainable]

    @torch.no_grad()
    def rewind(self) -> None:
        for parameter, first in zip(self.trainable, self.first, strict=True):
            parameter.copy_(first)

    def overflow(self, rank: int | None) -> None:
        self.overflowing_rank = rank

    def _optimise(self, loss_is_finite: bool) -> float:
        if self.rank == self.overflowing_rank:
            self.trainable[0].grad.to_local().fill_(float("inf"))
        return super()._optimise(loss_is_finite)


SGD = OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, clip_grad_norm=1e9)  # weights differ by the gradient


@contextmanager
def trainers(
    model_path: str,
    ranks: int,
    train_model: TrainModelConfig,
    optimizer: OptimizerConfig = SGD,
    objective: ObjectiveConfig | None = None,
    **train,
):
    spec = TrainerSpec(
        model_path,
        "eager",
        "cpu",
        1.0,
        0,
        train_model,
        objective or ObjectiveConfig(),
        TrainConfig(kl_to_ref_coeff=0.1, entropy_coeff=0.01, **train),
        optimizer,
        uses_reference=True,
        charges_divergence=True,
    )
    actors = [ray.remote(num_cpus=1)(Rewinding).remote(spec) for _ in range(ranks)]
    rendezvous = ray.get(actors[0].open_rendezvous.remote(), timeout=120)
    ray.get([actor.start.remote(rank, ranks, rendezvous, 120.0) for rank, actor in enumerate(actors)], timeout=120)
    yield actors
    for actor in actors:
        ray.kill(actor)


def step(
    actors: list, batch: TensorDict, path, micro_batches: int = 1, budget: int | None = None, steps: int = 1, divisor=len
) -> tuple:
    """The weights after some steps from the first weights; with the last step's metrics and log-probs."""
    ray.get([actor.rewind.remote() for actor in actors], timeout=60)
    pool = TrainerPool(actors, micro_batches, budget, 60.0, divisor=divisor)
    for number in range(steps):
        metrics, log_probs = pool.step(batch, number, with_log_probs=True)
    pool.export(path / "model")
    return load_file(path / "model" / "model.safetensors"), metrics, log_probs


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# Micro-batches a rank, and tokens a micro-batch: one of 16 rows, 16 of one, 8 of 2, 4 of 4, and by their length.
SPLITS = {1: [(1, None), (16, None), (8, None), (4, None), (1, 60)], 2: [(1, None), (4, None), (1, 60), (4, 60)]}


def test_gradients_agree_over_ranks_micro_batches_and_token_budgets(cluster, model_path, tmp_path):
    batch, results = ragged_batch(model_path), {}
    lengths = batch["prompt_length"] + batch["response_length"]
    assert max(split_rows(lengths, 2, 1, 60)[0].sizes) < 8  # the budget does make more micro-batches
    for ranks, splits in SPLITS.items():
        with trainers(model_path, ranks, TrainModelConfig()) as actors:
            for split in splits:
                results[ranks, *split] = step(actors, batch, tmp_path / f"{ranks} {split}", *split)
    start = {name: parameter.detach() for name, parameter in load_model(model_path, CPU).named_parameters()}
    whole, metrics, log_probs = results.pop((1, 1, None))
    assert largest_difference(whole, start) > 0.03  # the gradient's largest entry
    for split, (weights, its_metrics, its_log_probs) in results.items():
        assert largest_difference(whole, weights) < 1e-6, split
        assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert torch.allclose(its_log_probs, log_probs, atol=1e-5)


OBJECTIVES = {
    "gspo over tokens": ObjectiveConfig(policy_loss="gspo", aggregation="token", divergence="kl"),
    "cispo by a constant": ObjectiveConfig(policy_loss="cispo", aggregation="constant", divergence="k2"),
    "transport": ObjectiveConfig(policy_loss="reinforce", divergence="ot", ot_window=3, ot_target=0.01),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_objective_has_the_same_gradient_and_metrics_on_one_rank_and_two(cluster, model_path, tmp_path, name):
    batch, results, objective = ragged_batch(model_path), {}, OBJECTIVES[name]
    anchor = load_model(model_path, CPU)
    with torch.no_grad():
        anchor.model.embed_tokens.weight.mul_(1.3)
    rows = batch["tokens"], batch["prompt_length"], batch["response_mask"], 1.0
    batch["anchor_states"] = score_with_states(anchor, *rows)[1]
    by = divisor(objective.aggregation, 16)
    for ranks, splits in {1: [(1, None), (4, 60)], 2: [(2, None), (1, 60)]}.items():
        with trainers(model_path, ranks, TrainModelConfig(), objective=objective) as actors:
            for split in splits:
                results[ranks, *split] = step(actors, batch, tmp_path / f"{ranks} {split}", *split, divisor=by)
            if name == "transport":
                references = ReferencePool(actors, 60.0, "training", TrainerPool(actors, 1, None, 60.0).order)
                ray.get([actor.rewind.remote() for actor in actors], timeout=60)
                _, states = references.own_states(batch[:7])  # rows that two ranks cannot share
                expected = score_with_states(load_model(model_path, CPU, "eager"), *(part[:7] for part in rows[:3]), 1.0)[1]
                assert (states - expected).abs().max() < 1e-3
    start = {name: parameter.detach() for name, parameter in load_model(model_path, CPU).named_parameters()}
    whole, metrics, _ = results.pop((1, 1, None))
    assert largest_difference(whole, start) > 3e-3
    assert metrics["train/penalty"] > 0
    for split, (weights, its_metrics, _) in results.items():
        assert largest_difference(whole, weights) < 2e-6, split
        assert its_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_adapters_and_checkpointed_layers_train_and_score_alike_on_one_rank_and_two(cluster, model_path, tmp_path):
    batch, results = ragged_batch(model_path), {}
    lora = LoraConfig(enabled=True, r=3)  # a rank that two processes cannot share evenly
    rows = batch["tokens"], batch["prompt_length"], batch["response_mask"], 1.0
    reference = score(load_model(model_path, CPU, "eager"), *rows)
    for ranks, checkpointing in ((1, False), (2, True)):
        train_model = TrainModelConfig(gradient_checkpointing=checkpointing, lora=lora)
        with trainers(model_path, ranks, train_model, replace(SGD, lr=0.2)) as actors:
            pool = TrainerPool(actors, 2, None, 60.0)
            references = ReferencePool(actors, 60.0, "training", pool.order)
            assert (references.score(batch) - reference).abs().max() < 1e-5
            results[ranks] = step(actors, batch, tmp_path / str(ranks), 2, steps=3)
            assert (references.score(batch[:7]) - reference[:7]).abs().max() < 1e-5  # rows that two ranks cannot share
            # As with train.sync_iter=false: one thread scores while another steps. In another order they would hang.
            with ThreadPoolExecutor(1) as background:
                scores = [background.submit(references.score, batch) for _ in range(5)]
                for number in range(5):
                    pool.step(batch, number, with_log_probs=False)
            assert all((future.result() - reference).abs().max() < 1e-5 for future in scores)
    (one, metrics, log_probs), (two, its_metrics, its_log_probs) = results.values()
    start = {name: parameter.detach() for name, parameter in load_model(model_path, CPU).named_parameters()}
    assert largest_difference(one, start) > 5e-3
    assert largest_difference(one, two) < 1e-6
    assert its_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    assert torch.allclose(its_log_probs, log_probs, atol=1e-4)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "2" / "adapter" / name).is_file()


EIGHT_BIT = OptimizerConfig(name="adamw_8bit", lr=1e-3, warmup_steps=0)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(enabled=True, r=16)], ids=["whole", "lora"])
def test_states_of_8_bits_are_the_same_on_two_ranks_and_read_by_another_number(cluster, model_path, tmp_path, lora):
    batch, results, states = ragged_batch(model_path), {}, tmp_path / "states"
    for ranks in (2, 1):
        with trainers(model_path, ranks, TrainModelConfig(lora=lora), EIGHT_BIT) as actors:
            results[ranks] = step(actors, batch, tmp_path / str(ranks), steps=3)
            pool = TrainerPool(actors, 1, None, 60.0)
            if ranks == 2:
                states.mkdir()
                numbers = pool.save(states)
                assert pool.saved(wait=True)
                pool.step(batch, 4, with_log_probs=False)
                pool.export(tmp_path / "two" / "model")
            else:
                pool.load(states, numbers)
                pool.step(batch, 4, with_log_probs=False)
                pool.export(tmp_path / "one" / "model")
    start = {name: parameter.detach() for name, parameter in load_model(model_path, CPU).named_parameters()}
    (one, metrics, _), (two, its_metrics, _) = results[1], results[2]
    assert largest_difference(one, start) > 2e-3
    # Where rounding differs by the last bit, now and then, the next code is taken.
    assert largest_difference(one, two) < 2e-4
    assert its_metrics == pytest.approx(metrics, rel=1e-2, abs=1e-4)
    on_two, on_one = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert largest_difference(on_two, on_one) < 1e-5  # after one step from the same states
    assert largest_difference(on_two, two) > 5e-4


def test_an_overflow_on_one_rank_skips_the_step_on_all(cluster, model_path, tmp_path):
    batch = ragged_batch(model_path)
    decaying = OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.5, warmup_steps=0)
    with trainers(model_path, 2, TrainModelConfig(), decaying, mixed_precision="fp16") as actors:
        pool = TrainerPool(actors, 1, None, 60.0)

        def both() -> list[dict[str, float]]:
            arguments = [(batch[mine], [8], True, 16, False) for mine in torch.arange(16).split(8)]
            return [metrics for metrics, _ in pool._call("step", arguments, "stepping")]

        pool.export(tmp_path / "0" / "model")
        for scale, rank in ((2**15, 1), (2**14, 0)):
            ray.get([actor.overflow.remote(rank) for actor in actors], timeout=60)
            for metrics in both():
                assert (metrics["train/overflows"], metrics["train/grad_scale"]) == (1, scale)
        pool.export(tmp_path / "1" / "model")
        ray.get([actor.overflow.remote(None) for actor in actors], timeout=60)
        for metrics in both():
            assert (metrics["train/overflows"], metrics["train/grad_scale"]) == (0, 2**14)
        pool.export(tmp_path / "2" / "model")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in "012"]
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[1], weights[2]) > 1e-3


def test_two_of_each_role_train_as_one_of_each_does(run_sync):
    one = run_sync(TRANSFORMERS)
    two = run_sync(TRANSFORMERS, "train_model.num_devices=2", "inference_model.num_devices=2", "ref_model.num_devices=2")
    assert len(two.rollouts) == len(one.rollouts)
    largest = max(abs(a - b) for r in two.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert largest < 1e-5  # both engines got every push
    assert [row["policy_version"] for row in two.metrics] == [0, 1, 2]
    assert two.metrics[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert two.metrics[2]["train/kl_to_reference"] > 1e-4
    assert {line["group_id"] for line in two.rollouts} == {line["group_id"] for line in one.rollouts}


LORA = ("train_model.lora.enabled=true", "train_model.lora.r=8", "optimizer.lr=3e-3")


@pytest.mark.slow
def test_with_lora_the_trainer_is_its_own_reference_and_learns(run_sync):
    overrides = (*LORA, "train.dialog_turns_per_batch=256", "train.optim_batch_size=256", "train.total_dialog_turns=6144")
    run = run_sync(TRANSFORMERS, *overrides, "env.num_envs=32", "train.kl_to_ref_coeff=0.001", "env.test_size=200")
    kl = [row["train/kl_to_reference"] for row in run.metrics]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 0.01
    assert run.summary["phases_s"]["reference"] > 0
    rewards = [row["rollout/reward_mean"] for row in run.metrics]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    largest = max(abs(a - b) for r in run.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert largest < 1e-4  # the engine has the merged weights
    assert (run.run_dir / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_fp16_writes_its_scale_with_every_step_and_trains(run_sync):
    run = run_sync("train.mixed_precision=fp16", *LORA)  # vLLM gets the merged weights
    assert all(row["train/grad_scale"] >= 1 and row["train/overflows"] in (0, 1) for row in run.metrics)
    moved = [row for row in run.metrics if not row["train/overflows"]]
    assert moved and all(row["train/grad_norm"] > 0 for row in moved)
    assert run.metrics[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert run.metrics[2]["train/kl_to_reference"] > 1e-5
    largest = max(abs(a - b) for r in run.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert 1e-5 < largest < 0.05  # one rounds to 11 bits, the other does not


@pytest.mark.slow
def test_two_ranks_score_and_train_beside_a_collection(run_sync):
    """train.sync_iter=false: scores are asked for by one thread and steps by another, of ranks that meet in collectives."""
    budget = ("train_model.num_devices=2", "train.max_tokens_per_micro_batch=500", "train_model.gradient_checkpointing=true")
    run = run_sync(TRANSFORMERS, *LORA, *budget, "train.sync_iter=false", "train.mixed_precision=bf16")
    assert [row["buffer/staleness_max"] for row in run.metrics] == [0, 1, 1]
    assert run.metrics[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert run.metrics[2]["train/kl_to_reference"] > 1e-4


@pytest.mark.slow
def test_two_ranks_two_engines_and_a_reference_learn_as_one_of_each(model_path, tmp_path):
    """The same seed, and curves of the mean reward that stay within the noise of sampling."""
    curves = {}
    for name, num_devices in (("one", 1), ("two", 2)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        overrides = [f"{role}_model.num_devices={num_devices}" for role in ("train", "inference")]
        overrides += ["ref_model.num_devices=1", "train.kl_to_ref_coeff=0.01", "train.total_dialog_turns=25600"]
        overrides += ["env.test_size=200", "train.eval_frequency=0", "logging.progress=false"]
        grpo_sync.main(compose("grpo_arithmetic", overrides), run_dir)
        rewards = [row["rollout/reward_mean"] for row in Finished(run_dir).metrics]
        curves[name] = np.array(rewards).reshape(-1, 10).mean(1)
    print(curves)
    assert curves["one"][-1] - curves["one"][0] > 0.2
    # A window holds 640 groups whose mean rewards scatter by 0.35: two standard errors of a difference are 0.04.
    assert np.abs(curves["one"] - curves["two"]).max() < 0.05


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_engines_and_reference_have_the_policy_in_four_bits_from_the_start(run_sync):
    """What is sampled from, trained on and exported is one model: the engines get it before they sample."""
    devices = ("train_model.num_devices=2", "ref_model.num_devices=1", "optimizer.name=adamw_8bit")
    run = run_sync(*LORA, *devices, "train_model.quantization.enabled=true")
    largest = max(abs(a - b) for r in run.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert largest < 1e-4
    assert [row["policy_version"] for row in run.metrics] == [0, 1, 2]
    assert run.metrics[0]["train/kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert run.metrics[2]["train/kl_to_reference"] > 1e-4
    assert load_model(str(run.run_dir / "model"), CPU).config.to_dict().get("quantization_config") is None
