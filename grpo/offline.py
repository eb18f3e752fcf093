"""The composition root of grpo_offline.py: builds the parts of a run from its configuration, and closes them in reverse.

Everything that can be wrong without an actor (data, configuration, machine, model) is found before Ray starts.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray.actor import ActorHandle
from transformers import PreTrainedTokenizerBase

from grpo import builtin
from grpo.checkpoint import Checkpoint, CheckpointWriter
from grpo.cluster import check_shared, join_ranks, reserve, start_actors, start_ray
from grpo.errors import ConfigError, DataError
from grpo.metrics import METRICS_FILE, Clock, RunLog
from grpo.models import load_tokenizer
from grpo.offline_config import OfflineConfig
from grpo.offline_plan import OfflinePlan, make_plan
from grpo.offline_run import OfflineRun, differing
from grpo.offline_trainer import OfflineTrainerActor, OfflineTrainerPool, PolicyPool
from grpo.pools import named
from grpo.resume import SUMMARY
from grpo.scored import EncodedGroups, encode_groups, hold_out, read_groups
from grpo.session import claimed
from grpo.sources import check_files
from grpo.supervision import Supervisor
from grpo.trainer import TrainerSpec


@contextmanager
def build(config: OfflineConfig, run_dir: Path, supervisor: Supervisor | None = None) -> Iterator[OfflineRun]:
    """A run whose ranks are up; leaving the context ends every process that it started."""
    supervisor = supervisor or Supervisor(config.ray)
    plan = make_plan(config)
    model = builtin.resolve(config.model.name, config.model.cache_dir)
    check_files(model)
    train, held_out = load_data(config, load_tokenizer(model))
    num_steps = config.num_epochs * -(-len(train.groups) // config.batch_size)
    with ExitStack() as closing:
        resumed = closing.enter_context(claimed(run_dir, config.resume))
        if resumed is not None:
            check_resume(resumed, config, train, num_steps)
        start_ray(config.ray, config.train_model.num_devices, closing)
        check_shared(config.ray, plan.nodes, [str(run_dir), *([model] if os.path.isdir(model) else [])])
        closing.enter_context(supervisor.watching())
        ranks, timeout_s = start_ranks(config, plan, model, supervisor), config.ray.timeout_s
        supervisor.all_up()
        trainer = OfflineTrainerPool(ranks, config.train.gradient_accumulation_steps, None, timeout_s)
        position = None if resumed is None else resumed.state["log"]
        log = RunLog(run_dir, config, position, num_steps, (METRICS_FILE,))
        closing.callback(log.abandon)
        writer = CheckpointWriter(run_dir, config.train.keep_checkpoints, trainer, resumed)
        closing.callback(writer.close)
        run = OfflineRun(
            config=config,
            run_dir=run_dir,
            train=train,
            held_out=held_out,
            trainer=trainer,
            policy=PolicyPool(ranks, timeout_s, "training", trainer.order),
            clock=Clock(),
            log=log,
            writer=writer,
            resumed=resumed,
            supervisor=supervisor,
        )
        with run.kept():
            yield run


def load_data(config: OfflineConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedGroups, EncodedGroups]:
    """(training groups, held-out groups to rank) as token ids, those left out counted; DataError where none is left."""
    sides = hold_out(read_groups(config.data), config.eval_share, config.seed)
    train, held_out = (encode_groups(groups, tokenizer, config.max_seq_length) for groups in sides)
    too_long, too_small = train.too_long + held_out.too_long, train.too_small + held_out.too_small
    if too_long:
        print(
            f"{too_long} completions are longer than max_seq_length ({config.max_seq_length} tokens) with their prompt and "
            f"left out, and with them {too_small} groups that have fewer than 2 left"
        )
    number, held_out = len(held_out.groups), differing(held_out)
    equal = number - len(held_out.groups)
    if equal:
        print(f"{equal} of {number} held-out groups are left out, whose scores are all equal: there is nothing to rank")
    for what, encoded in (("to train on", train), ("held out whose scores differ", held_out)):
        if not encoded.groups:
            raise DataError(
                f"data ({config.data}) has no group {what}: give more data, raise max_seq_length "
                f"({config.max_seq_length}; {too_long} completions are longer) or change eval_share ({config.eval_share:g})"
            )
    return train, held_out


def check_resume(checkpoint: Checkpoint, config: OfflineConfig, train: EncodedGroups, num_steps: int) -> None:
    """Raise ConfigError where `checkpoint` is of another run than `config`, or its run has nothing left to do."""
    steps, run_dir = checkpoint.state["progress"]["num_steps"], checkpoint.path.parents[1]
    if (run_dir / SUMMARY).is_file() and steps >= num_steps:
        raise ConfigError(f"resume ({run_dir}): the run has ended with its step {steps}: raise num_epochs")
    if checkpoint.state["data"] != train.fingerprint and not config.resume_force:
        raise ConfigError(
            f"resume ({run_dir}): the training groups are not those of the run any more: give it its own back, or type "
            "resume_force=true"
        )


def start_ranks(config: OfflineConfig, plan: OfflinePlan, model: str, supervisor: Supervisor) -> list[ActorHandle]:
    """Start the training ranks and wait until each has its model."""
    spec = TrainerSpec(
        model=model,
        attn_implementation=config.model.attn_implementation,
        device="cpu" if plan.device == "mps" else plan.device,  # FSDP2 has no backend for mps
        temperature=1.0,
        seed=config.seed,
        train_model=config.train_model,
        objective=config.objective,
        train=config.train,
        optimizer=config.optimizer,
        uses_reference=False,
        matmul_precision=config.model.matmul_precision,
        lora_path=None if config.lora_path is None else str(Path(config.lora_path).absolute()),
    )
    gpus, nodes = plan.gpus_per_process, [plan.nodes[i] for i in plan.places["trainer"]]
    places = reserve(config.ray, {"trainer": nodes}, {"trainer": gpus})["trainer"]
    ranks = start_actors(OfflineTrainerActor, places, plan.device, gpus, plan.threads, {}, spec)
    supervisor.watch(named("training", ranks))
    join_ranks(ranks, config.ray)
    return ranks
