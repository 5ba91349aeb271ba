"""One call from a checked config to a finished, stopped or failed run."""

import logging
import signal
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seqtrain.data import Corpus, Mixture, SyntheticCorpus, prepare
from seqtrain.errors import Interrupted
from seqtrain.files import read_json
from seqtrain.kernels.dispatch import reset_backend_choice
from seqtrain.kernels.native import build as native
from seqtrain.report import announced
from seqtrain.runtime import ray_launcher
from seqtrain.runtime.checks import check
from seqtrain.runtime.choices import say_dtype, with_routine
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.metrics import MetricsReader, read_within
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.ranks import form_group, pick_device
from seqtrain.runtime.ray_ingest import ray_pools
from seqtrain.runtime.report import write_report
from seqtrain.runtime.resolving import resolve
from seqtrain.runtime.resume import begin, check_resumable, claimed, refuse_foreign, what_is_kept
from seqtrain.runtime.run_folder import RunFolder, log_to, warn_on_stderr
from seqtrain.runtime.schedule import gradient_norms, keep_norms
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.signals import listening
from seqtrain.runtime.source import build_model
from seqtrain.runtime.task import Callback, Pretraining, Task
from seqtrain.runtime.tracking import tracked, tracking_id
from seqtrain.runtime.worker import Session, train

log = logging.getLogger("seqtrain.runtime")

# Held-out tokens below which a score says little.
FEW_TOKENS = 4096
# Share of the time of training that evaluation may take before it is worth a word.
LONG_EVALUATION = 0.05

Launch = Callable[[Session, Callable[[], None], ProgressDisplay], None]


def run(config: PretrainConfig, task: Task | None = None, *, callback: Callback | None = None) -> dict[str, Any]:
    """Prepares the data, trains, writes the report; gives the summary (also in `output_dir/summary.json`).

    `task`: what is trained, by default a new language model. `callback`: told of every phase, on every rank.

    A run that was asked to stop has saved a checkpoint, and its summary says `stopped: true`. The same call again
    resumes it; for a run that has finished it gives the old summary. Under torchrun every rank calls it, and gets an
    empty summary on all but rank 0. Raises `ConfigError`, `DataError` or `CheckpointError` for what the user can put
    right, before anything is written where that is possible.
    """
    config = resolve(config)
    check(config)
    config = replace(config, output_dir=str(Path(config.output_dir).absolute()))
    told = (task or Pretraining(), callback or Callback())
    if config.runtime.name == "inline":
        return _run_inline(config, *told)
    return _drive(config, *told, ray_launcher.launch)


def _run_inline(config: PretrainConfig, task: Task, callback: Callback) -> dict[str, Any]:
    """The ranks are this process, or those torchrun started; rank 0 is the driver too."""
    if config.runtime.cpus_per_worker != torch.get_num_threads():
        torch.set_num_threads(config.runtime.cpus_per_worker)
    runtime = config.runtime
    ranks = form_group(
        pick_device(runtime.device),
        timeout_seconds=runtime.collective_timeout_seconds,
        section_seconds=runtime.section_timeout_seconds,
    )
    if ranks.first:

        def launch(session: Session, poll: Callable[[], None], _: ProgressDisplay) -> None:
            train(ranks.from_first_in_time(session), ranks, poll=poll)

        return _drive(config, task, callback, launch)
    with listening():
        train(ranks.from_first_in_time(None), ranks)
    return {}


def _drive(config: PretrainConfig, task: Task, callback: Callback, launch: Launch) -> dict[str, Any]:
    """Everything around the steps: the folder, the data, progress and tracking, the report."""
    config = with_routine(config)
    folder, name = RunFolder(Path(config.output_dir), config.checkpoint.store), uuid.uuid4().hex[:8]
    warn_on_stderr()
    refuse_foreign(folder, config)
    with claimed(folder, name, lease_seconds=config.runtime.lease_seconds, began=folder.starts) as lease:
        # As it is now that nobody else writes here.
        refuse_foreign(folder, config)
        norms = gradient_norms(config.schedule, folder)
        corpus = prepare(config.data, pools=ray_pools(config))
        config, chosen = _within_budget(config, corpus.vocab_size)
        session = Session(
            config,
            corpus.folder.resolve(),
            name,
            lease.epoch,
            tracking_id(config, folder),
            corpus.content,
            task=task,
            callback=callback,
            norms=norms,
            store_epoch=lease.store.epoch if lease.store else 0,
        )
        check_resumable(folder, config, session.fingerprint)
        # Reading text takes long: the folder may be another's by now.
        lease.check()
        keep_norms(norms, config.schedule, folder)
        begin(folder, config)
        log_to(folder.log)
        reset_backend_choice()
        log.info("data: %s", corpus.about)
        say_dtype(config)
        if chosen:
            log.info(chosen)
        _warn_of_few_tokens(corpus)
        _warn_of_long_evaluation(config, corpus)
        try:
            return _finished_summary(config, folder) or _follow(session, corpus, lease, launch)
        except KeyboardInterrupt as error:
            raise Interrupted(
                getattr(error, "number", signal.SIGINT), f"stopped at once; {what_is_kept(folder)}"
            ) from None


