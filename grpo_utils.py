"""The composition root: builds the parts of a run from its configuration on Ray, and closes them in reverse.

Everything that can be wrong without an actor (configuration, machine, model, data, reward function) is found before Ray
starts.
"""

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from transformers import PreTrainedTokenizerBase

from grpo import builtin, tasks
from grpo.admission import Admission, UniformAdmission
from grpo.background import BUFFER, CollectorActor
from grpo.checkpoint import Checkpoint, CheckpointWriter
from grpo.cluster import check_shared, join_ranks, on_node, reserve, start_actors, start_ray
from grpo.collect import PromptEnv, PromptStream, make_finish
from grpo.collector import GroupCollector, InferencePolicy
from grpo.colocate import Turns
from grpo.config import RunConfig
from grpo.errors import ActorError, ConfigError, RewardError
from grpo.grading import Failed, GradingPool, grading_pool
from grpo.inference import InferenceActor, Sampling, engine_environment, engine_spec
from grpo.metrics import Clock, RunLog
from grpo.models import load_tokenizer
from grpo.objectives.online import divisor
from grpo.plan import Plan, make_plan
from grpo.pools import EnginePool, ReferencePool, Revive, TrainerPool, named
from grpo.preemption import REQUEST
from grpo.push import WeightPush
from grpo.reference import ReferenceActor
from grpo.remote import HEARTBEATS, LOOK_S, get_all
from grpo.replay import GroupBuffer, make_replay_buffer
from grpo.resume import SUMMARY
from grpo.rewards import load_reward_function
from grpo.run import Run
from grpo.run_async import AsyncRun
from grpo.run_sync import SyncRun
from grpo.session import claimed
from grpo.sources import check_files
from grpo.supervision import Supervisor
from grpo.trainer import TrainerActor, TrainerSpec


@contextmanager
def build(config: RunConfig, run_dir: Path, supervisor: Supervisor | None = None) -> Iterator[Run]:
    """A run whose actors are up; leaving the context ends every process that it started."""
    supervisor = supervisor or Supervisor(config.ray)
    plan = make_plan(config)
    torch.set_num_threads(max(plan.threads.values()))
    task = tasks.load(config.env)
    if config.env.reward_fn:
        load_reward_function(config.env.reward_fn)  # so that what is missing is said before anything starts
    model = builtin.resolve(config.model.name, config.model.cache_dir)
    check_files(model)
    tokenizer = load_tokenizer(model)
    data = load_data(config, task, tokenizer)
    stream = PromptStream(len(data["train"].problems), config.seed)
    group_size, clock = config.env.repeats, Clock()
    with ExitStack() as closing:
        resumed = closing.enter_context(claimed(run_dir, config.resume))
        if resumed is not None:
            check_resume(resumed, config, data)
        grading = closing.enter_context(grading_pool(config.env))
        closing.callback(lambda: supervisor.before.update(grading=grading.restarts))
        check_reward_function(grading, data["train"].problems[:group_size])
        start_ray(config.ray, sum(plan.roles.values()), closing)
        check_shared(config.ray, plan.nodes, shared_paths(config, run_dir, model))
        closing.enter_context(supervisor.watching())
        ranks, references, actors = start_models(config, plan, model, supervisor)
        timeout_s = config.ray.timeout_s
        engines = EnginePool(dict(actors), timeout_s, lose=supervisor.lose)
        train = config.train
        trainer = TrainerPool(
            ranks,
            train.gradient_accumulation_steps,
            train.max_tokens_per_micro_batch,
            timeout_s,
            config.penalised,
            divisor(config.objective.aggregation, config.inference_model.max_tokens),
            train.share_prompts,
        )
        push = connect(trainer, engines, plan.transport, config.inference_model.tensor_parallel_size, timeout_s)
        if plan.transport == "shared_memory":
            engines.revive = reviving(supervisor, push)
        reference, old = None, None
        if config.num_references:
            reference = ReferencePool(references, timeout_s, "reference", Lock())
        elif config.uses_reference:  # the policy without its adapters
            reference = ReferencePool(ranks, timeout_s, "training", trainer.order)
        if config.anchor == "old":
            old = ReferencePool(ranks, timeout_s, "training", trainer.order)
        if config.mode == "sync":
            env = PromptEnv((config.groups_per_collection, group_size), grading, data["train"], stream, tokenizer, clock)
            make_run = partial(
                SyncRun,
                stream=stream,
                collector=make_collector(config, env, engines, reference),
                replay_buffer=make_replay_buffer(config.groups_per_collection, config.groups_per_batch),
                background=ThreadPoolExecutor(1, thread_name_prefix="collect"),
                old=old,
                turns=Turns(engines, named("training", ranks) | named("reference", references)) if config.colocate else None,
            )
            closing.callback(_end_background, make_run.keywords["background"])
        else:
            buffer, collectors, start_collector = start_collectors(
                config, plan, model, data["train"], actors, references, supervisor
            )
            make_run = partial(
                AsyncRun,
                buffer=buffer,
                collectors=collectors,
                start_collector=start_collector,
                stream=stream,
                sampling=sampling(config),
                admission=make_admission(config),
            )
        supervisor.all_up()
        log = RunLog(run_dir, config, None if resumed is None else resumed.state["log"])
        closing.callback(log.abandon)
        writer = CheckpointWriter(run_dir, train.keep_checkpoints, trainer, resumed)
        closing.callback(writer.close)
        closing.enter_context(rare_garbage_collection())
        run = make_run(
            config=config,
            run_dir=run_dir,
            grading=grading,
            tokenizer=tokenizer,
            data=data,
            trainer=trainer,
            engines=engines,
            push=push,
            clock=clock,
            log=log,
            writer=writer,
            resumed=resumed,
            supervisor=supervisor,
        )
        with run.kept():
            yield run


