"""A run from its options to its final figures."""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senet_kernels import __version__

from . import checkpoint, data, extras, loader, network, plots, record
from .checkpoint import Progress
from .errors import TrainError
from .loop import Learner, Sums
from .optimise import learning_rate
from .options import Options, Stage
from .parallel import Processes

State = dict[str, Any]


class Run:
    """One run, in one of its processes.

    Args:
        options: all of them.
        procs: the processes.
        state: the content of the checkpoint to go on from, if any.
        path: where that is from.
        may_replace: whether what is in the folder may go.
        asked: names of the options that were given for this session.

    Raises:
        TrainError: whatever is wrong, before training begins.
    """

    def __init__(
        self,
        options: Options,
        procs: Processes,
        state: State | None = None,
        path: str = "",
        *,
        may_replace: bool = False,
        asked: Collection[str] = (),
    ) -> None:
        self.options = options
        self.processes = procs
        self.stages = options.plan()
        self.folder = options.folder
        self.source = Path(path).parent if state is not None else None
        self.goes_on_here = self.source is not None and _same(self.source, self.folder)
        may_replace = may_replace or options.overwrite or self.goes_on_here
        # Whatever an optional library does on import, it does before a file is written.
        self.extras = procs.on_first(lambda: extras.choose(options, asked))
        procs.on_first(lambda: extras.check_images(options))
        self.makes_folder = not self.folder.exists()
        procs.on_first(lambda: record.check_folder(self.folder, may_replace))
        network.check(options)
        if options.data != "digits" and options.check != "none":
            self._say(f"reading the images of {options.data} (--check {options.check})")
        self.data = procs.on_first(lambda: data.load(options))
        self.fingerprint = procs.on_first(lambda: self.data.fingerprint)
        torch.manual_seed(options.seed)
        model = network.build(options, self.data)
        self.config = dict(model.config)
        self.batch = _batch_size(options.batch_size, len(self.data.train), procs.world)
        self.progress = Progress()
        if state is not None:
            checkpoint.check_same(state, self.config, self.fingerprint, procs.world, path)
            self.progress = Progress(**state["progress"])
            model.to(checkpoint.dtype(state)).load_state_dict(state["weights"])
        elif options.init_from:
            self._say(*network.initialise(model, options.init_from))
        self.batches = loader.TrainBatches(
            len(self.data.train), self.batch, options.seed, procs.rank, procs.world
        )
        channels = self.config["in_chans"]
        self.train_loader = loader.training_loader(
            self.data, options, channels, self.batches, procs
        )
        self.test_loader = loader.evaluation_loader(self.data, options, channels, procs)
        self.sums = Sums(procs.device)
        self.session_steps = 0
        torch.manual_seed(options.seed + procs.rank)  # dropout differs between processes
        self.learner = self._learner(model)
        if state is not None:
            self._restore(state)
        self.record: record.Record | None = None
        self._began_writing = False
        with self._no_half_run():
            self.record = self._open_record("tensorboard" in asked)

    def _restore(self, state: State) -> None:
        """All but the weights, which the model had before it was wrapped."""
        learner = self.learner
        if state["optimizer"]["state"]:
            checkpoint.load_momentum(learner.model, learner.optimizer, state["optimizer"])
        learner.scaler.load_state_dict(state["scaler"])
        own = state["ranks"][self.processes.rank]
        checkpoint.load_own_state(learner.model, self.processes.device, own)
        self.sums.values += own["sums"].to(self.processes.device)

    def _learner(self, model: Any) -> Learner:
        stage = self.stages[min(self.progress.stage, len(self.stages) - 1)]
        statistics = self.data.statistics(self.config["in_chans"])
        return Learner(model, stage, self.options, self.processes, statistics)

    def _open_record(self, needs_board: bool) -> record.Record | None:
        if not self.processes.first:
            return None
        steps = self.progress.steps
        rows = record.read_rows(self.source, steps) if self.source is not None else []
        if not self.goes_on_here:
            # Only now that nothing else can be wrong.
            self._began_writing = True
            record.clear_folder(self.folder)
            if self.source is not None and (self.source / checkpoint.BEST).is_file():
                shutil.copy(self.source / checkpoint.BEST, self.folder)
        opened = record.Record(self.folder, rows, steps, self.extras.tensorboard)
        if opened.board_failure is not None:
            if needs_board:
                opened.close()
                raise TrainError(f"--tensorboard: {opened.board_failure}")
            self._say(f"no TensorBoard files: {opened.board_failure}")
        opened.run({"steps": steps, **self._description()})
        if self.data.skipped:
            record.write_text(self.folder / record.SKIPPED, "\n".join(self.data.skipped) + "\n")
        return opened

    def _description(self) -> record.Row:
        model = self.learner.core
        return {
            "model": self.config,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": str(self.data),
            "skipped": len(self.data.skipped),
            "batch": self.batch,
            "device": str(self.processes.device),
            "processes": self.processes.world,
            "parallel": self.processes.kind,
            "threads": torch.get_num_threads(),
            "senet_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "options": asdict(self.options),
        }

    # -- training

    def train(self) -> record.Row:
        """All that is left of the run; the summary."""
        with self._no_half_run():
            return self._train()

    @contextmanager
    def _no_half_run(self) -> Iterator[None]:
        """Remove a run that fails before its first step is done: its folder would refuse the next
        try, and there is nothing in it to keep. One that is interrupted can be resumed."""
        try:
            yield
        except Exception:
            began = self.goes_on_here or self.session_steps > 0
            if self.processes.first and self._began_writing and not began:
                if self.record is not None:
                    self.record.close()
                record.clear_folder(self.folder)
                if self.makes_folder:
                    with suppress(OSError):  # something else is in it
                        self.folder.rmdir()
            raise

    def _train(self) -> record.Row:
        self._introduce()
        if not self.goes_on_here:
            self._save()  # to be resumed from, however soon the process dies
        goes_on = True
        while self.progress.stage < len(self.stages) and goes_on:
            stage = self.stages[self.progress.stage]
            if self.progress.step == 0 and self.progress.epoch == 0:
                self._introduce_stage(stage)
            goes_on = self._epoch(stage)
            if self.progress.epoch == stage.epochs:
                self._next_stage()
        return self._finish(complete=self.progress.stage == len(self.stages))

    def _next_stage(self) -> None:
        self.progress.stage += 1
        self.progress.epoch = 0
        if self.progress.stage < len(self.stages):
            # A fresh optimiser, and a fresh wrapper: DDP and FSDP2 ask what is frozen only once.
            weights = checkpoint.whole_weights(self.learner.model, everywhere=True)
            model = network.build(self.options, self.data).to(self.learner.dtype)
            model.load_state_dict(weights)
            self.learner = self._learner(model)
        self._save()

    def _epoch(self, stage: Stage) -> bool:
        """Train and test; False if the run is to stop before the epoch's end."""
        progress, start = self.progress, time.perf_counter()
        before = progress.seconds
        self.learner.train_mode()
        self.batches.epoch, self.batches.start = progress.epochs, progress.step
        per_epoch = self.batches.per_epoch
        for images, labels in self._bar(self.train_loader, per_epoch):
            number = progress.epoch * per_epoch + progress.step
            lr = learning_rate(self.options, stage, number, per_epoch)
            loss, logits = self.learner.step(images, labels, lr)
            labels = labels.to(loss.device)
            self.sums.add(loss * (labels != loader.IGNORED).sum(), logits, labels)
            progress.step += 1
            progress.steps += 1
            self.session_steps += 1
            self._log_step(loss, lr)
            progress.seconds = before + time.perf_counter() - start
            stops = self.session_steps == self.options.stop_after
            every = self.options.checkpoint_every
            if progress.step < per_epoch and (stops or (every and progress.step % every == 0)):
                self._check_finite(self.processes.sum(self.sums.values[0].clone()))
                self._save()
            if stops and progress.step < per_epoch:
                return False
        self._end_epoch(lr, before, start)
        return not stops

    def _log_step(self, loss: Tensor, lr: float) -> None:
        if self.progress.steps % self.options.log_every:
            return
        mean = float(self.processes.sum(loss.clone())) / self.processes.world
        self._check_finite(mean)
        if self.record is not None:
            self.record.step({
                "steps": self.progress.steps, "epoch": self.progress.epochs + 1,
                "loss": mean, "lr": lr,
            })  # fmt: skip

    def _check_finite(self, loss: float | Tensor) -> None:
        """Before a checkpoint is written: one with NaN in it would be of no use."""
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {float(loss)} at step {self.progress.steps}: try a smaller --lr or "
                "--clip 1"
            )

    def _end_epoch(self, lr: float, before: float, start: float) -> None:
        progress, procs = self.progress, self.processes
        procs.sum(self.sums.values)
        self._check_finite(self.sums.values[0])
        train, self.sums = self.sums, Sums(procs.device)
        test = self.learner.test(self.test_loader)
        progress.step = 0
        progress.epoch += 1
        progress.epochs += 1
        progress.seconds = before + time.perf_counter() - start
        best = test.accuracy > progress.best_accuracy
        progress.best_accuracy = max(test.accuracy, progress.best_accuracy)
        row = {
            "steps": progress.steps, "epoch": progress.epochs, "stage": progress.stage,
            "freeze": self.stages[progress.stage].freeze, "lr": lr,
            "train_loss": train.mean_loss, "train_accuracy": train.accuracy,
            "test_loss": test.mean_loss, "test_accuracy": test.accuracy,
            "unreadable": train.ignored, "seconds": round(progress.seconds, 3),
        }  # fmt: skip
        if self.record is not None:
            self.record.epoch(row)
        total = sum(stage.epochs for stage in self.stages)
        self._say(
            f"epoch {progress.epochs}/{total}  train loss {train.mean_loss:.4f} accuracy "
            f"{train.accuracy:.2%}  test loss {test.mean_loss:.4f} accuracy {test.accuracy:.2%}  "
            f"lr {lr:.4g}  {progress.seconds:.1f} s"
        )
        if best:
            self._save_best()
        if progress.epoch < self.stages[progress.stage].epochs:
            self._save()  # the last one of a stage is saved by _next_stage

    # -- files

    def _content(self) -> State:
        return checkpoint.content(
            self.options, self.config, self.data.classes, self.fingerprint,
            self.processes.world, self.progress,
        )  # fmt: skip

    def _save(self) -> None:
        learner, procs = self.learner, self.processes
        own = checkpoint.own_state(learner.model, procs.device)
        own["sums"] = self.sums.values.cpu()
        ranks = procs.gather(own)
        weights = checkpoint.whole_weights(learner.model)
        momentum: State = {"state": {}}
        if learner.optimizer.state:
            momentum = checkpoint.whole_momentum(learner.model, learner.optimizer)
        if procs.first:
            content = self._content()
            content |= {
                "weights": weights, "optimizer": momentum, "scaler": learner.scaler.state_dict(),
                "ranks": ranks,
            }  # fmt: skip
            checkpoint.save(self.folder / checkpoint.LAST, content)

    def _save_best(self) -> None:
        weights = checkpoint.whole_weights(self.learner.model)
        if self.processes.first:
            content = self._content() | {"weights": weights}
            checkpoint.save(self.folder / checkpoint.BEST, content)

    def _finish(self, complete: bool) -> record.Row:
        summary: record.Row = {"complete": complete, **asdict(self.progress)}
        if complete and self.options.measure_train:
            channels = self.config["in_chans"]
            sums = self.learner.test(loader.evaluation_loader(
                self.data, self.options, channels, self.processes, of_train=True
            ))  # fmt: skip
            summary |= {"train_accuracy": sums.accuracy, "train_loss": sums.mean_loss}
        if self.record is None:
            return summary
        if self.record.epochs:
            last = self.record.epochs[-1]
            summary |= {"test_accuracy": last["test_accuracy"], "test_loss": last["test_loss"]}
        summary |= self._description()
        if complete:
            self.record.summary(summary)
            self._say(
                f"test accuracy {summary.get('test_accuracy', math.nan):.2%} (best epoch "
                f"{self.progress.best_accuracy:.2%}), {self.progress.seconds:.0f} s; {self.folder}"
            )
        else:
            self._say(f"stopped at step {self.progress.steps}; --resume {self.folder} goes on")
        if self.extras.curves:
            plots.draw(self.record.rows, self.folder / record.CURVES)
        self.record.close()
        return summary

    # -- what is said

    def _introduce(self) -> None:
        description = self._description()
        self._say(*self.extras.notes)
        self._say(
            f"{self.options.model}: {description['parameters']:,} parameters, {self.data}",
            f"batches of {self.batch}, {self.batches.per_epoch} steps an epoch, "
            f"{self.processes.device}, {self.options.precision}"
            + (f", {self.processes.world} processes by {self.processes.kind}"
               if self.processes.world > 1 else ""),
            "weight decay: "
            + ", ".join(
                f"{group['weight_decay']:g} on {len(group['params'])} tensors"
                for group in self.learner.optimizer.param_groups
            ),
        )  # fmt: skip
        if self.batch != self.options.batch_size:
            self._say(f"batch size {self.batch}, not {self.options.batch_size}: so few images")
        self._say(*(f"skipped {line}" for line in self.data.skipped[:5]))
        if len(self.data.skipped) > 5:
            self._say(f"... {len(self.data.skipped)} skipped in all, see skipped.txt")
        if self.progress.stage == len(self.stages):
            self._say("the run is complete already: nothing is left to train")
        elif self.progress.steps:
            self._say(f"resumed at step {self.progress.steps}, epoch {self.progress.epochs + 1}")

    def _introduce_stage(self, stage: Stage) -> None:
        if len(self.stages) > 1 or stage.freeze != "none":
            trained = sum(p.requires_grad for p in self.learner.model.parameters())
            self._say(
                f"stage {self.progress.stage + 1}: epochs {stage.epochs}, frozen: {stage.freeze}; "
                f"{trained} tensors learn, {len(self.learner.frozen_norms)} BatchNorms keep their "
                "statistics"
            )

    def _bar(self, batches: Any, total: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.extras.progress or not self.processes.first:
            yield from batches
            return
        from tqdm import tqdm

        yield from tqdm(
            batches, f"epoch {self.progress.epochs + 1}", total, initial=self.progress.step,
            leave=False, disable=None, unit="step",  # None: shown on a terminal only
        )  # fmt: skip

    def _say(self, *lines: str) -> None:
        if self.processes.first:
            for line in lines:
                # A file's name need not be text.
                print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _batch_size(wanted: int, images: int, world: int) -> int:
    """As wanted, or as large as the images allow; the same for every process."""
    if wanted % world:
        raise TrainError(f"--batch-size: expected a multiple of {world} processes, got {wanted}")
    batch = min(wanted, images // world * world)
    if not batch:
        raise TrainError(f"{images} training images are too few for {world} processes")
    return batch
