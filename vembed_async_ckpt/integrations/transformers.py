"""Integration of transformers' Trainer.

`class MyTrainer(AsyncCheckpointMixin, Trainer)` writes its checkpoints in the background.

Stock Trainer does three things at once in `_save_checkpoint` that wait here until the checkpoint is durable: `on_save`,
the push to the hub, and the deletion of older checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import Trainer
from transformers.training_args import ParallelMode
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from .. import _signals
from .._capture import dialect
from .._capture.model import unwrap
from .._capture.optimizer import unwrap as unwrap_optimizer
from .._capture.request import Objects
from .._capture.training_state import torch_save
from .._disk.lock import wait_for_orphan
from .._format import names
from ..checkpointer import AsyncCheckpointer
from ..errors import CheckpointerBusy, CheckpointError, PlanError
from ..events import logger
from ..handle import SaveHandle, SaveState
from ..policies import SavePolicy
from ..sinks import log_values
from . import trainer_state
from .rotation import Rotation
from .shared import figures_of
from .trainer_host import check_options, is_of_the_loop, remove_placeholder, replaced, supported
from .trainer_resume import ResumingTrainer
from .trainer_stop import TrainerStop, refuse_another_stop

_NEEDED = ("_save_checkpoint", "_maybe_log_save_evaluate", "_finalize_training", "_prepare_for_training")
_WRITES = (
    "_save_checkpoint", "save_model", "_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state",
)  # fmt: skip


@dataclass(eq=False)
class _Pending:
    """A checkpoint under way.

    `path`: as Trainer spells it. `state`: Trainer's state at the call. `best_before`: the best checkpoint without this
    one. `announce`: whether to call `on_save` when it is durable.
    """

    handle: SaveHandle
    path: str
    state: Any
    best_before: str | None
    announce: bool

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass
class _Run:
    """One call of `train()`.

    - `checkpointer`: None until there is something to save.
    - `stock`: the reason why Trainer saves by itself; None if it does not.
    - `holding_back`: whether the next `on_save` is suppressed. Trainer calls it where it logs, evaluates and saves
      after a step.
    - `now`: the state of the training while `self.state` is that of a save; else None.
    - `stop`: if signals may stop it.
    - `saved`: whether a save was committed. `failed`: number of failed saves.
    """

    checkpointer: AsyncCheckpointer | None = None
    rotation: Rotation | None = None
    stop: TrainerStop | None = None
    stock: str | None = None
    holding_back: bool = False
    now: Any = None
    saved: bool = False
    failed: int = 0
    ended: bool = False
    pending: deque[_Pending] = field(default_factory=deque)
    uploads: dict[str, Any] = field(default_factory=dict)
    states: trainer_state.Renderer = field(default_factory=trainer_state.Renderer)


class AsyncCheckpointMixin(ResumingTrainer):
    """Saves Trainer's checkpoints without stopping the training: `class MyTrainer(AsyncCheckpointMixin, Trainer)`.

    The same files appear in `{output_dir}/checkpoint-{global_step}`, all at once and durable. `on_save` and the push to
    the hub follow on the training thread, at the next step or at the end of the training. They get `state` as it was at
    the save. They are not called for a save that failed. `train()` returns when every checkpoint is on disk. If another
    base class has a `_save_checkpoint` of its own, name the mixin last:
    `class MyTrainer(SFTTrainer, AsyncCheckpointMixin)`.

    The failure of a save is raised by the next save or at the end of `train()`. With `on_error="warn"` it is only
    logged: see `async_checkpoint_options`. In three cases Trainer saves by itself, after one warning: nothing says what
    this process holds of the state (DeepSpeed, XLA, SageMaker, FSDP version 1 without `use_orig_params`), the training is
    a hyperparameter search, or `save()` raises `PlanError`.

    With FSDP every rank writes what it holds into the files that one process writes, but for `optimizer.safetensors`. Any
    number of ranks resumes from them, with `resume_from_checkpoint`.

    `save_total_limit` counts our checkpoints and Trainer's own earlier ones, and deletes only those. It never deletes
    the newest, the best, or one whose `on_save` or upload is still due. The option `retention` replaces it.
    """

    async_checkpoint_options: Mapping[str, Any] = MappingProxyType({})
    """Keywords of `AsyncCheckpointer`, as a class attribute or set on the trainer before `train()`. Checked when the
    trainer is made, and when `train()` begins."""

    async_checkpoint_log: bool = False
    """Whether `Trainer.log` is told of each save once it has ended: `checkpoint/blocked_ms` (of several ranks the most),
    `checkpoint/durable_s`, `checkpoint/write_gbps`, `checkpoint/bytes`, `checkpoint/failed`, `checkpoint/step`. Off, as the log
    history is a part of the checkpoints, which are then not those that Trainer writes."""

    async_checkpoint_stop_on: Sequence[int] = ()
    """Signals that ask for a stop, as in `AsyncCheckpointer.stop_on`: `(signal.SIGTERM,)`. The training saves after its
    step, leaves out evaluations, and `train()` returns; then `sys.exit(trainer.async_checkpoint_exit_code)`. A DataLoader
    worker that the same signal killed ends the training in the same way, unless there are several ranks. Takes the place
    of `enable_jit_checkpoint`, with which it is refused."""

    async_checkpoint_stop_options: Mapping[str, Any] = MappingProxyType({})
    """`drain` and `grace` of `AsyncCheckpointer.stop_on`."""

    async_checkpoint_exit_code: int = 0
    """After `train()`: 128 + the number of the signal for which it stopped, else 0."""

    _async_run: _Run | None = None  # while train() runs
    state: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_options(self.async_checkpoint_options)
        refuse_another_stop(self.async_checkpoint_stop_on, kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy. A copy has no part in a training under way."""
        state = {name: value for name, value in vars(self).items() if name != "_async_run"}
        for name in ("async_checkpoint_options", "async_checkpoint_stop_options"):
            if name in state:
                state[name] = dict(state[name])  # a mapping proxy cannot be copied
        return state

    def wait_for_checkpoints(self) -> None:
        """Wait until every checkpoint of this training is on disk and its `on_save` has been called."""
        run = self._async_run
        if run is None or run.checkpointer is None:
            return
        if run.stop is not None and run.stop.reached:
            run.stop.drain()
            self._settle(run, self._ended_everywhere(run))
        else:
            run.checkpointer.wait()
            self._settle(run, len(run.pending))

    # -- what Trainer calls

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            path = self.args.output_dir if resume_from_checkpoint is True else os.path.dirname(resume_from_checkpoint)
            # wait for what the writer of a dead training still commits: resume from that
            wait_for_orphan(os.path.realpath(path))
        with self._running():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        run = self._async_run
        if run is not None and run.checkpointer is not None and run.stock is None:
            with self._falling_back(run):
                self._prewarm(run.checkpointer)
        return prepared

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self._stopping(self._async_run):
            self._log_save_evaluate(*args, **kwargs)

    def _log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        run = self._async_run
        if run is None or run.stock is not None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        on_save = self.callback_handler.on_save

        def held_back(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if not run.holding_back:
                return on_save(args, state, control, **kwargs)
            control.should_save = False
            return control

        if self._policy is not None and self._checkpointer_of(run).should_save(self.state.global_step):
            self.control.should_save = True
        run.holding_back = False
        with replaced(self.callback_handler, "on_save", held_back):
            super()._maybe_log_save_evaluate(*args, **kwargs)
        self._settle(run, self._ended_everywhere(run))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        run = self._async_run
        try:
            return super().get_batch_samples(*args, **kwargs)
        except Exception as error:
            if run is None or run.stop is None or not run.stop.takes(error, self.args.world_size):
                raise
            self.control.should_training_stop = True  # this is the end of a step: the epoch ends here, and saves
            return [], None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._async_run is None:
            with self._running():
                self._save_checkpoint(model, trial)
            return
        run = self._async_run
        with self._training_state(run):
            if run.stock is None:
                with self._falling_back(run):
                    self._save_in_background(run, later=is_of_the_loop(sys._getframe(1)))
                    return
            self.wait_for_checkpoints()
            super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        run = self._async_run
        if run is None or run.stock is not None:
            return super()._finalize_training(*args, **kwargs)
        self.wait_for_checkpoints()
        run.ended = True
        self._rotate(run)
        # Trainer would now delete everything that is named like a checkpoint. With a limit of one, it would keep only
        # the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        on_train_end = self.callback_handler.on_train_end

        def restored(*args: Any, **kwargs: Any) -> Any:
            self.args.save_total_limit = limit
            return on_train_end(*args, **kwargs)

        try:
            with replaced(self.callback_handler, "on_train_end", restored):
                return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        if self._async_run is not None and self._async_run.stop is not None and self._async_run.stop.reached:
            return  # the training is not over, and the grace time is short
        self.wait_for_checkpoints()
        super()._load_best_model()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self.wait_for_checkpoints()
        return super().push_to_hub(*args, **kwargs)

    # -- a training

    @contextlib.contextmanager
    def _stopping(self, run: _Run | None) -> Iterator[None]:
        """Around what Trainer does after a step: if the training stops here, it saves, does not evaluate, and leaves."""
        step = self.state.global_step
        if run is None or run.stop is None or not run.stop.ask(step):
            yield
            return
        self.control.should_evaluate = False
        self.control.should_save = run.stop.must_save(step)
        yield
        self.control.should_training_stop = True

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        check_options(self.async_checkpoint_options)
        refuse_another_stop(self.async_checkpoint_stop_on, self.args)
        run = self._async_run = _Run(stock=self._why_stock())
        try:
            if run.stock is not None:
                self._say_why_stock(run.stock)
            elif self.args.save_strategy != "no" or self._policy is not None or self.async_checkpoint_stop_on:
                with self._falling_back(run):
                    self._checkpointer_of(run)
            with contextlib.ExitStack() as stack:
                stack.push(lambda *error: None if run.checkpointer is None else run.checkpointer.__exit__(*error))
                stack.callback(lambda: None if run.rotation is None else run.rotation.join())
                yield
                self.wait_for_checkpoints()
                if run.stock is None:
                    self._rotate(run)  # now also what was being uploaded before
        finally:
            self._async_run = None
            self.async_checkpoint_exit_code = 0 if run.checkpointer is None else run.checkpointer.exit_code

    @property
    def _policy(self) -> SavePolicy | None:
        return self.async_checkpoint_options.get("policy")

    def _checkpointer_of(self, run: _Run) -> AsyncCheckpointer:
        if run.checkpointer is None:
            options = dict(self.async_checkpoint_options)
            policy = options.pop("retention", None)
            if policy is not None and self.args.save_total_limit:
                raise ValueError("save_total_limit and the option retention both say what to keep; use one of them")
            try:
                run.checkpointer = AsyncCheckpointer(self.args.output_dir, **options)
            except CheckpointerBusy:
                raise
            except CheckpointError as error:  # not Linux, or no locks
                raise PlanError(str(error)) from error
            if self.async_checkpoint_stop_on:
                run.stop = TrainerStop(
                    run.checkpointer, self.async_checkpoint_stop_on, self.async_checkpoint_stop_options
                )
            if self.args.should_save:
                run.rotation = Rotation(os.fspath(run.checkpointer.root), self.args.save_total_limit, policy)
        return run.checkpointer

    def _prewarm(self, checkpointer: AsyncCheckpointer) -> None:
        if self._has_save_pretrained():
            checkpointer.prewarm(
                model=self.model, optimizer=None if self.args.save_only_model else unwrap_optimizer(self.optimizer)
            )

    def _why_stock(self) -> str | None:
        """Return the reason why Trainer must save by itself, or None. All ranks get the same result."""
        accelerator, args = self.accelerator, self.args
        kind = str(getattr(accelerator, "distributed_type", "NO")).rpartition(".")[2]
        missing = [name for name in _NEEDED if not hasattr(Trainer, name)]
        if missing:
            return f"transformers {transformers.__version__} has no Trainer.{missing[0]}"
        if self.hp_search_backend is not None:
            return "the trials of a hyperparameter search have directories of their own"
        if is_torch_xla_available() or is_sagemaker_mp_enabled():
            return "XLA and SageMaker write their own files"
        sharded = (getattr(self, f"is_{name}_enabled", False) for name in ("fsdp_xla", "deepspeed"))
        if kind in ("DEEPSPEED", "MEGATRON_LM", "TP") or any(sharded):
            return f"states sharded by {kind} are kept by its own engine"
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) == 1 and not getattr(plugin, "use_orig_params", False):
            return "FSDP version 1 keeps no state per parameter without use_orig_params"
        if getattr(accelerator, "parallelism_config", None) is not None:
            return "states sharded by a parallelism_config cannot be saved yet"
        if getattr(self, "is_distributed_loading_by_transformers", False):
            return "models sharded at load time cannot be saved yet"
        if args.device.type not in ("cpu", "cuda"):
            return f"random states of {args.device.type} devices cannot be saved yet"
        if args.save_on_each_node and args.world_size > 1:
            return "save_on_each_node needs one writer for each node"
        if not self._has_save_pretrained() and isinstance(unwrap(self.model), supported()):
            return f"the model given to it is wrapped in a {type(self.model).__qualname__}"
        return self._overridden()

    def _overridden(self) -> str | None:
        below = type(self).__mro__[type(self).__mro__.index(AsyncCheckpointMixin) + 1 :]
        for name in _WRITES:
            # A `_save_checkpoint` that comes before ours in the order of classes calls ours.
            classes = below if name == "_save_checkpoint" else type(self).__mro__
            owner = next(cls for cls in classes if name in vars(cls))
            if owner is not Trainer or name in vars(self):
                hint = "; name AsyncCheckpointMixin after it among the bases" if name == "_save_checkpoint" else ""
                return f"{owner.__qualname__}.{name} is not Trainer's{hint}"
        return None

    def _has_save_pretrained(self) -> bool:
        """Return whether Trainer would use the model's `save_pretrained`, and not its plain state_dict."""
        return isinstance(unwrap(self.model) if self.is_fsdp_enabled else self.model, supported())

    @contextlib.contextmanager
    def _falling_back(self, run: _Run) -> Iterator[None]:
        """After a `PlanError`, let Trainer save by itself from now on: a slow checkpoint is better than none.

        With several ranks the error is raised, because the other ranks do not know of it.
        """
        try:
            yield
        except PlanError as error:
            if self.args.world_size > 1:
                raise  # the other ranks do not know of it
            self._say_why_stock(str(error))
            run.stock = str(error)

    def _say_why_stock(self, reason: str) -> None:
        unheard = "; it does not stop for signals" if self.async_checkpoint_stop_on and self._stop_is_off() else ""
        logger.warning("Trainer saves checkpoints by itself, while training waits: %s%s", reason, unheard)

    def _stop_is_off(self) -> bool:
        return self._async_run is None or self._async_run.stop is None

    # -- a save

    @_signals.held()
    def _save_in_background(self, run: _Run, later: bool) -> None:
        """Save in the background.

        `later`: Trainer's own loop asks, so `on_save` may come later. Otherwise a callback or a signal handler asks,
        perhaps before the process is killed. Then this waits until the checkpoint is durable.
        """
        checkpointer = self._checkpointer_of(run)
        if not later:
            self.wait_for_checkpoints()
        if run.rotation is not None:
            # else it might delete the directory of the same name that this save is about to replace
            run.rotation.join()
        self.store_flos()
        state = self._state_to_save(run)
        path = os.path.join(self.args.output_dir, names.checkpoint(state.global_step))
        remove_placeholder(path)
        handle = checkpointer.save_as(os.path.basename(path), state.global_step, self._objects(run, state))
        best_before = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = state.best_model_checkpoint
        self.state.stateful_callbacks = state.stateful_callbacks
        run.pending.append(_Pending(handle, path, state, best_before, later))
        run.holding_back |= later
        if not later:
            self._save_now(run, handle)
        elif callable(getattr(unwrap_optimizer(self.optimizer), "eval", None)):
            self._raise_or_leave(lambda: handle.wait_staged())  # this optimizer swaps the weights between steps

    def _save_now(self, run: _Run, handle: SaveHandle) -> None:
        try:
            self._raise_or_leave(lambda: handle.result())
        finally:
            self.wait_for_checkpoints()

    def _raise_or_leave(self, wait: Callable[[], Any]) -> None:
        try:
            wait()
        except CheckpointError:
            if self.async_checkpoint_options.get("on_error") != "warn":
                raise

    def _state_to_save(self, run: _Run) -> Any:
        """Return Trainer's state as Trainer would write it now."""
        state = trainer_state.snapshot(self.state, [*self.callback_handler.callbacks, self.control])
        if self.args.save_strategy != "no" and state.best_global_step:
            best = os.path.join(self.args.output_dir, names.checkpoint(state.best_global_step))
            under_way = {pending.path for pending in run.pending}
            if state.best_global_step == state.global_step or best in under_way or os.path.isdir(best):
                state.best_model_checkpoint = best
        return state

    def _objects(self, run: _Run, state: Any) -> Objects:
        args, collator = self.args, self.data_collator
        files: dict[str, bytes] = {}
        if args.should_save:
            files[names.TRAINER_STATE] = run.states.render(state)
            files[names.TRAINING_ARGUMENTS] = torch_save(args)
        processor = self.processing_class
        whole = not args.save_only_model
        device = torch.cuda.current_device() if self.args.device.type == "cuda" else 0
        return Objects(
            model=self.model if self._has_save_pretrained() else None,
            state_dicts=None if self._has_save_pretrained() else self.model,
            optimizer=self.optimizer if whole else None,
            scheduler=self.lr_scheduler if whole else None,
            scaler=getattr(self.accelerator, "scaler", None) if whole else None,
            processor=getattr(collator, "tokenizer", None) if processor is None else processor,
            metrics=trainer_state.metrics(state),
            files=files,
            dialect=dialect.Trainer(None if args.parallel_mode == ParallelMode.DISTRIBUTED else device, random=whole),
            of_every_rank=whole,
        )

    # -- after a save

    def _ended_everywhere(self, run: _Run) -> int:
        """Return how many of the pending saves, from the first on, have ended on all ranks.

        Callbacks must run at the same step on every rank.
        """
        ended = next((n for n, save in enumerate(run.pending) if not save.handle.done()), len(run.pending))
        if self.args.world_size == 1 or not run.pending:
            return ended
        least = torch.tensor(ended, device=self.args.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)

    def _settle(self, run: _Run, count: int) -> None:
        """Do what was held back for the first `count` saves, in their order. These saves have ended."""
        last = run.pending[count - 1] if count else None
        while last in run.pending:  # a callback may have waited for all of them
            save = run.pending.popleft()
            if self.async_checkpoint_log:
                self._log_save(run, save.handle)
            if save.handle.state is SaveState.COMMITTED:
                self._deliver(run, save)
            else:
                self._withdraw(run, save)

    def _log_save(self, run: _Run, handle: SaveHandle) -> None:
        run.failed += handle.state is not SaveState.COMMITTED
        figures = figures_of(handle)
        if self.args.world_size > 1:
            blocked = torch.tensor(figures.blocked, device=self.args.device)
            torch.distributed.all_reduce(blocked, torch.distributed.ReduceOp.MAX)
            figures = dataclasses.replace(figures, blocked=float(blocked))
        with self._training_state(run):
            self.log({**log_values(figures, run.failed), "checkpoint/step": handle.step})

    def _deliver(self, run: _Run, save: _Pending) -> None:
        run.saved = True
        outer, now = run.now, self.state
        run.now, self.state = now, save.state
        wanted = self.control.should_save
        try:
            if self.args.push_to_hub:
                self._push_from_checkpoint(save.path)
                upload = getattr(self, "push_in_progress", None)
                if upload is not None and not upload.is_done():
                    run.uploads[save.name] = upload
            self._rotate(run, save, now.best_model_checkpoint)
            if save.announce:
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        finally:
            self.state, run.now = now, outer
            self.control.should_save = wanted  # this belongs to the present step of the training

    @contextlib.contextmanager
    def _training_state(self, run: _Run) -> Iterator[None]:
        """Let `self.state` be the state of the training.

        Code that asks for a save may run inside `on_save`: `on_save` itself, or a signal handler that interrupts it.
        """
        shown, now = self.state, run.now
        if now is None:
            yield
            return
        self.state, run.now = now, None
        try:
            yield
        finally:
            self.state, run.now = shown, now

    def _withdraw(self, run: _Run, save: _Pending) -> None:
        """A save has failed: replace it as the best checkpoint by the one before it."""
        for later in run.pending:
            if later.best_before == save.path:
                later.best_before = save.best_before
        if self.state.best_model_checkpoint == save.path:
            self.state.best_model_checkpoint = save.best_before

    def _rotate(self, run: _Run, save: _Pending | None = None, best: str | None = None) -> None:
        run.uploads = {name: upload for name, upload in run.uploads.items() if not upload.is_done()}
        best = self.state.best_model_checkpoint if best is None else best
        protected = {best, *(path for pending in run.pending for path in (pending.path, pending.best_before))}
        if save is not None:
            protected |= {save.path, save.state.best_model_checkpoint}
        only = os.path.basename(best) if best is not None and run.ended and self.args.save_total_limit == 1 else None
        if run.rotation is not None and (run.saved or only is not None):
            run.rotation.start({*run.uploads, *(os.path.basename(path) for path in protected if path)}, only)
