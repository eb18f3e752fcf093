"""Where an asynchronous run's time went, and which split of devices would balance it."""

import math

MOST_PUSHING = 0.05  # share of the time that pushes may take before rarer ones are recommended


class Stopwatches:
    """What clocks have gone on since they were read last, by the names of whom they are with.

    A clock that shows less than before is that of a process which was started again, at 0.
    """

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}

    def since(self, readings_s: dict[str, float]) -> dict[str, float]:
        before = {name: self.shown.get(name, 0.0) for name in readings_s}
        self.shown |= readings_s
        return {name: s - before[name] if s >= before[name] else s for name, s in readings_s.items()}


def make_account(
    phases_s: dict[str, float], wall_s: float, engine_devices: int, num_ranks: int, steps_per_push: int
) -> dict[str, float]:
    """Busy shares of `wall_s` seconds of training, in [0, 1], and what they recommend.

    phases_s: seconds that an engine sampled (`generate`, the mean over engines), the trainer trained (`train`) and waited
    for data (`wait`), and pushes took (`push`). A device that both could use is best given so that engines and ranks need
    as long: `inference_devices` is the engines' share of the device seconds of the two. An engine may have several of the
    `engine_devices`. Pushes that take the share p, made r times rarer, take (p / r) / (1 - p + p / r): at most
    MOST_PUSHING = m from r = p (1 - m) / (m (1 - p)) on.
    """
    sampling, training = phases_s["generate"] * engine_devices, phases_s["train"] * num_ranks
    pushing = phases_s["push"] / wall_s
    rarer = math.ceil(pushing * (1 - MOST_PUSHING) / (MOST_PUSHING * (1 - pushing)))
    return {
        "engines_busy": min(1.0, phases_s["generate"] / wall_s),
        "trainer_busy": phases_s["train"] / wall_s,
        "waiting_for_data": phases_s["wait"] / wall_s,
        "pushing": pushing,
        "inference_devices": sampling / (sampling + training),
        "weight_update_frequency": steps_per_push * max(1, rarer),
    }


def describe(account: dict[str, float]) -> str:
    """One line for the user."""
    return (
        f"Engines were busy {account['engines_busy']:.0%} of the time, the trainer {account['trainer_busy']:.0%}; it waited "
        f"for data {account['waiting_for_data']:.0%}, pushes took {account['pushing']:.1%}. Balanced would be "
        f"{account['inference_devices']:.0%} of the devices for inference, and train.weight_update_frequency="
        f"{account['weight_update_frequency']:.0f}"
    )
