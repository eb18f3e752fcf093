"""The composition root: builds the parts of a run from its configuration on Ray, and closes them in reverse.

Everything that can be wrong without an actor (configuration, machine, model, data, reward function) is found before Ray
starts.
"""

import errno
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from transformers import PreTrainedTokenizerBase

from grpo import builtin, tasks
from grpo.advantages import group_advantages
from grpo.checkpoint import Checkpoint, CheckpointWriter, newest
from grpo.collect import Finish, GroupCollector, InferencePolicy, PromptEnv, PromptStream
from grpo.config import RunConfig
from grpo.errors import ConfigError, RewardError
from grpo.grading import Failed, GradingPool
from grpo.inference import EngineSpec, InferenceActor, Sampling
from grpo.metrics import Clock, RunLog
from grpo.models import check_files, load_tokenizer
from grpo.objectives.divergences import ESTIMATES, k3
from grpo.objectives.online import divisor
from grpo.plan import Plan, make_plan
from grpo.pools import EnginePool, ReferencePool, TrainerPool, WeightPush, named
from grpo.preemption import REQUEST, Preempted, listen
from grpo.reference import ReferenceActor
from grpo.remote import LOOK_S, get, get_all
from grpo.replay import make_replay_buffer
from grpo.resume import CONFIG, SUMMARY, locked, write_config
from grpo.rewards import load_reward_function
from grpo.run import Run
from grpo.trainer import TrainerActor, TrainerSpec


