"""One line puts the kernels into a model of diffusers, and one takes them out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import _backend, _checks
from . import (
    cogvideox_transformer,
    cogvideox_vae,
    forward_swap,
    hunyuan_video,
    mochi,
    wan_transformer,
    wan_vae,
)
from .registry import Family, ModulePatch
from .report import Report, path
from .state import Patch, Site

MODES = ("exact", "fast")
FAMILIES: tuple[Family, ...] = (
    cogvideox_transformer.FAMILY,
    cogvideox_vae.FAMILY,
    hunyuan_video.FAMILY,
    mochi.FAMILY,
    wan_transformer.FAMILY,
    wan_vae.FAMILY,
)


class UnsupportedModelError(TypeError):
    """An object that `patch` knows nothing of, or not in this shape."""


def patch(
    obj: Any,
    only: Sequence[str] | None = None,
    mode: str = "exact",
    strict: bool = True,
    *,
    backend: str = "auto",
) -> Report:
    """Puts the kernels into a pipeline, a transformer or a VAE of diffusers: in place, into this
    one object, and without a change of its weights, their names or its classes.

    Args:
        obj: a pipeline, or a model that `supported()` lists; one under `torch.compile` too.
        only: names of ops, or of groups of them ("transformer", "vae"), to put in; None: all.
        mode: "exact": ops that move data, or change the order of doing things, give the same bits
            in fp32, and all others stay within the project's rule of numerics; "fast" also takes
            ways whose bits differ, all of them within that rule.
        strict: raise if `obj`, or anything of diffusers in it, is not supported; else leave it as
            it is, and say so in the report.
        backend: of every op: "auto", "kernel" or "reference".

    Returns:
        A report to print; its counts go on with every call. Patching again with the same options
        changes nothing, and with others replaces what was there.

    Raises:
        UnsupportedModelError: as `strict` says; nothing has been changed.
        ValueError: an unknown name in `only`, `mode` or `backend`.
    """
    _checks.choice("patch", "mode", mode, MODES)
    _checks.choice("patch", "backend", backend, _backend.BACKENDS)
    models, skipped = _models(obj)
    if strict and skipped:
        raise _unsupported("patch", skipped, "; strict=False leaves it as it is")
    wanted = {name: _wanted(model.family, only) for name, model in models.items()}
    _check_only(only, models)
    plans = {
        name: _Plan(model, wanted[name], mode, backend)
        for name, model in models.items()
        if wanted[name]
    }
    refused = {
        path(name, of): reason
        for name, plan in plans.items()
        for of, reason in plan.patch.refused.items()
    }
    if strict and refused:
        raise UnsupportedModelError(f"patch: {_listed(refused)}. strict=False leaves it as it is")
    for name, plan in plans.items():
        if _options(models[name].module) != plan.patch.options:
            plan.carry_out()
    return _report(obj, models, skipped)


def unpatch(obj: Any) -> None:
    """Takes out what `patch` put in: every forward is again the one it was. Hooks that have come in
    between stay. Nothing happens to what is not patched.

    A model that several pipelines share is one model: it is unpatched for all of them. Raises
    UnsupportedModelError for an object in which `patch` knows no model.
    """
    models, skipped = _models(obj)
    if not models:
        raise _unsupported("unpatch", skipped)
    for model in models.values():
        _undo(model)


@contextmanager
def patched(obj: Any, *args: Any, **options: Any) -> Iterator[Report]:
    """`patch` for the length of a `with`; after it, whatever happens in it, things are as before,
    patched in another way or not at all."""
    models, _ = _models(obj)
    before = {name: _options(model.module) for name, model in models.items()}
    try:
        yield patch(obj, *args, **options)
    finally:
        for name, model in models.items():
            ops = before[name]
            if _options(model.module) != ops:
                _undo(model)
                if ops is not None:
                    _Plan(model, *ops).carry_out()


def explain(obj: Any) -> Report:
    """The report of `patch`: what is patched in `obj`, how often the kernel, the reference and the
    model's own forward have run for each op, and why."""
    return _report(obj, *_models(obj))


@dataclass(frozen=True)
class Support:
    """One op in one model that `patch` knows."""

    model: str
    op: str
    does: str
    bits: bool  # the same ones in mode "exact" in fp32

    def __str__(self) -> str:
        same = "the same bits" if self.bits else "within the rule"
        return f"{self.model:<30} {self.op:<10} {same:<16} {self.does}"


class SupportTable(tuple[Support, ...]):
    """What `patch` knows; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def supported() -> SupportTable:
    """Every model that `patch` knows, with its ops."""
    return SupportTable(
        Support(model, op, does, op in family.exact)
        for family in FAMILIES
        for model in family.models
        for op, does in family.ops.items()
    )


# --- finding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model of diffusers, and what is known of its like."""

    module: Any
    family: Family