def check_reward_function(grading: GradingPool, problems: list[tasks.Problem]) -> None:
    """A first call of the user's function, so that a broken one is found before anything else starts."""
    if grading.reward_function is not None:
        questions, answers = [problem.question for problem in problems], [problem.answer for problem in problems]
        found = grading.reward([(questions, answers, answers)])[0]
        if isinstance(found, Failed):
            raise RewardError(found.note)


@contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Python looks for cycles after 100,000 new objects, not 700, and not among those that are there already.

    Looking through everything that lives as long as the run, again and again, costs large collections a fifth.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _end_background(background: ThreadPoolExecutor) -> None:
    """Have the thread leave what it waits for, since Ray ends next; a reward function of the user's may hold it longer."""
    REQUEST.ended = True
    last = background.submit(int)
    background.shutdown(wait=False)
    wait([last], timeout=4 * LOOK_S)


def check_resume(checkpoint: Checkpoint, config: RunConfig, data: dict[str, tasks.EncodedProblems]) -> None:
    """Raise ConfigError where `checkpoint` is of another run than `config`, or its run has nothing left to do."""
    progress, run_dir, plateau = checkpoint.state["progress"], checkpoint.path.parents[1], config.train.stop_when
    if (run_dir / SUMMARY).is_file():
        steps = progress["num_steps"]
        if steps >= config.num_steps:
            raise ConfigError(f"resume ({run_dir}): the run has ended with its step {steps}: raise train.total_dialog_turns")
        if plateau is not None and progress["evaluations_since_best"] >= plateau:
            raise ConfigError(f"resume ({run_dir}): the run has ended after step {steps}: raise train.stop_when ({plateau})")
    if checkpoint.state["data"] != tasks.fingerprint(data) and not config.resume_force:
        raise ConfigError(
            f"resume ({run_dir}): its problems, to train on or held out, are not those of the run any more: give it its own "
            "back, or type resume_force=true"
        )


def load_data(config: RunConfig, task: tasks.Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, tasks.EncodedProblems]:
    """The three splits as token ids; raises DataError where one is empty."""
    limits = {"train": None, "validation": config.env.validation_size, "test": config.env.test_size}
    data = {
        split: tasks.encode_split(task, split, tokenizer, config.env.max_prompt_length, limit)
        for split, limit in limits.items()
    }
    for split, encoded in data.items():
        if encoded.dropped:
            print(f"{encoded.dropped} prompts of the {split} split are longer than env.max_prompt_length and left out")
    return data


