"""Laws of the training loop: neither the number of workers, nor how they share the model, nor an interruption changes a loss."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.training.metrics import losses
from lora_diffusion.training.distributed import Group
from lora_diffusion.training.loop import Batch, Loop, LoopConfig, Stage, epoch_batches

CONFIG = LoopConfig(
    steps=12, batch_size=7, learning_rate=0.02, warmup=2, validate_every=3, log_every=2, checkpoint_every=4
)


class Regression(Stage):
    """Noisy linear regression: small, and with everything the loop has to get right (noise, parts, unequal shares)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 3))
        rng = np.random.default_rng(1)
        self.x, self.y = rng.normal(size=(41, 5)).astype("f"), rng.normal(size=(41, 3)).astype("f")
        self.train_slots, self.validation_slots = np.arange(36), np.arange(36, 41)

    def inputs(self, slots: np.ndarray) -> Batch:
        return {"x": torch.from_numpy(self.x[slots]), "y": torch.from_numpy(self.y[slots])}

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        return {"noise": torch.randn(count, 5, generator=generator)}

    def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.net(inputs["x"] + 0.1 * draws["noise"]) - inputs["y"]).square().mean(1)
        return error, {"twice": 2 * error}


def train(
    folder: Path, config: LoopConfig = CONFIG, group: Group | None = None, dropout: float = 0.0, **options: Any
) -> tuple[Loop, list[Any]]:
    loop, reports = Loop("regression", Regression(dropout), config, open_store(folder), group, **options), []
    loop.run(reports.append)
    return loop, losses(reports)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_run_repeats_a_calm_one_to_the_bit(tmp_path: Path, dropout: float) -> None:
    calm, reports = train(tmp_path / "calm", dropout=dropout)

    class Killed(Exception):
        pass

    def die(values: dict[str, Any]) -> None:
        if values["step"] == 9:  # one step after a checkpoint
            raise Killed

    with pytest.raises(Killed):
        Loop("regression", Regression(dropout), CONFIG, open_store(tmp_path / "cut")).run(die)
    torch.rand(100)  # the new process' generator stands elsewhere
    again, rest = train(tmp_path / "cut", dropout=dropout)
    assert again.resumed_at == 8
    assert rest == [report for report in reports if report["step"] > 8]
    expected = calm.best_weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.best_weights().items())
    done, nothing = train(tmp_path / "cut", dropout=dropout)
    assert (done.state.step, nothing) == (12, [])


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    _, reports = train(tmp_path, replace(CONFIG, steps=150, validate_every=50, log_every=25))
    assert reports[-1]["loss"] < 0.8 * reports[0]["loss"]
    assert reports[-1]["twice"] == pytest.approx(2 * reports[-1]["loss"], rel=1e-5)
    assert reports[-1]["done"]


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(tmp_path: Path) -> None:
    # the targets are noise: more steps overfit
    config = replace(CONFIG, steps=2000, validate_every=20, log_every=1000, checkpoint_every=1000, patience=3)
    loop, reports = train(tmp_path, config)
    assert loop.state.step < 2000
    validations = {report["step"]: report["validation_loss"] for report in reports}
    assert min(validations, key=validations.__getitem__) == loop.state.best_step == loop.state.step - 60
    loop.stage.load_state_dict(loop.best_weights())
    batch, size = loop._load(np.arange(36, 41))
    assert loop._forward(batch, size, 7_000_003)[0].mean().item() == pytest.approx(loop.state.best[0], rel=1e-5)
    again, nothing = train(tmp_path, config)
    assert (again.state.step, nothing) == (loop.state.step, [])


def test_told_so_it_keeps_the_newest_and_never_loses_patience(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=200, validate_every=20, patience=3, keep="newest")
    loop, reports = train(tmp_path, config)
    assert loop.state.best_step == loop.state.step == 200
    validations = {report["step"]: report["validation_loss"] for report in reports if "validation_loss" in report}
    assert validations[200] > min(validations.values()), "otherwise this test shows nothing"
    loop.stage.load_state_dict(loop.best_weights())
    batch, size = loop._load(np.arange(36, 41))
    assert loop._forward(batch, size, 7_000_003)[0].mean().item() == pytest.approx(validations[200], rel=1e-5)


