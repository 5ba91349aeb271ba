"""A black-box conformity check of anyone's hybrid language model or trainer.

    from seqtrain.audit import Subject, audit, of_huggingface

    print(audit(of_huggingface(model)))                  # a transformers model
    print(audit(Subject(forward=f, vocabulary=50_000)))  # any function of tokens

`Subject` says which functions there may be, `tools/audit.py` does the same for a folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from seqtrain.audit import passes, training
from seqtrain.audit.flops import flops
from seqtrain.audit.gates import gates
from seqtrain.audit.huggingface import of_huggingface
from seqtrain.audit.probe import Probe
from seqtrain.audit.subject import Finding, NotChecked, Subject, Trainer
from seqtrain.errors import ConfigError, unknown_name

__all__ = ["CHECKS", "Finding", "Report", "Subject", "Trainer", "audit", "of_huggingface"]

DOCUMENTS = "documents"
CHECKS: dict[str, Callable[[Probe], Iterator[Finding]]] = {
    "future": passes.future,
    "batch": passes.batch,
    "left padding": passes.padding,
    "cached decoding": passes.decoding,
    "chunked prefill": passes.chunked_prefill,
    DOCUMENTS: lambda probe: iter(()),
    "gradients of pieces": passes.pieces_gradients,
    "gates": gates,
    "loss denominator": training.loss_denominator,
    "resume": training.resume,
    "FLOPs": flops,
}


@dataclass
class Report:
    """`findings`; `passed`: checks without any; `unchecked`: why a check could not be made, by its name."""

    findings: list[Finding] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(each) for each in self.findings]
        lines += [f"{check}: not checked: {why}" for check, why in self.unchecked.items()]
        passed = ", ".join(self.passed) or "none"
        return "\n".join([*lines, f"{len(self.findings)} findings; without any: {passed}"])


def audit(subject: Subject, checks: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None) -> Report:
    """Makes `checks`, all where empty; `tell` is given each line as it is found. Raises `ConfigError` for unknown ones.

    Weights are moved by roundings while a check runs, and are as before when it ends; gradients are dropped. A check
    whose function is missing or raises is named in `unchecked`.
    """
    for name in checks:
        if name not in CHECKS:
            raise ConfigError("checks: " + unknown_name("check", name, CHECKS))
    probe, report = Probe(subject), Report()
    for name, check in _chosen(subject, checks or tuple(CHECKS)):
        found: list[Finding] = []
        try:
            for finding in check(probe):
                found.append(finding)
                tell(str(finding))
        except NotChecked as why:
            report.unchecked[name] = str(why)
        # Whatever a model does with a call that it can't take.
        except Exception as error:
            report.unchecked[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        report.findings += found
        if name in report.unchecked:
            tell(f"{name}: not checked: {report.unchecked[name]}")
        elif not found:
            report.passed.append(name)
    return report


def _chosen(subject: Subject, names: Sequence[str]) -> Iterator[tuple[str, Callable[[Probe], Iterator[Finding]]]]:
    """Checks by name; documents once for each way to say where they begin."""
    for name in names:
        if name != DOCUMENTS:
            yield name, CHECKS[name]
        elif not subject.packed:
            yield name, _unpacked
        for form in subject.packed if name == DOCUMENTS else ():
            yield f"{DOCUMENTS} by {form}", partial(passes.documents, form=form)


def _unpacked(probe: Probe) -> Iterator[Finding]:
    raise NotChecked("no such functions (packed=)")