def shared_paths(config: RunConfig, run_dir: Path, model: str) -> list[str]:
    """What every node of a cluster must see."""
    reward_fn = config.env.reward_fn or ""
    code = [reward_fn.rpartition(":")[0]] if ".py:" in reward_fn else []
    return [str(run_dir), *([model] if os.path.isdir(model) else []), *code]


def start_models(
    config: RunConfig, plan: Plan, model: str, supervisor: Supervisor
) -> tuple[list[ActorHandle], list[ActorHandle], dict[str, ActorHandle]]:
    """Start the actors and wait until each has its model: (training ranks, references, engines by name).

    They start side by side, but for engines that share a GPU. Engines that are gone for good are left out, and the others
    have the names that they had. Ray starts references again that die, and engines where the last push is still there for
    them; all else is started anew.
    """

    parallel = config.inference_model.tensor_parallel_size
    gpus = {role: plan.gpus_per_process * (parallel if role == "inference" else 1) for role in plan.roles}
    places = reserve(config.ray, plan.nodes_of, gpus)
    planned = named("inference", places["inference"])
    names = supervisor.engines_of(planned)
    places["inference"] = [planned[name] for name in names]

    def start(role: str, cls: type, environment: dict[str, str], *arguments) -> list[ActorHandle]:
        if role not in places:
            return []
        restarts = None
        if role == "reference" or (role == "inference" and plan.transport == "shared_memory"):
            restarts = [supervisor.left(name) for name in (names if role == "inference" else named(role, places[role]))]
        threads = plan.threads[role]
        return start_actors(cls, places[role], plan.device, gpus[role], threads, environment, *arguments, restarts=restarts)

    inference, attention = config.inference_model, config.model.attn_implementation
    spec = replace(engine_spec(config, model, plan.device), sleeps=config.colocate)
    engines = dict(zip(names, start("inference", InferenceActor, engine_environment(spec), spec), strict=True))
    precision, products = config.train.mixed_precision, config.model.matmul_precision
    references = start(
        "reference",
        ReferenceActor,
        {},
        model,
        attention,
        plan.device,
        inference.temperature,
        precision,
        products,
        config.reference_in_four_bits,
    )
    train_device = "cpu" if plan.device == "mps" else plan.device  # FSDP2 has no backend for mps
    trainer_spec = TrainerSpec(
        model,
        attention,
        train_device,
        inference.temperature,
        config.seed,
        config.train_model,
        config.objective,
        config.train,
        config.optimizer,
        config.uses_reference,
        config.diverges and config.train.kl_coef_in_loss,
        config.train.share_prompts,
        products,
    )
    trainers = start("trainer", TrainerActor, {}, trainer_spec)
    supervisor.watch(named("training", trainers) | named("reference", references) | engines)
    starting = named("reference", [actor.start.remote() for actor in references])
    if 0 < plan.gpus_per_process < 1:
        # vLLM measures what its start takes of a GPU, and what others load would count: other engines too.
        join_ranks(trainers, config.ray, starting)
        for name, actor in engines.items():
            get_all({name: actor.start.remote()}, config.ray.start_timeout_s, "starting", "ray.start_timeout_s")
    else:
        starting |= {name: actor.start.remote() for name, actor in engines.items()}
        join_ranks(trainers, config.ray, starting)
    return trainers, references, engines