def test_a_stage_may_be_judged_by_something_else_than_its_loss(tmp_path: Path) -> None:
    class Judged(Regression):
        selection_metrics = ("rough", "against")

        def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            error, _ = super().forward(inputs, draws, step)
            # one value before step 6 and a lower one afterwards; the second number rises while training goes well
            return error, {"rough": torch.full_like(error, 2.0 if step < 6 else 1.0), "against": -error}

    loop, reports = Loop("regression", Judged(), CONFIG, open_store(tmp_path)), []
    loop.run(reports.append)
    losses = {report["step"]: report["validation_loss"] for report in reports if "validation_loss" in report}
    late = {step: loss for step, loss in losses.items() if step >= 6}
    assert loop.state.best_step == max(late, key=late.__getitem__) != min(losses, key=losses.__getitem__)
    assert loop.state.best == [1.0, -late[loop.state.best_step]]
    with pytest.raises(ValueError, match=r"judged_by: .*rough.* there, .*loss.* now"):
        Loop("regression", Regression(), CONFIG, open_store(tmp_path))


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    class Diverging(Regression):
        def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            error, parts = super().forward(inputs, draws, step)
            return error * (float("inf") if step == 6 else 1), parts

    loop = Loop("regression", Diverging(), CONFIG, open_store(tmp_path))
    with pytest.raises(ValueError, match=r"stage regression diverged: .*loss.* not finite at step \d.*learning_rate"):
        loop.run()
    assert Loop("regression", Regression(), CONFIG, open_store(tmp_path)).resumed_at == 4


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    same = {"layout_id": "abc", "vae": {"latent_size": 8}}
    train(tmp_path, identity=same)
    Loop("regression", Regression(), replace(CONFIG, log_every=7), open_store(tmp_path), identity=same)
    with pytest.raises(ValueError, match=r"loop.keep: 'best' there, 'newest' now"):  # one is no better than the other
        Loop("regression", Regression(), replace(CONFIG, keep="newest"), open_store(tmp_path), identity=same)
    with pytest.raises(ValueError, match=r"loop.batch_size: 7 there, 8 now"):
        Loop("regression", Regression(), replace(CONFIG, batch_size=8), open_store(tmp_path), identity=same)
    with pytest.raises(ValueError, match=r"vae.latent_size: 8 there, 9 now"):
        Loop("regression", Regression(), CONFIG, open_store(tmp_path), identity={**same, "vae": {"latent_size": 9}})
    (tmp_path / "checkpoints" / "regression.safetensors").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match=r"cannot be read .* Delete it: the same command makes it anew"):
        Loop("regression", Regression(), CONFIG, open_store(tmp_path), identity=same)


def test_batches_are_epochs_and_do_not_depend_on_where_one_begins() -> None:
    slots = np.arange(100, 117)
    batches = epoch_batches(slots, 5, seed=3)
    first = [next(batches) for _ in range(9)]
    assert len({*np.concatenate(first[:3]).tolist()}) == 15
    assert np.concatenate(first[:3]).tolist() != np.concatenate(first[3:6]).tolist()
    later = epoch_batches(slots, 5, seed=3, step=4)
    assert all((next(later) == batch).all() for batch in first[4:])
    assert next(epoch_batches(slots, 64, seed=3)).shape == (17,)


def work(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"rank": rank, "world_size": world, "init_method": f"tcp://127.0.0.1:{port}"}
    torch.distributed.init_process_group("gloo", **place)
    for parallel in ("ddp", "fsdp"):
        loop, reports = train(Path(folder, parallel), group=Group.current(), parallel=parallel)
        if rank == 0:
            torch.save({"reports": reports, "weights": loop.best_weights()}, Path(folder, f"{parallel}.pt"))
        torch.distributed.barrier()
    # the file does not know how it was written: what DDP began, FSDP goes on with, and one worker ends
    longer = replace(CONFIG, checkpoint_every=3)
    other, rest = train(Path(folder, "ddp"), longer, Group.current(), parallel="fsdp")
    assert (other.state.step, rest) == (12, [])
    loop = Loop("regression", Regression(), CONFIG, open_store(Path(folder, "cut")), Group.current(), parallel="fsdp")

    def die(values: dict[str, Any]) -> None:
        if values["step"] == 9:
            raise KeyboardInterrupt

    try:
        loop.run(die)
    except KeyboardInterrupt:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def assert_close(reports: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert [report["step"] for report in reports] == [other["step"] for other in others]
    for report, other in zip(reports, others, strict=True):
        numbers = {name: value for name, value in report.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-5)


def test_two_workers_learn_what_one_learns_however_they_share(tmp_path: Path) -> None:
    one, reports = train(tmp_path / "one")
    alone = one.best_weights()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, (2, port, str(tmp_path)), nprocs=2, start_method="fork")  # spawn would import it all anew
    cut, rest = train(tmp_path / "cut")
    assert cut.resumed_at == 8
    assert_close([report for report in reports if report["step"] > 8], rest)
    for parallel in ("ddp", "fsdp"):
        two = torch.load(tmp_path / f"{parallel}.pt", weights_only=True)
        assert_close(reports, two["reports"])
        for name, tensor in alone.items():
            torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_batch_whose_gradient_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    class Fragile(Regression):
        leaves_out_bad_batches = True
        bad_steps: range = range(5, 6)

        def forward(self, inputs: Batch, draws: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            error, parts = super().forward(inputs, draws, step)
            return (error * torch.nan if self.training and step in self.bad_steps else error), parts

    loop, reports = Loop("regression", Fragile(), CONFIG, open_store(tmp_path / "one")), []
    loop.run(reports.append)
    assert [report["left_out"] for report in reports if report["step"] in (4, 6, 8)] == [0, 0.5, 0]
    assert all(np.isfinite(tensor).all() for tensor in loop.best_weights().values())

    stage = Fragile()
    stage.bad_steps = range(10**6)
    with pytest.raises(ValueError, match="gradients of 20 batches in a row were not finite"):
        Loop("regression", stage, replace(CONFIG, steps=50), open_store(tmp_path / "all")).run()


def test_the_state_is_saved_at_once_when_a_machine_is_about_to_go(tmp_path: Path) -> None:
    config = replace(CONFIG, log_every=3, checkpoint_every=1000)

    class Gone(Exception):
        pass

    def die(values: dict[str, Any]) -> None:
        if values["step"] >= 9:
            raise Gone

    asked = iter([False, True, False])
    with pytest.raises(Gone):
        Loop("regression", Regression(), config, open_store(tmp_path)).run(die, lambda: next(asked))
    assert Loop("regression", Regression(), config, open_store(tmp_path)).resumed_at == 6
