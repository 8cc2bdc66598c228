"""Printable report of a patch: modules, calls, and reasons for fallbacks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .state import Patch


@dataclass(frozen=True)
class Row:
    """One op in one model.

    A call is one norm, rotation, convolution or resampling that the op did in place of the model;
    a block with two norms makes two calls in one forward. Calls in compiled code are not counted.

    Attributes:
        component: the model's name in the pipeline, or "" where it was patched alone.
        model: its class.
        op: the op.
        sites: norms, rotations, ... of the model that the op replaces.
        hit: those of them that have been called.
        calls: all calls: `kernel` and all of `reference`.
        kernel: calls of the kernel.
        reference: reason -> calls of the reference, in plain torch.
        fallbacks: reason -> calls left to the model's own forward.
        modules: modules that the op is in.
        not_called: names of those that have not been called yet.
        compiled: a compiler has traced some of them.
    """

    component: str
    model: str
    op: str
    sites: int
    hit: int
    calls: int
    kernel: int
    reference: Mapping[str, int]
    fallbacks: Mapping[str, int]
    modules: int
    not_called: tuple[str, ...]
    compiled: bool


class Report:
    """The modules that were patched. Counts are read when they are accessed.

    Attributes:
        mode: "exact" or "fast"; None if nothing is patched.
        skipped: name of a component or module left unchanged -> reason.
    """

    def __init__(self, title: str, patches: Mapping[str, Patch], skipped: Mapping[str, str]):
        self.title = title
        self.mode = next((patch.mode for patch in patches.values()), None)
        self.skipped = dict(skipped)
        self._patches = dict(patches)
        for component, patch in patches.items():
            for name, reason in patch.refused.items():
                self.skipped[path(component, name)] = reason

    @property
    def rows(self) -> list[Row]:
        return [
            _row(component, patch, op)
            for component, patch in self._patches.items()
            for op in patch.ops
        ]

    def __getitem__(self, key: str | tuple[str, str]) -> Row:
        """The row of an op, or of (component, op) where several models have the op.

        Raises KeyError, naming the rows, if none or several fit.
        """
        rows = [row for row in self.rows if key in (row.op, (row.component, row.op))]
        if len(rows) != 1:
            known = [(row.component, row.op) for row in self.rows]
            raise KeyError(f"report: must be one of {known}, or the op of only one; got {key!r}")
        return rows[0]

    def __str__(self) -> str:
        if not self._patches:
            head = f"{self.title}: not patched"
        else:
            head = f"{self.title}, patched, mode {self.mode!r}"
        lines = [head]
        for component, patch in self._patches.items():
            lines.append(f"  {component + ': ' if component else ''}{patch.model}")
            for op in patch.ops:
                lines += _lines(_row(component, patch, op), patch)
        lines += [f"  left as it is: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def path(component: str, name: str) -> str:
    """Name of a component and a module in it, joined by a dot; both may be ""."""
    return ".".join(filter(None, (component, name)))


def _row(component: str, patch: Patch, op: str) -> Row:
    sites = [site for site in patch.sites if site.does(op)]
    kernel = 0
    reference: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    for site in sites:
        for (name, why), count in site.hits.items():
            if name == op and why is None:
                kernel += count
            elif name == op and why is not None:
                reference[why] += count
        for (name, why), count in site.misses.items():
            if name == op:
                fallbacks[why] += count
    return Row(
        component,
        patch.model,
        op,
        sites=sum(site.ops[op] for site in sites),
        hit=sum(site.ops[op] for site in sites if _ran(site.hits, op)),
        calls=kernel + reference.total(),
        kernel=kernel,
        reference=reference,
        fallbacks=fallbacks,
        modules=len(sites),
        not_called=tuple(
            site.name for site in sites if not _ran(site.hits, op) and not _ran(site.misses, op)
        ),
        compiled=any(site.compiled for site in sites),
    )


def _ran(counts: Iterable[tuple[str, str | None]], op: str) -> bool:
    return any(name == op for name, _ in counts)


def _lines(row: Row, patch: Patch) -> list[str]:
    """Lines of one row of the report: counts, reasons, modules not called."""
    if not (row.calls or row.fallbacks or row.compiled):
        return [f"    {row.op:<10} in {_counted(row.modules, 'module')}, not called yet"]
    lines = [
        f"{_counted(row.calls, 'call')} in {row.modules - len(row.not_called)} of "
        f"{_counted(row.modules, 'module')}: kernel {row.kernel:,}, "
        f"reference {row.calls - row.kernel:,}"
    ]
    for ran, reasons in (("reference", row.reference), ("model's own forward", row.fallbacks)):
        lines += [f"{ran}, {_counted(n, 'call')}: {why}" for why, n in reasons.items()]
    if row.compiled:
        lines.append("compiled: calls in compiled code are not counted")
    elif row.not_called:
        lines.append("not called: " + ", ".join(_groups(row, patch)))
    return [f"    {row.op:<10} {lines[0]}", *(f"{'':15}{line}" for line in lines[1:])]


def _groups(row: Row, patch: Patch) -> list[str]:
    """Modules not called, of all, for each child of the model."""
    in_all = Counter(_child(site.name) for site in patch.sites if site.does(row.op))
    missing = Counter(map(_child, row.not_called))
    return [
        f"{count:,} of {_counted(in_all[child], 'module')}{f' in {child}' if child else ''}"
        for child, count in missing.items()
    ]


def _child(name: str) -> str:
    return name.partition(".")[0]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