@contextmanager
def build(config: RunConfig, run_dir: Path) -> Iterator[Run]:
    """A run whose actors are up; leaving the context ends every process that it started."""
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
        closing.enter_context(locked(run_dir))
        if config.resume is None and (run_dir / CONFIG).is_file():
            raise ConfigError(f"{run_dir} holds a run already: type resume={run_dir}, or another hydra.run.dir")
        resumed = newest(run_dir)
        if resumed is not None:
            check_resume(resumed, config, data["train"])
        limits = config.env.grading_timeout_s, config.env.reward_fn, config.env.reward_timeout_s
        grading = closing.enter_context(GradingPool(tasks.grader(config.env), config.env.grading_processes, *limits))
        check_reward_function(grading, data["train"].problems[:group_size])
        env = PromptEnv(config.groups_per_collection, group_size, grading, data["train"], stream, tokenizer, clock)
        take_signals = closing.enter_context(listen(config.train.grace_s, config.train.max_wall_time))
        _start_ray(config, plan, closing)
        take_signals()
        ranks, references, actors = _start_actors(config, plan, model)
        timeout_s = config.ray.timeout_s
        engines = EnginePool(actors, timeout_s)
        train = config.train
        trainer = TrainerPool(
            ranks,
            train.gradient_accumulation_steps,
            train.max_tokens_per_micro_batch,
            timeout_s,
            config.penalised,
            divisor(config.objective.aggregation, config.inference_model.max_tokens),
        )
        push = connect(trainer, engines, plan.transport, config.inference_model.tensor_parallel_size, timeout_s)
        reference = None
        if config.num_references:
            reference = ReferencePool(references, timeout_s, "reference", Lock())
        elif config.uses_reference:  # the policy without its adapters
            reference = ReferencePool(ranks, timeout_s, "training", trainer.order)
        old = ReferencePool(ranks, timeout_s, "training", trainer.order) if config.anchor == "old" else None
        background = ThreadPoolExecutor(1, thread_name_prefix="collect")
        closing.callback(_end_background, background)
        log = RunLog(run_dir, config, None if resumed is None else resumed.state["log"])
        closing.callback(log.abandon)
        writer = CheckpointWriter(run_dir, train.keep_checkpoints, trainer, resumed)
        closing.callback(writer.close)
        closing.enter_context(rare_garbage_collection())
        run = Run(
            config=config,
            run_dir=run_dir,
            grading=grading,
            tokenizer=tokenizer,
            data=data,
            trainer=trainer,
            old=old,
            engines=engines,
            push=push,
            collector=make_collector(config, env, engines, reference),
            replay_buffer=make_replay_buffer(train.buffer_size // group_size, train.optim_batch_size // group_size),
            background=background,
            clock=clock,
            log=log,
            writer=writer,
            resumed=resumed,
        )
        write_config(config, run_dir)
        (run_dir / SUMMARY).unlink(missing_ok=True)  # of the shorter run that is gone on with
        try:
            try:
                yield run
            except Preempted as stop:
                stop.saved = run.save_and_end()
                raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise writer.disk_error(f"metrics and rollouts could not be written to {run_dir}", error) from None


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


def check_resume(checkpoint: Checkpoint, config: RunConfig, data: tasks.EncodedProblems) -> None:
    """Raise ConfigError where `checkpoint` is of another run than `config`, or its run has nothing left to do."""
    progress, run_dir, plateau = checkpoint.state["progress"], checkpoint.path.parents[1], config.train.stop_when
    if (run_dir / SUMMARY).is_file():
        steps = progress["num_steps"]
        if steps >= config.num_steps:
            raise ConfigError(f"resume ({run_dir}): the run has ended with its step {steps}: raise train.total_dialog_turns")
        if plateau is not None and progress["evaluations_since_best"] >= plateau:
            raise ConfigError(f"resume ({run_dir}): the run has ended after step {steps}: raise train.stop_when ({plateau})")
    if checkpoint.state["data"] != data.fingerprint and not config.resume_force:
        raise ConfigError(
            f"resume ({run_dir}): the training problems are not those of the run any more: give it its own back, or type "
            "resume_force=true"
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


def _start_ray(config: RunConfig, plan: Plan, closing: ExitStack) -> None:
    path = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ray.init(
        address="local",
        num_cpus=sum(plan.roles.values()),
        object_store_memory=config.ray.object_store_memory,
        _temp_dir=config.ray.temp_dir,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
    )
    closing.callback(ray.shutdown)


def _start_actors(
    config: RunConfig, plan: Plan, model: str
) -> tuple[list[ActorHandle], list[ActorHandle], list[ActorHandle]]:
    """Start the actors side by side and wait until each has its model: (training ranks, references, engines)."""
    common = {}
    if plan.device == "cpu":
        # Large tensors come from the heap, which keeps its pages: faulting them in anew costs a push a third of its time.
        common |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_ARENA_MAX": "1"}
        # Idle OpenMP threads spin by default, on cores that other actors compute on: pushes took four times as long.
        common |= {"GOMP_SPINCOUNT": "30000"}

    def start(role: str, cls: type, environment: dict[str, str], *arguments) -> list[ActorHandle]:
        if role not in plan.roles:
            return []
        environment = common | environment | {"OMP_NUM_THREADS": str(plan.threads[role])}
        gpus = plan.gpus_per_process * (config.inference_model.tensor_parallel_size if role == "inference" else 1)
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
        return [ray.remote(**options)(cls).remote(*arguments) for _ in range(plan.roles[role])]

    inference, attention = config.inference_model, config.model.attn_implementation
    spec = EngineSpec(
        backend=inference.backend,
        model=model,
        device=plan.device,
        dtype="float32" if plan.device == "cpu" else inference.dtype,
        seed=config.seed,
        max_concurrent=config.env.num_envs * config.env.repeats,
        max_length=config.env.max_prompt_length + inference.max_tokens,
        top_p=inference.top_p,
        gpu_memory_utilization=inference.gpu_memory_utilization,
        enforce_eager=inference.enforce_eager or plan.device == "cpu",
        tensor_parallel_size=inference.tensor_parallel_size,
    )
    engines = start("inference", InferenceActor, engine_environment(spec), spec)
    precision, products = config.train.mixed_precision, config.model.matmul_precision
    references = start(
        "reference", ReferenceActor, {}, model, attention, plan.device, inference.temperature, precision, products
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
        products,
    )
    trainers = start("trainer", TrainerActor, {}, trainer_spec)
    starting = named("inference", [actor.start.remote() for actor in engines])
    starting |= named("reference", [actor.start.remote() for actor in references])
    timeout, key = config.ray.start_timeout_s, "ray.start_timeout_s"
    rendezvous = get(trainers[0].open_rendezvous.remote(), timeout, "the first training actor", "starting", key)
    ranks = [
        actor.start.remote(rank, len(trainers), rendezvous, config.ray.timeout_s) for rank, actor in enumerate(trainers)
    ]
    get_all(starting | named("training", ranks), timeout, "starting", key)
    return trainers, references, engines


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables for an engine's process."""
    if spec.backend != "vllm":
        return {}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if spec.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if spec.enforce_eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def connect(
    trainer: TrainerPool, engines: EnginePool, transport: str, processes_per_engine: int, timeout_s: float
) -> WeightPush:
    """Bring the first training rank and every engine together over `transport`, ready for the first push."""

    def ask(calls: dict[str, ObjectRef], doing: str) -> list:
        return get_all(calls, timeout_s, doing)

    first, actors = trainer.actors[0], engines.actors
    dtype, *_ = ask(named("inference", [actor.weights_dtype.remote() for actor in actors]), "telling its dtype")
    num_receivers = len(actors) * processes_per_engine
    # Less time than the driver has: their errors say more.
    opening = {"the first training actor": first.open_pushes.remote(transport, dtype, num_receivers, 0.8 * timeout_s)}
    description, aliases, own_dtype = ask(opening, "preparing weight pushes")[0]
    joining = {"the first training actor": first.join_pushes.remote()}
    for i, engine in enumerate(named("inference", actors)):
        call = actors[i].connect.remote(description, engine, i * processes_per_engine, list(aliases))
        joining[engine] = call
    _, *projected = ask(joining, "connecting trainer and engines")
    packed = sorted({aliases.get(name, name) for names in projected for name in names})
    ask({"the first training actor": first.project.remote(packed)}, "preparing weight pushes")
    coarser = min(dtype, own_dtype, key=lambda name: -torch.finfo(getattr(torch, name)).eps)
    return WeightPush(trainer, engines, aliases, coarser, timeout_s)


def make_collector(
    config: RunConfig, env: PromptEnv, engines: EnginePool, reference: ReferencePool | None
) -> GroupCollector:
    """Everything between a prompt and a scored group."""
    inference, train, objective = config.inference_model, config.train, config.objective
    sampling = Sampling(config.env.repeats, inference.max_tokens, inference.temperature, inference.top_p)
    kl_in_reward = 0.0 if train.kl_coef_in_loss or reference is None else train.kl_to_ref_coeff
    return GroupCollector(
        env,
        policy=InferencePolicy(engines, env.data, sampling, config.seed, env.clock),
        dialog_turns_per_batch=train.dialog_turns_per_batch,
        total_dialog_turns=-1,  # the run counts
        postproc=Finish(
            env,
            reference,
            kl_in_reward,
            ESTIMATES.get(objective.divergence, k3),
            partial(group_advantages, scale=objective.advantage_scale, baseline=objective.baseline),
            config.anchor == "reference",
        ),
    )
