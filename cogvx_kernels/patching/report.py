"""What a patch did and does, for people to read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .site import Patch


@dataclass(frozen=True)
class Row:
    """One op in one model.

    Attributes:
        component: the model's name in the pipeline, or "" where it was patched alone.
        model: its class.
        op: the op.
        sites: how many places of the model it is in.
        hit: in how many of them it has run.
        calls: how often.
        fallbacks: why calls went the model's own way -> how many did.
    """

    component: str
    model: str
    op: str
    sites: int
    hit: int
    calls: int
    fallbacks: Mapping[str, int]


class Report:
    """What was patched. The counts are those of the moment in which they are looked at.

    Attributes:
        mode: "exact" or "fast"; None if nothing is patched.
        skipped: what was left as it is -> why.
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

    def __getitem__(self, op: str) -> Row:
        """The row of an op. Raises KeyError if it is in no model, or in several."""
        rows = [row for row in self.rows if row.op == op]
        if len(rows) != 1:
            raise KeyError(f"{op}: in {len(rows)} of {[row.component for row in self.rows]}")
        return rows[0]

    def __str__(self) -> str:
        if not self._patches:
            head = f"{self.title}: not patched"
        else:
            head = f"{self.title}, patched, mode {self.mode!r}"
        lines = [head]
        for component, patch in self._patches.items():
            lines.append(f"  {component + ': ' if component else ''}{patch.model}")
            for row in (_row(component, patch, op) for op in patch.ops):
                lines.append(
                    f"    {row.op:<10} {row.hit:>4} of {row.sites:<4} sites, {row.calls:,} calls"
                )
                lines += [
                    f"               {count:,} calls went the model's own way: {reason}"
                    for reason, count in row.fallbacks.items()
                ]
        lines += [f"  left as it is: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    __repr__ = __str__


def path(component: str, name: str) -> str:
    """A module's name, beneath that of its model in the pipeline; both may be ""."""
    return ".".join(filter(None, (component, name)))


def _row(component: str, patch: Patch, op: str) -> Row:
    sites = [site for site in patch.sites if site.does(op)]
    fallbacks: Counter[str] = Counter()
    for site in sites:
        for (missed, reason), count in site.misses.items():
            if missed == op:
                fallbacks[reason] += count
    return Row(
        component,
        patch.model,
        op,
        sum(site.places[op] for site in sites),
        sum(site.places[op] for site in sites if site.hits[op]),
        sum(site.hits[op] for site in sites),
        fallbacks,
    )
