"""One worker's view of a run: its place among the others, what it says, and how it trains a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_diffusion.storage import Store
from lora_diffusion.synthesis.training.metrics import RunLog, progress_line
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.distributed import Group
from lora_diffusion.training.loop import Leaving, Loop


class TrainingRun:
    """Writes to `store`, together with the others in `group`.

    `say(line)`: progress for people, from worker 0; `report(values)`: the numbers of each report, on every worker; `leaving()`: see
    `Loop.run`.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        group: Group | None = None,
        say: Callable[[str], None] = print,
        report: Callable[[dict[str, Any]], None] = lambda values: None,
        commit: str = "",
        leaving: Leaving = lambda: False,
    ) -> None:
        self.config, self.store, self.group, self.report, self.commit = config, store, group or Group(), report, commit
        self.leaving = leaving
        self.leader = self.group.rank == 0
        self.say: Callable[[str], None] = say if self.leader else lambda line: None
        self.log = RunLog(store, config.tensorboard) if self.leader else None

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def train(self, loop: Loop, picture: Callable[[], bytes | None] = lambda: None) -> None:
        """From the newest checkpoint to the end. `picture()`: a PNG for the log after a validation, if there is one."""
        if loop.state.done:
            return
        if self.log is not None:
            self.log.forget_after(loop.name, loop.resumed_at)
        if loop.resumed_at:
            self.say(f"{loop.name}: goes on after step {loop.resumed_at}")

        def report(values: dict[str, Any]) -> None:
            if self.log is not None:
                self.log.add(values)
                if "validation_loss" in values and (png := picture()) is not None:
                    self.log.picture(loop.name, values["step"], png)
                if values["checkpoint"]:
                    self.log.save()
                self.say(progress_line(values))
            self.report(values)

        loop.run(report, self.leaving)