def _within_budget(config: PretrainConfig, vocab_size: int) -> tuple[PretrainConfig, str]:
    """See `planning.budget`, which is imported where there is one."""
    if not config.train.memory_budget:
        return config, ""
    from seqtrain.planning.budget import within_budget

    return within_budget(config, vocab_size)


def _follow(
    session: Session, corpus: Corpus | SyntheticCorpus | Mixture, lease: Lease, launch: Launch
) -> dict[str, Any]:
    """Has the ranks trained, and shows and tracks what they write; the summary."""
    config, folder = session.config, session.folder
    reader = MetricsReader(folder, lease)
    with (
        listening(lease.own.stop) as received,
        ProgressDisplay(steps=config.train.steps) as display,
        tracked(config, folder, run_id=session.tracking_id) as trackers,
    ):

        def poll() -> None:
            epoch = lease.current()
            for record in reader.new():
                display.show(record)
                for tracker in trackers:
                    # `step` is one of its fields: an offline run that is resumed counts its own steps from 0.
                    tracker.log(record)
            if within := read_within(epoch):
                display.show_within(within)

        if isinstance(session.task, Pretraining):
            display.say(_describe_model(config, corpus.vocab_size))
        if not config.runtime.cluster and pick_device(config.runtime.device).type == "cpu" and native.must_build():
            with announced("building kernels (once)", display.say):
                native.unavailable()
        launch(session, poll, display)
        summary = write_report(config, folder, corpus, lease, stopped_by_signal=received.number)
        for tracker in trackers:
            tracker.summary.update(summary)
    return summary


def _warn_of_few_tokens(corpus: Corpus | SyntheticCorpus | Mixture) -> None:
    for name, text in corpus.texts.items():
        if 0 < text.held_out.tokens < FEW_TOKENS:
            log.warning(
                "data.held_out=%s: only %d tokens%s are held out, too few for a score that means much; raise it, or "
                "name other text as data.held_out_path",
                text.config.held_out,
                text.held_out.tokens,
                f" of {name}" if name else "",
            )


def _warn_of_long_evaluation(config: PretrainConfig, corpus: Corpus | SyntheticCorpus | Mixture) -> None:
    every, most = config.evaluation.every, config.evaluation.max_tokens
    if not 0 < every < config.train.steps:
        return
    held_out = sum(text.held_out.tokens for text in corpus.texts.values())
    scored = min(most or held_out, held_out)
    between = every * config.train.batch_size * config.train.sequence_length
    # A forward pass, of which a step of training has about three.
    if (share := scored / 3 / between) > LONG_EVALUATION:
        log.warning(
            "evaluation.max_tokens=%d: scoring %d held-out tokens takes about %.0f%% of the %d steps between; "
            "evaluation.max_tokens=%d takes %.0f%%",
            most,
            scored,
            100 * share,
            every,
            int(3 * LONG_EVALUATION * between),
            100 * LONG_EVALUATION,
        )


def _finished_summary(config: PretrainConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of the run in `folder` where it has done all its steps."""
    if not folder.summary.exists():
        return None
    try:
        summary: dict[str, Any] = read_json(folder.summary)
        if summary["steps"] != config.train.steps or summary["stopped"]:
            return None
    except (ValueError, TypeError, KeyError):
        log.warning("%s: is damaged; it is written anew", folder.summary)
        return None
    log.warning(
        "output_dir=%s: this run has finished already; here is its summary. train.steps=N makes it longer where"
        " the learning rates of the steps done stay the same",
        folder.path,
    )
    return summary


def _describe_model(config: PretrainConfig, vocab_size: int) -> str:
    with torch.device("meta"):
        model = build_model(config, vocab_size)
    whole, trained = model.parameter_count(), sum(x.numel() for x in model.parameters() if x.requires_grad)
    numbers = f"{whole:,}" if trained == whole else f"{trained:,} trainable of {whole:,}"
    return f"model: {numbers} parameters, with a vocabulary of {model.vocab_size:,}"