def connect(
    trainer: TrainerPool, engines: EnginePool, transport: str, processes_per_engine: int, timeout_s: float
) -> WeightPush:
    """Bring the first training rank and every engine together over `transport`, ready for the first push."""

    def ask(calls: dict[str, ObjectRef], doing: str) -> list:
        return get_all(calls, timeout_s, doing)

    first = trainer.actors[0]
    sender = next(iter(named("training", trainer.actors)))
    dtypes = {name: actor.weights_dtype.remote() for name, actor in engines.by_name.items()}
    dtype, *_ = ask(dtypes, "telling its dtype")
    num_receivers = len(engines.by_name) * processes_per_engine
    # Less time than the driver has: their errors say more.
    opening = {sender: first.open_pushes.remote(transport, dtype, num_receivers, 0.8 * timeout_s)}
    description, aliases, own_dtype = ask(opening, "preparing weight pushes")[0]
    joining = {sender: first.join_pushes.remote()}
    first_index = {engine: i * processes_per_engine for i, engine in enumerate(engines.by_name)}

    def join(engine: str) -> ObjectRef:
        return engines.by_name[engine].connect.remote(description, engine, first_index[engine], list(aliases))

    joining |= {engine: join(engine) for engine in engines.by_name}
    _, *projected = ask(joining, "connecting trainer and engines")
    packed = sorted({aliases.get(name, name) for names in projected for name in names})
    ask({sender: first.project.remote(packed)}, "preparing weight pushes")
    coarser = min(dtype, own_dtype, key=lambda name: -torch.finfo(getattr(torch, name)).eps)
    return WeightPush(trainer, engines, aliases, coarser, timeout_s, join)


def reviving(supervisor: Supervisor, push: WeightPush) -> Revive:
    """How an engine that has died comes back in its place, with the weights of the last push if it is to have them."""

    def revive(name: str, actor: ActorHandle, error: ActorError, load: bool) -> None:
        supervisor.bring_back(name, actor, error, actor.start.remote, partial(push.repeat, name, load))

    return revive


def make_collector(
    config: RunConfig, env: PromptEnv, engines: EnginePool, reference: ReferencePool | None
) -> GroupCollector:
    """Everything between a prompt and a scored group."""
    train = config.train
    return GroupCollector(
        env,
        policy=InferencePolicy(engines, env.data, sampling(config), config.seed, env.clock),
        dialog_turns_per_batch=train.dialog_turns_per_batch,
        total_dialog_turns=-1,  # the run counts
        postproc=make_finish(config, env, reference),
    )


def sampling(config: RunConfig) -> Sampling:
    """How training's responses are drawn."""
    inference = config.inference_model
    return Sampling(config.env.repeats, inference.max_tokens, inference.temperature, inference.top_p)


def make_admission(config: RunConfig) -> Admission:
    sizes = config.groups_per_batch, config.num_groups, config.staleness_bound, config.batches_per_push
    if config.train.replay == "uniform":
        return UniformAdmission(*sizes, config.running_groups, config.buffered_groups, config.seed)
    return Admission(*sizes, config.buffered_groups)


def start_collectors(
    config: RunConfig,
    plan: Plan,
    model: str,
    data: tasks.EncodedProblems,
    engines: dict[str, ActorHandle],
    references: list[ActorHandle],
    supervisor: Supervisor,
) -> tuple[ActorHandle, dict[str, ActorHandle], Callable[[str], ObjectRef]]:
    """The replay buffer's actor, a collector on each engine's node, by the names that errors use, and what starts one again.

    The buffer is started by TorchRL's `as_remote`, not as its RayReplayBuffer, whose calls have no deadline.
    """
    resources = {"num_cpus": 0, "num_gpus": 0, "concurrency_groups": HEARTBEATS}
    buffer = GroupBuffer.as_remote(resources).options(resources=on_node(config.ray, plan.nodes[0])).remote()
    shared, nodes = ray.put(data), named("inference", plan.nodes_of["inference"])
    collector = ray.remote(**resources, max_concurrency=3)(CollectorActor)
    engine_of = {engine.replace("inference", "collector"): engine for engine in engines}
    collectors = {
        name: collector.options(resources=on_node(config.ray, nodes[engine]), max_restarts=supervisor.left(name)).remote(
            config, model, engine
        )
        for name, engine in engine_of.items()
    }
    supervisor.watch({BUFFER: buffer} | collectors)

    def start_collector(name: str) -> ObjectRef:
        return collectors[name].start.remote(shared, engines[engine_of[name]], references, buffer)

    starting = {name: start_collector(name) for name in collectors} | {BUFFER: buffer.look.remote()}
    get_all(starting, config.ray.start_timeout_s, "starting", "ray.start_timeout_s")
    return buffer, collectors, start_collector