class _Plan:
    """What is to be done to a model; nothing has been done."""

    def __init__(self, model: Model, ops: tuple[str, ...], mode: str, backend: str) -> None:
        self.model = model
        self.patch = Patch(type(model.module).__name__, ops, mode, backend)
        self.sites: list[tuple[nn.Module, ModulePatch, Site]] = []
        for name, module in model.module.named_modules():
            kind = model.family.module_patch(module)
            if kind is None or not set(kind.places) & set(ops):
                continue
            reason = kind.refuses(module)
            if reason:
                self.patch.refused[name] = reason
                continue
            places = kind.places_of(name, module, ops)
            self.sites.append((module, kind, Site(self.patch, name, places)))

    def carry_out(self) -> None:
        _undo(self.model)
        self.patch.sites = [site for *_, site in self.sites]
        self.model.module.__dict__["_cogvx_patch"] = self.patch
        for module, kind, site in self.sites:
            module.__dict__["_cogvx"] = site
            forward_swap.replace(module, kind.forward)
        self.model.family.prepare(self.model.module, self.patch)


def _undo(model: Model) -> None:
    if model.module.__dict__.pop("_cogvx_patch", None) is None:
        return
    model.family.undo(model.module)
    for module in model.module.modules():
        if module.__dict__.pop("_cogvx", None) is not None:
            forward_swap.restore(module)


def _models(obj: Any) -> tuple[dict[str, Model], dict[str, str]]:
    """The models in `obj` that are known, by name, and why the rest of diffusers in it is not; of
    an object in which nothing is known, why."""
    obj = _unwrapped(obj)
    components = getattr(obj, "components", None)
    parts = {}
    if isinstance(obj, nn.Module):
        parts = {"": obj}
    elif isinstance(components, Mapping):
        parts = {n: _unwrapped(x) for n, x in components.items() if isinstance(x, nn.Module)}
    models = {}
    skipped = {}
    for name, part in parts.items():
        model = model_of(part)
        if model:
            models[name] = model
        elif not name or type(part).__module__.startswith("diffusers."):
            skipped[name or "obj"] = f"{type(part).__name__} is not supported"
    if not models and not skipped:
        skipped = {"obj": f"{_named(obj)} has no model of diffusers in it"}
    return models, skipped


def _named(obj: Any) -> str:
    """An object, for a message: a class is often given where one of its instances is meant."""
    return f"the class {obj.__name__}" if isinstance(obj, type) else f"{type(obj).__name__}"


def _unsupported(where: str, skipped: Mapping[str, str], hint: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {_listed(skipped)}. Supported: {_names()}{hint}")


def _unwrapped(obj: Any) -> Any:
    """Beneath `torch.compile`."""
    compiled = isinstance(obj, nn.Module) and "_orig_mod" in obj._modules
    return obj._modules["_orig_mod"] if compiled else obj


def model_of(obj: Any) -> Model | None:
    """A model that is known, under `torch.compile` too; None for all else."""
    module = _unwrapped(obj)
    names = {b.__name__ for b in type(module).__mro__ if b.__module__.startswith("diffusers.")}
    family = next((family for family in FAMILIES if names & set(family.models)), None)
    return Model(module, family) if family else None


def _wanted(family: Family, only: Sequence[str] | None) -> tuple[str, ...]:
    if only is None:
        return tuple(family.ops)
    return tuple(op for op in family.ops if op in only or family.group in only)


def _check_only(only: Sequence[str] | None, models: Mapping[str, Model]) -> None:
    if only is None:
        return
    if isinstance(only, str):
        raise ValueError(f'patch: only must be a list of names, such as ["{only}"]; got "{only}"')
    families = [model.family for model in models.values()] or FAMILIES
    known = {name for family in families for name in (family.group, *family.ops)}
    unknown = sorted(set(only) - known)
    if unknown or not only:
        raise ValueError(
            f"patch: only must name some of {', '.join(sorted(known))}; "
            f"got {', '.join(unknown) or 'none'}"
        )


def _options(module: Any) -> tuple[tuple[str, ...], str, str] | None:
    patch = module.__dict__.get("_cogvx_patch")
    return patch.options if patch else None


def _report(obj: Any, models: Mapping[str, Model], skipped: Mapping[str, str]) -> Report:
    patches = {
        name: model.module._cogvx_patch
        for name, model in models.items()
        if _options(model.module) is not None
    }
    return Report(_named(_unwrapped(obj)), patches, skipped)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _names() -> str:
    return ", ".join(sorted({model for family in FAMILIES for model in family.models}))
